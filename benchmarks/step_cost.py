#!/usr/bin/env python3
"""The cost of one step of ALaST, LoRA and both against one step of full fine-tuning, each in a process of its own.

    python benchmarks/step_cost.py --out results/step_cost.json

Every round takes one step of each variant on the same batch, so that whatever else the machine does weighs on all
alike; times are medians over the rounds, counts averages over draws. All variants use the attention path that is
faster for full fine-tuning here. Nothing is discarded but the warm-up. Beside the clock stand the CPU seconds that the
process spent in a step, which other processes disturb less. In one process, a large step after a small one would pay
for memory given back in between, and variants would take each other's kernels.
"""

import argparse
import json
import statistics
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from environment import environment

from snello.config import AlastConfig, FinetuneConfig
from snello.devices import resolve_device
from snello.measure.process import Process, make_request
from snello.measure.step import TrainingStep
from snello.vit import AttentionPath
from snello.vit.attention import faster_attention


@dataclass(frozen=True)
class Variant:
    """A row of the table, with the least ratios over `full` it is meant to reach (FLOPs, saved bytes, time)."""

    name: str
    method: str = "alast"
    alast: AlastConfig = field(default_factory=AlastConfig)
    exact_savings: bool = True
    target: tuple[float, float, float] | None = None


PUBLISHED = AlastConfig().published()
MID = replace(PUBLISHED, drop_at="mid", draw="proportional")
LOWEST = replace(MID, draw="lowest-first", train_embeddings=False)
VARIANTS = (
    Variant("full", method="full", exact_savings=False),
    Variant("full, exact savings", method="full"),
    Variant("ALaST (the default)", target=(1.0, 4.0, 2.6)),
    Variant("ALaST (the default), no exact savings", exact_savings=False),
    Variant("ALaST, pairs merged, 0.38 of the FLOPs", alast=AlastConfig(rule="merge", flops=0.38, token_multiple=1)),
    Variant("published", alast=PUBLISHED),
    Variant("published, no exact savings", alast=PUBLISHED, exact_savings=False, target=(1.85, 1.7, 1.75)),
    Variant("mid", alast=MID, target=(1.95, 1.8, 1.9)),
    Variant("mid, lowest-first, embeddings frozen", alast=LOWEST, target=(2.5, 2.75, 2.4)),
    Variant("LoRA", method="lora"),
    Variant("ALaST + LoRA", method="alast+lora", target=(1.0, 1.0, 2.2)),
    Variant(
        "attached, nothing dropped or frozen",
        alast=replace(PUBLISHED, blocks=None, start_budget=1.0),
        exact_savings=False,
    ),
)


def measure(args: argparse.Namespace, precision: Any) -> list[dict[str, Any]]:
    """One row per variant."""
    device = resolve_device(args.device)
    common = {"num_classes": args.classes, "batch_size": args.batch_size, "device": device, "precision": precision}
    config = FinetuneConfig(model=args.model, weights="none", method="full")
    attention = faster_attention(
        TrainingStep(config, attention="fused", **common).vit, args.batch_size, device, precision
    )
    variants = [v for v in VARIANTS if v.name == "full" or args.only in v.name]
    steps, costs = _measure(args, [request(args, variant, precision, attention) for variant in variants])
    rows: list[dict[str, Any]] = []
    for variant, taken, counted in zip(variants, steps, costs, strict=True):
        seconds, cpu_seconds = ([step[key] for step in taken[args.warmup :]] for key in ("seconds", "cpu_seconds"))
        row = {"variant": variant.name, "precision": precision, "attention": attention}
        row |= {"alast": asdict(variant.alast) if "alast" in variant.method else None}
        row |= {
            "step_time_s": statistics.median(seconds),
            "step_times_s": seconds,
            "cpu_times_s": cpu_seconds,
            **counted,
        }
        row["ratios"] = ratios(rows[0] if rows else row, row)
        lora = next((other for other in rows if other["variant"] == "LoRA"), None)
        if variant.method == "alast+lora" and lora is not None:
            row["ratios_of_lora"] = ratios(lora, row)
        row["target"] = variant.target
        rows.append(row)
        print_row(row)
    return rows


def request(args: argparse.Namespace, variant: Variant, precision: Any, attention: AttentionPath) -> dict[str, Any]:
    """What the process of a variant is told."""
    config = FinetuneConfig(
        model=args.model,
        weights="none",
        method=variant.method,
        alast=variant.alast,
        exact_savings=variant.exact_savings,
        batch_size=args.batch_size,
    )
    device = str(resolve_device(args.device))
    return make_request(config, num_classes=args.classes, device=device, precision=precision, attention=attention)


def _measure(args: argparse.Namespace, requests: list[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    """The steps of each process, taken in turn, and its counts."""
    with ExitStack() as stack:
        processes = [stack.enter_context(Process(one)) for one in requests]
        rounds = [[process.ask("step") for process in processes] for _ in range(args.warmup + args.rounds)]
        return list(zip(*rounds, strict=True)), [process.ask("costs") for process in processes]


def ratios(other: dict[str, Any], row: dict[str, Any]) -> dict[str, float]:
    """How much more `other` costs; times are medians of the ratios of steps taken in turn."""

    def median(key: str) -> float:
        return statistics.median(a / b for a, b in zip(other[key], row[key], strict=True))

    return {
        "flops": other["flops_per_sample"] / row["flops_per_sample"],
        "saved_bytes": other["saved_bytes_per_sample"] / row["saved_bytes_per_sample"],
        "step_time": median("step_times_s"),
        "cpu_time": median("cpu_times_s"),
    }


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    r, of_lora = row["ratios"], row.get("ratios_of_lora")
    target = "  target {:.2f} {:.2f} {:.2f}".format(*row["target"]) if row["target"] else ""
    print(
        f"{row['precision']} {row['attention']:8} {row['variant']:38} FLOPs {r['flops']:.2f}x  "
        f"saved bytes {r['saved_bytes']:.2f}x  time {r['step_time']:.2f}x ({row['step_time_s']:.3f} s)  "
        f"CPU time {r['cpu_time']:.2f}x{target}",
        flush=True,
    )
    if of_lora:
        print(f"      LoRA over it: {', '.join(f'{name} {value:.2f}x' for name, value in of_lora.items())}", flush=True)


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
