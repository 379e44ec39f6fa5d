#!/usr/bin/env python3
"""How far bytes can fall, and what that costs: rotate and code, freeze and replay, on two tasks with three seeds.

    python get_cifar10.py cifar10 --classes automobile,cat,dog,horse,truck
    python benchmarks/fashion.py fashion
    python benchmarks/fewer_bytes.py work/ --cifar cifar10 --fashion fashion --out results/fewer_bytes.json

The micro ViT cut after block 3, 5 000 pictures, batch 128, learning rate 1e-3, as in benchmarks/codecs.py. Settings
were chosen on seed 0 of the five CIFAR-10 classes; Fashion-MNIST, all ten classes, has them unchanged. Accuracy is that
of the last epoch on all test pictures, with int8 at the cut; bytes are all those of training, both ways, against
uncompressed training for five epochs. Every run is a process of its own (`--jobs`); what is finished is kept in the
work folder, so the script goes on where it was cut off.
"""

import argparse
import io
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from environment import environment
from PIL import Image
from rich.console import Console
from target import MODEL

from snello.config import FinetuneConfig, SplitConfig
from snello.devices import resolve_device
from snello.environment import set_environment
from snello.finetuning import finetune

CUT, EPOCHS, BATCH, LR = 3, 5, 128, 1e-3
PER_CLASS = {"cifar": 1000, "fashion": 500}


@dataclass(frozen=True)
class Setting:
    """A line of the table."""

    name: str
    codec: str
    epochs: int = EPOCHS
    send_epochs: int | None = None
    """Of a frozen client; None for one that trains."""
    replay: int = 0
    """Steps on stored samples after each one that is sent; the others follow when all is sent."""
    cutmix: float | None = None
    tasks: tuple[str, ...] = ("cifar", "fashion")
    group: str = "a client that trains"


CIFAR = ("cifar",)
FROZEN, OTHERS, LONGER = "a frozen client, and a server that replays", "other codecs", "trained longer"
SETTINGS = (
    Setting("uncompressed", "none"),
    Setting("auto", "pca(1)"),
    Setting("small", "pca(1.5, down=1)"),
    Setting("smallest", "pca(2)"),
    Setting("frozen, auto, 2 epochs sent", "pca(2)", 12, 2, group=FROZEN),
    Setting("frozen, small, 3 epochs sent", "pca(3)", 20, 3, group=FROZEN),
    Setting("frozen, smallest, 3 epochs sent", "pca(4.5)", 20, 3, group=FROZEN),
    Setting("frozen, auto, 2 epochs sent, replayed between", "pca(2)", 12, 2, 5, group=FROZEN),
    Setting("frozen, small, 3 epochs sent, replayed between", "pca(3)", 20, 3, 5, group=FROZEN),
    Setting("frozen, smallest, 3 epochs sent, replayed between", "pca(4.5)", 20, 3, 5, group=FROZEN),
    Setting("ADC as published", "adc(0.1)", group=OTHERS),
    Setting("40 % of the tokens, 4 bits", "adc(samples=1, tokens=0.4)+int4", tasks=CIFAR, group=OTHERS),
    Setting("the same, the others merged", "adc(samples=1, tokens=0.4, rule=merge)+int4", tasks=CIFAR, group=OTHERS),
    Setting("uncompressed, 12 epochs", "none", 12, tasks=CIFAR, group=LONGER),
    Setting("uncompressed, 12 epochs, CutMix in half", "none", 12, cutmix=0.5, tasks=CIFAR, group=LONGER),
    Setting("auto, 12 epochs", "pca(1)", 12, tasks=CIFAR, group=LONGER),
)


@dataclass(frozen=True)
class Run:
    """One training."""

    setting: Setting
    task: str
    seed: int

    def folder(self, work: Path) -> Path:
        """Where it is."""
        text = f"{self.task}-{self.setting.name}-{self.seed}"
        return work / "".join(c if c.isalnum() or c in ".-" else "_" for c in text)

    @property
    def cost(self) -> int:
        """Roughly how long it takes beside others: the longest go first."""
        coder = 3 if "pca" in self.setting.codec and self.setting.send_epochs is None else 1
        return self.setting.epochs * coder


def train(run: Run, args: argparse.Namespace) -> None:
    setting, out = run.setting, run.folder(args.work)
    split = SplitConfig(cut=CUT, codec=setting.codec, eval_codec="int8", cutmix=setting.cutmix)
    if setting.send_epochs:
        split = replace(split, client="frozen", send_epochs=setting.send_epochs, replay=setting.replay)
    config = FinetuneConfig(
        data=str(few(args, run.task)),
        model=MODEL,
        method="full",
        split=split,
        epochs=setting.epochs,
        batch_size=BATCH,
        lr=LR,
        seed=run.seed,
        device=args.device,
        attention="explicit",
        workers=0,
        check_pictures=False,
        eval_epochs=10**6,  # only the last counts
        compare=False,
        out=out,
        resume=(out / "config.yaml").exists(),
    )
    with (args.work / "console.log").open("a") as log:
        finetune(config, Console(file=log))


