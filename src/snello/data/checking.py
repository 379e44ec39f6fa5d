"""Finds pictures that cannot be read: opens every one once, in threads, for Pillow decodes without the GIL."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from PIL import Image

from snello.data.sets import P, PictureSet
from snello.errors import DataError, listing

T = TypeVar("T")


def without_bad(sets: Sequence[P], skip_bad: bool, check: bool) -> tuple[list[P], int]:
    """Removes the pictures that cannot be read from the sets, and counts them; looks for them only if told to.

    Raises:
        DataError: for a bad picture without `skip_bad`, or where all of a class are bad.
    """
    if not (check or skip_bad):
        return list(sets), 0
    bad = [failures(pictures) for pictures in sets]
    first = next((reason for reasons in bad for reason in reasons.values()), "")
    num_bad, total = sum(map(len, bad)), sum(map(len, sets))
    if num_bad and not skip_bad:
        raise DataError(f"{first} ({num_bad} of {total} pictures cannot be read; --skip-bad leaves them out)")
    kept = []
    for pictures, reasons in zip(sets, bad, strict=True):
        kept.append(pictures.subset([i for i in range(len(pictures)) if i not in reasons]) if reasons else pictures)
        if lost := sorted(set(pictures.labels) - set(kept[-1].labels)):
            names = listing([pictures.classes[label] for label in lost])
            raise DataError(f"no picture of class {names} can be read ({num_bad} bad ones in all, first {first})")
    return kept, num_bad


def failures(pictures: PictureSet) -> dict[int, str]:
    """Finds out why pictures cannot be read, by their index; only the bad ones, in order."""

    def failure(index: int) -> str | None:
        try:
            pictures.open(index, draft=True)
        except DataError as error:
            return str(error)
        return None

    return {index: text for index, text in enumerate(in_threads(failure, len(pictures))) if text}


def in_threads(look: Callable[[int], T], num: int) -> Iterator[T]:
    """Yields `look(0)`, ... `look(num - 1)`, in this order."""
    Image.init()  # Pillow registers formats lazily, and threads that do so at once may miss some
    with ThreadPoolExecutor() as pool:
        for start in range(0, num, 1024):  # in parts, to be stopped by Ctrl-C and to hold few futures
            yield from pool.map(look, range(start, min(start + 1024, num)))
