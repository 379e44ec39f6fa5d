"""Labelled pictures, whatever holds them. They are decoded when asked for, and go to worker processes as they are."""

import contextlib
import copy
import hashlib
import io
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from typing_extensions import override

from snello.data.reading import open_picture
from snello.errors import DataError, printable

P = TypeVar("P", bound="PictureSet")


class PictureSet(ABC):
    """Labelled pictures: `labels[i]`, an index into `classes`, belongs to `open(i)`."""

    classes: tuple[str, ...]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name(self, index: int) -> str:
        """Returns what messages call the picture."""

    @abstractmethod
    def open(self, index: int, *, draft: bool = False) -> Image.Image:
        """Decodes the picture to 8-bit RGB, else a DataError; as a draft, no more than shows whether that works."""

    @abstractmethod
    def file_bytes(self) -> int:
        """Returns the bytes of the pictures' files: what uploading them once would take."""

    def fingerprint(self) -> str:
        """Returns what tells these pictures from others of the same number, without decoding any."""
        return hashlib.blake2b(repr((self.labels, self._marks())).encode(), digest_size=8).hexdigest()

    def _marks(self) -> object:
        """Returns what is known of the pictures in no time, beside their labels."""
        return None

    @abstractmethod
    def _keep(self, indices: Sequence[int]) -> None:
        """Forgets all pictures but these."""

    def subset(self: P, indices: Sequence[int]) -> P:
        """Selects the pictures at `indices`; the classes stay."""
        part = copy.copy(self)
        part.labels = [self.labels[i] for i in indices]
        part._keep(indices)
        return part

    def relabelled(self: P, classes: Sequence[str]) -> P:
        """Makes the labels indices into `classes`, which has all names that are in use here."""
        part = copy.copy(self)
        part.classes = tuple(classes)
        if part.classes != self.classes:
            place = {name: i for i, name in enumerate(part.classes)}
            part.labels = [place[self.classes[label]] for label in self.labels]
        return part

    def counts(self) -> dict[str, int]:
        """Counts the pictures of each class, in the order of the classes."""
        counts = Counter(self.labels)
        return {name: counts[label] for label, name in enumerate(self.classes)}


class FilePictures(PictureSet):
    """Pictures in files."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], classes: Sequence[str]) -> None:
        self.paths, self.labels, self.classes = list(paths), list(labels), tuple(classes)

    @override
    def name(self, index: int) -> str:
        return printable(self.paths[index])

    @override
    def open(self, index: int, *, draft: bool = False) -> Image.Image:
        return open_picture(self.paths[index], draft=draft)

    @override
    def file_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    @override
    def _marks(self) -> object:
        return [path.stat().st_size if path.is_file() else None for path in self.paths]

    @override
    def _keep(self, indices: Sequence[int]) -> None:
        self.paths = [self.paths[i] for i in indices]


class ArrayPictures(PictureSet):
    """Pictures in one array: `images` (N, H, W), grey, or (N, H, W, 3), and `labels` (N,), integers; images uint8."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: Sequence[str], title: str) -> None:
        self.images, self.labels, self.classes, self.title = images, labels.tolist(), tuple(classes), title

    @override
    def name(self, index: int) -> str:
        return f"{self.title} {index}"

    @override
    def open(self, index: int, *, draft: bool = False) -> Image.Image:
        return Image.fromarray(self.images[index]).convert("RGB")

    @override
    def file_bytes(self) -> int:
        total = 0  # as JPEG files of Pillow's default quality
        for image in self.images:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG")
            total += file.tell()
        return total

    @override
    def _marks(self) -> object:
        return zlib.crc32(np.ascontiguousarray(self.images).data)

    @override
    def _keep(self, indices: Sequence[int]) -> None:
        self.images = self.images[list(indices)]


def imbalance(pictures: PictureSet) -> str | None:
    """Returns one line where the largest class has more than twice the pictures of the smallest, else None."""
    counts = pictures.counts()
    largest, smallest = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    if counts[largest] <= 2 * counts[smallest]:
        return None
    without = sum(count == 0 for count in counts.values())
    least = f"{without} without any" if without > 1 else f"{counts[smallest]} of {printable(smallest)}"
    return (
        f"unbalanced classes: {counts[largest]} pictures of {printable(largest)}, {least}; "
        "the balanced accuracy counts each class the same"
    )


def typical_size(pictures: PictureSet, look_at: int = 9) -> tuple[int, int] | None:
    """Returns width and height of a picture in the middle of some, by their shorter sides; None where none opens."""
    places = sorted({number * (len(pictures) - 1) // (look_at - 1) for number in range(look_at)})
    sizes: list[tuple[int, int]] = []
    for index in places:
        with contextlib.suppress(DataError):  # found elsewhere, where that is wanted
            sizes.append(pictures.open(index).size)
    return sorted(sizes, key=min)[len(sizes) // 2] if sizes else None


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
