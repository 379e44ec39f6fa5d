"""From the text of --data to the pictures of a run: which to train on, which to hold out.

Order and split are pure functions of the source and the seed.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from snello.config import ColumnsConfig, FinetuneConfig
from snello.data.checking import without_bad
from snello.data.folders import Folder
from snello.data.hf_datasets import PREFIX, HfDataset
from snello.data.sets import P, PictureSet, Splits
from snello.data.shipped import Shipped
from snello.data.source import Source
from snello.data.tables import SUFFIXES, Table
from snello.data.torchvision_sets import SETS, TorchvisionSet, spec_of
from snello.errors import DataError, listing, printable
from snello.seeds import mix, permutation

_SPLIT = 0x73706C6974  # keeps the seeds of the split apart from those of order and augmentation


def find_source(text: str | Path | None, columns: ColumnsConfig | None = None, data_root: Path | None = None) -> Source:
    """Finds the source that --data names; None are the pictures that ship with snello.

    What exists as a file or folder wins over a torchvision set of that name.

    Raises:
        DataError: for a source that there is not, listing what there is.
    """
    if text is None:
        return Shipped()
    text = os.fspath(text)
    if "://" in text:
        what = "is an address, and nothing is downloaded: fetch the pictures, and name their folder or table"
        raise DataError(f"--data {printable(text)}: {what}")
    if text.startswith(PREFIX):
        return HfDataset(text.removeprefix(PREFIX), columns or ColumnsConfig())
    path = Path(text)
    if path.is_dir():
        return Folder(path)
    if path.suffix.lower() in SUFFIXES:
        return Table(path, columns or ColumnsConfig())
    if path.exists():
        raise DataError(f"--data {printable(text)}: is a file; a folder or a table ({' '.join(SUFFIXES)}) is needed")
    if (spec := spec_of(text)) is not None:
        return TorchvisionSet(text, spec, data_root)
    raise DataError(
        f"--data {printable(text)}: no such folder or file; a source is a folder, a table ({' '.join(SUFFIXES)}), "
        f"{PREFIX}PATH_OR_NAME, or a torchvision set: {', '.join(sorted(SETS))}"
    )


def splits_of(config: FinetuneConfig, *, skip_bad: bool | None = None, check: bool | None = None) -> Splits:
    """Finds the training and held-out pictures of a run as its config says; `skip_bad` and `check` may differ.

    Where the source has a train part, that and val, else test; with neither of these, or without parts, `val_share` of
    every class is held out (at least one picture, never all).

    Args:
        config: Of the run.
        skip_bad: Leave out and count the pictures that cannot be read; they are looked for whatever `check` says.
        check: Decode every picture once.

    Raises:
        DataError: where the source, or a picture that is checked, cannot be used.
    """
    skip_bad = config.skip_bad if skip_bad is None else skip_bad
    check = config.check_pictures if check is None else check
    found = find_source(config.data, config.columns, config.data_root)
    part = found.training_part()
    held_out = None if part is None else found.held_out_part()
    train = found.read(part)
    if len(train.classes) < 2:
        where = found.where if part is None else f"{found.where}, {found.part_name(part)}"
        raise DataError(f"{where}: only one class ({listing(train.classes)}); two or more are needed")
    if part is None or held_out is None:
        (pictures,), num_skipped = without_bad([train], skip_bad, check)
        title = found.title if part is None else f"{found.title}, {found.part_name(part)}"
        title += f", {config.val_share:.0%} of each class held out"
        train, val = _hold_out(pictures, found.where, config.val_share, config.seed)
        return Splits(train, val, num_skipped, title, found.notes)
    val = found.read(held_out)
    _require_same_classes(found, part, train, held_out, val)
    (train, val), num_skipped = without_bad([train, val.relabelled(train.classes)], skip_bad, check)
    title = f"{found.title}, {found.part_name(part)} and {found.part_name(held_out)}"
    return Splits(train, val, num_skipped, title, found.notes)


def load_pictures(
    source: str | Path | None,
    classes: Sequence[str],
    *,
    skip_bad: bool,
    check: bool,
    part: str | None = None,
    columns: ColumnsConfig | None = None,
    data_root: Path | None = None,
) -> tuple[PictureSet, int, tuple[str, ...]]:
    """Finds pictures of known classes; returns also how many bad ones are left out, and notes as in `Splits`.

    Labels are indices into `classes`, not all of which need pictures. The part defaults to val, else test, else all
    pictures.

    Raises:
        DataError: where the source, or a picture that is checked, cannot be used, or a class is not known.
    """
    found = find_source(source, columns, data_root)
    if part is not None and part not in found.parts:
        raise DataError(f"{found.where}: there is no {part} part; there is {', '.join(found.parts) or 'only one part'}")
    pictures = found.read(part or found.held_out_part(), classes)
    (pictures,), num_skipped = without_bad([pictures], skip_bad, check)
    return pictures, num_skipped, found.notes


def _require_same_classes(source: Source, part: str, train: PictureSet, held_out: str, val: PictureSet) -> None:
    """Refuses a class that is only held out, and one that is only trained where that is a mistake."""
    in_use = [[name for name, count in pictures.counts().items() if count] for pictures in (train, val)]
    only_train = [name for name in in_use[0] if name not in val.classes] if source.same_classes else []
    only_val = [name for name in in_use[1] if name not in train.classes]
    only = ((source.part_name(part), only_train), (source.part_name(held_out), only_val))
    if differences := [f"only in {name}: {listing(classes)}" for name, classes in only if classes]:
        names = f"{source.part_name(part)} and {source.part_name(held_out)}"
        raise DataError(f"{source.where}: {names} differ in classes, {'; '.join(differences)}")


def held_out_indices(pictures: PictureSet, where: str, val_share: float, seed: int) -> set[int]:
    """Which pictures of a source without parts are held out: a share of each class at random, at least one, never all.

    Raises:
        DataError: for a class with a single picture.
    """
    of_class: list[list[int]] = [[] for _ in pictures.classes]
    for index, label in enumerate(pictures.labels):
        of_class[label].append(index)
    held_out: set[int] = set()
    for label, indices in enumerate(of_class):
        if len(indices) == 1:
            raise DataError(
                f"{where}: class {printable(pictures.classes[label])} has only one picture; to hold some out each "
                "class needs two or more, or there must be pictures for train and for val"
            )
        num_val = min(max(round(val_share * len(indices)), 1), len(indices) - 1) if indices else 0
        order = permutation(len(indices), mix(_SPLIT, seed, label))
        held_out.update(indices[i] for i in order[:num_val])
    return held_out


def _hold_out(pictures: P, where: str, val_share: float, seed: int) -> tuple[P, P]:
    """Splits every class at random, in proportion, with at least one picture on either side."""
    held_out = held_out_indices(pictures, where, val_share, seed)
    everything = range(len(pictures))
    return pictures.subset([i for i in everything if i not in held_out]), pictures.subset(sorted(held_out))
