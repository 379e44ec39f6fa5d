"""Tables that list pictures: CSV, TSV or Parquet with a column of paths, one of labels, and perhaps one of parts."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import override

from snello.config import ColumnsConfig
from snello.data.sets import FilePictures
from snello.data.source import PART_NAMES, PARTS, Source, with_classes
from snello.errors import DataError, listing, printable

SUFFIXES = (".csv", ".tsv", ".parquet")
IMAGE_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path", "img", "img_path")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "class_name", "target", "category")
SPLIT_COLUMNS = ("split",)
HF_EXTRA = "pip install 'snello[hf]'"


@dataclass(frozen=True)
class _Row:
    path: Path
    label: str
    part: str | None


class Table(Source):
    """A table; relative paths in it are relative to its own folder."""

    def __init__(self, path: Path, columns: ColumnsConfig) -> None:
        self.where, self.title = f"--data {printable(path)}", printable(path)
        if not path.is_file():
            raise DataError(f"{self.where}: {'is not a regular file' if path.exists() else 'no such file'}")
        header, rows = _parquet(path, self.where) if path.suffix.lower() == ".parquet" else _csv(path, self.where)
        image = require_column(self.where, header, IMAGE_COLUMNS, columns.image, "image")
        label = require_column(self.where, header, LABEL_COLUMNS, columns.label, "label")
        split = find_column(self.where, header, SPLIT_COLUMNS, columns.split, "split")
        self._rows: list[_Row] = []
        for number, values in rows:
            where = f"{self.where}, row {number}"
            file = text_of(values.get(image), where, "path", image)
            name = "" if split is None else text_of(values.get(split), where, "split", split)
            part = PART_NAMES.get(name.lower())
            if name and part is None:
                known = ", ".join(PARTS)
                raise DataError(f"{where}: unknown split {printable(name)!r} in column {split}; known: {known}")
            self._rows.append(_Row(path.parent / file, text_of(values.get(label), where, "label", label), part))
        if not self._rows:
            raise DataError(f"{self.where}: no rows in it")
        self.parts = tuple(part for part in PARTS if any(row.part == part for row in self._rows))

    @override
    def read(self, part: str | None, known: Sequence[str] | None = None) -> FilePictures:
        rows = [row for row in self._rows if part is None or row.part == part]
        pictures = FilePictures([row.path for row in rows], *indexed([row.label for row in rows]))
        return with_classes(pictures, known, self.where)


def find_column(where: str, header: Sequence[str], usual: Sequence[str], given: str | None, what: str) -> str | None:
    """Finds the given column (a DataError without it), else the first of the usual names in any case, else None."""
    if given is not None:
        if given not in header:
            raise DataError(f"{where}: no column {printable(given)!r} (--columns.{what}); {_there_are(header)}")
        return given
    lower = {name.strip().lower(): name for name in reversed(header)}
    return next((lower[name] for name in usual if name in lower), None)


def require_column(where: str, header: Sequence[str], usual: Sequence[str], given: str | None, what: str) -> str:
    """Finds a column as `find_column` does; a DataError where there is none."""
    found = find_column(where, header, usual, given, what)
    if found is None:
        raise DataError(
            f"{where}: no column is known to be the {what} (looked for {', '.join(usual)}); {_there_are(header)}: "
            f"name it with --columns.{what}"
        )
    return found


def _there_are(header: Sequence[str]) -> str:
    return f"there are {listing(header, 12)}" if header else "there are none"


def text_of(value: Any, where: str, what: str, column: str) -> str:
    """Makes a cell text, whole numbers without a point; a DataError for an empty cell, and for anything else."""
    if isinstance(value, float) and value.is_integer():  # what pandas makes of integers beside missing ones
        value = int(value)
    if text := str(value).strip() if isinstance(value, (str, int)) else "":
        return text
    empty = value is None or value == "" or isinstance(value, str) or value != value
    got = f"no {what}" if empty else f"{what} {printable(str(value))}"
    raise DataError(f"{where}: {got} in column {printable(column)}")


def indexed(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Makes names labels: indices into the classes, sorted by name, or as numbers where all are whole numbers."""
    numbers = all(name.isdecimal() for name in names)
    classes = sorted(set(names), key=lambda name: (int(name) if numbers else 0, name))
    place = {name: i for i, name in enumerate(classes)}
    return [place[name] for name in names], classes


def _csv(path: Path, where: str) -> tuple[list[str], Iterator[tuple[int, dict[str, Any]]]]:
    """Reads header and numbered rows; lines count from 1 with the header, as editors do."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{where}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DataError(f"{where}: is not UTF-8 text; save it as UTF-8") from None
    lines = io.StringIO(text).readlines()  # str.splitlines would break at other characters too
    first = lines[0] if lines else ""
    delimiter = max(",;\t", key=first.count)  # the first of those that are as frequent
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if any(row.values())]
    except csv.Error as error:
        raise DataError(f"{where}, row {reader.line_num}: {error}") from None
    return [name for name in reader.fieldnames or [] if name], iter(rows)


def _parquet(path: Path, where: str) -> tuple[list[str], Iterator[tuple[int, dict[str, Any]]]]:
    """Reads header and numbered rows, from 1."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{where}: reading Parquet needs pyarrow: {HF_EXTRA}") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{where}: cannot be read as Parquet: {' '.join(str(error).split())}") from None
    names = [field.name for field in table.schema if not pyarrow.types.is_nested(field.type)]
    return names, iter(enumerate(table.select(names).to_pylist(), 1))
