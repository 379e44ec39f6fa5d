#!/usr/bin/env python3
"""The cost of one ALaST step against one step of full fine-tuning, in turn, in one process.

    python benchmarks/step_cost.py --out results/step_cost.json

Every round takes one step of each variant on the same batch, so that whatever else the machine does weighs on all
alike; times are medians over the rounds, counts averages over draws. All variants use the attention path that is
faster for full fine-tuning here. Nothing is discarded but the warm-up. A large step that comes after a small one pays
for memory given back in between: measure `--only attached` alone to see the overhead of being attached.
"""

import argparse
import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from environment import environment

from snello.config import AlastConfig, FinetuneConfig
from snello.devices import faster_attention, resolve_device
from snello.profiling import TrainingStep

DRAWS = 6


@dataclass(frozen=True)
class Variant:
    """A row of the table, with the least ratios it is meant to reach (FLOPs, saved bytes, time)."""

    name: str
    method: str = "alast"
    alast: AlastConfig = field(default_factory=AlastConfig)
    target: tuple[float, float, float] | None = None


VARIANTS = (
    Variant("full", method="full"),
    Variant("published", alast=AlastConfig(drop_at="block-end"), target=(1.85, 1.7, 1.75)),
    Variant("mid", alast=AlastConfig(drop_at="mid"), target=(1.95, 1.8, 1.9)),
    Variant(
        "mid, lowest-first, embeddings frozen",
        alast=AlastConfig(drop_at="mid", draw="lowest-first", train_embeddings=False),
        target=(2.5, 2.75, 2.4),
    ),
    Variant("attached, nothing dropped or frozen", alast=AlastConfig(blocks=12, start_budget=1.0), target=None),
)


def measure(args: argparse.Namespace, precision: Any) -> list[dict[str, Any]]:
    """One row per variant."""
    device = resolve_device(args.device)
    common = {"num_classes": args.classes, "batch_size": args.batch_size, "device": device, "precision": precision}
    config = FinetuneConfig(model=args.model, weights="none", method="full")
    attention = faster_attention(
        TrainingStep(config, attention="fused", **common).vit, args.batch_size, device, precision
    )
    variants = [v for v in VARIANTS if v.method == "full" or args.only in v.name]
    steps = [
        TrainingStep(
            FinetuneConfig(model=args.model, weights="none", method=variant.method, alast=variant.alast),
            attention=attention,
            **common,
        )
        for variant in variants
    ]
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(args.warmup + args.rounds):
        for step, seconds in zip(steps, times, strict=True):
            seconds.append(step.run())
    times = [seconds[args.warmup :] for seconds in times]
    rows = []
    for variant, step, seconds in zip(variants, steps, times, strict=True):
        costs = asdict(step.costs(1 if variant.method == "full" else DRAWS))
        row = {"variant": variant.name, "precision": precision, "attention": attention}
        row |= {"alast": asdict(variant.alast) if variant.method == "alast" else None}
        row |= {"step_time_s": statistics.median(seconds), "step_times_s": seconds, **costs}
        full = rows[0] if rows else row
        row["ratios"] = {
            "flops": full["flops_per_sample"] / row["flops_per_sample"],
            "saved_bytes": full["saved_bytes_per_sample"] / row["saved_bytes_per_sample"],
            "step_time": full["step_time_s"] / row["step_time_s"],
            "step_time_median_of_ratios": statistics.median(
                a / b for a, b in zip(full["step_times_s"], seconds, strict=True)
            ),
        }
        row["target"] = variant.target
        rows.append(row)
        print_row(row)
    return rows


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    r = row["ratios"]
    target = "  target {:.2f} {:.2f} {:.2f}".format(*row["target"]) if row["target"] else ""
    print(
        f"{row['precision']} {row['attention']:8} {row['variant']:38} FLOPs {r['flops']:.2f}x  "
        f"saved bytes {r['saved_bytes']:.2f}x  time {r['step_time']:.2f}x ({row['step_time_s']:.3f} s){target}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--only", default="", help="variants whose name contains this, and full")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = {key: value for key, value in vars(args).items() if key != "out"}
    rows = [row for precision in args.precisions.split(",") for row in measure(args, precision)]
    result = {"config": config, "environment": environment(resolve_device(args.device)), "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
