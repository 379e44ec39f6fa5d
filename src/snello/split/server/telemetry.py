"""What the operators of a server see: metrics for Prometheus, a log, progress bars, and whether it is healthy."""

import json
import logging
import math
import re
import threading
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text
from typing_extensions import override

from snello.errors import CheckpointError, ConfigError
from snello.split.wire.frames import Direction

LogFormat = Literal["text", "json"]

STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
LONGEST_VALUE = 500
"""Characters of a field that are logged: what peers send has any length."""
LONGEST_NAME = 40
"""Characters of a session's name on the board."""


class Telemetry:
    """Metrics of one server, in a registry of their own; whoever knows that something has happened counts it."""

    def __init__(self, log: logging.Logger) -> None:
        self.registry = CollectorRegistry()
        self._log = log
        self._endpoint: tuple[WSGIServer, threading.Thread] | None = None
        own: dict[str, Any] = {"registry": self.registry}
        self.sessions = Gauge("snello_sessions", "Sessions under way", ("mode",), **own)
        self._steps = Counter("snello_steps", "Optimizer steps taken", **own)
        self._bytes = Counter("snello_bytes", "Bytes of frames by kind, headers included", ("direction", "kind"), **own)
        self._seconds = Histogram("snello_step_seconds", "Time of an optimizer step", buckets=STEP_SECONDS, **own)
        self.refused = Counter("snello_refused", "Clients that were refused, by reason", ("code",), **own)
        self.queue = Gauge("snello_queue_depth", "Frames waiting for compute", **own)
        self.reconnects = Counter("snello_reconnects", "Sessions that went on after a broken connection", **own)
        for mode in ("train", "inference"):
            self.sessions.labels(mode)  # 0 from the start, not absent

    def step(self, seconds: float) -> None:
        """Counts an optimizer step."""
        self._steps.inc()
        self._seconds.observe(seconds)

    def sent(self, direction: Direction, sizes: Mapping[str, int]) -> None:
        """Counts a frame of these sizes by kind, as `frames.sizes` counts them."""
        for kind, size in sizes.items():
            self._bytes.labels(direction, kind).inc(size)

    def serve(self, port: int) -> int:
        """Serves the metrics under http://127.0.0.1:port/metrics, and returns the port; 0 takes a free one.

        Raises:
            ConfigError: where the port is taken.
        """
        try:
            self._endpoint = start_http_server(port, addr="127.0.0.1", registry=self.registry)
        except OSError as error:
            raise ConfigError(f"--metrics-port {port} cannot be listened on: {error.strerror or error}") from None
        actual = self._endpoint[0].server_port
        self._log.info("metrics", extra={"fields": {"address": f"http://127.0.0.1:{actual}/metrics"}})
        return actual

    def close(self) -> None:
        """Stops serving; does nothing where nothing is served."""
        if self._endpoint is not None:
            server, thread = self._endpoint
            self._endpoint = None
            server.shutdown()
            server.server_close()
            thread.join()


def make_logger(folder: Path | None, format: LogFormat, console: Console) -> logging.Logger:
    """The server's logger: to the console, and as JSON lines to serve.log in `folder`.

    Fields are given as `log.info("session opened", extra={"fields": {"session": "ab12"}})`. Without a folder no file is
    written; the console also shows the progress bars, so that lines go above them.

    Raises:
        CheckpointError: where serve.log cannot be written.
    """
    log = logging.getLogger("snello.serve")
    close_logger(log)
    log.setLevel(logging.INFO)
    log.propagate = False
    screen = _ConsoleHandler(console)
    screen.setFormatter(_JsonFormatter() if format == "json" else _TextFormatter())
    log.addHandler(screen)
    if folder is not None:
        try:
            file = logging.FileHandler(folder / "serve.log", encoding="utf-8")
        except OSError as error:
            close_logger(log)
            raise CheckpointError(f"could not write {folder / 'serve.log'}: {error.strerror or error}") from error
        file.setFormatter(_JsonFormatter())
        log.addHandler(file)
    return log


