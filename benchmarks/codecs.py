#!/usr/bin/env python3
"""Accuracy against bytes for every codec at the cut: the micro ViT on the five CIFAR-10 classes it has never seen.

    python get_cifar10.py cifar10 --classes automobile,cat,dog,horse,truck
    python benchmarks/codecs.py cifar10 work/ --out results/codecs.json --picture results/codecs.png

Cut after block 3, batch 128, 1 000 pictures of each class, the same recipe and epochs for all; the learning rate is the
best for training without compression. Settings named "equal traffic" train until they have sent as much as the
uncompressed run; those named "equal time" as many epochs as its compute takes, by the step times measured first, in
turn, in one process. Accuracy is that of the last epoch on all test pictures: nothing is selected on them. Finished
runs are kept in the work folder, so the script goes on where it was cut off.
"""

import argparse
import io
import json
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from environment import environment
from PIL import Image
from rich.console import Console
from target import CLASSES, MODEL, link_data

from snello.config import FinetuneConfig, SplitConfig
from snello.devices import resolve_device, resolve_precision
from snello.environment import set_environment
from snello.finetuning import finetune
from snello.models import create_model
from snello.runs.folder import RunFolder
from snello.split.learner import make_split_learner
from snello.train.learner import MicroStep
from snello.train.place import Setup
from snello.train.schedule import Schedule
from snello.vit import ViT

CUT = 3
LINKS = ("10mbit/20ms", "100mbit/20ms")


@dataclass(frozen=True)
class Setting:
    """A line of the table."""

    codec: str
    family: str
    ratio: float | None = None
    """What the codec's options promise, where they do."""
    until: str = "epochs"
    """`epochs`: the same for all; `traffic`: as many bytes as uncompressed; `time`: as much compute."""
    more_seeds: bool = False

    @property
    def name(self) -> str:
        return self.codec if self.until == "epochs" else f"{self.codec}, equal {self.until}"


RATIOS = (0.05, 0.1, 0.2, 0.5)
CHAINS = (  # what each is there to show: the frontier, from many bytes to few, then ADC's own chains
    "adc(samples=1, tokens=0.4)+int4",
    "int2(clip=auto)",
    "adc(samples=1, tokens=0.7)+int2(clip=auto)",
    "adc(samples=1, tokens=0.4)+int2(clip=auto)",
    "adc(samples=1, tokens=0.35)+int2(clip=auto)",
    "adc(samples=1, tokens=0.2)+int4",
    "adc(samples=1, tokens=0.2)+int2",
    "adc(samples=1, tokens=0.2)+int2(clip=auto)",
    "adc(samples=1, tokens=0.175)+int2(clip=auto)",
    "adc(samples=1, tokens=0.15)+int2(clip=auto)",
    "adc(samples=1, tokens=0.5)+bottlenet(0.2)+int4(per=channel)",
    "bottlenet(0.25)+int4(per=channel)",
    "adc(0.2)+int8",
    "adc(0.2)+int4",
)
FRONTIER = CHAINS[0], CHAINS[2], CHAINS[4], CHAINS[10]
BEST = CHAINS[7]
SETTINGS = (
    Setting("none", "none", 1.0, more_seeds=True),
    *(Setting(f"adc({r})", "ADC", r, more_seeds=r == 0.1) for r in RATIOS),
    Setting("adc(0.1)+int8", "chains", 0.025, more_seeds=True),
    *(Setting(f"int{bits}", "integers", bits / 32) for bits in (8, 4, 2)),
    *(Setting(chain, "chains", more_seeds=chain in FRONTIER) for chain in CHAINS),
    *(Setting(f"topk({r})", "top-k", r, more_seeds=r == 0.1) for r in RATIOS),
    *(Setting(f"randtopk({r})", "rand-top-k", r) for r in RATIOS),
    *(Setting(f"c3sl({round(1 / r)})", "C3-SL", r) for r in RATIOS),
    *(Setting(f"bottlenet({r})", "BottleNet++", r) for r in RATIOS),
    Setting("fedlite(32)", "FedLite"),
    Setting("adc(samples=0.5, tokens=0.2)", "ADC variants", 0.1),
    Setting("adc(0.1, weight=sizes)", "ADC variants", 0.1),
    Setting("adc(samples=1, tokens=0.1)", "ADC variants", 0.1),
    Setting("adc(samples=0.1, tokens=1)", "ADC variants", 0.1),
    Setting("adc(0.1)", "ADC", 0.1, until="traffic"),
    Setting(BEST, "chains", until="time", more_seeds=True),
)


