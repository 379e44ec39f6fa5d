#!/usr/bin/env python3
"""Whole runs of DeiT-S under a slow link, by codec, and what uploading the pictures would take.

    python benchmarks/link_run.py work/ --data fashion --out results/link_run.json

640 pictures at 224 pixels, five epochs at batch 128, cut after block 3; both halves in one process, with the time that
10 Mbit/s and 20 ms would add for the bytes that crossed (`--split.link`). The model starts from random weights;
accuracy is not looked at here. The upload is that of the same pictures as JPEG files of quality 90 at 224 pixels.
"""

import argparse
import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from environment import environment
from PIL import Image
from rich.console import Console

from snello.config import FinetuneConfig, SplitConfig
from snello.config.units import Link
from snello.devices import resolve_device
from snello.environment import set_environment
from snello.finetuning import finetune

LINK, EPOCHS, PER_CLASS = "10mbit/20ms", 5, 64
RUNS: dict[str, dict[str, Any]] = {
    "none": {"codec": "none"},
    "int4": {"codec": "int4"},
    "adc(0.1)": {"codec": "adc(0.1)"},
    "auto": {"codec": "auto"},
    "small": {"codec": "small"},
    "smallest": {"codec": "smallest"},
    "frozen, auto, 2 epochs sent": {"codec": "auto", "client": "frozen", "send_epochs": 2},
    "frozen, smallest, 2 epochs sent": {"codec": "smallest", "client": "frozen", "send_epochs": 2},
}


def few(args: argparse.Namespace) -> Path:
    """A folder of links to a few pictures of each class."""
    folder: Path = args.work / "data"
    for part, most in (("train", PER_CLASS), ("test", 8)):
        for kind in sorted((args.data / part).iterdir()):
            (folder / part / kind.name).mkdir(parents=True, exist_ok=True)
            for path in sorted(kind.glob("*.png"))[:most]:
                link = folder / part / kind.name / path.name
                if not link.is_symlink():
                    link.symlink_to(path.resolve())
    return folder


def train(name: str, args: argparse.Namespace) -> None:
    config = FinetuneConfig(
        model="deit_small_patch16_224",
        weights="none",
        method="full",
        data=str(few(args)),
        split=SplitConfig(cut=3, link=LINK, **RUNS[name]),
        epochs=EPOCHS,
        batch_size=128,
        device=args.device,
        workers=0,
        attention="explicit",
        check_pictures=False,
        eval_epochs=EPOCHS,
        compare=False,
        out=args.work / name.replace(" ", "-"),
    )
    with (args.work / "console.log").open("a") as log:
        finetune(config, Console(file=log))


def upload(folder: Path) -> dict[str, Any]:
    """The pictures as they would be sent, and the seconds of that."""
    size, num = 0, 0
    for path in sorted((folder / "train").rglob("*.png")):
        file = io.BytesIO()
        with Image.open(path) as image:
            image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        size, num = size + file.tell(), num + 1
    return {"bytes": size, "pictures": num, "link_seconds": Link.parse(LINK, "link").seconds(size, 1)}


def main() -> None:
    set_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.one:
        torch.set_num_threads(1)
        train(args.one, args)
        return
    few(args)
    own = [sys.executable, __file__, str(args.work), "--data", str(args.data), "--device", args.device]
    due = [name for name in RUNS if not (args.work / name.replace(" ", "-") / "summary.json").exists()]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda name: subprocess.run([*own, "--one", name], check=True), due))
    rows = []
    for name, split in RUNS.items():
        summary = json.loads((args.work / name.replace(" ", "-") / "summary.json").read_text())
        figures = ["codec", "steps", "uplink_bytes", "downlink_bytes"]
        figures += ["client_seconds", "server_seconds", "link_seconds"]
        rows.append({"name": name, **split, **{figure: summary[figure] for figure in figures}})
    config = {"model": "deit_small_patch16_224", "link": LINK, "epochs": EPOCHS, "batch_size": 128, "cut": 3}
    result = {"config": config, "environment": environment(resolve_device(args.device)), "rows": rows}
    result["upload"] = upload(few(args))
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
