"""How many epochs few pictures need: five, or as many as make a number of steps; the micro ViT on parts of two tasks.

    python benchmarks/few_pictures.py cifar=FOLDER fashion=FOLDER --out results/few_pictures.json

A FOLDER has train/ and test/ with a folder per class, as `tools` and benchmarks/fashion.py write them. Runs that the
output file has already are not done again.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from environment import environment
from rich.console import Console

import snello

SIZES = (100, 300, 1000)
HELD_OUT = 1000
SEEDS = (0, 1, 2)
EPOCHS = {"5 epochs": lambda steps: 5, "250 steps": lambda steps: min(50, max(5, -(-250 // steps)))}
BATCH = 64


def part(source: Path, target: Path, size: int) -> None:
    """Links to the first pictures of each class: `size` to train and HELD_OUT to test."""
    for name, number in (("train", size), ("test", HELD_OUT)):
        folders = sorted(folder for folder in (source / name).iterdir() if folder.is_dir())
        for folder in folders:
            made = target / name / folder.name
            made.mkdir(parents=True)
            for file in sorted(folder.iterdir())[: number // len(folders)]:
                (made / file.name).symlink_to(file.resolve())


def accuracy(data: Path, epochs: int, seed: int) -> tuple[float, float]:
    """Accuracy of the last epoch, and seconds of training."""
    with tempfile.TemporaryDirectory() as folder:
        config = snello.FinetuneConfig(
            data=str(data), model="vit_micro_patch4_32", epochs=epochs, eval_epochs=epochs, batch_size=BATCH, seed=seed,
            workers=0, compare=False, report=False, checkpoint_steps=0, check_pictures=False, out=Path(folder) / "run",
        )  # fmt: skip
        summary = snello.finetune(config, Console(quiet=True))
    return summary.last_accuracy, summary.train_time_s


def write(file: Path, rows: list[dict[str, object]]) -> None:
    config = {"batch_size": BATCH, "held_out": HELD_OUT, "model": "vit_micro_patch4_32"}
    values = {"config": config, "environment": environment(torch.device("cpu")), "rows": rows}
    file.write_text(json.dumps(values, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="+", help="NAME=FOLDER")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    done = {(row["task"], row["pictures"], row["setting"], row["seed"]) for row in rows}
    for seed in SEEDS:
        for size in SIZES:
            for task, _, source in (text.partition("=") for text in args.tasks):
                with tempfile.TemporaryDirectory() as folder:
                    part(Path(source), Path(folder), size)
                    for setting, rule in EPOCHS.items():
                        if (task, size, setting, seed) in done:
                            continue
                        epochs = rule(-(-size // BATCH))
                        found, seconds = accuracy(Path(folder), epochs, seed)
                        rows.append({
                            "task": task, "pictures": size, "setting": setting, "epochs": epochs, "seed": seed,
                            "accuracy": found, "seconds": seconds,
                        })  # fmt: skip
                        print(json.dumps(rows[-1]), flush=True)
                        write(args.out, rows)


if __name__ == "__main__":
    main()
