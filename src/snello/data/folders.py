"""Folders of pictures: a folder per class, or folders for train, val and test that each hold a folder per class.

Names of parts go by `PART_NAMES`, in any case. What is left out is counted, by its kind and the reason.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from typing_extensions import override

from snello.data.reading import extension_of, has_picture_name, reason_against
from snello.data.sets import FilePictures
from snello.data.source import PARTS, Source, left_out_beside, parts_among
from snello.errors import DataError, listing, printable

JUNK = ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information")
"""What systems leave behind, beside hidden files; in lower case."""
IRREGULAR = "not regular files (pipes, sockets, devices, broken links)"


class Omissions(Counter[tuple[str, str]]):
    """How many files are left out, by (kind, reason)."""

    def add(self, name: str, reason: str) -> None:
        """Counts a file; its kind is its extension, where that looks like one."""
        kind = extension_of(name)
        self[kind if kind[1:].isalnum() and not kind[1:].isdecimal() else "without extension", reason] += 1

    def lines(self, most: int = 8) -> list[str]:
        """Makes a line of each kind and reason, the most frequent first."""
        listed = [f"{count} {kind}: {reason}" for (kind, reason), count in self.most_common(most)]
        more = self.total() - sum(count for _, count in self.most_common(most))
        return [f"left out: {line}" for line in [*listed, *([f"{more} more of other kinds"] if more else [])]]

    def __str__(self) -> str:
        return "; ".join(self.lines()).replace("; left out: ", "; ")


class Folder(Source):
    """A folder that exists; a DataError where two of its folders mean the same part."""

    same_classes = True

    def __init__(self, root: Path) -> None:
        self.root, self.where, self.title = root, f"--data {printable(root)}", printable(root)
        self._omissions: dict[Path, Omissions] = {}
        folders, files = _visible(root)
        names = [entry.name for entry in folders]
        self._folders = parts_among(names, self.where)
        if list(self._folders) == ["train"] and _are_class_folders(folders):
            name = self._folders.pop("train")
            others = listing([other for other in names if other != name], 3)
            self.remarks = (f"{name}/ is taken for a class: it holds pictures, not class folders, as {others} do",)
        elif not self._folders and (held := _same_folders(folders)):
            what = f"class folders {listing(names)} all hold {listing(held)}"
            self.remarks = (f"{what}: if they are parts, name them train and val",)
        self.parts = tuple(part for part in PARTS if part in self._folders)
        self._others = [name for name in names if name not in self._folders.values()]
        self.remarks += left_out_beside("folder", names, [self._folders[part] for part in self.parts])
        if self.parts:
            self._omissions[root] = _loose(files)

    @property
    @override
    def notes(self) -> tuple[str, ...]:
        omissions = Omissions()
        for counted in self._omissions.values():
            omissions += counted
        return (*self.remarks, *omissions.lines())

    @override
    def read(self, part: str | None, known: Sequence[str] | None = None) -> FilePictures:
        if part is None and self.parts:  # all there is
            part = "train"
        folder = self.root if part is None else self.root / self._folders[part]
        where, (folders, files) = f"--data {printable(folder)}", _visible(folder)
        names, loose = [entry.name for entry in folders], _loose(files)
        if not names:
            what = "pictures but no class folders" if loose else "no class folders" if files else "empty"
            raise DataError(f"{where}: {what}; put the pictures of each class in a folder of its own, as in cats/1.jpg")
        classes = names if known is None else list(known)
        if unknown := [name for name in names if name not in classes]:
            text = f"class folders unknown to the model: {listing(unknown)}; known: {listing(classes)}"
            raise DataError(f"{where}: {text}")
        self._omissions[folder] = omissions = loose
        of_class = {name: _pictures(folder / name, omissions) for name in names}
        if without := [name for name in names if not of_class[name]]:
            what = "its class folders" if without == names else f"class folder {listing(without)}"
            raise DataError(f"{where}: no pictures in {what}{f' ({omissions})' if omissions else ''}")
        labels = [classes.index(name) for name in names for _ in of_class[name]]
        return FilePictures([path for paths in of_class.values() for path in paths], labels, classes)

    @override
    def part_name(self, part: str) -> str:
        return f"{printable(self._folders.get(part, part))}/"

    @override
    def training_part(self) -> str | None:
        try:
            return super().training_part()
        except DataError as error:
            if not self._others:
                raise
            what = f"put the class folders ({listing(self._others)}) into train/"
            names = " and ".join(map(self.part_name, self.parts))
            raise DataError(f"{error}; {what}, or rename {names} if it is a class") from None


def find_pictures(paths: Sequence[Path]) -> tuple[list[Path], tuple[str, ...]]:
    """Finds the pictures in folders and their subfolders, sorted, beside files as given; and names what it leaves out.

    Raises:
        DataError: for a path that does not exist, and for a folder without pictures.
    """
    found: list[Path] = []
    omissions = Omissions()
    for path in paths:
        if not path.exists():
            raise DataError(f"{printable(path)}: no such file or folder")
        own = Omissions()
        files = _pictures(path, own) if path.is_dir() else [path]
        if not files:
            raise DataError(f"{printable(path)}: no pictures in it{f' ({own})' if own else ''}")
        found += files
        omissions += own
    return found, tuple(omissions.lines())


def _visible(folder: Path) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
    """Lists folders, linked ones too, and other entries of a folder, sorted, but neither hidden ones nor junk."""
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if entry.name[0] != "." and entry.name.lower() not in JUNK]
    except OSError as error:
        raise DataError(f"{printable(folder)}: {error.strerror}") from None
    folders: list[os.DirEntry[str]] = []
    others: list[os.DirEntry[str]] = []
    for entry in sorted(entries, key=lambda entry: entry.name):
        is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
        (folders if is_folder else others).append(entry)
    return folders, others


def _pictures(folder: Path, omissions: Omissions) -> list[Path]:
    """Finds the pictures in a folder and its subfolders, sorted; follows no links to folders."""
    found: list[Path] = []
    waiting = [folder]
    while waiting:
        parent = waiting.pop()
        folders, files = _visible(parent)
        for entry in folders:
            if entry.is_symlink():
                omissions["linked folders", "not followed"] += 1
            else:
                waiting.append(parent / entry.name)
        for entry in files:
            if reason := IRREGULAR if not _is_regular(entry) else reason_against(entry.path):
                omissions.add(entry.name, reason)
            else:
                found.append(parent / entry.name)
    return sorted(found, key=lambda path: path.parts)


def _is_regular(entry: os.DirEntry[str]) -> bool:
    return os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()


def _loose(files: Sequence[os.DirEntry[str]]) -> Omissions:
    """Counts the files with names of pictures that lie where class folders should be."""
    return Omissions((extension_of(e.name), "in no class folder") for e in files if has_picture_name(e.name))


def _are_class_folders(folders: Sequence[os.DirEntry[str]]) -> bool:
    """Says whether three or more folders hold pictures and no folders; two may be train and test without labels."""
    inside = [_visible(Path(entry.path)) for entry in folders]
    return len(inside) > 2 and all(not deeper and _loose(files) for deeper, files in inside)


def _same_folders(folders: Sequence[os.DirEntry[str]]) -> list[str]:
    """Returns the names of the folders that each of a few folders holds, where these are the same, as parts have."""
    if not 2 <= len(folders) <= 4:
        return []
    first, *others = [[entry.name for entry in _visible(Path(folder.path))[0]] for folder in folders]
    return first if len(first) > 1 and all(names == first for names in others) else []
