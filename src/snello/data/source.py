"""What every source of pictures answers: which parts it has, and the pictures of one."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from snello.data.sets import P, PictureSet
from snello.errors import DataError, listing, printable

PARTS = ("train", "val", "test")
# What others call them.
PART_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class Source(ABC):
    """Where pictures come from."""

    where: str
    """What messages begin with, as `--data photos`."""
    title: str
    """The source in words."""
    parts: tuple[str, ...] = ()
    """Which of train, val and test there are; none where all pictures are in one."""
    remarks: tuple[str, ...] = ()
    """What is beside the parts, and how folders were taken, in a line each."""
    same_classes = False
    """Whether a class that is in train but not held out is a mistake."""

    @abstractmethod
    def read(self, part: str | None, known: Sequence[str] | None = None) -> PictureSet:
        """Finds the pictures of a part, or all where it is None.

        Labels are indices into the `known` classes, else into those of the part.

        Raises:
            DataError: where they cannot be found, or a class is not known.
        """

    @property
    def notes(self) -> tuple[str, ...]:
        """The remarks, and what the parts that were read leave out."""
        return self.remarks

    def part_name(self, part: str) -> str:
        """Returns what messages call a part."""
        return part

    def training_part(self) -> str | None:
        """Chooses the part to train on, None where all pictures are in one; a DataError where no part is for that."""
        if self.parts and "train" not in self.parts:
            only = ", ".join(map(self.part_name, self.parts))
            raise DataError(f"{self.where}: nothing to train on: only {only} and no {self.part_name('train')}")
        return "train" if self.parts else None

    def held_out_part(self) -> str | None:
        """Chooses the part to evaluate on: val, else test, else None."""
        return next((part for part in ("val", "test") if part in self.parts), None)


def parts_among(names: Iterable[str], where: str) -> dict[str, str]:
    """Finds which of the names mean which parts; a DataError where two mean the same."""
    found: dict[str, str] = {}
    for name in names:
        part = PART_NAMES.get(name.lower())
        if part in found:
            both = f"{printable(found[part])} and {printable(name)}"
            raise DataError(f"{where}: {both} both mean {part}; keep one of them")
        if part is not None:
            found[part] = name
    return found


def left_out_beside(kind: str, names: Sequence[str], used: Sequence[str]) -> tuple[str, ...]:
    """Names the folders or splits that are none of the parts; nothing where there are no parts."""
    others = [name for name in names if name not in used] if used else []
    kinds = kind if len(others) == 1 else f"{kind}s"
    return (f"left out: {kinds} {listing(others)}: beside {listing(used)}",) if others else ()


def with_classes(pictures: P, known: Sequence[str] | None, where: str) -> P:
    """Makes the labels indices into `known`, where that is given; a DataError for a class in use that is not there."""
    if known is None:
        return pictures
    if unknown := [name for name, count in pictures.counts().items() if count and name not in known]:
        raise DataError(f"{where}: classes unknown to the model: {listing(unknown)}; known: {listing(known)}")
    return pictures.relabelled(known)
