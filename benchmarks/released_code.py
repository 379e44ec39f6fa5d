#!/usr/bin/env python3
"""A training step of snello's published setting against one of the authors' released code, run unchanged.

    git clone https://github.com/Federico-Alvetreti/Split-Learning_ADC
    python benchmarks/released_code.py Split-Learning_ADC --out results/released_code.json

The repository is that of two of ALaST's authors, for later work that is compared with it: its file `methods/alast.py`
is imported from the checkout as it stands and wraps timm's model, with 9 of 12 blocks and budgets held at 0.9, without
the compression and the channel that it can put between the blocks. Batch, loop, autocast and optimizer (fused AdamW
over all parameters) are those of `snello.measure.step` for all, so that only the forward and the draw differ. Each
variant has a process of its own and the steps are taken in turn, with CPU seconds beside the clock; ratios are medians
over the rounds. `full` is plain fine-tuning, without snello's exact savings; it and snello compute attention the way
that is faster for it here, the released code always explicitly. It keeps a share of all tokens where snello keeps a
share of the patch tokens, so every block passes on one or two more: FLOPs and saved bytes show what that makes.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from environment import environment
from step_cost import ratios
from torch import nn

from snello.config import AlastConfig, FinetuneConfig
from snello.config.values import from_dict
from snello.environment import set_environment
from snello.measure.process import Process, make_request
from snello.measure.step import DRAWS, TrainingStep, saved_bytes, storages_of
from snello.vit.attention import faster_attention

CPU = torch.device("cpu")
FILE = Path("methods", "alast.py")
PUBLISHED = AlastConfig().published()
BLOCKS = 9
FLOP_DRAWS = 24  # a draw changes them by 1.5 percent
SNELLO, RELEASED = "snello", "released"
TEXT = "FLOPs {flops:.3f}x  saved bytes {saved_bytes:.3f}x  time {step_time:.3f}x  CPU time {cpu_time:.3f}x"


class Released:
    """A process of this file that takes steps of the released code, asked as `snello.measure.process.Process` is."""

    def __init__(self, checkout: Path, request: dict[str, Any]) -> None:
        command, pipe = [sys.executable, __file__, str(checkout), "--serve"], subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.ask(json.dumps(request))

    def ask(self, line: str) -> dict[str, Any]:
        """Sends a line, returns the JSON answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def __enter__(self) -> "Released":
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:  # closes its pipes and waits for it
            self._process.kill()


def training_step(request: dict[str, Any]) -> TrainingStep:
    """The step of a request, in this process."""
    own = {name: request[name] for name in ("num_classes", "batch_size", "precision", "attention")}
    return TrainingStep(from_dict(FinetuneConfig, request["config"]), device=CPU, **own)


