#!/usr/bin/env python3
"""What a process holds beyond what a step counts: holes in the C library's heap, and the kernels that oneDNN keeps.

    python benchmarks/heap.py --out results/heap.json

Each row is a process of its own; their steps are taken in turn. Budgets move a little in every step, the same in all
rows, as in a run: every number of tokens is another size of block, and in bf16 another kernel. `kernels` limits how
many kernels are kept, as snello does; `multiple` also rounds the number of tokens; `heap` gives large freed blocks back
to the system at once.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from snello.environment import KERNELS

LIMITS = ("none", "kernels", "multiple", "heap")
LOW, HIGH, MOVE = 0.5, 1.0, 0.01  # of the budgets, and by how much they move in a step (standard deviation)
MULTIPLE = 8  # of tokens


def child(request: dict[str, Any]) -> None:
    """Takes a step for every line on standard input; answers with its seconds and the memory held so far."""
    os.environ |= dict.fromkeys(KERNELS, "1024") if request["limit"] == "none" else KERNELS  # before torch computes
    import numpy as np
    import torch

    from snello.config import AlastConfig, FinetuneConfig
    from snello.devices import return_large_blocks
    from snello.measure.step import TrainingStep, peak_memory, resident_memory

    torch.set_num_threads(request["threads"])
    device, rng = torch.device("cpu"), np.random.default_rng(0)
    if request["limit"] == "heap":
        return_large_blocks()
    config = FinetuneConfig(
        model=request["model"],
        method=request["method"],
        batch_size=request["batch_size"],
    )
    if "alast" in config.method_name:
        multiple = MULTIPLE if request["limit"] == "multiple" else 1
        usual = AlastConfig(min_budget=LOW).published()
        config = replace(config, alast=replace(usual, drop_at="mid", rule=request["rule"], token_multiple=multiple))
    before = resident_memory(device)
    step = TrainingStep(
        config, num_classes=100, batch_size=config.batch_size, device=device,
        precision=request["precision"], attention=request["attention"],
    )  # fmt: skip
    alast = getattr(step.method, "_inner", step.method)
    for _ in sys.stdin:
        if "alast" in config.method_name:
            state = alast.state_dict()
            moved = np.clip(state["budgets"] + rng.normal(0, MOVE, step.vit.depth), LOW, HIGH)
            alast.load_state_dict(state | {"budgets": moved.tolist()})
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
    parser.add_argument("--cases", default="full/bf16,alast/bf16,alast+lora/bf16,alast/fp32")
    parser.add_argument("--rule", default="drop")
    parser.add_argument("--limits", default=",".join(LIMITS))
    parser.add_argument("--attention", default="explicit")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child)
    import torch  # which has to come after the child's settings
    from environment import environment

    wanted = {key: value for key, value in vars(args).items() if key not in ("out", "child")}
    common = {key: wanted[key] for key in ("model", "batch_size", "rule", "attention", "threads")}
    head, rows = {"config": wanted, "environment": environment(torch.device("cpu"))}, list[dict[str, Any]]()
    for method, precision in (case.split("/") for case in args.cases.split(",")):
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
