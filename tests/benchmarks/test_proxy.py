"""The proxy that stands for a slow or broken network: what it forwards, how late, and what rules do to it."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent import futures

import grpc
import proxy as module
import pytest
import torch
from proxy import Proxy, Rule

from snello.split.wire.frames import HEADER, Frame, Kind, write


class Echo:
    """A server that sends back what comes, and remembers it."""

    def __init__(self) -> None:
        self.got = bytearray()
        self.echoing = True
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._answer, args=(self._listener.accept()[0],), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(1 << 16):
                self.got += data
                if self.echoing:
                    connection.sendall(data)

    def wait_for(self, size: int) -> bytes:
        until(lambda: len(self.got) >= size)
        return bytes(self.got)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends the accept under way
        self._listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


def until(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def connect(proxy: Proxy) -> socket.socket:
    host, port = proxy.address.split(":")
    connection = socket.create_connection((host, int(port)), timeout=5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        assert part, f"closed after {len(data)} of {size} bytes"
        data += part
    return data


def trip(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    return receive(connection, len(data))


def frame(step: int = 0, kind: Kind = Kind.ACTIVATIONS, micro: int = 0, size: int = 1000) -> bytes:
    values = torch.arange(size).to(torch.uint8)
    return b"".join(write(Frame(kind, step, micro, {"activations": values})))


def http2(messages: list[bytes], largest: int) -> tuple[bytes, list[int]]:
    """A client's stream with messages of gRPC in DATA frames of at most so many bytes, and where each byte of them is.

    Between the frames are settings that hold the beginning of a frame of snello.
    """
    stream = b"".join(b"\0" + len(message).to_bytes(4, "big") + message for message in messages)
    is_content = [part for message in messages for part in (*[False] * 5, *[True] * len(message))]
    data, places = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", []
    for at in range(0, len(stream), largest):
        data += (6).to_bytes(3, "big") + bytes([4, 0]) + bytes(4) + b"snlo\1\1"
        part = stream[at : at + largest]
        data += len(part).to_bytes(3, "big") + bytes([0, 0, 0, 0, 0, 1])
        places += [len(data) + i for i in range(len(part)) if is_content[at + i]]
        data += part
    return data, places


def bits_apart(one: bytes, other: bytes) -> list[int]:
    """The bytes that differ, each by one bit."""
    assert len(one) == len(other)
    places = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    assert all((one[i] ^ other[i]).bit_count() == 1 for i in places)
    return places


# ------------------------------------------------------------------------------------------------------ forwarding


def test_everything_arrives_and_is_counted(echo):
    data = bytes(range(256)) * 2000
    with Proxy(echo.address) as proxy, connect(proxy) as one, connect(proxy) as other:
        threading.Thread(target=one.sendall, args=(data,)).start()
        assert receive(one, len(data)) == data
        assert trip(other, b"x") == b"x"
        assert (proxy.bytes_up, proxy.bytes_down, proxy.connections) == (len(data) + 1, len(data) + 1, 2)
    assert not [thread for thread in threading.enumerate() if thread.name == "proxy"]


def test_ends_of_connections_are_forwarded(echo):
    with Proxy(echo.address) as proxy, connect(proxy) as connection:
        connection.sendall(b"last words")
        connection.shutdown(socket.SHUT_WR)
        assert receive(connection, 10) == b"last words" and connection.recv(1) == b""


def test_without_a_server_connections_are_reset(echo):
    echo.close()
    with Proxy(echo.address) as proxy, pytest.raises(ConnectionResetError), connect(proxy) as connection:
        connection.recv(1)


def test_another_target_is_for_new_connections(echo):
    other = Echo()
    with Proxy(echo.address) as proxy, connect(proxy) as before:
        trip(before, b"1")
        proxy.set_target(other.address)
        trip(before, b"2")
        with connect(proxy) as after:
            trip(after, b"3")
    assert (echo.got, other.got) == (b"12", b"3")
    other.close()


# --------------------------------------------------------------------------------------------------- the slow link


class Clock:
    """Stands for asyncio in the proxy: time passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def get_running_loop(self) -> "Clock":
        return self

    def time(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "asyncio", clock)
    return clock


def test_delay_is_a_pipeline(clock):
    link = module._Link(0.1, None)
    arrivals = [asyncio.run(link.take(1000)) for _ in range(30)]
    assert arrivals == [100.1] * 30 and clock.now == 100.0


def test_rate_is_that_of_the_link(clock):
    link = module._Link(0.1, 1e6)
    arrivals = [asyncio.run(link.take(link.piece)) for _ in range(50)]
    assert arrivals[-1] == pytest.approx(100.1 + 50 * link.piece * 8e-6 - module.CREDIT_SECONDS)
    assert arrivals == sorted(arrivals) and clock.now == pytest.approx(arrivals[-1] - 0.1)


