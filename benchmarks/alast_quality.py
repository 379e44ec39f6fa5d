#!/usr/bin/env python3
"""Accuracy of ALaST against full fine-tuning: the micro ViT on the five CIFAR-10 classes it has never seen.

    python get_cifar10.py cifar10 --classes automobile,cat,dog,horse,truck
    python benchmarks/alast_quality.py cifar10 work/ --per-class 1000 --out results/alast_quality.json

Every setting runs with the same recipe, number of epochs and seeds. The settings named "equal time" get as many
epochs as fit into the time of full fine-tuning, by the ratio of step times measured first, in turn, in one process.
Accuracy is that of the last epoch on all test pictures: nothing is selected on them. Finished runs are kept in the work
folder, so the script goes on where it was cut off.
"""

import argparse
import json
import math
import statistics
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from environment import environment
from rich.console import Console
from target import CLASSES, MODEL, link_data

from snello.config import AlastConfig, FinetuneConfig
from snello.devices import resolve_device, resolve_precision
from snello.environment import set_environment
from snello.finetuning import finetune
from snello.measure.step import TrainingStep
from snello.vit.attention import faster_attention


@dataclass(frozen=True)
class Setting:
    """A row of the table."""

    name: str
    method: str = "alast"
    alast: AlastConfig = field(default_factory=AlastConfig)
    equal_time: bool = False


PUBLISHED = replace(AlastConfig().published(), draw="proportional")


def _mid(start_budget: float = 0.9, **options: Any) -> AlastConfig:
    return replace(PUBLISHED, **{"start_budget": start_budget, "drop_at": "mid", **options})


EQUAL = ", equal time"
LOWEST = {"draw": "lowest-first", "train_embeddings": False}
SETTINGS = (
    Setting("full", method="full"),
    Setting("mid, 0.9, all blocks trained", alast=_mid(blocks=12)),
    Setting("mid, 0.9, all blocks trained, equal time", alast=_mid(blocks=12), equal_time=True),
    Setting("mid, 0.94, all blocks trained", alast=_mid(0.94, blocks=12)),
    Setting("mid, 0.9, all blocks trained, last 0.2 with all tokens", alast=_mid(blocks=12, full_tail=0.2)),
    Setting("mid, 0.8, all blocks trained, last 0.45 with all tokens", alast=_mid(0.8, blocks=12, full_tail=0.45)),
    Setting("mid, 0.85, all blocks trained, last 0.3 with all tokens", alast=_mid(0.85, blocks=12, full_tail=0.3)),
    Setting("mid, 0.9", alast=_mid()),
    Setting("mid, 0.9, equal time", alast=_mid(), equal_time=True),
    Setting("mid, 0.95", alast=_mid(0.95)),
    Setting("mid, 0.95, equal time", alast=_mid(0.95), equal_time=True),
    Setting("mid, 0.95, lowest-first, embeddings frozen", alast=_mid(0.95, **LOWEST)),
    Setting("mid, 0.9, lowest-first, embeddings frozen", alast=_mid(**LOWEST)),
    Setting("mid, 0.9, lowest-first, embeddings frozen, equal time", alast=_mid(**LOWEST), equal_time=True),
    Setting("published, 0.9", alast=PUBLISHED),
    Setting("mid, 0.9, last 0.2 with all tokens", alast=_mid(full_tail=0.2)),
    Setting("mid, 0.9, alpha 0.05", alast=_mid(alpha=0.05)),
    Setting("last-k (3)", method="last-k"),
    Setting("head", method="head"),
)


def configure(setting: Setting, args: argparse.Namespace, seed: int, epochs: int) -> FinetuneConfig:
    return FinetuneConfig(
        data=link_data(args.data, args.work, args.per_class),
        model=MODEL,
        method=setting.method,
        alast=setting.alast,
        epochs=epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=seed,
        device=args.device,
        precision=args.precision,
        attention=args.attention,
        workers=args.workers,
        check_pictures=False,
        eval_epochs=epochs,  # only the last counts
        compare=False,
    )


