"""Pictures, settings, small models and helpers that several test files share."""

import json
import os
import random
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # no test downloads anything
os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that tests start: one thread gives the same bits

import numpy as np
import pytest
import torch
from helpers.budgets import DROPPING
from PIL import Image
from rich.console import Console
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from snello import finetuning
from snello.config import AlastConfig, AugmentConfig, FinetuneConfig, SplitConfig
from snello.files import load_tensors
from snello.runs.folder import RunFolder

torch.set_num_threads(1)

pytest_plugins = ["helpers.clients"]  # its fixtures; and pytest says what is wrong in its asserts

QUIET = Console(quiet=True)
TIMES = ("seconds", "train_time_s", "client_seconds", "server_seconds")


def finetune(config: FinetuneConfig, console: Console | None = None, *, report: bool = False) -> dict[str, Any]:
    """The summary of a run, as summary.json holds it; a report only where it is asked for: that takes longer."""
    return finetuning.finetune(replace(config, report=report), console).to_dict()


@pytest.fixture(autouse=True)
def no_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of the command line in this process draw no report, but for tests that are marked `report`.

    Beside gRPC, which is here, that would take a new process each time, and its seconds to import torch.
    """
    if request.node.get_closest_marker("report") is None:
        monkeypatch.setattr(finetuning, "report_after", lambda run, console: None)
        monkeypatch.setattr("snello.explain.report.report_after", lambda run, console: None)


def write_pictures(folder: Path, counts: dict[str, int], seed: int = 0, size: int = 16) -> Path:
    """Noisy pictures, in one folder per class; each class has a colour of its own."""
    rng = np.random.default_rng(seed)
    for channel, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            values = rng.integers(0, 90, (size, size, 3), dtype=np.uint8)
            values[..., channel % 3] += 150
            Image.fromarray(values).save(folder / name / f"{i:03}.png")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 pictures to train (7 micro-batches of 4, the last of 2) and 9 held out, in 3 classes."""
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder / "train", {"blue": 9, "green": 9, "red": 8})
    write_pictures(folder / "val", {"blue": 3, "green": 3, "red": 3}, seed=1)
    return folder


def small_config(pictures: Path) -> FinetuneConfig:
    """A run of two epochs that takes less than a second: timm's test ViT (6 blocks, 9 patches)."""
    return FinetuneConfig(
        data=pictures,
        model="test_vit",
        weights="none",
        image_size=48,
        method="full",
        epochs=2,
        batch_size=4,
        workers=0,
        device="cpu",
        precision="fp32",
        attention="explicit",
        checkpoint_steps=0,
        compare=False,
    )


@pytest.fixture
def small(pictures: Path, tmp_path: Path) -> FinetuneConfig:
    """`small_config` with a folder of its own."""
    return replace(small_config(pictures), out=tmp_path / "run")


def with_method(config: FinetuneConfig, /, method: str = "full", **settings: Any) -> FinetuneConfig:
    """The same run with another method; ALaST by DROPPING, with budgets that move visibly for so small changes."""
    adaptive = {"alast": AlastConfig(**DROPPING, alpha=5.0)} if "alast" in method else {}
    return replace(config, method=method, **adaptive | settings)


def flags(config: FinetuneConfig) -> list[str]:
    """The flags that describe what `config` sets apart from the defaults."""
    groups = (("", config, FinetuneConfig()), ("alast.", config.alast, AlastConfig()))
    groups += (("augment.", config.augment, AugmentConfig()), ("split.", config.split, SplitConfig()))
    return [flag for prefix, values, default in groups for flag in _flags(values, default, prefix)]


def _flags(config: Any, default: Any, prefix: str) -> list[str]:
    result = []
    for name, value in vars(config).items():
        if is_dataclass(value) or value == getattr(default, name):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            result.append(f"--{prefix}{flag}" if value else f"--{prefix}no-{flag}")
        else:
            result += [f"--{prefix}{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return result


def rows_of(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without the only things in them that may differ from run to run."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in RunFolder(run).rows(kind)]


def assert_same_run(one: Path, other: Path) -> None:
    """Both run folders hold the same result: metrics, weights, optimizer and state, bit for bit."""
    assert rows_of(one) == rows_of(other)
    names = [name for name in ("model.safetensors", "last.safetensors", "codec.safetensors") if (other / name).exists()]
    for name in names:
        (ours, our_state), (theirs, their_state) = (load_tensors(run / name) for run in (one, other))
        assert ours.keys() == theirs.keys() and our_state == their_state, name
        for key, value in ours.items():
            assert value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]), f"{key} of {name} differs"
    alast = [(run / "alast.json").read_text() if (run / "alast.json").exists() else "" for run in (one, other)]
    assert alast[0] == alast[1]
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, other)]
    one_summary, other_summary = ({k: v for k, v in s.items() if k not in TIMES} for s in summaries)
    assert one_summary == other_summary
    assert not list(one.glob(".*")) and not list(other.glob(".*"))


def resumed(config: FinetuneConfig) -> FinetuneConfig:
    """The same run, to be gone on with."""
    return replace(config, resume=True)


def run_python(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, to its end."""
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )


def tiny_vit(cls: type = VisionTransformer, seed: int = 0, **kwargs: Any) -> VisionTransformer:
    """A ViT of 4 blocks on 16 x 16 pictures (16 patches), with weights large enough that attention is not uniform."""
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: VisionTransformer = cls(**{**shape, **kwargs})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def tiny_deit(**kwargs: Any) -> VisionTransformer:
    """The same with a distillation token."""
    return tiny_vit(VisionTransformerDistilled, **kwargs)


def free_port() -> int:
    """A port that nobody listens on, of those that the system does not hand out itself (to other tests, say)."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
