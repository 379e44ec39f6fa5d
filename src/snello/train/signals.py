"""Ctrl-C and SIGTERM: the step under way ends, a checkpoint is saved, and the run says how to resume it.

Outside the main thread signals cannot be caught: there nothing here acts.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ASKING = (signal.SIGINT, signal.SIGTERM)
"""The signals that ask a run to stop."""


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM), has saved a checkpoint, and can be resumed."""


@contextmanager
def stopping(asked: list[int], *, patient: bool = False) -> Iterator[None]:
    """Fills a list when Ctrl-C or SIGTERM asks to stop; a second Ctrl-C stops at once.

    A `patient` block takes no notice of a second one, not even when it has ended: torchrun passes on to its processes
    the Ctrl-C that the terminal has already sent them, and kills those that do not end in 30 s.
    """
    asked.clear()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked and not patient:
            raise KeyboardInterrupt
        asked.append(number)

    with _handled(ask) as after:
        try:
            yield
        finally:
            if patient and asked:
                after.update(dict.fromkeys(after, signal.SIG_IGN))


@contextmanager
def interruptible() -> Iterator[None]:
    """Lets SIGTERM interrupt a block as Ctrl-C does, by KeyboardInterrupt; what comes after the first is ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in ASKING:  # torchrun sends again what the terminal has already sent
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    with _handled(interrupt):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[dict[int, Any]]:
    """Handles the signals in a block; yields what handles them after it."""
    try:
        after: dict[int, Any] = {number: signal.signal(number, handler) for number in ASKING}
    except ValueError:
        after = {}
    try:
        yield after
    finally:
        for number, former in after.items():
            signal.signal(number, former)