def released_step(checkout: Path, request: dict[str, Any]) -> TrainingStep:
    """Full fine-tuning's step, with the released code around its model: that freezes and drops in its own forward."""
    step = training_step(request)
    nothing = {part: nn.Identity() for part in ("encoder", "channel", "decoder")}
    step.model = load(checkout / FILE).model(step.model, **nothing, split_index=step.vit.depth // 2, k=BLOCKS, alfa=0.0)
    step.set_attention("explicit")  # its only path, for whoever asks the blocks
    step.model.train()
    return step


def count(checkout: Path, name: str, request: dict[str, Any]) -> dict[str, float]:
    """FLOPs, which no batch size changes, and saved bytes, both per picture and averaged over draws."""
    step = released_step(checkout, request) if name == RELEASED else training_step(request)
    saved = []
    for _ in range(DRAWS):
        step.begin()
        saved.append(saved_bytes(step.loss, storages_of(step.model.parameters())))
    step.set_batch_size(1)
    flops = step.costs(FLOP_DRAWS).flops_per_sample
    return {"flops_per_sample": flops, "saved_bytes_per_sample": statistics.mean(saved) / request["batch_size"]}


def load(file: Path) -> ModuleType:
    """The module in `file`, which is on no path."""
    spec = importlib.util.spec_from_file_location("released_alast", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def serve(checkout: Path) -> None:
    """Reads one request, then takes a step for each line, and answers each with JSON."""
    set_environment()
    request = json.loads(sys.stdin.readline())
    torch.set_num_threads(request["threads"])
    step = released_step(checkout, request)
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        cpu = time.process_time()
        print(json.dumps({"seconds": step.run(), "cpu_seconds": time.process_time() - cpu}), flush=True)


def measure(args: argparse.Namespace, precision: Any) -> list[dict[str, Any]]:
    """One row per variant."""
    full = FinetuneConfig(
        model=args.model, weights="none", method="full", batch_size=args.batch_size, exact_savings=False
    )
    common: dict[str, Any] = {"num_classes": args.classes, "precision": precision}
    vit = TrainingStep(full, batch_size=args.batch_size, device=CPU, attention="fused", **common).vit
    path = faster_attention(vit, args.batch_size, CPU, precision)
    plain = replace(full, method="alast", alast=PUBLISHED)
    own = {SNELLO: replace(plain, exact_savings=True), "snello, no exact savings": plain}
    configs = {"full": full, **own, RELEASED: full}  # what wraps the model of full fine-tuning
    requests = {name: make_request(one, device="cpu", attention=path, **common) for name, one in configs.items()}
    with ExitStack() as stack:
        processes: list[Process | Released] = []
        for name, request in requests.items():
            process = Released(args.checkout, request) if name == RELEASED else Process(request)
            processes.append(stack.enter_context(process))
        steps = []
        for number in range(args.warmup + args.rounds):
            order = processes if number % 2 else processes[::-1]  # neither always comes after the other
            taken = {id(process): process.ask("step") for process in order}
            steps.append([taken[id(process)] for process in processes])
    counts = [count(args.checkout, name, one) for name, one in requests.items()]
    rows: list[dict[str, Any]] = []
    for name, own_steps, counted in zip(configs, zip(*steps[args.warmup :], strict=True), counts, strict=True):
        seconds, cpu_seconds = ([step[key] for step in own_steps] for key in ("seconds", "cpu_seconds"))
        row = {"variant": name, "precision": precision, "attention": "explicit" if name == RELEASED else path}
        row |= {"step_time_s": statistics.median(seconds), "cpu_time_s": statistics.median(cpu_seconds)}
        row |= {"step_times_s": seconds, "cpu_times_s": cpu_seconds}
        row |= {key: counted[key] for key in ("flops_per_sample", "saved_bytes_per_sample")}
        row["ratios"] = ratios(rows[0] if rows else row, row)
        rows.append(row)
        print_row(row)
    for row in rows[1:-1]:
        row["released_over_it"] = ratios(rows[-1], row)
        print(f"{precision} the released code costs of {row['variant']}: {TEXT.format(**row['released_over_it'])}")
    return rows


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    head = f"{row['precision']} {row['attention']:8} {row['variant']:24} {row['cpu_time_s']:.3f} CPU s  "
    print(head + TEXT.format(**row["ratios"]), flush=True)


def commit_of(checkout: Path) -> str | None:
    """The commit of their checkout; None where the folder is no git checkout of its own."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of the released code")
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--out", type=Path)
    group.add_argument("--serve", action="store_true", help="be the process that takes steps of the released code")
    args = parser.parse_args()
    if args.serve:
        serve(args.checkout)
        return
    torch.set_num_threads(args.threads)
    config = {key: value for key, value in vars(args).items() if key not in ("checkout", "out", "serve")}
    rows = [row for precision in args.precisions.split(",") for row in measure(args, precision)]
    released = {"repository": "Federico-Alvetreti/Split-Learning_ADC", "file": str(FILE)}
    released["commit"] = commit_of(args.checkout)
    result = {"config": config, "released": released, "environment": environment(CPU), "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
