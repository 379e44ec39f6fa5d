#!/usr/bin/env python3
"""What `snello finetune` prints on what ships: the first thing that a reader of README.md would see.

python benchmarks/first_run.py    # a minute or two on two cores; writes results/first_run.json
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from environment import environment

OUT = Path(__file__).resolve().parent.parent / "results" / "first_run.json"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "snello", "finetune"]
        wide = {**os.environ, "COLUMNS": "100"}
        done = subprocess.run(command, cwd=folder, env=wide, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        return done.returncode
    OUT.write_text(
        json.dumps({"environment": environment(torch.device("cpu")), "output": done.stderr}, indent=2) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
