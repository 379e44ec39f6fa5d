"""A TCP proxy between snello's clients and its server: a slow link for benchmarks, and faults for tests.

It runs on asyncio in a thread of its own. Each direction of a connection is a pipeline: bytes are read in small pieces,
wait for their turn on the link (rate), then in a queue until they are due (delay), and are forwarded.

In plaintext it watches what it forwards for frames of snello's protocol, and does what rules say when one passes. What
gRPC and HTTP/2 put in between is told apart, so that a frame's bytes are counted exactly; other streams are searched as
they are. Under TLS the bytes mean nothing to it.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeVar

from snello.errors import ProtocolError
from snello.split.wire.frames import HEADER, MAGIC, Header, parse_header

T = TypeVar("T")
Direction = Literal["up", "down"]
When = Literal["before", "middle", "after"]

LARGEST_PIECE, SMALLEST_PIECE = 16 * 1024, 1024
PIECE_SECONDS = 0.005
"""Time that a piece takes on a slow link."""
CREDIT_SECONDS = 0.005
"""What an idle link saves up: makes good for timers that wake up late."""
PIECES_IN_FLIGHT = 4096
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_HEAD, DATA, SETTINGS = 9, 0, 4  # of HTTP/2
MESSAGE_HEAD = 5  # of gRPC


@dataclass(frozen=True)
class Rule:
    """What to do when a frame passes; None stands for any."""

    direction: Direction
    """`up` from the client to the server."""
    kind: int | None = None
    step: int | None = None
    micro: int | None = None
    action: Callable[[], None] | None = None
    """Called in a thread; what follows in this direction waits until it returns. It may use the proxy."""
    when: When = "before"
    """Before the frame's header is forwarded, in the middle of its body, or once all of it was."""
    times: int = 1
    """Frames that it is for, of those that match."""
    flip: bool = False
    """Flips a bit of the frame: in the part that came with the header, or right in the middle."""

    def __post_init__(self) -> None:
        if self.flip and self.when == "after":
            raise ValueError("a frame that was forwarded cannot be changed: flip needs before or middle")

    def matches(self, direction: Direction, header: Header) -> bool:
        """Whether it is for a frame with this header."""
        wanted, got = (self.kind, self.step, self.micro), (header.kind, header.step, header.micro)
        return self.direction == direction and all(w is None or w == g for w, g in zip(wanted, got, strict=True))


class Proxy:
    """A proxy from a free port on 127.0.0.1 to `target`, while its context lasts.

    Args:
        target: address and port of the server.
        seconds: delay of each direction.
        bits_per_second: rate of each direction, shared by all connections; None: as fast as the machine.
        rules: what to do when frames pass.

    Raises:
        Exception: what a rule's action raised, when the context ends.
    """

    def __init__(
        self,
        target: tuple[str, int],
        *,
        seconds: float = 0.0,
        bits_per_second: float | None = None,
        rules: Sequence[Rule] = (),
    ) -> None:
        self.bytes_up = self.bytes_down = 0
        """Forwarded so far, over all connections."""
        self.connections = 0
        """Accepted so far, without those refused."""
        self.port = 0
        self.rules = [_Armed(rule, rule.times) for rule in rules]
        self.errors: list[Exception] = []
        self.flipping = {"up": False, "down": False}
        self.flow = asyncio.Event()
        self.links = {"up": _Link(seconds, bits_per_second), "down": _Link(seconds, bits_per_second)}
        self._target = target
        self._refusing = False
        self._open: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> "Proxy":
        self._thread.start()
        self._server = self._call(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self.errors and kind is None:
            raise self.errors[0]

    @property
    def address(self) -> str:
        """Where clients connect to, as `127.0.0.1:7443`."""
        return f"127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Closes all open connections abruptly, both sides with a reset."""
        self._call(self._cut())

    def refuse(self, refusing: bool) -> None:
        """Closes new connections at once, while `refusing`."""
        self._refusing = refusing

    def hold(self, holding: bool) -> None:
        """Forwards nothing while `holding`, not even the end of a connection: a network that went silent."""
        self._loop.call_soon_threadsafe(self.flow.clear if holding else self.flow.set)

    def set_target(self, target: tuple[str, int]) -> None:
        """Connects new connections to another server."""
        self._target = target

    def flip_next(self, direction: Direction) -> None:
        """Flips a bit in the middle of the next piece of more than 100 bytes in a direction."""
        self.flipping[direction] = True

    def count(self, direction: Direction, size: int) -> None:
        """Adds to the bytes forwarded."""
        if direction == "up":
            self.bytes_up += size
        else:
            self.bytes_down += size

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _listen(self) -> asyncio.Server:
        self.flow.set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=LARGEST_PIECE)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _close(self) -> None:
        self._server.close()
        tasks = list(self._open)
        await self._cut()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_default_executor()

    async def _cut(self) -> None:
        for task, writers in list(self._open.items()):
            _reset(writers)
            task.cancel()
        await asyncio.sleep(0)  # the sockets are closed in the loop's next round

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        writers = self._open[task] = [writer]
        parts: list[asyncio.Task[None]] = []
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._target, limit=LARGEST_PIECE)
            writers.append(server_writer)
            up, down = _Pipe(self, "up", reader, server_writer), _Pipe(self, "down", server_reader, writer)
            parts = [asyncio.create_task(part) for part in (up.read(), up.forward(), down.read(), down.forward())]
            await asyncio.gather(*parts)
        except (OSError, asyncio.CancelledError):  # one side is gone, so it is for the other; or all was cut
            _reset(writers)
        except Exception as error:
            self.errors.append(error)
            _reset(writers)
        finally:
            del self._open[task]
            for part in parts:
                part.cancel()
            for one in writers:
                one.close()


