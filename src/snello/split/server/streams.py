"""The server of split learning: gRPC streams with TLS on one side, sessions that know nothing of them on the other.

The event loop moves bytes and keeps time. All that computes, reads or writes files runs in one thread beside it, one
frame after the other in the order in which they are complete: so sessions take turns, and one that is slow or gone
takes nothing from the others.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import grpc
import grpc.aio

from snello.errors import CheckpointError, ConfigError, ProtocolError, SnelloError
from snello.split.security.auth import Authenticator
from snello.split.server.registry import Registry, session_name
from snello.split.server.sessions import Answer, Session, TrainingSession
from snello.split.server.telemetry import Telemetry, health_reply
from snello.split.wire import chunks, frames
from snello.split.wire.frames import MAX_CONTROL_BYTES, Kind, control_values
from snello.split.wire.handshake import Hello, parse
from snello.split.wire.refusals import Code, Refused

T = TypeVar("T")
HEALTH = "/grpc.health.v1.Health/Check"
MAX_HELLO_BYTES = MAX_CONTROL_BYTES + (1 << 12)
QUIET_SECONDS = 0.5
"""A server that stops waits so long for the next frame after an answer: that frame shows that the client has the
answer, which gRPC may drop where the stream ends right behind it."""
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
    """Serves sessions until it is stopped."""

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
        self._calls: dict[str, _Call] = {}  # those that train, by session
        self._stopping = False
        self.on_step: Callable[[TrainingSession, float], None] = lambda session, seconds: None
        """Called after every step with its session and its seconds, in the thread of the event loop."""
        self.on_leave: Callable[[str], None] = lambda name: None
        """Called with the folder's name of a session whose connection has ended."""

    async def start(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        """Listens on host:port, with TLS where there are credentials; returns the port.

        Raises:
            OSError: where the address cannot be had.
        """
        chunks.keep_blocks()
        self._loop = asyncio.get_running_loop()
        self._server = grpc.aio.server(options=_options(self._limits), maximum_concurrent_rpcs=1024)
        self._server.add_generic_rpc_handlers(self._handlers())
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
        while self._calls and time.monotonic() < deadline:
            for call in list(self._calls.values()):
                if call.session is not None and call.session.between_steps and call.quiet_seconds > QUIET_SECONDS:
                    call.end(await self._parting(call.session))
                    await call.ended.wait()
            await asyncio.sleep(0.02)
        self._sweeper.cancel()
        try:
            await self._in_thread(self._registry.save_all)
        except CheckpointError as error:
            self._log.error("could not save", extra={"fields": {"reason": str(error)}})
        await self._server.stop(grace=1.0)
        self._compute.shutdown(wait=True)

    async def _parting(self, session: TrainingSession) -> Refused:
        """Saves a session that stands between two steps, and returns why its connection ends."""
        if session.failed is not None:
            return session.failed
        try:
            await self._in_thread(session.save)
        except CheckpointError as error:
            return Refused(Code.STORAGE, f"the server shuts down and could not save: {error}")
        return Refused(Code.SHUTDOWN, f"the server shuts down; step {session.step} is saved", session.step)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(30.0, self._limits.idle_seconds))
            await self._in_thread(self._registry.forget_idle)

    def _handlers(self) -> list[grpc.GenericRpcHandler]:
        methods = {
            chunks.METHOD: grpc.stream_stream_rpc_method_handler(self._train),
            HEALTH: grpc.unary_unary_rpc_method_handler(self._health),
        }
        services = ((path.split("/"), handler) for path, handler in methods.items())
        return [grpc.method_handlers_generic_handler(name, {method: it}) for (_, name, method), it in services]

    async def _health(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return health_reply(serving=not self._stopping)

    async def _train(self, requests: object, context: grpc.aio.ServicerContext) -> None:
        """One connection of a client, from its hello to its end."""
        call = _Call(context, self._limits)
        try:
            await self._converse(call)
        except asyncio.CancelledError:
            if call.reason is None:
                raise
            await self._refuse(call, call.reason)
        except grpc.aio.AbortError:
            raise
        except Refused as refused:
            await self._refuse(call, refused)
        except CheckpointError as error:
            await self._refuse(call, Refused(Code.STORAGE, str(error)))
        except SnelloError as error:
            code = Code(error.code) if isinstance(error, ProtocolError) else Code.INTERNAL
            await self._refuse(call, Refused(code, str(error)))
        except Exception as error:
            self._log.exception("unexpected error", extra={"fields": call.peer})
            await self._refuse(call, Refused(Code.INTERNAL, f"the server failed with {type(error).__name__}"))
        finally:
            call.relax()
            call.ended.set()

    async def _refuse(self, call: "_Call", refused: Refused) -> None:
        call.relax()
        self._telemetry.refused.labels(refused.code.value).inc()
        level = logging.INFO if refused.code == Code.SHUTDOWN else logging.WARNING
        fields = {**call.peer, "code": refused.code.value, "reason": refused.reason}
        self._log.log(level, "refused", extra={"fields": fields})
        await call.context.abort(STATUS.get(refused.code, grpc.StatusCode.FAILED_PRECONDITION), refused.to_text())

    async def _converse(self, call: "_Call") -> None:
        call.client = call.peer["client"] = self._identify(call.context)
        data = await call.read(self._limits.hello_seconds, Code.TOO_SLOW, "no hello came")
        if data is None:
            return
        hello = self._hello(data)
        if self._stopping:
            raise Refused(Code.SHUTDOWN, "the server shuts down")
        if hello.mode == "describe":
            await call.write(chunks.of(self._registry.describe()))
            return
        await self._take_over(call, hello)
        name, session, welcome = await self._in_thread(lambda: self._registry.open(call.client, hello))
        if isinstance(session, TrainingSession):
            await self._in_thread(partial(self._go_on, session))
        call.peer |= {"session": hello.session[:12], "mode": hello.mode}
        self._log.info("session opened", extra={"fields": {**call.peer, "step": getattr(session, "step", 0)}})
        self._telemetry.sessions.labels(hello.mode).inc()
        if isinstance(session, TrainingSession):
            call.session = session
            self._calls[name] = call
        try:
            await call.write(chunks.of(welcome))
            del welcome
            await self._serve(call, session)
        finally:
            self._compute.submit(self._registry.leave, name)  # not awaited: this task may be cancelled already
            self._telemetry.sessions.labels(hello.mode).dec()
            self._log.info("session left", extra={"fields": {**call.peer, "step": getattr(session, "step", 0)}})
            if self._calls.get(name) is call:
                del self._calls[name]
            if isinstance(session, TrainingSession):
                self.on_leave(session.run.path.name)

    def _identify(self, context: grpc.aio.ServicerContext) -> str:
        metadata = dict(context.invocation_metadata() or ())
        try:
            credentials = json.loads(metadata.get(chunks.CREDENTIALS, "{}"))
            fits = isinstance(credentials, dict) and all(isinstance(v, str) for v in credentials.values())
        except (ValueError, RecursionError):
            fits = False
        names = context.auth_context().get("x509_common_name") or [None]
        certificate = None if names[0] is None else names[0].decode("ascii", "replace")
        try:
            client = self._authenticator.identify(credentials, certificate) if fits else None
        except ConfigError as error:
            self._log.error("nobody can be admitted", extra={"fields": {"reason": str(error)}})
            client = None
        if client is None:
            raise Refused(Code.CREDENTIALS, "the server does not know this client's name, token or certificate")
        return client

    @staticmethod
    def _hello(data: bytearray) -> Hello:
        frame = frames.read([data], MAX_HELLO_BYTES)
        if frame.kind != Kind.HELLO:
            raise Refused(Code.OUT_OF_TURN, f"a frame of kind {frame.kind.name} came before the hello")
        return parse(Hello, control_values(frame))

    async def _take_over(self, call: "_Call", hello: Hello) -> None:
        """Ends the connection that the session had: its client has noticed before us that it broke."""
        before = self._calls.get(session_name(call.client, hello.session)) if hello.mode == "train" else None
        if before is not None:
            before.end(Refused(Code.TAKEN_OVER, "another connection has taken this session over"))
            await before.ended.wait()
            self._telemetry.reconnects.inc()

    async def _serve(self, call: "_Call", session: Session) -> None:
        call.assembler.max_body_bytes = session.max_body
        while True:
            data = await call.read(self._limits.idle_seconds, Code.IDLE, "nothing came")
            if data is None:
                return
            if self._stopping and isinstance(session, TrainingSession):
                flags = frames.parse_header(data).flags
                await self._in_thread(partial(session.settle, flags))
                if session.between_steps:
                    raise await self._parting(session)
            call.busy = True
            self._telemetry.queue.inc()
            future = self._loop.run_in_executor(self._compute, self._apply, session, data, time.perf_counter())
            future.add_done_callback(lambda done: self._telemetry.queue.dec())
            del data
            answer = await asyncio.shield(future)  # what is begun is ended, also where the connection breaks
            await call.write(answer.chunks)
            call.busy, call.since = False, time.monotonic()
            if not answer.repeated:
                self._telemetry.sent("uplink", answer.sizes[0])
                self._telemetry.sent("downlink", answer.sizes[1])

    def _apply(self, session: Session, data: bytearray, started: float) -> Answer:
        answer = session.take(data)
        if answer.repeated:
            return answer
        if answer.after is not None and isinstance(session, TrainingSession):
            self._compute.submit(self._after, answer.after, session, started)
        if frames.parse_header(data).kind == Kind.SAVE:
            self._registry.saved()
        return answer

    def _after(self, after: Callable[[], None], session: TrainingSession, started: float) -> None:
        try:
            after()
        except Exception:
            self._log.exception("a step could not be ended")
            session.failed = Refused(Code.INTERNAL, f"the server could not end step {session.step}")
            return
        if session.failed is not None and session.failed.code == Code.NOT_FINITE:
            return  # the weights did not move
        self._registry.stepped()
        self._go_on(session)
        seconds = time.perf_counter() - started
        self._telemetry.step(seconds)
        self._loop.call_soon_threadsafe(self.on_step, session, seconds)

    def _go_on(self, session: TrainingSession) -> None:
        """Lets a session take the steps that wait for no frame, one at a time, so that others have their turn."""
        if session.behind and not session.in_background and not self._stopping and self._registry.keeps(session):
            session.in_background = True
            self._compute.submit(self._replay, session)

    def _replay(self, session: TrainingSession) -> None:
        session.in_background = False
        if not session.behind or self._stopping or not self._registry.keeps(session):
            return
        try:
            session.replay()
        except Exception:
            self._log.exception("a step on stored samples could not be taken")
            session.failed = Refused(Code.INTERNAL, f"the server failed in a step of its own after step {session.step}")
        self._go_on(session)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await self._loop.run_in_executor(self._compute, function)


class _Call:
    """One connection: frames from it and to it, each within its time, and why it is ended."""

    def __init__(self, context: grpc.aio.ServicerContext, limits: Limits) -> None:
        self.context, self._limits = context, limits
        self.peer: dict[str, Any] = {"peer": context.peer()}
        """Who it is, as the log has it."""
        self.client = ""
        self.session: TrainingSession | None = None
        self.busy = False
        """Whether a frame is being answered."""
        self.since = time.monotonic()
        """When the last answer went out."""
        self.reason: Refused | None = None
        self.ended = asyncio.Event()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self.assembler = chunks.Assembler(MAX_HELLO_BYTES)
        self._timer: asyncio.TimerHandle | None = None

    @property
    def quiet_seconds(self) -> float:
        """For how long the client has been neither answered nor heard."""
        return 0.0 if self.busy else time.monotonic() - self.since

    def end(self, reason: Refused) -> None:
        """Ends the connection, and says why."""
        if self.reason is None and not self.ended.is_set():
            self.reason = reason
            self._task.cancel()

    def relax(self) -> None:
        """The peer is not waited for."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def read(self, seconds: float, code: Code, otherwise: str) -> bytearray | None:
        """The next frame; None where the client has no more. Ends the connection where it does not come in time."""
        self._allow(seconds, code, otherwise)
        while True:
            chunk = await self.context.read()
            if chunk is grpc.aio.EOF:
                return None
            begun = self.assembler.header is not None
            data = self.assembler.add(chunk)
            if data is not None:
                self.relax()
                return data
            if not begun and self.assembler.header is not None:
                self._allow_transfer(self.assembler.header.body_bytes)

    async def write(self, parts: list[bytes]) -> None:
        """Sends a frame; ends the connection where the peer does not take it in time."""
        self._allow_transfer(sum(map(len, parts)))
        for part in parts:
            await self.context.write(part)
        self.relax()

    def _allow_transfer(self, size: int) -> None:
        seconds = self._limits.frame_seconds + size / self._limits.bytes_per_second
        self._allow(seconds, Code.TOO_SLOW, f"a frame of {size} bytes was not through")

    def _allow(self, seconds: float, code: Code, otherwise: str) -> None:
        self.relax()
        late = Refused(code, f"{otherwise} in {seconds:.0f} s")
        self._timer = asyncio.get_running_loop().call_later(seconds, self.end, late)


def _options(limits: Limits) -> list[tuple[str, int]]:
    """Messages stay small, dead connections are noticed, clients may ping."""
    keepalive = int(limits.keepalive_seconds * 1000)
    return [
        ("grpc.max_receive_message_length", chunks.MAX_CHUNK_BYTES),
        ("grpc.max_metadata_size", 16384),
        ("grpc.keepalive_time_ms", keepalive),
        ("grpc.keepalive_timeout_ms", keepalive),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),
        ("grpc.http2.max_ping_strikes", 5),
        ("grpc.so_reuseport", 0),
    ]
