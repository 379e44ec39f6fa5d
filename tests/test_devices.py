"""How many kernels the process keeps; what else is in devices is tested where it is used."""

import json
import os
import subprocess
import sys

import pytest
import torch

from snello.devices import _bf16_is_native

# Products of 1 500 sizes; says what the process has grown by, once what every process has is there.
PROGRAM = """
import json, os, sys
if sys.argv[1] == "limited":
    from snello.environment import set_environment
    set_environment()
import torch
from torch.nn.functional import linear
from snello.measure.step import resident_memory
cpu = torch.device("cpu")
if sys.argv[1] != "limited":
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ[name] = "1024"
torch.set_num_threads(1)
weight = torch.randn(32, 32, dtype=torch.bfloat16)
linear(torch.randn(8, 32, dtype=torch.bfloat16), weight)
before = resident_memory(cpu)
for rows in range(16, 1516):
    linear(torch.randn(rows, 32, dtype=torch.bfloat16), weight)
print(json.dumps(resident_memory(cpu) - before))
"""


def grown(*args: str, **environment: str) -> int:
    run = [sys.executable, "-c", PROGRAM, *args]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=os.environ | environment)
    return int(json.loads(done.stdout))


@pytest.mark.skipif(
    sys.platform != "linux" or not _bf16_is_native(torch.device("cpu")), reason="needs oneDNN's products in bf16"
)
@pytest.mark.slow
def test_kernels_for_ever_new_sizes_do_not_fill_the_memory(monkeypatch):
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    unlimited = grown("unlimited")
    if unlimited < 20 * 2**20:
        pytest.skip(f"oneDNN keeps only {unlimited} bytes here")
    assert grown("limited") < 0.6 * unlimited
