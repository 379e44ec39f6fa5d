"""Hugging Face datasets: folders on this machine, and what is in the local cache. Nothing is downloaded."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from typing_extensions import override

from snello.config import ColumnsConfig
from snello.data.reading import UNREADABLE, open_picture
from snello.data.sets import PictureSet
from snello.data.source import PARTS, Source, left_out_beside, parts_among, with_classes
from snello.data.tables import HF_EXTRA, IMAGE_COLUMNS, LABEL_COLUMNS, indexed, require_column, text_of
from snello.errors import DataError, listing, printable

PREFIX = "hf:"


class HfPictures(PictureSet):
    """Rows of a dataset; the picture of a row is decoded when it is asked for."""

    def __init__(self, dataset: Any, column: str, labels: Sequence[int], classes: Sequence[str], title: str) -> None:
        from datasets import Image as ImageFeature

        self.labels, self.classes, self.title = list(labels), tuple(classes), title
        self._column, self._rows = column, list(range(len(self.labels)))
        self._dataset = dataset.select_columns([column]).cast_column(column, ImageFeature(decode=False))

    @override
    def name(self, index: int) -> str:
        return f"{self.title} row {self._rows[index]}"

    @override
    def open(self, index: int, *, draft: bool = False) -> Image.Image:
        value = self._dataset[self._rows[index]][self._column] or {}
        if value.get("bytes") is not None:
            return open_picture(value["bytes"], self.name(index), draft=draft)
        if value.get("path") is None:
            raise DataError(f"{self.name(index)}: {UNREADABLE}: there is none in this row")
        return open_picture(Path(value["path"]), draft=draft)

    @override
    def file_bytes(self) -> int:
        values = (self._dataset[row][self._column] for row in self._rows)
        return sum(len(v["bytes"]) if v["bytes"] is not None else Path(v["path"]).stat().st_size for v in values)

    @override
    def _keep(self, indices: Sequence[int]) -> None:
        self._rows = [self._rows[i] for i in indices]


class HfDataset(Source):
    """A dataset by its folder, written by `save_to_disk` or as `load_dataset` reads it, or its name in the cache."""

    def __init__(self, text: str, columns: ColumnsConfig) -> None:
        self.where, self.title = f"--data {PREFIX}{printable(text)}", f"{PREFIX}{printable(text)}"
        if not text:
            raise DataError(f"{self.where}: a folder or a name is missing")
        try:
            import datasets
        except ImportError:
            raise DataError(f"{self.where}: needs the package datasets: {HF_EXTRA}") from None
        self._columns = columns
        loaded = _load(text, self.where)
        splits: dict[str, Any] = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
        names = parts_among(splits, self.where)
        self._parts = {part: splits[name] for part, name in names.items()}
        self._only = next(iter(splits.values())) if len(splits) == 1 else None
        if self._only is None and not self._parts:
            raise DataError(f"{self.where}: no split is called train, val or test; there are {listing(list(splits))}")
        self.parts = tuple(part for part in PARTS if part in self._parts)
        self.remarks = left_out_beside("split", list(splits), [names[part] for part in self.parts])

    @override
    def read(self, part: str | None, known: Sequence[str] | None = None) -> HfPictures:
        dataset = self._only if part is None else self._parts[part]
        if dataset is None:
            raise DataError(f"{self.where}: only {', '.join(self.parts)}, and none to evaluate on")
        image, (labels, classes) = self._image_column(dataset), self._labels(dataset)
        title = self.title if part is None else f"{self.title} {part}"
        return with_classes(HfPictures(dataset, image, labels, classes, title), known, self.where)

    def _image_column(self, dataset: Any) -> str:
        import datasets

        found = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        if not found:
            columns = [f"{name} ({type(feature).__name__})" for name, feature in dataset.features.items()]
            raise DataError(f"{self.where}: no column holds pictures; there are {listing(columns, 12)}")
        if len(found) == 1 and self._columns.image is None:
            return str(found[0])
        return require_column(self.where, found, IMAGE_COLUMNS, self._columns.image, "image")

    def _labels(self, dataset: Any) -> tuple[list[int], list[str]]:
        """Finds the label of every row, and the names of the classes."""
        import datasets

        named = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
        if len(named) == 1 and self._columns.label is None:
            column = named[0]
        else:
            candidates = list(dataset.features) if self._columns.label is not None or not named else named
            column = require_column(self.where, candidates, LABEL_COLUMNS, self._columns.label, "label")
        values = list(dataset.select_columns([column]).with_format(None)[:][column])
        if column not in named:
            return indexed([text_of(v, f"{self.where}, row {i}", "label", column) for i, v in enumerate(values)])
        classes = list(dataset.features[column].names)
        for i, value in enumerate(values):
            if value is None or not 0 <= value < len(classes):
                raise DataError(f"{self.where}, row {i}: no label in column {column} ({value})")
        return values, classes


def _load(text: str, where: str) -> Any:
    """Loads the Dataset or DatasetDict that `PATH_OR_NAME[:CONFIG]` names."""
    import datasets

    name, colon, config = (text, "", "") if Path(text).exists() else text.rpartition(":")
    name, config = (name, config) if colon else (text, "")
    folder = Path(name)
    try:
        with _offline():
            if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
                return datasets.load_from_disk(name)
            if not folder.exists() and (folder.is_absolute() or name.count("/") > 1 or name.startswith(".")):
                raise DataError(f"{where}: no such folder")
            return datasets.load_dataset(name, config or None)
    except DataError:
        raise
    except Exception as error:  # the package, its cache, its readers: each raises its own
        line = " ".join(str(error).split()) or type(error).__name__
        if folder.exists():
            raise DataError(f"{where}: cannot be loaded: {printable(line[:300])}") from None
        arguments = f'"{name}"' + (f', "{config}"' if config else "")
        raise DataError(
            f"{where}: no such folder, and not in the local cache ({printable(line[:160])}); nothing is downloaded: on "
            f"a machine with a connection run python -c 'from datasets import load_dataset; "
            f'load_dataset({arguments}).save_to_disk("FOLDER")\', copy FOLDER here and use --data {PREFIX}FOLDER'
        ) from None


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Makes the package look on this machine only, and be quiet."""
    import datasets
    from datasets.utils import logging

    before, verbosity = datasets.config.HF_HUB_OFFLINE, logging.get_verbosity()
    bars = datasets.utils.are_progress_bars_disabled()
    datasets.config.HF_HUB_OFFLINE = True
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
        logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()
