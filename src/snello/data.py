"""Pictures: found on disk or shipped with snello, checked, and split. `snello.loading` makes batches of them.

The split is a pure function of the files and the seed.
"""

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from snello.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# fmt: off
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)
# fmt: on
_SPLIT = 0x73706C6974  # keeps the seeds of the split apart from those of order and augmentation


# ---------------------------------------------------------------------------------------------- reading a picture


def open_picture(path: Path, *, draft: bool = False) -> Image.Image:
    """The picture in a file as 8-bit RGB, turned as its EXIF tag says, transparent parts on white.

    Args:
        path: The file; its contents decide the format, not its name.
        draft: Decode a JPEG at an eighth of its size, which is enough to find out whether it can be read.

    Raises:
        DataError: naming the file and the reason, where it cannot be read.
    """
    try:
        with Image.open(path) as image:
            if draft:
                image.draft(None, (1, 1))
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except Exception as error:  # on damaged files Pillow raises almost anything: OSError, SyntaxError, struct.error...
        raise DataError(f"{_shown(path)}: cannot be read as a picture: {_reason(path, error)}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):  # convert() would clip at 255 what goes up to 65535
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels outside 0..65535; save it with 8 or 16 bits")
        return Image.fromarray(((values.astype(np.int64) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image.convert("RGB")


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a known picture format" if path.stat().st_size else "the file is empty"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _shown(path: Path) -> str:
    """The path as it can be printed on one line, whatever bytes it is made of."""
    return "".join(char if char.isprintable() else "?" for char in str(path))


# ------------------------------------------------------------------------------------------------ sets of pictures


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
    def file_bytes(self) -> int:
        """What uploading the pictures once would take: the bytes of their files."""


class FolderPictures(PictureSet):
    """Pictures in files."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], classes: Sequence[str]) -> None:
        self.paths, self.labels, self.classes = list(paths), list(labels), tuple(classes)

    def name(self, index: int) -> str:
        """The path."""
        return _shown(self.paths[index])

    def open(self, index: int) -> Image.Image:
        """See `open_picture`."""
        return open_picture(self.paths[index])

    def file_bytes(self) -> int:
        """The sizes of the files."""
        return sum(path.stat().st_size for path in self.paths)

    def subset(self, indices: Sequence[int]) -> "FolderPictures":
        """The pictures at `indices`, with the same classes."""
        return FolderPictures([self.paths[i] for i in indices], [self.labels[i] for i in indices], self.classes)


class ArrayPictures(PictureSet):
    """Grey pictures in one array: `images` (N, H, W) and `labels` (N,), both uint8."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: Sequence[str], title: str) -> None:
        self.images, self.labels, self.classes, self.title = images, labels.tolist(), tuple(classes), title

    def name(self, index: int) -> str:
        """Title and number."""
        return f"{self.title} {index}"

    def open(self, index: int) -> Image.Image:
        """The picture, its grey repeated in the three channels."""
        return Image.fromarray(self.images[index]).convert("RGB")

    def file_bytes(self) -> int:
        """The sizes they would have as JPEG files of Pillow's default quality."""
        total = 0
        for image in self.images:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG")
            total += file.tell()
        return total


@dataclass(frozen=True)
class Splits:
    """The pictures of a run."""

    train: PictureSet
    val: PictureSet
    num_skipped: int
    """Pictures left out because they cannot be read."""
    source: str
    """Where the pictures come from, in words."""


# ---------------------------------------------------------------------------------------------- finding pictures


def load_splits(root: Path | None, *, val_share: float, seed: int, skip_bad: bool, check: bool) -> Splits:
    """The training and held-out pictures in a folder, or those shipped with snello if `root` is None.

    With `train/` in the folder, that and `val/`, else `test/`; with neither of these, or where `root` holds the class
    folders itself, `val_share` of every class is held out (at least one picture, never all).

    Args:
        root: The folder.
        val_share: Share of each class to hold out, in (0, 1).
        seed: Seed of the split.
        skip_bad: Leave out and count the pictures that cannot be read; they are looked for whatever `check` says.
        check: Decode every picture once.

    Raises:
        DataError: where the folder, or a picture that is checked, cannot be used.
    """
    if root is None:
        return _shipped()
    _require_folder(root)
    folder = root / "train" if (root / "train").is_dir() else root
    held_out = None if folder == root else next((root / n for n in ("val", "test") if (root / n).is_dir()), None)
    train = _scan(folder)
    if len(train.classes) < 2:
        raise DataError(f"--data {_shown(folder)}: only one class folder ({train.classes[0]}); two or more are needed")
    if held_out is None:
        (pictures,), num_skipped = _check([train], skip_bad, check)
        source = f"{_shown(folder)}, {val_share:.0%} of each class held out"
        return Splits(*_hold_out(pictures, folder, val_share, seed), num_skipped, source)
    val = _scan(held_out)
    _require_same_classes(root, train, val, held_out.name)
    (train, val), num_skipped = _check([train, val], skip_bad, check)
    return Splits(train, val, num_skipped, f"{_shown(root)}, train/ and {held_out.name}/")


def load_pictures(root: Path, classes: Sequence[str], *, skip_bad: bool, check: bool) -> tuple[PictureSet, int]:
    """Labelled pictures of known classes, and how many were left out: `val/` or `test/` of `root`, else `root` itself.

    Not every class needs a folder; labels are indices into `classes`.

    Raises:
        DataError: where the folder, or a picture that is checked, cannot be used, or a class folder is not known.
    """
    _require_folder(root)
    folder = next((root / name for name in ("val", "test") if (root / name).is_dir()), root)
    (pictures,), num_skipped = _check([_scan(folder, classes)], skip_bad, check)
    return pictures, num_skipped


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """Files as they are given, and the pictures in folders and their subfolders, sorted.

    Raises:
        DataError: for a path that does not exist, and for a folder without pictures.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{_shown(path)}: no such file or folder")
        files = _files(path) if path.is_dir() else [path]
        if not files:
            raise DataError(f"{_shown(path)}: no pictures in it ({' '.join(EXTENSIONS)})")
        found += files
    return found


def _shipped() -> Splits:
    file = resources.files("snello") / "assets" / "fashion_mnist.npz"
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        train, val = (
            ArrayPictures(arrays[f"{part}_images"], arrays[f"{part}_labels"], FASHION_CLASSES, f"Fashion-MNIST {part}")
            for part in ("train", "test")
        )
    return Splits(train, val, 0, f"Fashion-MNIST, the {len(train) + len(val)} pictures that ship with snello")


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        what = "is a file; a folder is needed" if folder.exists() else "no such folder"
        raise DataError(f"--data {_shown(folder)}: {what}")


def _walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Folders from `folder` down, with the sorted names of subfolders and files; none hidden, no links followed."""

    def fail(error: OSError) -> None:
        raise DataError(f"{_shown(Path(error.filename))}: {error.strerror}")

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(parent), folders, sorted(name for name in names if not name.startswith("."))


def _files(folder: Path) -> list[Path]:
    """Pictures, told by their extension, in a folder and its subfolders, sorted."""
    found = [parent / name for parent, _, names in _walk(folder) for name in names if name.lower().endswith(EXTENSIONS)]
    return sorted(found, key=lambda path: path.parts)


def _scan(folder: Path, known: Sequence[str] | None = None) -> FolderPictures:
    """The pictures in the class folders of `folder`; classes are those `known`, else the folders' sorted names."""
    where = f"--data {_shown(folder)}"
    _, names, files = next(_walk(folder))
    if not names:
        pictures = any(name.lower().endswith(EXTENSIONS) for name in files)
        what = "pictures but no class folders" if pictures else "no class folders" if files else "empty"
        raise DataError(f"{where}: {what}; put the pictures of each class in a folder of its own, as in cats/1.jpg")
    classes = names if known is None else list(known)
    if unknown := [name for name in names if name not in classes]:
        raise DataError(f"{where}: class folders unknown to the model: {_some(unknown)}; known: {_some(classes)}")
    of_class = {name: _files(folder / name) for name in names}
    if without := [name for name in names if not of_class[name]]:
        what = "its class folders" if without == names else f"class folder {_some(without)}"
        raise DataError(f"{where}: no pictures in {what} (looked for {' '.join(EXTENSIONS)})")
    labels = {name: classes.index(name) for name in names}
    paths = [path for name in names for path in of_class[name]]
    return FolderPictures(paths, [labels[name] for name in names for _ in of_class[name]], classes)


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(_shown(Path(name)) for name in names[:most]) + more


def _require_same_classes(root: Path, train: PictureSet, val: PictureSet, val_name: str) -> None:
    sides = (("train", train, val), (val_name, val, train))
    only = [(name, [c for c in here.classes if c not in there.classes]) for name, here, there in sides]
    if differences := [f"only in {name}/: {_some(classes)}" for name, classes in only if classes]:
        raise DataError(f"--data {_shown(root)}: train/ and {val_name}/ differ in classes, {'; '.join(differences)}")


def _hold_out(
    pictures: FolderPictures, folder: Path, val_share: float, seed: int
) -> tuple[FolderPictures, FolderPictures]:
    """Every class split at random, in proportion, with at least one picture on either side."""
    of_class: list[list[int]] = [[] for _ in pictures.classes]
    for index, label in enumerate(pictures.labels):
        of_class[label].append(index)
    held_out: set[int] = set()
    for label, indices in enumerate(of_class):
        if len(indices) < 2:
            raise DataError(
                f"--data {_shown(folder)}: class {pictures.classes[label]} has only one picture; "
                "to hold some out each class needs two or more, or there must be a train/ and a val/ folder"
            )
        num_val = min(max(round(val_share * len(indices)), 1), len(indices) - 1)
        order = permutation(len(indices), mix(_SPLIT, seed, label))
        held_out.update(indices[i] for i in order[:num_val])
    everything = range(len(pictures))
    return pictures.subset([i for i in everything if i not in held_out]), pictures.subset(sorted(held_out))


def _check(sets: Sequence[FolderPictures], skip_bad: bool, check: bool) -> tuple[list[FolderPictures], int]:
    """The sets without the pictures that cannot be read, and their number; a DataError for one if not `skip_bad`."""
    if not (check or skip_bad):
        return list(sets), 0
    paths = [path for pictures in sets for path in pictures.paths]
    reasons = _failures(paths)
    first = next(iter(reasons.values()), "")
    if reasons and not skip_bad:
        raise DataError(f"{first} ({len(reasons)} of {len(paths)} pictures cannot be read; --skip-bad leaves them out)")
    kept = [pictures.subset([i for i, p in enumerate(pictures.paths) if p not in reasons]) for pictures in sets]
    for before, after in zip(sets, kept, strict=True):
        if lost := sorted(set(before.labels) - set(after.labels)):
            names = _some([before.classes[label] for label in lost])
            raise DataError(f"no picture of class {names} can be read ({len(reasons)} bad ones in all, first {first})")
    return kept, len(reasons)


def _failures(paths: Sequence[Path]) -> dict[Path, str]:
    """Why pictures cannot be read, in the order of `paths`; only the bad ones."""

    def failure(path: Path) -> str | None:
        try:
            open_picture(path, draft=True)
        except DataError as error:
            return str(error)
        return None

    Image.init()  # Pillow registers formats lazily, and threads that do so at once may miss some
    reasons: dict[Path, str] = {}
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), 1024):  # in parts, to be stopped by Ctrl-C and to hold few futures
            part = paths[start : start + 1024]
            reasons.update((path, text) for path, text in zip(part, pool.map(failure, part), strict=True) if text)
    return reasons


def mix(*values: int) -> int:
    """One number in [0, 2**63) from several, in this order: the finalizer of splitmix64 after adding each in turn.

    Neighbouring values give unrelated results, also in the low 32 bits, the only ones torch's CPU generator uses.
    """
    mask, state = 2**64 - 1, 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def permutation(num: int, seed: int) -> list[int]:
    """The numbers 0..num-1 in an order drawn from `seed`."""
    order: list[int] = torch.randperm(num, generator=torch.Generator().manual_seed(seed)).tolist()
    return order
