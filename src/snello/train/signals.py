"""Ctrl-C and SIGTERM: the step under way ends, a checkpoint is saved, and the run says how it goes on."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ASKING = (signal.SIGINT, signal.SIGTERM)
"""The signals that ask a run to stop."""


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM), has saved a checkpoint, and can be resumed."""


@contextmanager
def stopping(asked: list[int], *, patient: bool = False) -> Iterator[None]:
    """Fills a list when Ctrl-C or SIGTERM asks to stop; a second Ctrl-C stops at once.

    Outside the main thread signals cannot be caught: there it stays empty.

    Args:
        asked: what is filled; emptied first.
        patient: takes no notice of a second one, not even when the block has ended. torchrun passes on to its processes
            the Ctrl-C that the terminal has already sent them, and kills those that do not end in 30 s.
    """
    asked.clear()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked and not patient:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {number: signal.signal(number, ask) for number in ASKING}
    except ValueError:
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if patient and asked else handler)


@contextmanager
def interruptible() -> Iterator[None]:
    """Lets SIGTERM interrupt a block as Ctrl-C does, by KeyboardInterrupt; what comes after the first is ignored.

    Outside the main thread signals cannot be caught: there nothing changes.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in ASKING:  # torchrun sends again what the terminal has already sent
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    try:
        before = {number: signal.signal(number, interrupt) for number in ASKING}
    except ValueError:
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
