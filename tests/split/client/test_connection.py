"""How long a client's connection goes on trying: until an answer comes, or the time that the user gave is over."""

from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import asdict

import grpc
import pytest

from snello.errors import NetworkError
from snello.split.client import connection as module
from snello.split.client.connection import Connection, Endpoint, RolledBack
from snello.split.wire.chunks import METHOD, Assembler, chunks
from snello.split.wire.frames import Frame, Kind, control, read, write
from snello.split.wire.handshake import Hello, Welcome
from snello.split.wire.refusals import Code, Refused

FRAME = Frame(Kind.SAVE, 3, 1, control(Kind.SAVE, {}).arrays)
TOO_MANY = 60


class Clock:
    """Stands for `time` in the connection: waiting takes no time, and is added up."""

    def __init__(self) -> None:
        self.now = self.waited = 0.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 1e-3)
        self.waited += seconds


class Server:
    """Welcomes every stream, and then does what it is told with its first frame."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.tries = clock, 0
        self.seconds = 0.0
        """That each try takes."""
        self.answers: Callable[[int], bool] = lambda tries: False
        """Whether the frame is answered at this try."""
        self.refusal = "connection reset"
        self.back = False
        self._grpc = grpc.server(futures.ThreadPoolExecutor(4))
        handler = grpc.stream_stream_rpc_method_handler(self._train)
        service, method = METHOD.strip("/").split("/")
        self._grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        self.address = f"127.0.0.1:{self._grpc.add_insecure_port('127.0.0.1:0')}"
        self._grpc.start()

    def _train(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        assembler = Assembler(1 << 20)
        for chunk in requests:
            data = assembler.add(chunk)
            if data is None:
                continue
            frame = read([data])
            if frame.kind == Kind.HELLO:
                welcome = Welcome(time=0.0, version="", back=self.back and self.tries > 0)
                yield from chunks(write(control(Kind.WELCOME, asdict(welcome))))
                continue
            self.tries += 1
            self.clock.now += self.seconds
            if not (self.answers(self.tries) or self.tries > TOO_MANY):
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.refusal)
            yield from chunks(write(Frame(Kind.SAVED, frame.step, frame.micro, {})))

    def stop(self) -> None:
        self._grpc.stop(0).wait()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    server = Server(clock)
    yield server
    server.stop()


@pytest.fixture
def connection(server: Server) -> Iterator[Connection]:
    connection = Connection(Endpoint(server.address), lambda: Hello("describe"), reconnect_seconds=100)
    connection.open()
    yield connection
    connection.close()


@pytest.mark.parametrize("refusal", ["connection reset", Refused(Code.SHUTDOWN, "it stops", 3).to_text()])
def test_a_frame_that_never_gets_through_is_given_up_when_the_time_is_over(server, connection, refusal):
    server.seconds, server.refusal = 20.0, refusal
    with pytest.raises(NetworkError, match=r"cannot be reached: .*(connection reset|it stops)"):
        connection.exchange(FRAME)
    assert 5 <= server.tries <= 6  # the first at 20 s, the last before 120 s


def test_the_time_begins_anew_when_an_answer_has_come(server, connection):
    server.seconds, server.answers = 20.0, lambda tries: tries % 4 == 0
    for _ in range(3):
        assert connection.exchange(FRAME).kind == Kind.SAVED
    assert server.tries == 12


def test_going_back_to_a_checkpoint_is_no_answer(server, connection):
    server.seconds, server.back = 20.0, True
    times = 0
    with pytest.raises(NetworkError):
        while server.tries <= TOO_MANY:
            with pytest.raises(RolledBack):
                connection.exchange(FRAME)
            times += 1
    assert 3 <= times <= 6


def test_pauses_grow_while_frames_are_lost(server, connection):
    server.seconds = 0.0
    with pytest.raises(NetworkError):
        connection.exchange(FRAME)
    assert server.tries < 20 and server.clock.waited == pytest.approx(100, rel=0.05)
