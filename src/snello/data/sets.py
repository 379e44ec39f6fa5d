"""Labelled pictures, whatever holds them. They are decoded when asked for, and go to worker processes as they are."""

import copy
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from snello.data.reading import open_picture
from snello.errors import printable

P = TypeVar("P", bound="PictureSet")


class PictureSet(ABC):
    """Labelled pictures: `labels[i]`, an index into `classes`, belongs to `open(i)`."""

    classes: tuple[str, ...]
    labels: list[int]

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.labels)

    @abstractmethod
    def name(self, index: int) -> str:
        """What the picture is called in messages."""

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """The picture, 8-bit RGB; a DataError where it cannot be read."""

    @abstractmethod
    def check(self, index: int) -> None:
        """A DataError where the picture cannot be read; decodes no more than finding that out takes."""

    @abstractmethod
    def file_bytes(self) -> int:
        """What uploading the pictures once would take: the bytes of their files."""

    @abstractmethod
    def _keep(self, indices: Sequence[int]) -> None:
        """Forgets all pictures but these."""

    def subset(self: P, indices: Sequence[int]) -> P:
        """The pictures at `indices`, with the same classes."""
        part = copy.copy(self)
        part.labels = [self.labels[i] for i in indices]
        part._keep(indices)
        return part

    def relabelled(self: P, classes: Sequence[str]) -> P:
        """The same pictures with labels that are indices into `classes`, which has all names that are in use here."""
        part = copy.copy(self)
        part.classes = tuple(classes)
        if part.classes != self.classes:
            place = {name: i for i, name in enumerate(part.classes)}
            part.labels = [place[self.classes[label]] for label in self.labels]
        return part

    def counts(self) -> dict[str, int]:
        """Pictures of each class, in the order of the classes."""
        counts = [0] * len(self.classes)
        for label in self.labels:
            counts[label] += 1
        return dict(zip(self.classes, counts, strict=True))


class FilePictures(PictureSet):
    """Pictures in files."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], classes: Sequence[str]) -> None:
        self.paths, self.labels, self.classes = list(paths), list(labels), tuple(classes)

    def name(self, index: int) -> str:
        """The path."""
        return printable(self.paths[index])

    def open(self, index: int) -> Image.Image:
        """See `open_picture`."""
        return open_picture(self.paths[index])

    def check(self, index: int) -> None:
        """Decodes it, a JPEG in small."""
        open_picture(self.paths[index], draft=True)

    def file_bytes(self) -> int:
        """The sizes of the files."""
        return sum(path.stat().st_size for path in self.paths)

    def _keep(self, indices: Sequence[int]) -> None:
        self.paths = [self.paths[i] for i in indices]


class ArrayPictures(PictureSet):
    """Pictures in one array: `images` (N, H, W), grey, or (N, H, W, 3), and `labels` (N,), integers; images uint8."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: Sequence[str], title: str) -> None:
        self.images, self.labels, self.classes, self.title = images, labels.tolist(), tuple(classes), title

    def name(self, index: int) -> str:
        """Title and number."""
        return f"{self.title} {index}"

    def open(self, index: int) -> Image.Image:
        """The picture; grey is repeated in the three channels."""
        return Image.fromarray(self.images[index]).convert("RGB")

    def check(self, index: int) -> None:
        """Nothing can be wrong with it."""

    def file_bytes(self) -> int:
        """The sizes they would have as JPEG files of Pillow's default quality."""
        total = 0
        for image in self.images:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG")
            total += file.tell()
        return total

    def _keep(self, indices: Sequence[int]) -> None:
        self.images = self.images[list(indices)]


@dataclass(frozen=True)
class Splits:
    """The pictures of a run."""

    train: PictureSet
    val: PictureSet
    num_skipped: int
    """Pictures left out because they cannot be read."""
    source: str
    """Where the pictures come from, in words."""
    notes: tuple[str, ...] = ()
    """What was left out of the source, and why, in a line each."""