def close_logger(log: logging.Logger) -> None:
    """Closes serve.log and takes the handlers away."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()


class Board:
    """Progress of the sessions under way, a row each; shows nothing where the console is no terminal. Thread-safe."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[rate]:.0f} pictures/s"),
            TextColumn("{task.fields[uplink]:.1f} MB up {task.fields[downlink]:.1f} down"),
            TextColumn("{task.fields[less]}"),
            TimeRemainingColumn(),
        )
        self._live = console.is_interactive
        self._progress = Progress(*columns, console=console, refresh_per_second=2)
        self._lock = threading.Lock()
        self._rows: dict[str, TaskID] = {}

    def __enter__(self) -> "Board":
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._progress.stop()

    def show(
        self,
        name: str,
        *,
        step: int,
        total: int,
        loss: float,
        rate: float,
        uplink_bytes: int,
        downlink_bytes: int,
        times_fewer: float | None,
    ) -> None:
        """Sets what the row `name` shows, a new one where there is none.

        Steps are the optimizer's, the loss is the last one's, the rate is in pictures per second; the bytes so far are
        `times_fewer` than without compression, None where that is not known.
        """
        fields: dict[str, Any] = {"loss": loss, "rate": rate, "uplink": uplink_bytes / 1e6}
        fields |= {"downlink": downlink_bytes / 1e6, "less": "" if times_fewer is None else f"{times_fewer:.1f}x less"}
        with self._lock:
            if name in self._rows:
                self._progress.update(self._rows[name], completed=step, total=total, **fields)
            else:
                label = printable(name[:LONGEST_NAME])
                self._rows[name] = self._progress.add_task(label, completed=step, total=total, **fields)

    def remove(self, name: str) -> None:
        """Takes a row away; does nothing where there is none."""
        with self._lock:
            row = self._rows.pop(name, None)
            if row is not None:
                self._progress.remove_task(row)


def health_reply(serving: bool) -> bytes:
    """The response of `grpc.health.v1.Health/Check` as bytes.

    Written by hand: it is one varint field (1: SERVING, 2: NOT_SERVING), and grpcio-health-checking, which would write
    it too, binds the version of protobuf for everything else that is installed.
    """
    return b"\x08\x01" if serving else b"\x08\x02"


def printable(text: str) -> str:
    """A text from a peer in one line and without what a terminal would obey: control, format and separator characters
    as escapes.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    @override
    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._console.print(Text(self.format(record)), soft_wrap=True)  # what peers sent is no markup
        except Exception:
            self.handleError(record)


class _TextFormatter(logging.Formatter):
    """`HH:MM:SS level message key=value ...`, in local time; of an error that was caught only its text."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record)
        if record.exc_info and record.exc_info[1] is not None:
            fields["error"] = f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
        head = f"{self.formatTime(record, '%H:%M:%S')} {record.levelname.lower()} {printable(record.getMessage())}"
        return " ".join([head, *(f"{printable(name)}={_quoted(value)}" for name, value in fields.items())])


class _JsonFormatter(logging.Formatter):
    """One JSON object in ASCII: whatever is in a field is escaped."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": time.replace("+00:00", "Z"), "level": record.levelname.lower()}
        line["message"] = record.getMessage()
        for name, value in _fields(record).items():
            line[f"field_{name}" if name in line else name] = value
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """The fields given with a record: numbers as they are where JSON has them, all else as text of limited length."""
    fields: dict[str, Any] = {}
    for name, value in getattr(record, "fields", {}).items():
        exact = value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
        text = str(value)
        fields[name] = value if exact else text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."
    return fields


def _quoted(value: Any) -> str:
    """A value as the text log has it: in quotes where it could be taken for more than one."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    plain = re.fullmatch(r"[\w.:/@%+,\[\]-]+", text, re.ASCII) is not None
    return text if plain else printable(json.dumps(text, ensure_ascii=False))
