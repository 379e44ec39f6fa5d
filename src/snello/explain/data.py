"""The pictures of a run in numbers, those that are there twice, and the machine that this is."""

import hashlib
import os
import platform
import time
from collections import defaultdict
from collections.abc import Hashable
from typing import Any

from snello.data import ArrayPictures, FilePictures, PictureSet
from snello.devices import cpu_name
from snello.environment import total_memory
from snello.errors import DataError
from snello.explain.files import Part
from snello.explain.run import Run

SECONDS = 3.0
"""For the search for copies: what has not been compared by then is not."""
EXAMPLES, NAMES = 5, 4
Place = tuple[str, int]
"""A part, and the number of a picture in it."""


def data(run: Run) -> Part:
    """Pictures of each class, copies, and the machine."""
    splits = run.splits
    return Part({
        "source": splits.source,
        "notes": list(splits.notes),
        "skipped": run.resolved.num_skipped,
        "train": splits.train.counts(),
        "held_out": splits.val.counts(),
        "copies": copies(splits.train, splits.val),
        "machine": machine(),
    })  # fmt: skip


def copies(train: PictureSet, held_out: PictureSet, seconds: float = SECONDS) -> dict[str, Any] | None:
    """Pictures that are there more than once, byte for byte; None where none could be compared in time."""
    until = time.monotonic() + seconds
    parts = {"held out": held_out, "train": train}
    sizes: dict[Hashable, list[Place]] = defaultdict(list)
    for part, pictures in parts.items():
        for index in range(len(pictures)):
            if time.monotonic() > until:
                break
            sizes[_size(pictures, index)].append((part, index))
    same: dict[Hashable, list[Place]] = defaultdict(list)
    read = 0
    for size, places in sizes.items():
        for part, index in places:
            # A file of a size of its own has no copy.
            digest = _digest(parts[part], index) if len(places) > 1 and time.monotonic() < until else None
            read += len(places) == 1 or digest is not None
            if digest is not None:
                same[size, digest].append((part, index))
    groups = sorted((places for places in same.values() if len(places) > 1), key=_leaks, reverse=True)
    classes = [{parts[part].labels[index] for part, index in places} for places in groups]
    return None if read == 0 else {
        "groups": len(groups),
        "leaked": sum(map(_leaks, groups)),
        "mixed": sum(len(found) > 1 for found in classes),
        "examples": [[parts[part].name(i) for part, i in places[:NAMES]] for places in groups[:EXAMPLES]],
        "read": read,
    }  # fmt: skip


def _leaks(places: list[Place]) -> bool:
    return len({part for part, _ in places}) > 1


def _size(pictures: PictureSet, index: int) -> int | None:
    """Bytes of a picture's file; None where it has none."""
    try:
        return pictures.paths[index].stat().st_size if isinstance(pictures, FilePictures) else None
    except OSError:
        return None


def _digest(pictures: PictureSet, index: int) -> bytes | None:
    """Of a picture's file, or of its pixels where it has none; None where it cannot be read."""
    try:
        if isinstance(pictures, FilePictures):
            content = pictures.paths[index].read_bytes()
        elif isinstance(pictures, ArrayPictures):
            content = pictures.images[index].tobytes()
        else:
            content = pictures.open(index).tobytes()
    except (OSError, DataError):
        return None
    return hashlib.blake2b(content, digest_size=16).digest()


def machine() -> dict[str, Any]:
    """What this machine is."""
    able = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": cpu_name() or platform.processor() or platform.machine(),
        "cores": len(able(0)) if able is not None else os.cpu_count(),
        "memory": total_memory(),
        "os": platform.platform(),
        "python": platform.python_version(),
    }
