"""Make the pictures that ship with snello: a small part of Fashion-MNIST, from Debian's package.

    apt-get install dataset-fashion-mnist && python tools/make_fashion_mnist.py

The first 200 training and the first 50 test pictures of each of the ten classes, in their original order, one class
after the other in turn: picture k belongs to class k mod 10. The same input gives the same bytes.
"""

import argparse
import gzip
import struct
from pathlib import Path

import numpy as np

ASSETS = Path(__file__).resolve().parents[1] / "src" / "snello" / "assets"
NUM_CLASSES = 10
NUM_TRAIN, NUM_TEST = 200, 50  # of each class

LICENSE = """\
fashion_mnist.npz holds the first 200 training and the first 50 test pictures of every class of Fashion-MNIST \
(https://github.com/zalandoresearch/fashion-mnist).

The MIT License (MIT)

Copyright © 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated \
documentation files (the “Software”), to deal in the Software without restriction, including without limitation the \
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit \
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the \
Software.

THE SOFTWARE IS PROVIDED “AS IS”, WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE \
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR \
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR \
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in a gzipped idx file: two zero bytes, type 8, number of dimensions, big-endian sizes, data."""
    data = gzip.decompress(path.read_bytes())
    zeros, kind, num_dims = struct.unpack_from(">HBB", data)
    if zeros != 0 or kind != 8:
        raise SystemExit(f"{path} is no idx file of unsigned bytes")
    shape = struct.unpack_from(f">{num_dims}I", data, 4)
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * num_dims).reshape(shape)


def take(folder: Path, part: str, num_each: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `num_each` pictures of each class and their labels, the classes in turn."""
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
    of_class = np.stack([np.flatnonzero(labels == label)[:num_each] for label in range(NUM_CLASSES)])
    order = of_class.T.reshape(-1)
    return images[order], labels[order]


def main() -> None:
    """Write the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    folder = parser.parse_args().folder
    train_images, train_labels = take(folder, "train", NUM_TRAIN)
    test_images, test_labels = take(folder, "t10k", NUM_TEST)
    ASSETS.mkdir(parents=True, exist_ok=True)
    target = ASSETS / "fashion_mnist.npz"
    np.savez_compressed(
        target,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
    )
    (ASSETS / "fashion_mnist.LICENSE").write_text(LICENSE, encoding="utf-8")
    print(f"{target}: {len(train_labels)} + {len(test_labels)} pictures, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
