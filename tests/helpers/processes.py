"""`snello` in processes of their own that start at once, and can be killed, limited and led astray like any others.

They are forked from a server process that has imported what is slow to import (PyTorch, gRPC, timm).
"""

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "timm",
        "snello.reports.terminal",
        "snello.split.security.certs",
        "snello.split.client.join",
        "snello.split.server.command",
        "helpers.processes",
    ]
)
SECONDS = 60.0
"""The longest that anything may take, on a busy machine."""


@dataclass(frozen=True)
class Wrong:
    """What is wrong with a process."""

    version: int | None = None
    """Of the protocol that it speaks."""
    clock_days: float = 0.0
    """How far the clock is ahead that it checks dates of certificates by."""
    flips: tuple[tuple[int, int, int | bytes], ...] = ()
    """Kind and step of frames of which a bit is flipped on the way out, once each, and its byte: the how manieth, or
    the last of some text in the table."""
    count: Path | None = None
    """File for the bytes of all frames that it wrote and read."""


class Child:
    """A process of `snello`; what it prints is in a file."""

    def __init__(self, args: Sequence[str | Path], log: Path, wrong: Wrong | None = None) -> None:
        self.args = [str(arg) for arg in args]
        self.log = log
        self._lock = threading.Lock()
        self._process = CONTEXT.Process(target=_run, args=(self.args, str(log), wrong or Wrong()), daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def alive(self) -> bool:
        with self._lock:
            return self._process.is_alive()

    def wait(self, seconds: float = SECONDS) -> int:
        """The exit code; -9 after SIGKILL."""
        until(lambda: not self.alive, f"the end of {self}", seconds)
        assert self._process.exitcode is not None
        return self._process.exitcode

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        with contextlib.suppress(ProcessLookupError):
            self.send(signal.SIGKILL)
        self.wait()

    def limit_files(self, size: int | None) -> None:
        """Lets it write no file beyond a size, as if the disk were full; None: lets it again."""
        limit = resource.RLIM_INFINITY if size is None else size
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, text: str, seconds: float = SECONDS) -> None:
        """Until it has printed `text`."""
        until(lambda: text in self.said or not self.alive, f"{text!r} of {self}", seconds)
        assert text in self.said, f"{self} ended without {text!r}"

    def __repr__(self) -> str:
        return f"snello {' '.join(self.args)}, which said:\n{self.said}"


def until(condition: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.005)


def _run(args: list[str], log: str, wrong: Wrong) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    from snello import cli
    from snello.reports import pictures
    from snello.split.client import connection, link

    torch.set_num_threads(1)
    connection.random = SimpleNamespace(uniform=lambda low, high: min(high, 0.1))  # pauses before it connects again
    link.ASK_SECONDS = 0.05  # the steps that a server takes by itself are few here
    pictures.plot_traffic = lambda run: None  # takes longer than the run
    _lead_astray(wrong)
    sys.exit(cli.main(args))


def _lead_astray(wrong: Wrong) -> None:
    from snello.split.security import tls
    from snello.split.wire import chunks as wire
    from snello.split.wire import frames

    if wrong.version is not None:
        frames.VERSION = wrong.version
    if wrong.clock_days:
        tls.datetime = _shifted(timedelta(days=wrong.clock_days))  # type: ignore[attr-defined]
    if wrong.flips:
        wire.chunks = _flipping(wire.chunks, list(wrong.flips))
    if wrong.count is not None:
        _count(wire, wrong.count)


def _shifted(by: timedelta) -> type[datetime]:
    class Shifted(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + by

    return Shifted


def _flipping(chunks: Callable[..., Any], flips: list[tuple[int, int, int | bytes]]) -> Callable[..., Any]:
    def flipped(buffers: Sequence[Any], *rest: Any) -> Any:
        from snello.split.wire.frames import parse_header

        head = parse_header(buffers[0])
        due = next((flip for flip in flips if flip[:2] == (head.kind, head.step)), None)
        if due is not None:
            flips.remove(due)
            first = bytearray(buffers[0])
            place = due[2] if isinstance(due[2], int) else first.index(due[2]) + len(due[2]) - 1
            first[place] ^= 1
            buffers = [first, *buffers[1:]]
        return chunks(buffers, *rest)

    return flipped


def _count(wire: Any, file: Path) -> None:
    totals = {"out": 0, "in": 0}
    chunks, add = wire.chunks, wire.Assembler.add

    def counted(buffers: Sequence[Any], *rest: Any) -> Any:
        totals["out"] += sum(map(len, buffers))
        return chunks(buffers, *rest)

    def added(self: Any, chunk: bytes) -> Any:
        totals["in"] += len(chunk)
        file.write_text(json.dumps(totals))
        return add(self, chunk)

    wire.chunks, wire.Assembler.add = counted, added
