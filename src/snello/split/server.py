"""The server of split learning: gRPC streams with TLS on one side, sessions that know nothing of them on the other.

The event loop moves bytes and keeps time. All that computes, reads or writes files runs in one thread beside it, one
frame after the other in the order in which they are complete: so sessions take turns, and one that is slow or gone
takes nothing from the others.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import grpc
import grpc.aio

from snello.errors import CheckpointError, ProtocolError, SnelloError
from snello.split import frames, wire
from snello.split.auth import Authenticator
from snello.split.frames import MAX_CONTROL_BYTES, Frame, Kind, control_values
from snello.split.handshake import Hello, parse
from snello.split.refusals import Code, Refused
from snello.split.registry import Registry
from snello.split.sessions import Answer, Session, TrainingSession
from snello.split.telemetry import Telemetry, health_reply

T = TypeVar("T")
SERVICE, METHOD = "snello.Split", "Train"
CREDENTIALS = "snello-credentials"
MAX_HELLO_BYTES = MAX_CONTROL_BYTES + (1 << 12)
STATUS = {Code.CREDENTIALS: grpc.StatusCode.UNAUTHENTICATED, Code.FULL: grpc.StatusCode.RESOURCE_EXHAUSTED}


@dataclass(frozen=True)
class Limits:
    """How long the server waits."""

    hello_seconds: float = 20.0
    """For the first frame of a connection."""
    frame_seconds: float = 30.0
    """For the rest of a frame that has begun, beside what its bytes may take."""
    bytes_per_second: float = 8192.0
    """The slowest that a frame may come in."""
    idle_seconds: float = 600.0
    """For the next frame."""
    grace_seconds: float = 30.0
    """For steps under way when the server is asked to stop."""
    keepalive_seconds: float = 20.0
    """Between two pings on a connection, and for their answer."""


class Server:
    """Serves sessions until it is stopped.

    Args:
        registry: of the sessions.
        authenticator: decides who is admitted.
        telemetry: what operators see.
        log: where to.
        limits: how long it waits.
    """

    def __init__(
        self,
        registry: Registry,
        authenticator: Authenticator,
        telemetry: Telemetry,
        log: logging.Logger,
        limits: Limits | None = None,
    ) -> None:
        self._registry, self._authenticator, self._telemetry, self._log = registry, authenticator, telemetry, log
        self._limits = limits or Limits()
        self._compute = ThreadPoolExecutor(1, "snello-compute")
        self._streams: dict[str, _Stream] = {}  # by session
        self._stopping = False
        self.on_step: Callable[[TrainingSession, float], None] = lambda session, seconds: None
        """Told after every step of a session and its seconds, from the thread of the event loop."""
        self.on_leave: Callable[[str], None] = lambda name: None
        """Told the folder's name of a session whose connection has ended."""

    async def start(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        """Listens on host:port, with TLS where there are credentials; returns the port.

        Raises:
            OSError: where the address cannot be had.
        """
        self._server = grpc.aio.server(options=_options(self._limits), maximum_concurrent_rpcs=1024)
        self._server.add_generic_rpc_handlers((self._handlers(),))
        try:
            if credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise OSError(str(error)) from error
        if port == 0:
            raise OSError("the address cannot be had")
        await self._server.start()
        self._sweeper = asyncio.create_task(self._sweep())
        return int(port)

    async def stop(self) -> None:
        """Lets steps under way end, saves every session, tells the clients, and closes; in at most the grace."""
        self._stopping = True
        deadline = time.monotonic() + self._limits.grace_seconds
        while self._streams and time.monotonic() < deadline:
            for stream in list(self._streams.values()):
                if stream.idle and stream.session.between_steps:
                    await self._dismiss(stream)
            await asyncio.sleep(0.02)
        self._sweeper.cancel()
        try:
            await self._in_thread(self._registry.save_all)
        except CheckpointError as error:
            self._log.error("could not save", extra={"fields": {"reason": str(error)}})
        await self._server.stop(grace=1.0)
        self._compute.shutdown(wait=True)

    async def _dismiss(self, stream: "_Stream") -> None:
        """Saves a session that stands between two steps, and tells its client."""
        session = stream.session
        try:
            await self._in_thread(session.save)
            stream.end(Refused(Code.SHUTDOWN, f"the server shuts down; step {session.step} is saved", session.step))
        except CheckpointError as error:
            stream.end(Refused(Code.STORAGE, f"the server shuts down and could not save: {error}"))
        await stream.ended.wait()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(30.0, self._limits.idle_seconds))
            await self._in_thread(self._registry.forget_idle)

    # ------------------------------------------------------------------------------------------------- the network

    def _handlers(self) -> grpc.GenericRpcHandler:
        methods = {
            f"/{SERVICE}/{METHOD}": grpc.stream_stream_rpc_method_handler(self._train),
            "/grpc.health.v1.Health/Check": grpc.unary_unary_rpc_method_handler(self._health),
        }

        class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
            def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
                return methods.get(details.method)

        return Handlers()

    async def _health(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return health_reply(serving=not self._stopping)

    async def _train(self, requests: object, context: grpc.aio.ServicerContext) -> None:
        """One connection of a client, from its hello to its end."""
        peer = {"peer": context.peer()}
        try:
            await self._converse(context, peer)
        except Refused as refused:
            await self._refuse(context, peer, refused)
        except ProtocolError as error:
            code = Code.VERSION if "protocol version" in str(error) else Code.MALFORMED
            code = Code.TOO_LARGE if "larger than the limit" in str(error) else code
            await self._refuse(context, peer, Refused(code, str(error)))
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except SnelloError as error:
            await self._refuse(context, peer, Refused(Code.INTERNAL, str(error)))
        except Exception as error:
            self._log.exception("unexpected error", extra={"fields": peer})
            await self._refuse(context, peer, Refused(Code.INTERNAL, f"the server failed with {type(error).__name__}"))

    async def _refuse(self, context: grpc.aio.ServicerContext, peer: Mapping[str, Any], refused: Refused) -> None:
        self._telemetry.refused(refused.code.value)
        level = logging.INFO if refused.code == Code.SHUTDOWN else logging.WARNING
        self._log.log(
            level, "refused", extra={"fields": {**peer, "code": refused.code.value, "reason": refused.reason}}
        )
        await context.abort(STATUS.get(refused.code, grpc.StatusCode.FAILED_PRECONDITION), refused.to_text())

    async def _converse(self, context: grpc.aio.ServicerContext, peer: dict[str, Any]) -> None:
        client = self._identify(context)
        peer["client"] = client
        reader = _Reader(context, MAX_HELLO_BYTES, self._limits)
        data = await reader.read(self._limits.hello_seconds, Code.TOO_SLOW, "no hello came")
        if data is None:
            return
        hello = self._hello(data)
        if self._stopping:
            raise Refused(Code.SHUTDOWN, "the server shuts down")
        await self._take_over(hello)
        if hello.mode == "describe":
            await _write(context, list(wire.chunks(frames.write(self._registry.describe()))))
            return
        name, session, welcome = await self._in_thread(lambda: self._registry.open(client, hello))
        peer |= {"session": hello.session[:12], "mode": hello.mode}
        self._log.info("session opened", extra={"fields": {**peer, "step": getattr(session, "step", 0)}})
        mode: Literal["train", "inference"] = "train" if isinstance(session, TrainingSession) else "inference"
        self._telemetry.session_opened(mode)
        try:
            if isinstance(session, TrainingSession):
                await self._serve_training(context, reader, session, name, welcome)
            else:
                await _write(context, list(wire.chunks(frames.write(welcome))))
                await self._serve(context, reader, session, asyncio.Event())
        finally:
            self._compute.submit(self._registry.leave, name)  # not awaited: this task may be cancelled already
            self._telemetry.session_closed(mode)
            self._log.info("session left", extra={"fields": {**peer, "step": getattr(session, "step", 0)}})

    def _identify(self, context: grpc.aio.ServicerContext) -> str:
        metadata = dict(context.invocation_metadata() or ())
        try:
            credentials = json.loads(metadata.get(CREDENTIALS, "{}"))
            fits = isinstance(credentials, dict) and all(isinstance(v, str) for v in credentials.values())
        except ValueError:
            fits = False
        names = context.auth_context().get("x509_common_name") or [None]
        certificate = None if names[0] is None else names[0].decode("ascii", "replace")
        client = self._authenticator.identify(credentials, certificate) if fits else None
        if client is None:
            raise Refused(Code.CREDENTIALS, "the server does not know this client's name, token or certificate")
        return client

    @staticmethod
    def _hello(data: bytearray) -> Hello:
        frame = frames.read([data], MAX_HELLO_BYTES)
        if frame.kind != Kind.HELLO:
            raise Refused(Code.OUT_OF_TURN, f"a frame of kind {frame.kind.name} came before the hello")
        return parse(Hello, control_values(frame))

    async def _take_over(self, hello: Hello) -> None:
        """Ends the connection that the session had: its client has noticed before us that it broke."""
        stream = self._streams.get(hello.session) if hello.mode == "train" else None
        if stream is not None:
            stream.end(Refused(Code.TAKEN_OVER, "another connection goes on with this session"))
            await stream.ended.wait()
            self._telemetry.reconnected()

    # -------------------------------------------------------------------------------------------------- one session

    async def _serve_training(
        self, context: grpc.aio.ServicerContext, reader: "_Reader", session: TrainingSession, name: str, welcome: Frame
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        stream = _Stream(session, task)
        self._streams[name] = stream
        try:
            await _write(context, list(wire.chunks(frames.write(welcome))))
            await self._serve(context, reader, session, stream.busy)
        except asyncio.CancelledError:
            if stream.reason is None:
                raise
            raise stream.reason from None
        finally:
            if self._streams.get(name) is stream:
                del self._streams[name]
            stream.ended.set()
            self.on_leave(session.run.path.name)

    async def _serve(
        self, context: grpc.aio.ServicerContext, reader: "_Reader", session: Session, busy: asyncio.Event
    ) -> None:
        reader.limit(session.max_body)
        while True:
            data = await reader.read(self._limits.idle_seconds, Code.IDLE, "nothing came")
            if data is None:
                return
            busy.set()
            answer = await asyncio.shield(self._take(session, data))
            del data
            await _write(context, answer.chunks)
            busy.clear()

    async def _take(self, session: Session, data: bytearray) -> Answer:
        """Applies a frame in the thread that computes, and what is left to do of it right after."""
        started, loop = time.perf_counter(), asyncio.get_running_loop()
        self._telemetry.queued(1)
        try:
            answer = await self._in_thread(lambda: self._apply(session, data, loop, started))
        finally:
            self._telemetry.queued(-1)
        if not answer.repeated:
            self._telemetry.sent("uplink", answer.sizes[0])
            self._telemetry.sent("downlink", answer.sizes[1])
        return answer

    def _apply(self, session: Session, data: bytearray, loop: asyncio.AbstractEventLoop, started: float) -> Answer:
        answer = session.take(data)
        if answer.repeated:
            return answer
        if answer.after is not None and isinstance(session, TrainingSession):
            self._compute.submit(self._after, answer.after, session, loop, started)
        if data[5] == Kind.SAVE:
            self._registry.saved()
        return answer

    def _after(
        self, after: Callable[[], None], session: TrainingSession, loop: asyncio.AbstractEventLoop, started: float
    ) -> None:
        try:
            after()
        except Exception:
            self._log.exception("a step could not be ended")
            session.failed = Refused(Code.INTERNAL, f"the server could not end step {session.step}")
            return
        self._registry.stepped(session)
        seconds = time.perf_counter() - started
        self._telemetry.step(seconds)
        loop.call_soon_threadsafe(self.on_step, session, seconds)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._compute, function)


class _Stream:
    """The connection that a session has now."""

    def __init__(self, session: TrainingSession, task: "asyncio.Task[Any]") -> None:
        self.session, self._task = session, task
        self.busy, self.ended = asyncio.Event(), asyncio.Event()
        self.reason: Refused | None = None

    @property
    def idle(self) -> bool:
        """Whether no frame is being answered."""
        return not self.busy.is_set()

    def end(self, reason: Refused) -> None:
        """Ends the connection, and says why."""
        if self.reason is None and not self.ended.is_set():
            self.reason = reason
            self._task.cancel()


class _Reader:
    """Frames from a stream, each within its time."""

    def __init__(self, context: grpc.aio.ServicerContext, max_body: int, limits: Limits) -> None:
        self._context, self._limits = context, limits
        self._assembler = wire.Assembler(max_body)

    def limit(self, max_body: int) -> None:
        """Bytes that bodies may have from now on."""
        self._assembler.max_body_bytes = max_body

    async def read(self, seconds: float, code: Code, otherwise: str) -> bytearray | None:
        """The next frame; None where the client has no more.

        Raises:
            Refused: with `code`, where none begins in time; TOO_SLOW where one that has begun does not end in time.
            ProtocolError: for a malformed one.
        """
        chunk = await _within(seconds, self._context.read(), Refused(code, f"{otherwise} for {seconds:g} s"))
        if chunk is grpc.aio.EOF:
            return None
        data = self._assembler.add(chunk)
        if data is not None:
            return data
        assert self._assembler.header is not None
        size = self._assembler.header.body_bytes
        limit = self._limits.frame_seconds + size / self._limits.bytes_per_second
        refused = Refused(Code.TOO_SLOW, f"a frame of {size} bytes took more than {limit:.0f} s")
        return await _within(limit, self._rest(), refused)

    async def _rest(self) -> bytearray | None:
        while True:
            chunk = await self._context.read()
            if chunk is grpc.aio.EOF:
                return None
            data = self._assembler.add(chunk)
            if data is not None:
                return data


async def _within(seconds: float, awaited: Awaitable[T], refused: Refused) -> T:
    try:
        return await asyncio.wait_for(awaited, seconds)
    except asyncio.TimeoutError:
        raise refused from None


async def _write(context: grpc.aio.ServicerContext, chunks: list[bytes]) -> None:
    for chunk in chunks:
        await context.write(chunk)


def _options(limits: Limits) -> list[tuple[str, int]]:
    """Messages stay small, dead connections are noticed, clients may ping."""
    keepalive = int(limits.keepalive_seconds * 1000)
    return [
        ("grpc.max_receive_message_length", wire.CHUNK_BYTES),
        ("grpc.max_metadata_size", 16384),
        ("grpc.keepalive_time_ms", keepalive),
        ("grpc.keepalive_timeout_ms", keepalive),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),
        ("grpc.http2.max_ping_strikes", 5),
        ("grpc.so_reuseport", 0),
    ]
