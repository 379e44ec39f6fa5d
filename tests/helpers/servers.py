"""A server in a thread of its own on a free port, and clients that send it whatever they like."""

import asyncio
import io
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console

from helpers.clients import Client
from snello.config import JoinConfig, ServeConfig
from snello.runs.folder import RunFolder
from snello.split.client.connection import Connection, Endpoint
from snello.split.client.join import describe
from snello.split.security.auth import Authenticator
from snello.split.server.command import make_security
from snello.split.server.registry import Registry, session_name
from snello.split.server.streams import Limits, Server
from snello.split.server.telemetry import Telemetry, close_logger, make_logger
from snello.split.wire import chunks as wire
from snello.split.wire.chunks import CREDENTIALS
from snello.split.wire.chunks import METHOD as PATH
from snello.split.wire.frames import Frame, Kind, control, control_values, read, write
from snello.split.wire.handshake import Welcome, parse
from snello.split.wire.refusals import Code, Refused

DEADLINE = 30.0


def anyone(client: Client) -> str:
    """The name of a session where nobody has to say who they are."""
    return session_name("anyone", client.id)


class Running:
    """A server in a thread of its own.

    Args:
        config: of the server.
        folder: its run folder.
        port: a free one by default.
    """

    def __init__(
        self,
        config: ServeConfig,
        folder: Path,
        *,
        limits: Limits | None = None,
        authenticator: Authenticator | None = None,
        port: int = 0,
    ) -> None:
        tls, by_config = make_security(config)
        self.registry = Registry(config, RunFolder(folder))
        folder.mkdir(parents=True, exist_ok=True)
        self.log_file, self.shown = folder / "serve.log", Console(file=io.StringIO(), record=True, width=10000)
        made = make_logger(folder, "text", self.shown)
        self.log = logging.Logger("a server among others")  # a process of `snello serve` has one, this one several
        self.log.handlers, made.handlers = made.handlers, []
        self.telemetry = Telemetry(self.log)
        self.server = Server(self.registry, authenticator or by_config, self.telemetry, self.log, limits)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = self.run(self._start(port, tls))
        self._stopped = False

    async def _start(self, port: int, tls: Any) -> int:
        until = time.monotonic() + DEADLINE
        while True:
            try:
                return await self.server.start(f"127.0.0.1:{port}", tls)
            except OSError:  # the one before has not let go of it yet
                if not port or time.monotonic() > until:
                    raise
                await asyncio.sleep(0.05)

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=2 * DEADLINE)

    def stop(self) -> None:
        """As `snello serve` does on SIGTERM."""
        if not self._stopped:
            self._stopped = True
            self.run(self.server.stop())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(DEADLINE)
            close_logger(self.log)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def refused(self, code: Code) -> float:
        return self.telemetry.registry.get_sample_value("snello_refused_total", {"code": code.value}) or 0.0

    def value(self, name: str, **labels: str) -> float:
        return self.telemetry.registry.get_sample_value(name, labels) or 0.0

    def logged(self, message: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in self.log_file.read_text().splitlines()]
        return [row for row in rows if row["message"] == message]

    def serves(self) -> bool:
        """Whether a client that asks for the settings gets them."""
        return describe(Endpoint(self.address)).recipe["model"] == "test_vit"

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()


class Raw:
    """A client that sends whatever it likes."""

    def __init__(self, server: Running, credentials: str = "{}", path: str = PATH, **options: Any) -> None:
        self.channel = grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._queue: queue.Queue[bytes | None] = queue.Queue()
        metadata = ((CREDENTIALS, credentials),)
        method = self.channel.stream_stream(path)
        self.call = method(iter(self._queue.get, None), metadata=metadata, timeout=DEADLINE, **options)

    def send(self, *messages: bytes | Frame) -> "Raw":
        for message in messages:
            for chunk in wire.chunks(write(message)) if isinstance(message, Frame) else [bytes(message)]:
                self._queue.put(chunk)
        return self

    def receive(self) -> Frame:
        assembler = wire.Assembler(1 << 30)
        while (data := assembler.add(next(self.call))) is None:
            pass
        return read([data])

    def end(self) -> tuple[grpc.StatusCode, str]:
        """What the server ended the call with."""
        with suppress(grpc.RpcError):
            for _ in self.call:
                pass
        return self.call.code(), self.call.details() or ""

    def refusal(self) -> Refused:
        """Why the server ended the call."""
        code, details = self.end()
        refused = Refused.from_text(details)
        assert refused is not None, (code, details)
        return refused

    def close(self) -> None:
        self._queue.put(None)
        self.call.cancel()
        self.channel.close()

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def hello_of(client: Client, **values: Any) -> Frame:
    return control(Kind.HELLO, asdict(client.hello(**values)))


def opened(server: Running, client: Client, **values: Any) -> Raw:
    """A raw stream of a session that has begun."""
    raw = Raw(server).send(hello_of(client, **values))
    frame = raw.receive()
    welcome = parse(Welcome, control_values(frame))
    client.incarnation = welcome.incarnation
    if welcome.fresh:
        client.load(frame)
    return raw


@contextmanager
def connected(server: Running, client: Client) -> Iterator[Connection]:
    """A well-behaved connection of a session that has begun."""
    connection = Connection(Endpoint(server.address), client.hello, max_body=1 << 24, reconnect_seconds=0)
    try:
        _, frame = connection.open()
        client.load(frame)
        yield connection
    finally:
        connection.close()


def until(condition: Callable[[], Any]) -> None:
    """Waits for a condition, with a deadline."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)


def join_config(server: Running, pictures: Path, out: Path, **options: Any) -> JoinConfig:
    values: dict[str, Any] = {"workers": 0, "device": "cpu", "attention": "explicit", "reconnect_seconds": 30.0}
    return JoinConfig(server.address, data=pictures, out=out, **{**values, **options})
