#!/usr/bin/env python3
"""A step of transformers' DeiT-S beside one of timm's, in turn, in one process.

    python benchmarks/families.py --out results/families.json

The same shape and the same attention path. CPU seconds of the process stand beside the clock, as in step_cost.py.
transformers projects queries, keys and values by three layers where timm has one: what that costs is timed too.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from environment import environment
from torch import nn

from snello.config import FinetuneConfig
from snello.devices import autocast
from snello.environment import set_environment
from snello.measure.step import TrainingStep

SHAPE = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
CPU = torch.device("cpu")


def save_config(folder: Path) -> str:
    """A folder with the config of a transformers ViT of DeiT-S's shape."""
    from transformers import ViTConfig

    ViTConfig(**SHAPE, image_size=224, patch_size=16).save_pretrained(folder)
    return str(folder)


def measure(model: str, method: str, precision: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Steps of timm's and of transformers' in turn."""
    steps = [
        TrainingStep(
            FinetuneConfig(model=name, weights="none", method=method, seed=1),
            num_classes=100,
            batch_size=args.batch_size,
            device=CPU,
            precision=precision,
            attention=args.attention,
        )
        for name in ("deit_small_patch16_224", model)
    ]
    wall: list[list[float]] = [[], []]
    cpu: list[list[float]] = [[], []]
    for number in range(args.warmup + args.rounds):
        for one in (0, 1) if number % 2 else (1, 0):  # neither always comes after the other
            before = time.process_time()
            seconds = steps[one].run()
            if number >= args.warmup:
                wall[one].append(seconds)
                cpu[one].append(time.process_time() - before)
    return {
        "method": method,
        "precision": precision,
        "timm_s": statistics.median(wall[0]),
        "transformers_s": statistics.median(wall[1]),
        "step_time_ratio": statistics.median(b / a for a, b in zip(*wall, strict=True)),
        "cpu_time_ratio": statistics.median(b / a for a, b in zip(*cpu, strict=True)),
        "step_times_s": wall,
        "cpu_times_s": cpu,
    }


def projections(precision: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Forward and backward of queries, keys and values of one block: one layer against three."""
    width = SHAPE["hidden_size"]
    x = torch.randn(args.batch_size, 197, width, requires_grad=True)
    layers = [nn.ModuleList([nn.Linear(width, 3 * width)]), nn.ModuleList(nn.Linear(width, width) for _ in range(3))]
    times: list[list[float]] = [[], []]
    for _ in range(4 * args.rounds):
        for one, parts in enumerate(layers):
            before = time.process_time()
            with autocast(CPU, precision):
                outputs = [part(x) for part in parts]
            torch.autograd.backward([y.float().sum() for y in outputs])
            times[one].append(time.process_time() - before)
    one, three = (statistics.median(seconds[args.warmup :]) for seconds in times)
    return {"precision": precision, "fused_s": one, "separate_s": three, "ratio": three / one}


def main() -> None:
    set_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--attention", default="explicit")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, parts = [], []
    with tempfile.TemporaryDirectory() as folder:
        model = save_config(Path(folder))
        for precision in args.precisions.split(","):
            parts.append(projections(precision, args))
            print(parts[-1], flush=True)
            for method in ("full", "alast"):
                rows.append(measure(model, method, precision, args))
                print({key: value for key, value in rows[-1].items() if not key.endswith("times_s")}, flush=True)
    config = {key: value for key, value in vars(args).items() if key != "out"}
    result = {"config": config, "environment": environment(CPU), "rows": rows, "projections": parts}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