def configure(setting: Setting, args: argparse.Namespace, seed: int) -> FinetuneConfig:
    until = ending(setting, args)
    return FinetuneConfig(
        data=link_data(args.data, args.work, args.per_class),
        model=MODEL,
        method="full",
        split=SplitConfig(cut=CUT, codec=setting.codec, max_bytes=until.get("max_bytes")),
        epochs=until.get("epochs", args.epochs),
        batch_size=args.batch_size,
        lr=args.lr,
        seed=seed,
        device=args.device,
        precision=args.precision,
        attention=args.attention,
        workers=args.workers,
        check_pictures=False,
        eval_epochs=10**6,  # only the last counts
        compare=False,
    )


def ending(setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """How long a setting trains."""
    if setting.until == "epochs":
        return {"epochs": args.epochs}
    if setting.until == "traffic":
        summaries = finished(Setting("none", "none"), args)
        return {"max_bytes": f"{summaries[0]['uplink_bytes'] + summaries[0]['downlink_bytes']}B"}
    costs = step_times(args, ["none", setting.codec])
    return {"epochs": math.floor(args.epochs * seconds(costs["none"]) / seconds(costs[setting.codec]))}


def folder(setting: Setting, args: argparse.Namespace, seed: int) -> Path:
    """The run folder of one training."""
    name = "".join(c if c.isalnum() or c in ".-=" else "_" for c in setting.name)
    work: Path = args.work
    return work / f"{name}--{args.per_class}-{args.lr}-{args.batch_size}-{args.epochs}-{seed}"


def finished(setting: Setting, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The summaries of a setting's finished runs."""
    files = [folder(setting, args, seed) / "summary.json" for seed in range(100)]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def train(setting: Setting, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The summary of one run, from the work folder where it is finished already."""
    out = folder(setting, args, seed)
    if (out / "summary.json").exists():
        summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
        return summary
    config = replace(configure(setting, args, seed), out=out, resume=(out / "config.yaml").exists())
    with (args.work / "console.log").open("a") as log:
        return finetune(config, Console(file=log)).to_dict()


def step_times(args: argparse.Namespace, codecs: list[str]) -> dict[str, dict[str, float]]:
    """Median seconds of each side in a step of these codecs, their steps taken in turn; kept in the work folder."""
    file: Path = args.work / f"costs-{args.batch_size}-{args.device}.json"
    costs: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    missing = [codec for codec in codecs if codec not in costs]
    if missing:
        costs |= measure(["none", *(codec for codec in missing if codec != "none")], args)
        file.write_text(json.dumps(costs, indent=1))
    return costs


def measure(codecs: list[str], args: argparse.Namespace, rounds: int = 7) -> dict[str, dict[str, float]]:
    device = resolve_device(args.device)
    precision = resolve_precision(args.precision, device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(len(CLASSES), (args.batch_size,), generator=generator).to(device)
    cuts = {}
    for codec in codecs:
        config = FinetuneConfig(
            model=MODEL, method="full", split=SplitConfig(cut=CUT, codec=codec), batch_size=args.batch_size
        )
        vit = ViT(create_model(config.model, "pretrained", len(CLASSES)).to(device))
        vit.set_attention_paths([args.attention] * vit.depth)
        schedule = Schedule(args.batch_size, args.batch_size, 1, 1000)
        cuts[codec] = make_split_learner(vit, Setup(config, len(CLASSES), device, precision, schedule, codec))
    taken: dict[str, list[dict[str, float]]] = {codec: [] for codec in codecs}
    for index in range(2 + rounds):
        for codec, cut in cuts.items():
            cut.begin(index, 0.0, 1)
            cut.backward(MicroStep([(images, labels)], index, 0, len(labels), index))
            cut.clip(1.0)
            cut.update(1e-6)
            metrics = cut.metrics()
            taken[codec].append({side: metrics[side] for side in ("client_seconds", "server_seconds")})
    return {
        codec: {side: statistics.median(row[side] for row in rows[2:]) for side in rows[0]}
        for codec, rows in taken.items()
    }


def seconds(costs: dict[str, float]) -> float:
    return costs["client_seconds"] + costs["server_seconds"]


def row(setting: Setting, args: argparse.Namespace, costs: dict[str, dict[str, float]]) -> dict[str, Any] | None:
    """A setting's row of the results, from its finished runs; None without any."""
    runs = finished(setting, args)
    if not runs:
        return None
    accuracies = [run["last_accuracy"] for run in runs]
    one = runs[0]
    steps, training = one["steps"], one["uplink_bytes"] + one["downlink_bytes"]
    return {
        "setting": setting.name,
        "codec": setting.codec,
        "family": setting.family,
        "until": setting.until,
        "nominal_ratio": setting.ratio,
        "ratio": one["ratio"],
        "epochs": steps / math.ceil(5 * args.per_class / args.batch_size),
        "seeds": [run["seed"] for run in runs],
        "train_threads": [RunFolder(folder(setting, args, run["seed"])).read()[1].threads for run in runs],
        "accuracies": accuracies,
        "accuracy": statistics.mean(accuracies),
        "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "uplink_bytes": one["uplink_bytes"],
        "downlink_bytes": one["downlink_bytes"],
        "training_bytes": training,
        "eval_bytes": one["eval_bytes"],
        "client_flops_per_sample": one["client_flops_per_sample"],
        "server_flops_per_sample": one["server_flops_per_sample"],
        "client_seconds": costs[setting.codec]["client_seconds"] * steps,
        "server_seconds": costs[setting.codec]["server_seconds"] * steps,
        "link_seconds": {link: link_seconds(link, training, steps) for link in LINKS},
    }


def link_seconds(link: str, training: int, steps: int) -> float:
    from snello.config.units import Link

    return Link.parse(link, "link").seconds(training, steps)


def jpeg_bytes(args: argparse.Namespace) -> int:
    """The training pictures as JPEG files of quality 90."""
    total = 0
    for path in sorted((link_data(args.data, args.work, args.per_class) / "train").rglob("*.png")):
        file = io.BytesIO()
        with Image.open(path) as image:
            image.convert("RGB").save(file, "JPEG", quality=90)
        total += file.tell()
    return total


def main() -> None:
    set_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--per-class", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", default="0", help="of every setting")
    parser.add_argument("--more-seeds", default="1,2", help="of the settings marked so")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--attention", default="explicit")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="these settings only, by name, separated by semicolons")
    parser.add_argument("--no-train", action="store_true", help="only make the table of what is finished")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    seeds, more = ([int(seed) for seed in text.split(",") if seed] for text in (args.seeds, args.more_seeds))
    for seed in () if args.no_train else sorted({*seeds, *more}):
        for setting in SETTINGS:  # every setting with one seed before the next seed
            if args.only and setting.name not in args.only.split(";"):
                continue
            if seed not in seeds and not setting.more_seeds:
                continue
            summary = train(setting, args, seed)
            accuracy, less = summary["last_accuracy"], 1 / summary["ratio"]
            took = summary["train_time_s"]
            print(f"seed {seed}  {setting.name:50} {accuracy:.2%}  {less:7.2f}x fewer bytes  {took:.0f} s", flush=True)
    if args.out:
        write(args)


def write(args: argparse.Namespace) -> None:
    """The results file and the picture, of all that is finished."""
    ran = list(dict.fromkeys(setting.codec for setting in SETTINGS if finished(setting, args)))
    costs = step_times(args, ran)
    config = {key: value for key, value in vars(args).items() if not isinstance(value, Path)} | {"cut": CUT}
    for name in ("only", "no_train"):
        config.pop(name, None)
    result = {
        "config": config,
        "environment": environment(resolve_device(args.device)),
        "jpeg_bytes": jpeg_bytes(args),
        "step_seconds": costs,
        "rows": [made for setting in SETTINGS if (made := row(setting, args, costs))],
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.picture:
        from codecs_picture import draw

        draw(result, args.picture)


if __name__ == "__main__":
    main()
