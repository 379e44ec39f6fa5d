#!/usr/bin/env python3
"""Where the memory of a step goes, and what each switch saves: counted, beside the measured peak of the process.

    python benchmarks/memory.py --out results/memory.json

Every row is a process of its own, as in `snello plan`. `release` gives back the optimizer state of frozen blocks;
`checkpointing` computes the insides of the blocks again.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from environment import environment

from snello.config import AlastConfig, FinetuneConfig
from snello.measure.process import Process, make_request
from snello.measure.step import Memory

METHODS = ("full", "alast", "lora", "alast+lora")
STEPS = 2


def measure(config: FinetuneConfig, args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    request = make_request(
        config, num_classes=args.classes, device="cpu", precision=args.precision, attention=args.attention
    )
    with Process(request) as process:
        seconds = [process.ask("step")["seconds"] for _ in range(STEPS)]
        counted = process.ask("memory")
    peak, before = counted.pop("peak_memory_bytes"), counted.pop("process_bytes")
    total = Memory(**counted).total_bytes
    return {
        "method": config.method_name,
        "batch_size": config.batch_size,
        "optimizer_state": config.alast.optimizer_state,
        "grad_checkpointing": config.grad_checkpointing,
        **counted,
        "total_bytes": total,
        "peak_memory_bytes": peak,
        "counted_of_peak": total / peak,
        "process_bytes": before,
        "step_times_s": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch-sizes", default="16,32")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--attention", default="explicit")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = {key: value for key, value in vars(args).items() if key != "out"}
    head, rows = {"config": config, "environment": environment(torch.device("cpu"))}, list[dict[str, Any]]()
    for batch_size in map(int, args.batch_sizes.split(",")):
        for method in args.methods.split(","):
            plain = FinetuneConfig(model=args.model, method=method, batch_size=batch_size)
            variants = [plain, replace(plain, grad_checkpointing=True)]
            if "alast" in method:
                variants.insert(1, replace(plain, alast=AlastConfig(optimizer_state="release")))
            for variant in variants:
                rows.append(measure(variant, args))
                print({key: value for key, value in rows[-1].items() if key != "step_times_s"}, flush=True)
                args.out.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
