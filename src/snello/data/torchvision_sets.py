"""torchvision's data sets by name, from files that are already there: nothing is downloaded."""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from snello.data.sets import ArrayPictures, FilePictures, PictureSet
from snello.data.source import Source, with_classes
from snello.errors import DataError, printable

DEFAULT_ROOT = Path("~/.cache/snello/torchvision")


@dataclass(frozen=True)
class Spec:
    """How one set is asked for."""

    cls: str
    """Its class in torchvision.datasets."""
    files: str
    """What is under the root once it has been fetched."""
    parts: Mapping[str, Mapping[str, Any]]
    """The arguments of its parts; of a set without parts, those of the name `all`."""
    contents: Callable[[Any], tuple[Any, Sequence[int]]]
    """Its paths, or its array of pictures, and its labels."""
    num_classes: int = 0
    """Where it does not name its classes, these are numbers."""
    by_hand: str = ""
    """Why it cannot be fetched by torchvision."""


def _loaded(made: Any) -> tuple[list[Any], list[int]]:
    """Of a set that takes a `loader`, which is told to return the paths."""
    pairs = [made[i] for i in range(len(made))]
    return [path for path, _ in pairs], [label for _, label in pairs]


def _samples(made: Any) -> tuple[list[Any], list[int]]:
    return [path for path, _ in made._samples], [label for _, label in made._samples]


def _pets(made: Any) -> tuple[list[Any], list[int]]:
    return made._images, made._labels


def _caltech(name: str) -> Callable[[Any], tuple[list[Any], list[int]]]:
    def contents(made: Any) -> tuple[list[Any], list[int]]:
        made.classes = made.categories
        folder = Path(made.root) / f"{name}_ObjectCategories"
        file = "image_{1:04d}.jpg" if name == "101" else "{0:03d}_{1:04d}.jpg"
        numbers = zip(made.y, made.index, strict=True)
        return [folder / made.categories[y] / file.format(y + 1, i) for y, i in numbers], made.y

    return contents


def _array(made: Any) -> tuple[Any, Any]:
    return np.asarray(made.data), np.asarray(made.targets)


def _channels_first(made: Any) -> tuple[Any, Any]:
    return np.transpose(made.data, (0, 2, 3, 1)), made.labels


def _split(**parts: str) -> dict[str, dict[str, Any]]:
    return {part: {"split": name} for part, name in parts.items()}


_TRAIN_TEST = {"train": {"train": True}, "test": {"train": False}}
_SPLITS = _split(train="train", val="val", test="test")
_TWO = _split(train="train", test="test")
_ALL: dict[str, dict[str, Any]] = {"all": {}}
_GONE = "its address no longer answers; the docstring of torchvision.datasets.StanfordCars names the files"
SETS = {
    "caltech101": Spec("Caltech101", "caltech101/101_ObjectCategories", _ALL, _caltech("101")),
    "caltech256": Spec("Caltech256", "caltech256/256_ObjectCategories", _ALL, _caltech("256")),
    "cifar10": Spec("CIFAR10", "cifar-10-batches-py", _TRAIN_TEST, _array),
    "cifar100": Spec("CIFAR100", "cifar-100-python", _TRAIN_TEST, _array),
    "country211": Spec("Country211", "country211", _split(train="train", val="valid", test="test"), _loaded),
    "dtd": Spec("DTD", "dtd/dtd", _SPLITS, _loaded),
    "eurosat": Spec("EuroSAT", "eurosat/2750", _ALL, _loaded),
    "fashion_mnist": Spec("FashionMNIST", "FashionMNIST/raw", _TRAIN_TEST, _array),
    "fgvc_aircraft": Spec("FGVCAircraft", "fgvc-aircraft-2013b", _SPLITS, _loaded),
    "flowers102": Spec("Flowers102", "flowers-102", _SPLITS, _loaded, num_classes=102),
    "food101": Spec("Food101", "food-101", _TWO, _loaded),
    "gtsrb": Spec("GTSRB", "gtsrb/GTSRB", _TWO, _samples, num_classes=43),
    "kmnist": Spec("KMNIST", "KMNIST/raw", _TRAIN_TEST, _array),
    "mnist": Spec("MNIST", "MNIST/raw", _TRAIN_TEST, _array),
    "oxford_iiit_pet": Spec("OxfordIIITPet", "oxford-iiit-pet", _split(train="trainval", test="test"), _pets),
    "rendered_sst2": Spec("RenderedSST2", "rendered-sst2", _SPLITS, _loaded),
    "stanford_cars": Spec("StanfordCars", "stanford_cars", _TWO, _loaded, by_hand=_GONE),
    "stl10": Spec("STL10", "stl10_binary", _TWO, _channels_first),
    "sun397": Spec("SUN397", "SUN397", _ALL, _loaded),
    "svhn": Spec("SVHN", "train_32x32.mat", _TWO, _channels_first, num_classes=10),
}


