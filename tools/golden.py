"""Golden runs: what a dozen short runs compute, to the bit, so that a refactoring can show that it changed nothing.

    python tools/golden.py          writes tests/golden.json: losses, hashes of weights, bytes, of every run

tests/test_golden.py does the runs again and compares. Bits depend on the processor and on versions, which are kept too.
Make them anew only where results are meant to change, and say so in the commit.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

FILE = Path(__file__).resolve().parent.parent / "tests" / "golden.json"
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "numpy", "pillow", "peft")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
MODEL = ["--model", "test_vit", "--weights", "none", "--image-size", "48"]
MACHINE = ["--device", "cpu", "--attention", "explicit"]
SMALL = ["--epochs", "2", "--batch-size", "8", "--seed", "3", "--precision", "fp32", "--checkpoint-steps", "0"]
OLD = [  # what the default was when most of these were made
    *["--alast.blocks", "0.75", "--alast.start-budget", "0.9", "--alast.min-budget", "0.5", "--alast.rule", "drop"],
    *["--alast.adapt", "difference", "--alast.token-multiple", "1"],
]
PLAIN = ["--no-exact-savings"]
ALAST = ["--method", "alast", *PLAIN, *OLD, "--alast.alpha", "5"]
EVALUATED = ["--split.eval-codec", "int8"]  # the default when they were made
CUT = ["--method", "full", *PLAIN, *EVALUATED, "--split.cut", "2", "--split.codec"]
RUNS: dict[str, list[str]] = {
    "alast": ALAST,
    "alast-merge-flops": [*ALAST, "--alast.rule", "merge", "--alast.flops", "0.7", "--alast.blocks", "5"],
    "alast-block-end-lowest-first": [*ALAST, "--alast.drop-at", "block-end", "--alast.draw", "lowest-first"],
    "full-accumulate-decay": [
        *["--method", "full", *PLAIN, "--accumulate", "2", "--layer-decay", "0.8", "--grad-checkpointing"],
    ],
    "last-k": ["--method", "last-k", *PLAIN],
    "lora": ["--method", "lora", *PLAIN],
    "alast-lora": ["--method", "alast+lora", *PLAIN, *OLD, "--alast.alpha", "5"],
    "alast-default": ["--method", "alast", "--batch-size", "4"],
    "alast-default-flops": ["--method", "alast", "--alast.flops", "0.5", "--alast.token-multiple", "2"],
    "full-exact-savings": ["--method", "full"],
    "full-mixed": ["--method", "full", "--augment.mixup", "0.2", "--augment.cutmix", "1"],
    "cut-none": [*CUT, "none"],
    "cut-adc-int8": [*CUT, "adc(0.1)+int8", "--accumulate", "2"],
    "cut-bottlenet-u-shape": [*CUT, "bottlenet(0.2)+int4", "--split.labels", "client"],
    "cut-u-shape-int8": [*CUT, "int8", "--split.labels", "client"],
    "cut-alast-both": [*ALAST, *EVALUATED, "--split.cut", "3", "--split.codec", "adc(samples=0.6, tokens=0.5)+int4"],
    "cut-max-bytes": [*CUT, "topk(0.1)", "--split.max-bytes", "1MB", "--split.link", "10mbit/20ms"],
    "cut-pca": [*CUT, "pca(1, basis=3)"],
    "cut-frozen-replay": [*CUT, "pca(2)", "--split.client", "frozen", "--split.send-epochs", "1"],
}
"""Runs of `snello finetune` by their flags."""
SERVED: dict[str, list[str]] = {
    "serve-join": [*CUT, "adc(0.1)+int8"],
    "serve-join-u-shape-alast-client": [
        *[*ALAST, *EVALUATED, "--split.cut", "3", "--split.codec", "int8", "--split.labels", "client"],
        *["--split.alast", "client"],
    ],
}
"""Runs of `snello serve` and `snello join` by the server's flags."""


def fingerprint() -> dict[str, str]:
    """What the bits depend on."""
    capability = torch.backends.cpu.get_cpu_capability()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"processor": model, "capability": capability, "python": platform.python_version()} | {
        name: version(name) for name in PACKAGES
    }


def names() -> list[str]:
    """Of all golden runs."""
    return [*RUNS, *SERVED, "killed-and-resumed"]


