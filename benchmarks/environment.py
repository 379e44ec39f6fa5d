"""What every results file says of where it was made."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from snello.runs.resolved import versions


def environment(device: torch.device) -> dict[str, Any]:
    """Device, threads, versions and commit, as JSON values."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":/src", ":/benchmarks")),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names)} cores"


def _git(*args: str) -> str:
    folder = Path(__file__).parent
    return subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=False).stdout.strip()
