"""`snello check-data`: reads every picture of a source once, in full, and says what is wrong with them."""

import hashlib
import warnings
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import Progress

from snello.config import CheckDataConfig, FinetuneConfig
from snello.data.checking import in_threads
from snello.data.reading import UNREADABLE
from snello.data.sets import PictureSet, imbalance
from snello.data.splits import find_source, held_out_indices
from snello.errors import DataError, printable


@dataclass(frozen=True)
class Broken:
    """A picture that cannot be read."""

    path: str
    reason: str
    part: str


@dataclass(frozen=True)
class Copies:
    """Pictures that are the same, pixel for pixel, with the parts and the classes that they are in.

    In a source without parts, train and val are what a run with default settings makes of it.
    """

    paths: list[str]
    parts: list[str]
    classes: list[str]


@dataclass
class Findings:
    """What there is in a source."""

    source: str
    pictures: dict[str, dict[str, int]] = field(default_factory=dict)
    """Of each part, the pictures of each class; a source without parts has one of the name `all`."""
    broken: list[Broken] = field(default_factory=list)
    copies: list[Copies] = field(default_factory=list)
    smallest: list[int] | None = None
    """Least width and least height, in pixels."""
    largest: list[int] | None = None
    """Greatest width and greatest height."""
    imbalance: str | None = None
    notes: list[str] = field(default_factory=list)
    """What is left out, and why."""

    @property
    def num_pictures(self) -> int:
        """Pictures, broken ones too."""
        return sum(sum(counts.values()) for counts in self.pictures.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        leaked = sum(len(copies.parts) > 1 for copies in self.copies)
        mixed = sum(len(copies.classes) > 1 for copies in self.copies)
        return {**asdict(self), "num_pictures": self.num_pictures, "num_leaked": leaked, "num_mixed": mixed}


def check_data(config: CheckDataConfig, console: Console | None = None) -> Findings:
    """Reads every picture once and returns what was found; a DataError where the source as a whole cannot be used."""
    source = find_source(config.source, config.columns, config.data_root)
    parts = {part or "all": source.read(part) for part in source.parts or (None,)}
    findings = Findings(source.title, {part: pictures.counts() for part, pictures in parts.items()})
    findings.notes = list(source.notes)
    findings.imbalance = imbalance(parts.get("train", next(iter(parts.values()))))
    same: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
    sizes: list[tuple[int, int]] = []
    with warnings.catch_warnings(), Progress(console=console or Console(stderr=True), transient=True) as bar:
        warnings.simplefilter("ignore")  # Pillow's, about tags it does not need
        task = bar.add_task("reading", total=findings.num_pictures)
        for part, pictures in parts.items():
            for index, seen in enumerate(in_threads(partial(_look, pictures), len(pictures))):
                bar.advance(task)
                if isinstance(seen, str):
                    name, _, reason = seen.partition(f": {UNREADABLE}: ")
                    findings.broken.append(Broken(name, reason or seen, part))
                else:
                    sizes.append(seen[0])
                    same[seen[1]].append((part, index))
    if sizes:
        findings.smallest = [min(width for width, _ in sizes), min(height for _, height in sizes)]
        findings.largest = [max(width for width, _ in sizes), max(height for _, height in sizes)]
    held_out = set[int]()
    if not source.parts:
        readable = sorted(index for found in same.values() for _, index in found)
        held_out = _held_out(parts["all"], readable, source.where)
    for found in same.values():
        if len(found) > 1:
            classes = {parts[part].classes[parts[part].labels[index]] for part, index in found}
            names = [parts[part].name(index) for part, index in found]
            within = {part for part, _ in found}
            if len({index in held_out for _, index in found}) > 1:
                within = {"train", "val"}
            findings.copies.append(Copies(names, sorted(within), sorted(classes)))
    return findings


def _held_out(pictures: PictureSet, readable: list[int], where: str) -> set[int]:
    """What a run with default settings holds out of a source without parts; nothing where it could not."""
    with suppress(DataError):  # of what does not suit a run, a run says so
        usual = FinetuneConfig()
        found = held_out_indices(pictures.subset(readable), where, usual.val_share, usual.seed)
        return {readable[index] for index in found}
    return set()


def _look(pictures: PictureSet, index: int) -> tuple[tuple[int, int], bytes] | str:
    """Width and height, and a digest of the pixels; or what is wrong."""
    try:
        image = pictures.open(index)
    except DataError as error:
        return str(error)
    return image.size, hashlib.blake2b(image.tobytes(), digest_size=16, key=repr(image.size).encode()).digest()


def print_findings(findings: Findings, most: int = 20) -> None:
    """Prints what was found, every broken picture, and at most so many classes and groups of copies."""
    for part, counts in findings.pictures.items():
        print(f"{part}: {sum(counts.values())} pictures in {len(counts)} classes")
    totals: Counter[str] = Counter()
    for counts in findings.pictures.values():
        totals.update(counts)
    listed = totals.most_common()
    left_out = f", ... and {len(listed) - most} classes with fewer" if len(listed) > most else ""
    print(f"classes: {', '.join(f'{printable(name)} {count}' for name, count in listed[:most])}{left_out}")
    if findings.imbalance:
        print(findings.imbalance)
    if findings.smallest and findings.largest:
        print("size: {}x{} to {}x{} pixels (width, height)".format(*findings.smallest, *findings.largest))
    for kind, copies in (
        ("in more than one part: what is held out was seen in training", [c for c in findings.copies if c.parts[1:]]),
        ("in more than one class", [c for c in findings.copies if c.classes[1:]]),
        ("within a class and part", [c for c in findings.copies if not c.parts[1:] and not c.classes[1:]]),
    ):
        if copies:
            print(f"same pictures {kind}: {len(copies)}")
            for group in copies[:most]:
                print(f"  {' = '.join(group.paths)}")
            if len(copies) > most:
                print(f"  ... and {len(copies) - most} more (--format json lists all)")
    for note in findings.notes:
        print(note)
    print(f"broken: {len(findings.broken)} of {findings.num_pictures}")
    for broken in findings.broken:
        print(f"  {broken.path}: {broken.reason}")