def test_what_is_delayed_waits_in_both_directions(echo, monkeypatch):
    sleep, slept = asyncio.sleep, []

    async def noted(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", noted)
    with Proxy(echo.address, seconds=60) as proxy, connect(proxy) as connection:
        trip(connection, b"x")
        assert len(slept) == 2 and all(0 < seconds <= 60 for seconds in slept)


@pytest.mark.parametrize("connections", [1, 2])
def test_connections_share_the_link(echo, connections):
    echo.echoing = False
    with Proxy(echo.address, bits_per_second=1e6) as proxy, contextlib.ExitStack() as stack:
        begin = proxy._loop.time()
        for _ in range(connections):
            stack.enter_context(connect(proxy)).sendall(bytes(10_000 // connections))
        echo.wait_for(10_000)
        assert proxy.links["up"]._free_at - begin >= 10_000 * 8e-6 - module.CREDIT_SECONDS


def test_small_messages_do_not_wait_for_large_ones_to_end(echo):
    echo.echoing = False
    with Proxy(echo.address, bits_per_second=1e6) as proxy, connect(proxy) as large, connect(proxy) as small:
        large.sendall(bytes(100_000))
        until(lambda: proxy.bytes_up > 0)
        small.sendall(b"x")
        until(lambda: b"x" in echo.got)
        assert proxy.bytes_up < 50_000


# ------------------------------------------------------------------------------------------------------------ faults


def test_cut_resets_both_sides_and_lets_in_again(echo):
    with Proxy(echo.address) as proxy:
        with connect(proxy) as one, connect(proxy) as other:
            trip(one, b"x"), trip(other, b"x")
            proxy.cut()
            for connection in (one, other):
                with pytest.raises(ConnectionResetError):
                    connection.recv(1)
        with connect(proxy) as again:
            assert trip(again, b"y") == b"y" and proxy.connections == 3


def test_refused_connections_are_closed_at_once(echo):
    with Proxy(echo.address) as proxy, connect(proxy) as before:
        trip(before, b"x")
        proxy.refuse(True)
        with connect(proxy) as refused:
            assert refused.recv(1) == b""
        assert trip(before, b"x") == b"x"
        proxy.refuse(False)
        with connect(proxy) as after:
            assert trip(after, b"x") == b"x"
        assert proxy.connections == 2


def test_nothing_passes_while_it_holds(echo):
    with Proxy(echo.address) as proxy, connect(proxy) as connection:
        trip(connection, b"x")
        proxy.hold(True)
        connection.sendall(b"held")
        connection.shutdown(socket.SHUT_WR)
        time.sleep(0.1)
        assert (echo.got, proxy.bytes_up) == (b"x", 1)
        proxy.hold(False)
        assert receive(connection, 4) == b"held"


def test_a_held_connection_can_be_cut(echo):
    with Proxy(echo.address) as proxy, connect(proxy) as connection:
        proxy.hold(True)
        connection.sendall(b"x")
        until(lambda: proxy.connections == 1)
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert not echo.got


@pytest.mark.parametrize("direction", ["up", "down"])
def test_flip_next_changes_one_bit_of_a_large_piece(echo, direction):
    data = bytes(range(200))
    with Proxy(echo.address) as proxy, connect(proxy) as connection:
        proxy.flip_next(direction)
        assert trip(connection, b"small") == b"small"
        assert bits_apart(trip(connection, data), data) == [100]
        assert bits_apart(bytes(echo.got[5:]), data) == ([100] if direction == "up" else [])
        assert trip(connection, data) == data


# ------------------------------------------------------------------------------------------------------------- rules


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


@pytest.mark.parametrize("framing", ["raw", "http2"])
@pytest.mark.parametrize("size", [13, 500, 100_000])
@pytest.mark.parametrize("when", ["before", "middle", "after"])
def test_a_rule_fires_at_its_frame(echo, when, size, framing):
    """However the frames are spread over TCP's writes and HTTP/2's: some hold the headers of several."""
    frames = [frame(step, size=300) for step in range(4)]
    payload = b"prefix" + b"".join(frames)
    begin = len(b"prefix" + frames[0] + frames[1])
    body = len(frames[2]) - HEADER.size
    data, places = payload, list(range(len(payload)))
    if framing == "http2":
        messages = [payload[:begin], frames[2][:100], frames[2][100:], frames[3]]
        data, places = http2(messages, (begin + 20) // 2)  # one begins inside the header
    forwarded: list[int] = []

    def action() -> None:
        forwarded.append(sum(place < proxy.bytes_up for place in places))

    echo.echoing = False
    rule = Rule("up", Kind.ACTIVATIONS, 2, 0, action, when)
    with Proxy(echo.address, rules=[rule]) as proxy, connect(proxy) as connection:
        end = places[begin + len(frames[2]) - 1] + 1
        for piece in pieces(data[:end], size):
            connection.sendall(piece)
            time.sleep(0.001)  # else they would come as one
        until(lambda: forwarded)  # nothing after the frame is needed
        connection.sendall(data[end:])
        assert echo.wait_for(len(data)) == data
    expected = {"before": begin, "middle": begin + HEADER.size + body // 2, "after": begin + HEADER.size + body}
    (count,) = forwarded
    if when == "before" and (size < HEADER.size or framing == "http2"):  # some of the header may be gone
        assert expected[when] <= count < expected[when] + HEADER.size
    else:
        assert count == expected[when]


def test_rules_choose_by_direction_kind_step_and_micro(echo):
    calls: list[str] = []

    def note(name: str):
        return lambda: calls.append(name)

    rules = [
        Rule("up", action=note("any"), times=3),
        Rule("down", Kind.GRADIENTS, action=note("down, gradients")),
        Rule("up", step=2, action=note("step 2")),
        Rule("up", Kind.ACTIVATIONS, 1, 1, note("micro 1"), "after"),
        Rule("up", Kind.EVALUATION, action=note("never")),
        Rule("up", step=9, action=note("never")),
        Rule("up", micro=9, action=note("never")),
    ]
    with Proxy(echo.address, rules=rules) as proxy, connect(proxy) as connection:
        for step, micro, kind in ((1, 0, 1), (1, 1, 1), (2, 0, Kind.GRADIENTS), (2, 1, 1)):
            data = frame(step, Kind(kind), micro)
            assert trip(connection, data) == data
    assert calls == ["any", "any", "micro 1", "any", "step 2", "down, gradients"]


def test_a_frame_inside_the_body_of_another_is_none(echo):
    calls: list[int] = []
    inner = torch.frombuffer(bytearray(frame(7)), dtype=torch.uint8)
    outer = b"".join(write(Frame(Kind.ACTIVATIONS, 1, 0, {"activations": inner})))
    rule = Rule("up", step=7, action=lambda: calls.append(7))
    with Proxy(echo.address, rules=[rule]) as proxy, connect(proxy) as connection:
        trip(connection, outer)
        assert not calls
        trip(connection, b"snlo\1 is no header: " + frame(7))
    assert calls == [7]


def test_an_action_may_cut_and_the_frame_does_not_arrive(echo):
    with Proxy(echo.address, rules=[Rule("up", step=1, action=lambda: proxy.cut(), when="before")]) as proxy:
        with connect(proxy) as connection:
            trip(connection, frame(0))
            connection.sendall(frame(1))
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
        with connect(proxy) as connection:
            assert trip(connection, frame(1)) == frame(1)
    assert bytes(echo.got) == frame(0) + frame(1)


def test_what_an_action_raises_is_raised_at_the_end(echo):
    def fail() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):  # noqa: SIM117 both would not fit into a line
        with Proxy(echo.address, rules=[Rule("up", action=fail)]) as proxy, connect(proxy) as connection:
            assert trip(connection, frame()) == frame()


@pytest.mark.parametrize("when", ["before", "middle"])
@pytest.mark.parametrize("size", [200, 40_000])
def test_a_flip_changes_one_bit_of_the_frame(echo, when, size):
    frames = [frame(step, size=size) for step in range(3)]
    with Proxy(echo.address, rules=[Rule("up", step=1, when=when, flip=True)]) as proxy, connect(proxy) as connection:
        connection.sendall(b"".join(frames))
        got = receive(connection, 3 * len(frames[0]))
    (place,) = bits_apart(got, b"".join(frames))
    assert HEADER.size <= place - len(frames[0]) < len(frames[0])
    if when == "middle":
        assert place - len(frames[0]) == HEADER.size + (len(frames[0]) - HEADER.size) // 2


def test_a_forwarded_frame_cannot_be_flipped():
    with pytest.raises(ValueError, match="flip"):
        Rule("up", when="after", flip=True)


# --------------------------------------------------------------------------------------------------------- over gRPC


@contextlib.contextmanager
def grpc_echo(got: list[bytes]) -> Iterator[tuple[str, int]]:
    def answer(requests, context):
        for request in requests:
            got.append(request)
            yield request

    handler = grpc.stream_stream_rpc_method_handler(answer)
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo", {"Run": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield "127.0.0.1", port
    finally:
        server.stop(0).wait()


@pytest.mark.parametrize("when, arrived", [("before", 1), ("middle", 1), ("after", 2)])
def test_rules_see_frames_in_grpc(when, arrived):
    """Large frames one after the other, in DATA frames that begin and end anywhere."""
    got: list[bytes] = []
    told: list[int] = []

    def action() -> None:
        time.sleep(0.05)  # what was forwarded is with the server by now
        told.append(len(got))
        proxy.cut()

    frames = [frame(step, size=100_000) for step in range(4)]
    with grpc_echo(got) as target, Proxy(target, rules=[Rule("up", step=1, action=action, when=when)]) as proxy:
        with grpc.insecure_channel(proxy.address) as channel, pytest.raises(grpc.RpcError) as error:
            list(channel.stream_stream("/echo/Run")(iter(frames)))
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    assert told == [arrived] and got == frames[:arrived]


def test_frames_come_down_through_grpc():
    calls: list[int] = []
    rules = [Rule("down", step=step, action=lambda step=step: calls.append(step), when="after") for step in (1, 3)]
    frames = [frame(step, size=30_000) for step in range(4)]
    with grpc_echo([]) as target, Proxy(target, rules=rules) as proxy:
        with grpc.insecure_channel(proxy.address) as channel:
            assert list(channel.stream_stream("/echo/Run")(iter(frames))) == frames
        until(lambda: calls == [1, 3])
