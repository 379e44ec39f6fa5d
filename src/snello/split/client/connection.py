"""A client's connection to the server: one frame there, one back, whatever happens to the network in between.

Training is not asynchronous: it waits for every answer, and gRPC answers pings by itself meanwhile. Where the stream
breaks, a new one is made, with pauses that grow, and the frame in flight is sent again: the server knows whether it has
applied it.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

import grpc
import grpc.aio

from snello.config.units import is_loopback, parse_address
from snello.errors import NetworkError, ProtocolError
from snello.split.client.waiting import wait_for
from snello.split.wire import chunks, frames
from snello.split.wire.frames import MAX_CONTROL_BYTES, Frame, Kind, control, control_values
from snello.split.wire.handshake import Hello, Welcome, parse
from snello.split.wire.refusals import TRANSIENT, Code, Refused
from snello.train.place import GoBack

SLOWEST_LINK = 65536
"""Bytes per second that the server is given for a frame and its answer, beside everything else."""
SETTLE = 3
"""Turns of the event loop after which it knows what has happened while nobody waited.

A write to a stream that the server has ended would hide why it did."""
OPTIONS = [
    ("grpc.max_receive_message_length", chunks.MAX_CHUNK_BYTES),
    ("grpc.keepalive_time_ms", 20000),
    ("grpc.keepalive_timeout_ms", 20000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),  # else a new channel would wait for the old one's next attempt
]


@dataclass(frozen=True)
class Endpoint:
    """Where the server is, and how to show who we are."""

    address: str
    ca: bytes | None = None
    """Who must have signed the server's certificate; None for plaintext."""
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    credentials: Mapping[str, str] = field(default_factory=dict, repr=False)
    explain: Callable[[], str | None] | None = None
    """Looks closer where no connection can be made, and says what is wrong."""

    def channel(self) -> grpc.aio.Channel:
        """A new channel; nothing is sent yet."""
        local = is_loopback(parse_address(self.address, "ADDRESS")[0])
        options = [*OPTIONS, ("grpc.enable_http_proxy", int(not local))]
        if self.ca is None:
            return grpc.aio.insecure_channel(self.address, options=options)
        tls = grpc.ssl_channel_credentials(self.ca, self.key, self.certificate)
        return grpc.aio.secure_channel(self.address, tls, options=options)


class RolledBack(GoBack):
    """The frame in flight is of no use any more: both sides resume from the checkpoint of the welcome's `step`, or
    without its `back` from the start of the step under way.
    """

    def __init__(self, welcome: Welcome) -> None:
        super().__init__(f"back to step {welcome.step}")
        self.welcome = welcome


class Stopped(Exception):
    """The user asked to stop while there was no connection."""


class Broken(Exception):
    """The stream broke; the frame in flight may or may not have been applied."""


