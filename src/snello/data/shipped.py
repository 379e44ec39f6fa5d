"""The pictures that ship with snello: 2 500 of Fashion-MNIST."""

from collections.abc import Sequence
from importlib import resources

import numpy as np
from typing_extensions import override

from snello.data.sets import ArrayPictures, PictureSet
from snello.data.source import Source, with_classes

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


class Shipped(Source):
    """2 000 pictures to train and 500 held out, in ten classes."""

    where, title = "the pictures that ship with snello", "Fashion-MNIST, the 2500 pictures that ship with snello"
    parts = ("train", "test")

    @override
    def read(self, part: str | None, known: Sequence[str] | None = None) -> PictureSet:
        file = resources.files("snello") / "assets" / "fashion_mnist.npz"
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        return with_classes(ArrayPictures(images, labels, FASHION_CLASSES, f"Fashion-MNIST {part}"), known, self.where)