def result(name: str, folder: Path) -> dict[str, Any]:
    """What the run of that name gives; it works in `folder`."""
    pictures = write_pictures(folder / "pictures")
    if name in SERVED:
        return _served(SERVED[name], folder, pictures)
    if name == "killed-and-resumed":
        return _killed(folder, pictures)
    out = folder / "run"
    run_snello(["finetune", *RUNS[name], *_common(pictures, out)], folder)
    return outcome(out)


def write_pictures(folder: Path) -> Path:
    """45 noisy pictures to train and 12 held out, in 3 classes."""
    rng = np.random.default_rng(7)
    for part, count in (("train", 15), ("val", 4)):
        for channel, name in enumerate(("blue", "green", "red")):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                values = rng.integers(0, 90, (20, 20, 3), dtype=np.uint8)
                values[..., channel] += 100
                Image.fromarray(values).save(folder / part / name / f"{i:03}.png")
    return folder


def outcome(run: Path) -> dict[str, Any]:
    """Losses of every step, accuracies, hashes of the weights, and bytes by kind, of a run folder."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    counted = {key: value for key, value in summary.items() if "bytes" in key and ("link" in key or "eval" in key)}
    return {
        "losses": [row["loss"] for row in rows if row["kind"] == "step" and "loss" in row],
        "accuracies": [row["accuracy"] for row in rows if row["kind"] == "eval"],
        "best": _hash(run / "model.safetensors", ""),
        "last": _hash(_checkpoint(run), "model."),
        "bytes": counted | {"uncompressed": summary.get("uncompressed_bytes")},
    }


def _checkpoint(run: Path) -> Path:
    last = run / "last.safetensors"
    return last if last.exists() else max((run / "checkpoints").glob("*.safetensors"))


def _hash(file: Path, prefix: str) -> str:
    made = hashlib.sha256()
    with safe_open(file, framework="pt") as opened:
        for name in sorted(opened.keys()):
            if name.startswith(prefix):
                value = opened.get_tensor(name)
                made.update(f"{name.removeprefix(prefix)} {tuple(value.shape)} {value.dtype}".encode())
                made.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return made.hexdigest()[:32]


def _common(pictures: Path, out: Path) -> list[str]:
    return [*MODEL, *MACHINE, *SMALL, "--data", str(pictures), "--out", str(out), "--workers", "0", "--no-compare"]


def run_snello(args: list[str], folder: Path) -> None:
    """One command to its end; raises where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "snello", *args], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"snello {' '.join(args)}: {done.stderr}")


def _served(flags: list[str], folder: Path, pictures: Path) -> dict[str, Any]:
    server_args = ["serve", "--insecure-loopback", "--listen", "127.0.0.1:0", *flags, *MODEL, *MACHINE, *SMALL]
    server = subprocess.Popen(
        [sys.executable, "-m", "snello", *server_args, "--out", str(folder / "server")],
        cwd=folder,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    try:
        line = next(line for line in server.stderr if "listening on" in line)
        address = line.split("listening on ")[1].split()[0]
        own = ["--data", str(pictures), "--out", str(folder / "run"), "--workers", "0", *MACHINE]
        run_snello(["join", address, *own], folder)
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=120)
    (session,) = (folder / "server" / "sessions").iterdir()
    return {"client": outcome(folder / "run"), "server": outcome(session)}


def _killed(folder: Path, pictures: Path) -> dict[str, Any]:
    """ALaST across a cut, killed after a few steps and gone on with."""
    out = folder / "run"
    args = ["finetune", *RUNS["cut-alast-both"], *_common(pictures, out)]
    args[args.index("--checkpoint-steps") + 1] = "2"
    process = subprocess.Popen(
        [sys.executable, "-m", "snello", *args], cwd=folder, env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        time.sleep(0.002)
    process.kill()
    process.wait()
    if (out / "summary.json").exists():
        raise RuntimeError("the run was over before it was killed")
    run_snello(["finetune", "--out", str(out), "--resume"], folder)
    return outcome(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="runs to make anew; default: all")
    wanted = parser.parse_args().names or names()
    made = json.loads(FILE.read_text()) if FILE.exists() else {"fingerprint": {}, "runs": {}}
    made["fingerprint"] = fingerprint()
    for name in wanted:
        folder = Path(tempfile.mkdtemp())
        try:
            made["runs"][name] = result(name, folder)
            print(name, json.dumps(made["runs"][name])[:120])
        finally:
            shutil.rmtree(folder)
    FILE.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
