#!/usr/bin/env python3
"""The target table: every method on the micro ViT and five CIFAR-10 classes it has never seen, and on a second task.

    python get_cifar10.py cifar10 --classes automobile,cat,dog,horse,truck
    python benchmarks/target_table.py train cifar10 work/          # accuracy
    python benchmarks/target_table.py table cifar10 work/ --out results/target.json
    python benchmarks/target_table.py train fashion work2/ --task fashion      # settings unchanged
    python benchmarks/target_table.py table fashion work2/ --task fashion --out results/target_fashion.json

Accuracy is that of the last epoch on all test pictures, over seeds. Where a method has several learning rates, seed 0
runs with each, the best of them goes on with the other seeds, and the others stay in the results. Costs are measured
apart: each method in a process of its own, steps in turn, CPU seconds, budgets moving as in a run; a run's time is its
step time times its steps.
A tail of steps with all tokens counts at full cost, in memory too. Finished runs stay in the work folder: the script
goes on where it was cut off, and several may share the folder.
"""

import argparse
import json
import os
import statistics
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from environment import environment
from rich.console import Console
from target import MODEL, TASKS, Task, link_data

from snello.config import AlastConfig, FinetuneConfig
from snello.devices import resolve_device, resolve_precision
from snello.environment import set_environment
from snello.finetuning import finetune
from snello.measure.process import Process, make_request

LR, SEEDS, EPOCHS, BATCH = 1e-3, (0, 1, 2), 5, 64
WARMUP, STEPS = 2, 25
SPENT = ("step_time_s", "relative_step_time", "flops_per_sample")


@dataclass(frozen=True)
class Setting:
    """A row of the table."""

    name: str
    method: str
    epochs: int = EPOCHS
    lrs: tuple[float, ...] = (LR,)
    alast: AlastConfig = field(default_factory=AlastConfig)
    exact_savings: bool = True
    accuracy_of: str | None = None
    """The setting whose runs count for this one too, since it computes the same."""
    tasks: tuple[str, ...] = ("cifar",)


TUNED = (1e-3, 3e-3, 1e-2)
PUBLISHED = AlastConfig().published()
OLD = replace(PUBLISHED, draw="proportional", drop_at="mid")  # what the default was
DROP = replace(OLD, blocks=12)
MERGE = replace(DROP, rule="merge", flops=0.47)
PAIRS = replace(MERGE, flops=0.38)
FIXED = AlastConfig(alpha=0.0)
ALL = ("cifar", "fashion", "cifar, all")
SETTINGS = (
    Setting("full", "full", lrs=(2.5e-4, 1e-3, 2e-3), exact_savings=False, tasks=ALL),
    Setting("full, exact savings", "full", accuracy_of="full"),
    Setting("full, 3 epochs", "full", epochs=3, exact_savings=False),
    Setting("head", "head", lrs=TUNED),
    Setting("last 4 blocks", "last-k"),
    Setting("LoRA", "lora", lrs=TUNED),
    Setting("ALaST (published)", "alast", alast=PUBLISHED),
    Setting("ALaST, all blocks train", "alast", alast=DROP),
    Setting("ALaST, all blocks train, last 0.2 with all tokens", "alast", alast=replace(DROP, full_tail=0.2)),
    Setting("ALaST, all blocks train, equal time", "alast", epochs=9, alast=DROP),
    Setting("ALaST, all blocks train, merging", "alast", alast=MERGE),
    Setting("ALaST, pairs merged in all blocks", "alast", epochs=6, alast=PAIRS),
    Setting("ALaST (the default)", "alast", epochs=7, tasks=ALL),
    Setting("ALaST (the default), equal time", "alast", epochs=15, tasks=("cifar", "fashion")),
    Setting("ALaST (the default), budgets fixed", "alast", epochs=7, alast=FIXED),
    Setting("ALaST (the default), 0.27 of the FLOPs", "alast", epochs=7, alast=AlastConfig(flops=0.27)),
    Setting("the same, budgets fixed", "alast", epochs=7, alast=replace(FIXED, flops=0.27)),
    Setting("ALaST + LoRA", "alast+lora", lrs=TUNED, alast=DROP),
)


def configure(setting: Setting, data: Path | None, lr: float, seed: int) -> FinetuneConfig:
    return FinetuneConfig(
        data=data,
        model=MODEL,
        method=setting.method,
        **({"last_k": 4} if setting.method == "last-k" else {}),
        alast=setting.alast,
        exact_savings=setting.exact_savings,
        epochs=setting.epochs,
        batch_size=BATCH,
        lr=lr,
        seed=seed,
        device="cpu",
        attention="explicit",
        workers=1,
        check_pictures=False,
        eval_epochs=setting.epochs,  # only the last counts
        compare=False,
    )


def folder(setting: Setting, work: Path, lr: float, seed: int) -> Path:
    """The run folder of one training."""
    name = "".join(c if c.isalnum() or c in ".-" else "_" for c in setting.accuracy_of or setting.name)
    return work / f"{name}--{lr:g}-{setting.epochs}-{seed}"


def accuracy(setting: Setting, work: Path, lr: float, seed: int) -> float | None:
    """Of a finished run; None without one."""
    file = folder(setting, work, lr, seed) / "summary.json"
    return json.loads(file.read_text())["last_accuracy"] if file.exists() else None


