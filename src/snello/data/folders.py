"""Folders of pictures: train/, val/ and test/ with a folder per class, or one folder per class."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from snello.data.reading import EXTENSIONS
from snello.data.sets import FilePictures
from snello.data.source import PARTS, Source
from snello.errors import DataError, listing, printable


class Folder(Source):
    """A folder that exists."""

    same_classes = True

    def __init__(self, root: Path) -> None:
        self.root, self.where, self.title = root, f"--data {printable(root)}", printable(root)
        self.parts = tuple(part for part in PARTS if (root / part).is_dir())

    def read(self, part: str | None, known: Sequence[str] | None = None) -> FilePictures:
        """See `Source`; not every known class needs a folder."""
        return _scan(self.root if part is None else self.root / part, known)

    def called(self, part: str) -> str:
        """With a slash."""
        return f"{part}/"

    def training_part(self) -> str | None:
        """`train/`, where it is there; else the folder holds the class folders itself."""
        return "train" if "train" in self.parts else None


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """Files as they are given, and the pictures in folders and their subfolders, sorted.

    Raises:
        DataError: for a path that does not exist, and for a folder without pictures.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{printable(path)}: no such file or folder")
        files = _files(path) if path.is_dir() else [path]
        if not files:
            raise DataError(f"{printable(path)}: no pictures in it ({' '.join(EXTENSIONS)})")
        found += files
    return found


def _walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Folders from `folder` down, with the sorted names of subfolders and files; none hidden, no links followed."""

    def fail(error: OSError) -> None:
        raise DataError(f"{printable(Path(error.filename))}: {error.strerror}")

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(parent), folders, sorted(name for name in names if not name.startswith("."))


def _files(folder: Path) -> list[Path]:
    """Pictures, told by their extension, in a folder and its subfolders, sorted."""
    found = [parent / name for parent, _, names in _walk(folder) for name in names if name.lower().endswith(EXTENSIONS)]
    return sorted(found, key=lambda path: path.parts)


def _scan(folder: Path, known: Sequence[str] | None = None) -> FilePictures:
    """The pictures in the class folders of `folder`; classes are those `known`, else the folders' sorted names."""
    where = f"--data {printable(folder)}"
    _, names, files = next(_walk(folder))
    if not names:
        pictures = any(name.lower().endswith(EXTENSIONS) for name in files)
        what = "pictures but no class folders" if pictures else "no class folders" if files else "empty"
        raise DataError(f"{where}: {what}; put the pictures of each class in a folder of its own, as in cats/1.jpg")
    classes = names if known is None else list(known)
    if unknown := [name for name in names if name not in classes]:
        raise DataError(f"{where}: class folders unknown to the model: {listing(unknown)}; known: {listing(classes)}")
    of_class = {name: _files(folder / name) for name in names}
    if without := [name for name in names if not of_class[name]]:
        what = "its class folders" if without == names else f"class folder {listing(without)}"
        raise DataError(f"{where}: no pictures in {what} (looked for {' '.join(EXTENSIONS)})")
    labels = {name: classes.index(name) for name in names}
    paths = [path for name in names for path in of_class[name]]
    return FilePictures(paths, [labels[name] for name in names for _ in of_class[name]], classes)
