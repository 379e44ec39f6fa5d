#!/usr/bin/env python3
"""What --preset costs and loses: the micro ViT on the tasks of target_table.py, and a step of a larger model.

    python get_cifar10.py cifar10 --classes automobile,cat,dog,horse,truck
    python benchmarks/fashion.py fashion/
    python benchmarks/presets.py train work/ --cifar cifar10 --fashion fashion      # accuracy
    python benchmarks/presets.py table work/ --out results/presets.json

Recipe, seeds and tasks are those of target_table.py, five epochs each; `small-memory` computes what its lower half of
frozen blocks does, with or without checkpoints, so that its runs are made without. `accurate` is the row "equal time"
of target_table.py. A step is timed in CPU seconds, each preset in a process of its own, in turn. Finished runs stay in
the work folder: the script goes on where it was cut off.
"""

import argparse
import json
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from environment import environment
from target import MODEL, TASKS
from target_table import BATCH, EPOCHS, LR, SEEDS, Setting, accuracy, train

from snello.config import FinetuneConfig
from snello.config.presets import PRESETS
from snello.devices import resolve_device, resolve_precision
from snello.environment import set_environment
from snello.measure.process import Process, make_request

MEASURED = ("best", "fast", "small-memory")
NAMES = {"best": "default", "fast": "lowest-first 0.75", "small-memory": "lowest-first 0.5"}
"""Of the settings, which name the folders of the runs."""
MODELS = {MODEL: 64, "deit_small_patch16_224": 16}
"""Models whose steps are measured, with their batch sizes."""
WARMUP, STEPS = 2, 8


def setting_of(preset: str) -> Setting:
    alast = FinetuneConfig().alast.filled(PRESETS[preset].alast)
    return Setting(NAMES[preset], "alast", epochs=EPOCHS, alast=alast)


def train_all(work: Path, folders: dict[str, Path]) -> None:
    for seed in SEEDS:
        for task, data in folders.items():
            (work / task).mkdir(parents=True, exist_ok=True)
            for preset in MEASURED:
                train(setting_of(preset), TASKS[task], data, work / task, LR, seed)


def accuracies(preset: str, work: Path, task: str) -> dict[str, Any]:
    """Of the runs that are finished."""
    found = {seed: accuracy(setting_of(preset), work / task, LR, seed) for seed in SEEDS}
    known = {seed: value for seed, value in found.items() if value is not None}
    values = list(known.values())
    mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
    return {"seeds": list(known), "accuracies": values, "accuracy": mean, "spread": spread}


def costs(model: str, batch_size: int) -> dict[str, dict[str, float]]:
    """A step of every preset, and of full fine-tuning, plain; times are relative to that."""
    precision = resolve_precision("auto", resolve_device("cpu"))
    common = {"num_classes": 10, "device": "cpu", "attention": "explicit", "precision": precision}
    plain: dict[str, Any] = {"model": model, "weights": "none", "batch_size": batch_size}
    configs = {"full": FinetuneConfig(method="full", exact_savings=False, **plain)}
    configs |= {preset: FinetuneConfig(method="alast", preset=preset, **plain) for preset in MEASURED}
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(Process(make_request(config, **common) | {"moving": True}))
            for name, config in configs.items()
        }
        for _ in range(WARMUP + STEPS):
            for name, process in processes.items():
                seconds[name].append(process.ask("step")["cpu_seconds"])
        measured = {name: process.ask("costs") for name, process in processes.items()}
    for name, own in measured.items():
        pairs = zip(seconds[name][WARMUP:], seconds["full"][WARMUP:], strict=True)
        own["relative_step_time"] = statistics.median(mine / full for mine, full in pairs)
        own["step_time_s"] = statistics.median(seconds[name][WARMUP:])
    return measured


def main() -> None:
    set_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["train", "table"])
    parser.add_argument("work", type=Path)
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--fashion", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/presets.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    folders = {name: path for name in ("cifar", "fashion") if (path := getattr(args, name)) is not None}
    if args.do == "train":
        train_all(args.work, folders)
        return
    file = args.work / "costs.json"
    if not file.exists():
        file.write_text(json.dumps({model: costs(model, batch_size) for model, batch_size in MODELS.items()}))
    tasks = [task for task in ("cifar", "fashion") if (args.work / task).is_dir()]
    rows = [
        {"preset": preset, "settings": dict(PRESETS[preset].alast)}
        | {task: accuracies(preset, args.work, task) for task in tasks}
        for preset in MEASURED
    ]
    config = {"model": MODEL, "batch_size": BATCH, "epochs": EPOCHS, "lr": LR, "threads": 1, "batch_sizes": MODELS}
    result = {"config": config, "environment": environment(resolve_device("cpu")), "rows": rows}
    args.out.write_text(json.dumps(result | {"costs": json.loads(file.read_text())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