def train(setting: Setting, task: Task, data: Path, work: Path, lr: float, seed: int) -> None:
    """One run, unless it is finished or under way in another process."""
    out = folder(setting, work, lr, seed)
    claim = work / f"{out.name}.claim"
    if accuracy(setting, work, lr, seed) is not None:
        return
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    try:
        config = configure(setting, link_data(data, work, task.per_class, task.classes), lr, seed)
        config = replace(config, out=out, resume=(out / "config.yaml").exists())
        with (work / "console.log").open("a") as log:
            summary = finetune(config, Console(file=log))
        print(f"{setting.name:30} lr {lr:g} seed {seed}: {summary.last_accuracy:.2%}", flush=True)
    finally:
        claim.unlink()


def best_lr(setting: Setting, work: Path) -> float | None:
    """The learning rate with the best seed 0; None while one of them is missing."""
    found = [(accuracy(setting, work, lr, 0), lr) for lr in setting.lrs]
    return None if any(a is None for a, _ in found) else max(found, key=lambda pair: pair[0] or 0.0)[1]


def train_all(name: str, data: Path, work: Path, only: list[str]) -> None:
    wanted = [s for s in settings_of(name) if s.accuracy_of is None and (not only or s.name in only)]
    for setting in wanted:
        for lr in setting.lrs:
            train(setting, TASKS[name], data, work, lr, 0)
    for seed in SEEDS[1:] if name != "cifar, all" else ():
        for setting in wanted:
            lr = best_lr(setting, work)
            if lr is not None:
                train(setting, TASKS[name], data, work, lr, seed)


def settings_of(name: str) -> list[Setting]:
    """Those of a task; on any but the first the learning rate is that which was best there."""
    chosen = [setting for setting in SETTINGS if name in setting.tasks]
    return chosen if name == "cifar" else [replace(setting, lrs=(LR,)) for setting in chosen]


def kind(setting: Setting) -> str:
    """What a step of a setting depends on: settings that differ in epochs or tail alone are measured once."""
    return json.dumps([setting.method, setting.exact_savings, asdict(replace(setting.alast, full_tail=0.0))])


def costs(name: str) -> dict[str, dict[str, float]]:
    """Step time, FLOPs, saved bytes, optimizer bytes and peak memory of every kind of step."""
    device = resolve_device("cpu")
    precision = resolve_precision("auto", device)
    common = {"num_classes": TASKS[name].num_classes, "device": "cpu", "attention": "explicit", "precision": precision}
    configs = {kind(setting): configure(setting, None, LR, 0) for setting in settings_of(name)}
    seconds: dict[str, list[float]] = {one: [] for one in configs}
    with ExitStack() as stack:  # each with kernels of its own: see docs/memory.md
        processes = {
            # Budgets move as in a run, so that the peak has the kernels of every number of tokens.
            one: stack.enter_context(Process(make_request(config, **common) | {"moving": True}))
            for one, config in configs.items()
        }
        for _ in range(WARMUP + STEPS):
            for one, process in processes.items():
                seconds[one].append(process.ask("step")["cpu_seconds"])
        measured = {one: process.ask("costs") for one, process in processes.items()}
    full = seconds[kind(SETTINGS[0])][WARMUP:]
    for one, values in seconds.items():
        own = values[WARMUP:]
        measured[one]["step_time_s"] = statistics.median(own)
        # Of each round apart: what else the machine does comes and goes over the rounds.
        measured[one]["relative_step_time"] = statistics.median(a / b for a, b in zip(own, full, strict=True))
    return measured


def row(setting: Setting, work: Path, measured: dict[str, dict[str, float]]) -> dict[str, Any]:
    """A setting's row of the results."""
    lr = best_lr(setting, work) or setting.lrs[0]
    found = {seed: accuracy(setting, work, lr, seed) for seed in SEEDS}
    accuracies = [a for a in found.values() if a is not None]
    own, full = measured[kind(setting)], measured[kind(SETTINGS[0])]
    tail = setting.alast.full_tail if setting.method.startswith("alast") else 0.0
    spent = {key: (1 - tail) * own[key] + tail * full[key] for key in SPENT}
    if tail:
        spent |= {key: full[key] for key in ("saved_bytes_per_sample", "peak_memory_bytes")}
    return {
        "setting": setting.name,
        "method": setting.method,
        "alast": asdict(setting.alast) if setting.method.startswith("alast") else None,
        "epochs": setting.epochs,
        "lr": lr,
        "seeds": [seed for seed, a in found.items() if a is not None],
        "accuracies": accuracies,
        "accuracy": statistics.mean(accuracies) if accuracies else None,
        "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "relative_time": spent["relative_step_time"] * setting.epochs / EPOCHS,
        "tried": [{"lr": lr, "seed": 0, "accuracy": accuracy(setting, work, lr, 0)} for lr in setting.lrs],
        **own,
        **spent,
    }


def main() -> None:
    set_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["train", "table"])
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--task", choices=list(TASKS), default="cifar")
    parser.add_argument("--out", type=Path, default=Path("results/target.json"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="train these settings only, separated by semicolons")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.do == "train":
        train_all(args.task, args.data, args.work, [name for name in args.only.split(";") if name])
        return
    file = args.work / "costs.json"
    if not file.exists():
        file.write_text(json.dumps(costs(args.task)))
    measured = json.loads(file.read_text())
    task = {"task": args.task, "per_class": TASKS[args.task].per_class, "num_classes": TASKS[args.task].num_classes}
    config = {**task, "batch_size": BATCH, "epochs": EPOCHS, "threads": args.threads}
    rows = [row(setting, args.work, measured) for setting in settings_of(args.task)]
    result = {"config": config, "environment": environment(resolve_device("cpu")), "rows": rows}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