@dataclass
class _Armed:
    """A rule, and how often it will still fire."""

    rule: Rule
    left: int


class _Link:
    """One direction of the link: pieces one after the other at its rate, each arriving after its delay."""

    def __init__(self, seconds: float, bits_per_second: float | None) -> None:
        self._seconds = seconds
        self._seconds_per_byte = 0.0 if bits_per_second is None else 8 / bits_per_second
        self._free_at = 0.0
        self.piece = LARGEST_PIECE
        """Most bytes that go at once: a small message does not wait long for a large one of another connection."""
        if bits_per_second is not None:
            self.piece = min(LARGEST_PIECE, max(SMALLEST_PIECE, int(PIECE_SECONDS / self._seconds_per_byte)))

    async def take(self, size: int) -> float:
        """Waits until so many bytes are on the link; returns when they arrive, in the loop's time."""
        now = asyncio.get_running_loop().time()
        if self._seconds_per_byte:
            self._free_at = sent = max(self._free_at, now - CREDIT_SECONDS) + size * self._seconds_per_byte
            if sent > now:
                await asyncio.sleep(sent - now)
                now = sent
        return now + self._seconds


class _Pipe:
    """One direction of one connection."""

    def __init__(
        self, proxy: Proxy, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._proxy, self._direction, self._reader, self._writer = proxy, direction, reader, writer
        self._link = proxy.links[direction]
        self._queue: asyncio.Queue[tuple[float, bytes | None]] = asyncio.Queue(PIECES_IN_FLIGHT)
        self._watcher = _Watcher(proxy.rules, direction) if proxy.rules else None
        writer.transport.set_write_buffer_limits(high=0)  # what was drained is with the system

    async def read(self) -> None:
        """Puts what comes on the link, up to its end: b"" where it was closed, None where it was reset."""
        while True:
            data: bytes | None
            try:
                data = await self._reader.read(self._link.piece)
            except OSError:
                data = None
            await self._queue.put((await self._link.take(len(data or b"")), data))
            if not data:
                return

    async def forward(self) -> None:
        """Forwards what is due.

        Raises:
            OSError: where either side is gone.
        """
        loop = asyncio.get_running_loop()
        while True:
            due, data = await self._queue.get()
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            await self._proxy.flow.wait()
            if data is None:
                raise ConnectionResetError
            if not data:
                self._writer.write_eof()
                return
            await self._forward(bytearray(data))

    async def _forward(self, data: bytearray) -> None:
        if self._proxy.flipping[self._direction] and len(data) > 100:
            self._proxy.flipping[self._direction] = False
            data[len(data) // 2] ^= 1
        points = self._watcher.points(bytes(data)) if self._watcher else []
        for point in points:
            if point.rule.flip:
                data[point.flip] ^= 1
        done = 0
        for point in points:
            await self._write(data[done : point.offset])
            done = point.offset
            await self._act(point.rule)
        await self._write(data[done:])

    async def _write(self, data: bytearray) -> None:
        if data:
            await self._proxy.flow.wait()  # an action may have stopped it
            self._proxy.count(self._direction, len(data))  # who has received it may look at once
            self._writer.write(bytes(data))
            await self._writer.drain()

    async def _act(self, rule: Rule) -> None:
        if rule.action is not None:
            try:
                await asyncio.to_thread(rule.action)
            except Exception as error:
                self._proxy.errors.append(error)


class _Point(NamedTuple):
    """Where in a piece a rule fires."""

    offset: int
    """Bytes of the piece to forward before."""
    flip: int
    """The byte that a flip changes."""
    rule: Rule


@dataclass
class _Due:
    """A rule that will fire when a byte of a stream's payload passes."""

    rule: Rule
    at: int
    end: int
    """Of the frame."""


class _Watcher:
    """Finds where rules fire in one direction of one connection."""

    def __init__(self, rules: Sequence[_Armed], direction: Direction) -> None:
        self._rules, self._direction = rules, direction
        self._payload = _Payload()
        self._streams: dict[int, _Frames] = {}
        self._due: dict[int, list[_Due]] = {}

    def points(self, data: bytes) -> list[_Point]:
        """Where rules fire in the next piece, in order."""
        found: list[_Point] = []
        for stream, begin, end in self._payload.runs(data):
            frames = self._streams.setdefault(stream, _Frames())
            due = self._due.setdefault(stream, [])
            first = frames.seen  # position in the stream's payload of the run's first byte
            for at, header in frames.feed(data[begin:end]):
                due += [self._make_due(rule, max(at, first), at, header) for rule in self._fired(header)]
            last = first + end - begin
            for item in [item for item in due if item.at < last]:
                due.remove(item)
                found.append(self._point(item, begin - first, min(item.end, last), len(data)))
        return sorted(found, key=lambda point: point.offset)

    def _fired(self, header: Header) -> list[Rule]:
        fired = [armed for armed in self._rules if armed.left > 0 and armed.rule.matches(self._direction, header)]
        for armed in fired:
            armed.left -= 1
        return [armed.rule for armed in fired]

    @staticmethod
    def _make_due(rule: Rule, first: int, at: int, header: Header) -> _Due:
        body = at + HEADER.size
        end = body + header.body_bytes
        passing = {"before": first, "middle": min(body + header.body_bytes // 2, end - 1), "after": end - 1}
        return _Due(rule, passing[rule.when], end)

    @staticmethod
    def _point(due: _Due, shift: int, end: int, size: int) -> _Point:
        flip = due.at if due.rule.when == "middle" else (due.at + end) // 2
        offset = size if due.rule.when == "after" else due.at + shift
        return _Point(offset, flip + shift, due.rule)


class _Frames:
    """Finds frames in a stream of bytes that comes in pieces."""

    def __init__(self) -> None:
        self.seen = 0
        """Bytes so far."""
        self._tail = b""
        self._from = 0  # where the body of the last frame ends: nothing is searched before

    def feed(self, data: bytes) -> list[tuple[int, Header]]:
        """The headers that are complete with `data`, each with where in the stream it begins."""
        found: list[tuple[int, Header]] = []
        window = self._tail + data
        start = self.seen - len(self._tail)
        at = max(0, self._from - start)
        while (at := window.find(MAGIC, at)) >= 0 and at + HEADER.size <= len(window):
            try:
                header = parse_header(window[at : at + HEADER.size])
            except ProtocolError:
                at += 1
                continue
            found.append((start + at, header))
            at += HEADER.size + header.body_bytes
            self._from = start + at
        self.seen += len(data)
        self._tail = window[-(HEADER.size - 1) :]
        return found


class _Payload:
    """Tells what a connection carries: the messages of gRPC, by stream, or all of it as stream 0."""

    def __init__(self) -> None:
        self._frames: _Envelopes | None = None
        self._messages: dict[int, _Envelopes] = {}
        self._begun = False

    def runs(self, data: bytes) -> list[tuple[int, int, int]]:
        """Stream, begin and end of each part of the next piece that is payload."""
        if not self._begun:
            self._begin(data)
        if self._frames is None:
            return [(0, 0, len(data))]
        found: list[tuple[int, int, int]] = []
        for stream, begin, end in self._frames.parts(data, 0, len(data)):
            if stream:
                messages = self._messages.setdefault(stream, _Envelopes(MESSAGE_HEAD, _message))
                found += [(stream, at, until) for _, at, until in messages.parts(data, begin, end)]
        return found

    def _begin(self, data: bytes) -> None:
        """A client's first bytes are the preface, a server's are settings."""
        self._begun = True
        preface = data[: len(PREFACE)] == PREFACE[: len(data)]
        if preface or (len(data) >= FRAME_HEAD and data[3] == SETTINGS and data[5:FRAME_HEAD] == bytes(4)):
            self._frames = _Envelopes(FRAME_HEAD, _frame, len(PREFACE) if preface else 0)


class _Envelopes:
    """A stream of envelopes: heads of fixed size, each with what it announces.

    Args:
        head_bytes: of a head.
        read: what a head says: a number for what follows, and its bytes.
        left: bytes before the first head.
    """

    def __init__(self, head_bytes: int, read: Callable[[bytes], tuple[int, int]], left: int = 0) -> None:
        self._head_bytes, self._read, self._left = head_bytes, read, left
        self._head = b""
        self._number = 0

    def parts(self, data: bytes, at: int, end: int) -> list[tuple[int, int, int]]:
        """Number, begin and end of each part of the contents between `at` and `end`, the next bytes of the stream."""
        found: list[tuple[int, int, int]] = []
        while at < end:
            if self._left:
                until = min(end, at + self._left)
                found.append((self._number, at, until))
                self._left -= until - at
            else:
                until = min(end, at + self._head_bytes - len(self._head))
                self._head += data[at:until]
                if len(self._head) == self._head_bytes:
                    (self._number, self._left), self._head = self._read(self._head), b""
            at = until
        return found


def _frame(head: bytes) -> tuple[int, int]:
    """Of a frame of HTTP/2: its stream, 0 for all but data; and its bytes."""
    stream = int.from_bytes(head[5:], "big") & 0x7FFFFFFF
    return stream if head[3] == DATA else 0, int.from_bytes(head[:3], "big")


def _message(head: bytes) -> tuple[int, int]:
    """Of a message of gRPC: nothing, and its bytes."""
    return 0, int.from_bytes(head[1:], "big")


def _reset(writers: Sequence[asyncio.StreamWriter]) -> None:
    """Closes at once and without a farewell: the other side gets a reset."""
    for writer in writers:
        if not writer.transport.is_closing():
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
