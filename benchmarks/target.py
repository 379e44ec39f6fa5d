"""The tasks of the quality benchmarks: five CIFAR-10 classes that the micro ViT has never seen, and a second one."""

import os
from dataclasses import dataclass
from pathlib import Path

from snello.config.default_model import TOY

MODEL = TOY
CLASSES = ("automobile", "cat", "dog", "horse", "truck")


@dataclass(frozen=True)
class Task:
    """Which pictures of a folder; get_cifar10.py and fashion.py make the folders."""

    classes: tuple[str, ...] | None
    """None: all that there are."""
    per_class: int
    num_classes: int


TASKS = {"cifar": Task(CLASSES, 1000, 5), "fashion": Task(None, 500, 10), "cifar, all": Task(CLASSES, 5000, 5)}


def link_data(source: Path, work: Path, per_class: int, classes: tuple[str, ...] | None = CLASSES) -> Path:
    """A folder of links to the first `per_class` training pictures of each class and all test pictures."""
    folder = work / f"data-{per_class}"
    names = classes or tuple(sorted(path.name for path in (source / "train").iterdir()))
    for part, most in (("train", per_class), ("test", None)):
        for name in names:
            target = folder / part / name
            target.mkdir(parents=True, exist_ok=True)
            for path in sorted((source / part / name).glob("*.png"))[:most]:
                if not (target / path.name).exists():
                    os.symlink(path.resolve(), target / path.name)
    return folder
