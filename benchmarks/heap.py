#!/usr/bin/env python3
"""What a process holds beyond what a step counts: holes in the C library's heap, and the kernels that oneDNN keeps.

    python benchmarks/heap.py --out results/heap.json

Each row is a process of its own; their steps are taken in turn. Budgets are drawn anew in every step, the same in all
rows, because in a run they move: every number of tokens is another size of block, and in bf16 another kernel.
`heap` gives large freed blocks back to the system at once, `kernels` limits how many kernels are kept.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

LIMITS = {"none": (), "heap": ("heap",), "kernels": ("kernels",), "both": ("heap", "kernels")}
LOW, HIGH = 0.5, 1.0  # of the budgets


def child(request: dict[str, Any]) -> None:
    """Takes a step for every line on standard input; answers with its seconds and the memory held so far."""
    kept = request["kernels"] if "kernels" in LIMITS[request["limit"]] else 1024  # which it is without us
    os.environ.update({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(kept), "LRU_CACHE_CAPACITY": str(kept)})
    import numpy as np
    import torch

    from snello.config import AlastConfig, FinetuneConfig
    from snello.devices import return_large_blocks
    from snello.profiling import TrainingStep, peak_memory, resident_memory

    torch.set_num_threads(request["threads"])
    device, rng = torch.device("cpu"), np.random.default_rng(0)
    if "heap" in LIMITS[request["limit"]]:
        return_large_blocks()
    config = FinetuneConfig(
        model=request["model"],
        method=request["method"],
        batch_size=request["batch_size"],
        alast=AlastConfig(min_budget=LOW, rule=request["rule"]),
    )
    before = resident_memory(device)
    step = TrainingStep(
        config, num_classes=100, batch_size=config.batch_size, device=device,
        precision=request["precision"], attention=request["attention"],
    )  # fmt: skip
    alast = getattr(step.method, "_inner", step.method)
    for _ in sys.stdin:
        if "alast" in config.method:
            alast.load_state_dict(alast.state_dict() | {"budgets": rng.uniform(LOW, HIGH, step.vit.depth).tolist()})
        cpu = time.process_time()
        seconds = step.run()
        held = {"cpu_s": time.process_time() - cpu, "peak_bytes": peak_memory(device) - before}
        print(json.dumps({"seconds": seconds, "held_bytes": resident_memory(device) - before} | held), flush=True)


def measure(requests: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """One process per request; their steps are taken in turn."""
    command = [sys.executable, __file__, "--child"]
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen([*command, json.dumps(request)], stdin=pipe, stdout=pipe, text=True) for request in requests
    ]
    seen: list[list[dict[str, Any]]] = [[] for _ in processes]
    for _ in range(steps):
        for process, rows in zip(processes, seen, strict=True):
            assert process.stdin and process.stdout
            process.stdin.write("\n")
            process.stdin.flush()
            rows.append(json.loads(process.stdout.readline()))
    for process in processes:
        process.communicate()
    late = [rows[2:] for rows in seen]  # after what is made once
    return [
        request
        | {
            "step_time_s": statistics.median(row["seconds"] for row in rows),
            "cpu_time_s": statistics.median(row["cpu_s"] for row in rows),
            "step_time_of_none": statistics.median(
                row["seconds"] / other["seconds"] for row, other in zip(rows, late[0], strict=True)
            ),
            "cpu_time_of_none": statistics.median(
                row["cpu_s"] / other["cpu_s"] for row, other in zip(rows, late[0], strict=True)
            ),
            "held_bytes": rows[-1]["held_bytes"],
            "peak_bytes": rows[-1]["peak_bytes"],
        }
        for request, rows in zip(requests, late, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--methods", default="full,alast,lora,alast+lora")
    parser.add_argument("--rule", default="drop")
    parser.add_argument("--precisions", default="bf16,fp32")
    parser.add_argument("--limits", default=",".join(LIMITS))
    parser.add_argument("--kernels", type=int, default=64, help="how many are kept where they are limited")
    parser.add_argument("--attention", default="explicit")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child)
    import torch  # which has to come after the child's settings
    from environment import environment

    wanted = {key: value for key, value in vars(args).items() if key not in ("out", "child")}
    common = {key: wanted[key] for key in ("model", "batch_size", "rule", "kernels", "attention", "threads")}
    head, rows = {"config": wanted, "environment": environment(torch.device("cpu"))}, list[dict[str, Any]]()
    for method, precision in product(args.methods.split(","), args.precisions.split(",")):
        requests = [
            common | {"method": method, "precision": precision, "limit": limit} for limit in args.limits.split(",")
        ]
        for row in measure(requests, args.steps):
            rows.append(row)
            print({key: row[key] for key in row if key not in common}, flush=True)
        if args.out:
            args.out.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