def spec_of(text: str) -> Spec | None:
    """Finds the set of that name; case does not matter, nor whether words are joined by - or _."""
    return SETS.get(text.lower().replace("-", "_"))


class TorchvisionSet(Source):
    """One of `SETS`, in the folder `root`."""

    def __init__(self, name: str, spec: Spec, root: Path | None) -> None:
        self.where = f"--data {name}"
        self._spec, self._root = spec, (root or DEFAULT_ROOT).expanduser()
        self.title = f"{spec.cls} in {printable(self._root)}"
        self.parts = () if "all" in spec.parts else tuple(spec.parts)
        if not (self._root / spec.files).exists():
            place = printable(self._root)
            raise DataError(f"{self.where}: there is no {spec.files} in {place}; {self._how_to_fetch()}")

    @override
    def read(self, part: str | None, known: Sequence[str] | None = None) -> PictureSet:
        made = self._make(part or "all")
        contents, labels = self._spec.contents(made)
        labels = [int(label) for label in labels]
        classes = getattr(made, "classes", None) or [str(i) for i in range(self._spec.num_classes)]
        if isinstance(contents, np.ndarray):
            title = f"{self._spec.cls} {part}"
            pictures: PictureSet = ArrayPictures(contents, np.asarray(labels), classes, title)
        else:
            pairs = sorted(zip(map(Path, contents), labels, strict=True))  # some are listed in the file system's order
            pictures = FilePictures([path for path, _ in pairs], [label for _, label in pairs], classes)
        return with_classes(pictures, known, self.where)

    def _make(self, part: str) -> Any:
        from torchvision import datasets

        options = {**self._spec.parts[part]}
        if self._spec.contents is _loaded:
            options["loader"] = lambda path: path
        try:
            return getattr(datasets, self._spec.cls)(str(self._root), **options)
        except Exception as error:  # whatever its files make it raise
            line = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, ImportError) or "scipy" in line.lower():
                raise DataError(f"{self.where}: needs the package scipy: pip install scipy") from None
            what = f"its files in {printable(self._root)} are incomplete or damaged ({printable(line[:200])})"
            raise DataError(f"{self.where}: {what}; {self._how_to_fetch()}") from None

    def _how_to_fetch(self) -> str:
        if self._spec.by_hand:
            return f"{self._spec.by_hand}; or name their folder with --data-root"
        root, calls = json.dumps(str(self._root)), []
        for options in self._spec.parts.values():
            # In double quotes, for the shell's are single.
            arguments = "".join(f", {name}={value!r}".replace("'", '"') for name, value in options.items())
            calls.append(f"{self._spec.cls}({root}{arguments}, download=True)")
        code = shlex.quote(f"from torchvision.datasets import {self._spec.cls}; {'; '.join(calls)}")
        return f"nothing is downloaded: fetch it with python -c {code}, or name its folder with --data-root"