def step_times(args: argparse.Namespace, rounds: int = 15) -> dict[str, dict[str, float]]:
    """Median step time, FLOPs and saved bytes of every setting, their steps taken in turn."""
    device = resolve_device(args.device)
    precision = resolve_precision(args.precision, device)
    common = {"num_classes": len(CLASSES), "batch_size": args.batch_size, "device": device, "precision": precision}
    configs = {s.name.removesuffix(EQUAL): configure(s, args, 0, args.epochs) for s in SETTINGS}
    if args.attention == "auto":
        probe = TrainingStep(configs["full"], attention="fused", **common)
        args.attention = faster_attention(probe.vit, args.batch_size, device, precision)
    steps = {name: TrainingStep(config, attention=args.attention, **common) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(2 + rounds):
        for name, step in steps.items():
            seconds[name].append(step.run())
    return {
        name: {"step_time_s": statistics.median(seconds[name][2:]), **asdict(step.costs())}
        for name, step in steps.items()
    }


def folder(setting: Setting, args: argparse.Namespace, seed: int, epochs: int) -> Path:
    """The run folder of one training."""
    name = "".join(c if c.isalnum() or c in ".-" else "_" for c in setting.name)
    work: Path = args.work
    return work / f"{name}--{args.per_class}-{args.lr}-{epochs}-{seed}"


def train(setting: Setting, args: argparse.Namespace, seed: int, epochs: int) -> dict[str, Any]:
    """The summary of one run, from the work folder where it is finished already."""
    out = folder(setting, args, seed, epochs)
    if (out / "summary.json").exists():
        summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
        return summary
    config = replace(configure(setting, args, seed, epochs), out=out, resume=(out / "config.yaml").exists())
    with (args.work / "console.log").open("a") as log:
        return finetune(config, Console(file=log)).to_dict()


def main() -> None:
    set_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-class", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="train these settings only, separated by semicolons")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    for name in ("data", "work", "out"):
        del config[name]
    costs_file = args.work / f"costs-{args.batch_size}-{args.device}.json"
    if not costs_file.exists():
        costs_file.write_text(json.dumps({"costs": step_times(args), "attention": args.attention}))
    measured = json.loads(costs_file.read_text())
    args.attention, costs = measured["attention"], measured["costs"]
    for seed in map(int, args.seeds.split(",")):
        for setting in SETTINGS:  # every setting with one seed before the next seed
            if args.only and setting.name not in args.only.split(";"):
                continue
            epochs = num_epochs(setting, args, costs)
            accuracy = train(setting, args, seed, epochs)["last_accuracy"]
            print(f"seed {seed}  {setting.name:60} {epochs:3} epochs  {accuracy:.2%}", flush=True)
    rows = [made for setting in SETTINGS if (made := row(setting, args, costs))]
    result = {"config": config, "environment": environment(resolve_device(args.device)), "rows": rows}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for made in rows:
        print(
            f"{made['setting']:60} {made['epochs']:3} epochs  {made['accuracy']:.2%} of {len(made['seeds'])} seeds  "
            f"step {made['step_time_ratio']:.2f}x, FLOPs {made['flops_ratio']:.2f}x"
        )


def num_epochs(setting: Setting, args: argparse.Namespace, costs: dict[str, Any]) -> int:
    """Epochs of a setting: all the same, but for those that get the time of full fine-tuning."""
    return math.floor(args.epochs * ratio(setting, costs, "step_time_s")) if setting.equal_time else args.epochs


def ratio(setting: Setting, costs: dict[str, Any], key: str) -> float:
    """Cost of full fine-tuning over a setting's, over a whole run: its tail with all tokens costs as much as full."""
    share = costs[setting.name.removesuffix(EQUAL)][key] / costs["full"][key]
    tail = setting.alast.full_tail
    return 1 / ((1 - tail) * share + tail)


def row(setting: Setting, args: argparse.Namespace, costs: dict[str, Any]) -> dict[str, Any] | None:
    """A setting's row of the results, from the runs in the work folder that are finished; None without any.

    With equal time, where the ratio of step times was measured again since, from those with the most epochs that fit.
    """
    most = num_epochs(setting, args, costs)
    for epochs in range(most, 0, -1) if setting.equal_time else (most,):
        files = [folder(setting, args, seed, epochs) / "summary.json" for seed in range(100)]
        runs = [json.loads(file.read_text()) for file in files if file.exists()]
        if runs:
            break
    else:
        return None
    accuracies = [run["last_accuracy"] for run in runs]
    return {
        "setting": setting.name,
        "method": setting.method,
        "alast": asdict(setting.alast) if setting.method == "alast" else None,
        "epochs": epochs,
        "seeds": [run["seed"] for run in runs],
        "accuracies": accuracies,
        "accuracy": statistics.mean(accuracies),
        "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "train_times_s": [run["train_time_s"] for run in runs],
        "step_time_ratio": ratio(setting, costs, "step_time_s"),
        "flops_ratio": ratio(setting, costs, "flops_per_sample"),
        **costs[setting.name.removesuffix(EQUAL)],
    }


if __name__ == "__main__":
    main()