def few(args: argparse.Namespace, task: str) -> Path:
    """A folder of links to the first training pictures of each class of a task, and to all test pictures."""
    source: Path = getattr(args, task)
    folder: Path = args.work / f"data-{task}"
    for part, most in (("train", PER_CLASS[task]), ("test", None)):
        for kind in sorted((source / part).iterdir()):
            target = folder / part / kind.name
            target.mkdir(parents=True, exist_ok=True)
            for path in sorted(kind.glob("*.png"))[:most]:
                link = target / path.name
                if not link.is_symlink():
                    link.symlink_to(path.resolve())
    return folder


def jpeg_bytes(folder: Path) -> int:
    """The training pictures as JPEG files of quality 90."""
    total = 0
    for path in sorted((folder / "train").rglob("*.png")):
        file = io.BytesIO()
        with Image.open(path) as image:
            image.save(file, "JPEG", quality=90)
        total += file.tell()
    return total


def rows_of(task: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a task, of what is finished."""
    rows: list[dict[str, Any]] = []
    for setting in SETTINGS:
        files = [Run(setting, task, seed).folder(args.work) / "summary.json" for seed in range(100)]
        runs = [json.loads(file.read_text()) for file in files if file.exists()]
        if not runs or task not in setting.tasks:
            continue
        accuracies = [run["last_accuracy"] for run in runs]
        sent = [run["uplink_bytes"] + run["downlink_bytes"] for run in runs]
        first = rows[0] if rows else None
        rows.append(
            {
                "task": task,
                **asdict(setting),
                "seeds": [run["seed"] for run in runs],
                "accuracies": accuracies,
                "accuracy": statistics.mean(accuracies),
                "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                "below": first["accuracy"] - statistics.mean(accuracies) if first else 0.0,
                "uplink_bytes": statistics.mean(run["uplink_bytes"] for run in runs),
                "downlink_bytes": statistics.mean(run["downlink_bytes"] for run in runs),
                "training_bytes": statistics.mean(sent),
                "times_fewer": first["training_bytes"] / statistics.mean(sent) if first else 1.0,
                "train_time_s": [run["train_time_s"] for run in runs],
                "device": environment(resolve_device(args.device))["device"],
                "precision": runs[0]["precision"],
            }
        )
    return rows


def together(here: list[dict[str, Any]], there: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of two machines in the order of the settings; each says where it was made. Those of here come first."""
    rows = {(row["task"], row["name"]): row for row in [*there, *here]}
    ordered = [rows[task, s.name] for task in PER_CLASS for s in SETTINGS if (task, s.name) in rows]
    for row in ordered:
        first = rows[row["task"], SETTINGS[0].name]
        row["below"] = first["accuracy"] - row["accuracy"]
        row["times_fewer"] = first["training_bytes"] / row["training_bytes"]
    return ordered


def main() -> None:
    set_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--fashion", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", help="the settings whose names contain this")
    parser.add_argument("--one", nargs=3, metavar=("SETTING", "TASK", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--no-train", action="store_true", help="only make the table of what is finished")
    parser.add_argument("--add", type=Path, help="results of another machine, whose rows fill in what is not here")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.one:
        torch.set_num_threads(1)
        name, task, seed = args.one
        train(Run(next(s for s in SETTINGS if s.name == name), task, int(seed)), args)
        return
    runs = [
        Run(setting, task, int(seed))
        for seed in args.seeds.split(",")
        for setting in SETTINGS
        for task in setting.tasks
        if not args.only or args.only in setting.name
    ]
    for task in PER_CLASS:
        few(args, task)
    due = [run for run in runs if not (run.folder(args.work) / "summary.json").exists() and not args.no_train]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda run: _start(run, args), sorted(due, key=lambda run: -run.cost)))
    if args.out:
        write(args)


def _start(run: Run, args: argparse.Namespace) -> None:
    """Trains in a process of its own."""
    own = ["--cifar", str(args.cifar), "--fashion", str(args.fashion), "--device", args.device]
    one = ["--one", run.setting.name, run.task, str(run.seed)]
    done = subprocess.run([sys.executable, __file__, str(args.work), *own, *one], capture_output=True, text=True)
    file = run.folder(args.work) / "summary.json"
    if done.returncode or not file.exists():
        print(f"{run.task} {run.setting.name} {run.seed}: failed: {done.stderr[-500:]}", flush=True)
        return
    summary = json.loads(file.read_text())
    sent = (summary["uplink_bytes"] + summary["downlink_bytes"]) / 1e6
    print(f"{run.task} {run.setting.name} {run.seed}: {summary['last_accuracy']:.2%}, {sent:.2f} MB", flush=True)


def write(args: argparse.Namespace) -> None:
    """The results file and the picture, of all that is finished."""
    config: dict[str, Any] = {"cut": CUT, "batch_size": BATCH, "lr": LR, "per_class": PER_CLASS, "epochs": EPOCHS}
    result: dict[str, Any] = {
        "config": config,
        "environment": environment(resolve_device(args.device)),
        "jpeg_bytes": {task: jpeg_bytes(few(args, task)) for task in PER_CLASS},
        "rows": [row for task in PER_CLASS for row in rows_of(task, args)],
    }
    if args.add:
        result["rows"] = together(result["rows"], json.loads(args.add.read_text())["rows"])
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.picture:
        from fewer_bytes_picture import draw

        draw(result, args.picture)


if __name__ == "__main__":
    main()