class Connection:
    """Frames to a server and back.

    Args:
        hello: makes the first message of every new stream.
        max_body: bytes that the server's frames may have.
        patience_seconds: for an answer, beside what its bytes may take.
        reconnect_seconds: from the first loss of a frame until an answer comes.
        tell: prints a line for the user.
        should_stop: whether the user asked to stop.
        on_shutdown: called with the step that a server saved before it went.
        accept: whether the frame in flight can be sent again after this welcome.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        hello: Callable[[], Hello],
        *,
        max_body: int = 1 << 20,
        patience_seconds: float = 60.0,
        reconnect_seconds: float = 600.0,
        tell: Callable[[str], None] = lambda text: None,
        should_stop: Callable[[], bool] = lambda: False,
        on_shutdown: Callable[[int], None] = lambda step: None,
        accept: Callable[[Welcome], bool] = lambda welcome: not welcome.back,
    ) -> None:
        self.endpoint, self._hello, self.max_body = endpoint, hello, max_body
        self._patience, self._reconnect = patience_seconds, reconnect_seconds
        self._tell, self._should_stop, self._on_shutdown, self._accept = tell, should_stop, on_shutdown, accept
        chunks.keep_blocks()
        self._line: _Line | None = None
        self._slowest = 0.0
        self._sequence = 0
        self._deadline: float | None = None  # of trying again: from the first loss on, until an answer comes
        self._pause = 0.0
        self.slowest_times = 10
        """How much longer than the slowest answer so far the next one may take, beside the patience."""
        self.repeated_bytes = 0
        """Bytes of frames that had to be sent again."""

    def open(self) -> tuple[Welcome, Frame]:
        """The first stream: the server's welcome and the frame that it came in.

        Raises:
            NetworkError: where the server cannot be reached, saying why.
            Refused: where it does not take us.
        """
        try:
            return self._open()
        except Broken as error:
            raise self._unreachable(str(error)) from None

    def exchange(self, frame: Frame) -> Frame:
        """The server's answer to a frame, which it applies exactly once.

        Raises:
            RolledBack: where the frame is of no use any more.
            Refused: where the server gives up.
            NetworkError: where it cannot be reached for too long.
            Stopped: where the user asked to stop meanwhile.
        """
        parts = chunks.of(frame)
        size, times = sum(map(len, parts)), 0
        while True:
            try:
                if self._line is None:
                    self._connect_again()
                self.repeated_bytes += size if times else 0
                times += 1
                answer = self._answer(parts, size)
            except Broken as error:
                self._lost(str(error))
            except Refused as refused:
                self.close()
                if refused.code not in TRANSIENT:
                    raise
                if refused.code == Code.SHUTDOWN and refused.step is not None:
                    self._on_shutdown(refused.step)
                self._lost(refused.reason)
            else:
                self._deadline, self._pause = None, 0.0
                return answer

    def request(self, frame: Frame, step: int) -> Frame:
        """`exchange` for frames that are not of a step's exchanges: each gets a number of its own."""
        self._sequence += 1
        return self.exchange(Frame(frame.kind, step, self._sequence, frame.arrays, frame.flags))

    def close(self) -> None:
        """Ends the stream."""
        if self._line is not None:
            line, self._line = self._line, None
            wait_for(line.close())

    def _open(self) -> tuple[Welcome, Frame]:
        self.close()
        values = asdict(self._hello())
        line = _Line(self.endpoint)
        hello = chunks.of(control(Kind.HELLO, values))
        try:
            data = wait_for(line.talk(hello, max(self.max_body, MAX_CONTROL_BYTES), self._patience))
            frame = frames.read([data])
            if frame.kind != Kind.WELCOME:
                raise ProtocolError(f"a frame of kind {frame.kind.name} came, where the server's welcome was due")
            welcome = parse(Welcome, control_values(frame))
        except BaseException:
            wait_for(line.close())
            raise
        self._line = line
        return welcome, frame

    def _answer(self, parts: list[bytes], size: int) -> Frame:
        assert self._line is not None
        started = time.perf_counter()
        seconds = self._patience + self.slowest_times * self._slowest + size / SLOWEST_LINK
        data = wait_for(self._line.talk(parts, self.max_body, seconds))
        self._slowest = max(self._slowest, time.perf_counter() - started)
        return frames.read([data], self.max_body)

    def _lost(self, reason: str) -> None:
        self.close()
        self._require_time(reason)
        self._tell(f"connection lost: {reason}; trying again for {self._seconds_left:.0f} s")

    @property
    def _seconds_left(self) -> float:
        return self._reconnect if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _require_time(self, reason: str) -> None:
        """Begins to count at the first loss, and gives up where the time is over."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._reconnect
        elif self._seconds_left <= 0:
            raise self._unreachable(reason)

    def _connect_again(self) -> None:
        """A new stream, with pauses that double up to half a minute, each of random length so that clients spread."""
        while True:
            self._wait(min(random.uniform(self._pause / 2, self._pause), self._seconds_left))
            self._pause = min(max(2 * self._pause, 0.25), 30.0)
            try:
                welcome, _ = self._open()
                break
            except (Broken, Refused) as error:
                if isinstance(error, Refused) and error.code not in TRANSIENT:
                    raise
                self._require_time(str(error))
        self._tell("connected again")
        if not self._accept(welcome):
            raise RolledBack(welcome)

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self._should_stop():
                raise Stopped
            time.sleep(min(0.1, max(0.0, until - time.monotonic())))

    def _unreachable(self, reason: str) -> NetworkError:
        why = (self.endpoint.explain and self.endpoint.explain()) or reason
        return NetworkError(f"the server at {self.endpoint.address} cannot be reached: {why}")


class _Line:
    """One stream; all of it runs on the event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._channel: grpc.aio.Channel | None = None
        self._call: grpc.aio.StreamStreamCall | None = None

    async def talk(self, parts: list[bytes], max_body: int, seconds: float) -> bytearray:
        """Sends a frame and returns the next that comes; Refused where the server says why it ends the stream, and
        Broken where it does not, or nothing comes in time.
        """
        try:
            return await asyncio.wait_for(self._talk(parts, max_body), seconds)
        except asyncio.TimeoutError:
            raise Broken(f"no answer in {seconds:.0f} s") from None
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the latter: it had ended before
            raise await self._why() from None

    async def _talk(self, parts: list[bytes], max_body: int) -> bytearray:
        if self._call is None:
            self._channel = self._endpoint.channel()
            method = self._channel.stream_stream(chunks.METHOD)
            metadata = ((chunks.CREDENTIALS, json.dumps(dict(self._endpoint.credentials))),)
            self._call = method(metadata=metadata, wait_for_ready=False)
        for _ in range(SETTLE):
            await asyncio.sleep(0)
        if self._call.done():
            raise await self._why()
        for part in parts:
            await self._call.write(part)
        assembler = chunks.Assembler(max_body)
        while True:
            chunk = await self._call.read()
            if chunk is grpc.aio.EOF:
                raise await self._why()
            data = assembler.add(chunk)
            if data is not None:
                return data

    async def _why(self) -> Exception:
        """Why the stream has ended: where a write met its end, only the call itself knows."""
        assert self._call is not None
        code, details = await self._call.code(), await self._call.details()
        refused = Refused.from_text(details or "")
        text = " ".join((details or "the stream ended").split())
        return refused or Broken(f"{code.name.lower().replace('_', ' ')}: {text}")

    async def close(self) -> None:
        """Ends the stream; an open one that is left to the garbage collector can hang the process at its exit."""
        if self._call is not None:
            self._call.cancel()
        if self._channel is not None:
            await self._channel.close()
