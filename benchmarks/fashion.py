#!/usr/bin/env python3
"""Fashion-MNIST as an image folder, from the Debian package dataset-fashion-mnist: the second task of the benchmarks.

    apt install dataset-fashion-mnist
    python benchmarks/fashion.py fashion/        # fashion/train/<class>/<index>.png and fashion/test/...

The first pictures of each class: 1 000 to train (the benchmarks take fewer), 500 to test; 28 x 28 grey.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SOURCE = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "T-shirt_top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle_boot",
)  # fmt: skip
PARTS = {"train": ("train", 1000), "test": ("t10k", 500)}


def read(path: Path, header: int) -> NDArray[np.uint8]:
    """The bytes behind the header of an idx file."""
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", type=Path, default=SOURCE)
    args = parser.parse_args()
    for part, (name, most) in PARTS.items():
        pictures = read(args.source / f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        labels = read(args.source / f"{name}-labels-idx1-ubyte.gz", 8)
        for number, label in enumerate(CLASSES):
            folder = args.out / part / label
            folder.mkdir(parents=True, exist_ok=True)
            for index in np.flatnonzero(labels == number)[:most]:
                Image.fromarray(pictures[index]).save(folder / f"{index:05d}.png")


if __name__ == "__main__":
    main()
