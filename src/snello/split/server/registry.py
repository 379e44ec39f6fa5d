"""The sessions of a server: whose they are, which are in memory, and where a client that comes back resumes.

    out/config.yaml                     the server's settings
    out/serve.log                       JSON lines
    out/shared/checkpoints/             the half that all sessions share (--sessions shared)
    out/sessions/NAME-ID/session.json   whose it is
                        /checkpoints/   the last two
                        /metrics.jsonl, model.safetensors (the best), summary.json

All of this runs in the one thread that computes.
"""

import json
import shutil
import time
import uuid
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

from snello.config import ServeConfig
from snello.config.units import parse_bytes
from snello.devices import Precision, resolve_device, resolve_precision
from snello.errors import CheckpointError
from snello.files import save_json
from snello.models import architecture_of
from snello.runs.folder import RunFolder
from snello.split.checkpoints import Checkpoints
from snello.split.server.half import Sizes, make_server_model, make_vit, starting_weights
from snello.split.server.sessions import InferenceSession, Session, TrainingSession
from snello.split.steps import ServerModel
from snello.split.wire.frames import Frame, Kind, control, weights_frame
from snello.split.wire.handshake import Hello, RunShape, Welcome, parse, recipe_values
from snello.split.wire.refusals import Code, Refused
from snello.train.schedule import Schedule
from snello.vit import AttentionPath
from snello.vit.attention import faster_attention


class Registry:
    """Opens, keeps and saves sessions.

    `attention` is the path of attention that an earlier start has measured, if any.

    Raises:
        SnelloError: where settings, model and machine do not fit each other; nothing has been written.
    """

    def __init__(self, config: ServeConfig, run: RunFolder, attention: str | None = None) -> None:
        self.config, self.run = config, run
        self.device = resolve_device(config.device)
        self.precision: Precision = resolve_precision(config.precision, self.device)
        self._sizes: dict[int, Sizes] = {}
        self._memory = parse_bytes(config.max_memory, "--max-memory")
        self._in_memory: dict[str, TrainingSession] = {}
        self._connected: set[str] = set()  # those of evaluation too, under names of their own
        self._left: dict[str, float] = {}  # sessions in memory without a connection: since when
        self.attention: AttentionPath = "explicit"
        self.attention = self._attention(attention or config.attention)
        self._shared: ServerModel | None = None
        self._shared_steps = 0
        self._shared_checkpoints: Checkpoints | None = None
        self._shared_classes = ""

    def _attention(self, path: str) -> AttentionPath:
        vit = make_vit(self.config, self.config.num_classes or 10)  # also shows that the settings work
        self.architecture = architecture_of(vit.model)
        self._new_half(self.config.num_classes or 10, weights="none")
        if path == "auto":
            return faster_attention(vit, self.config.batch_size, self.device, self.precision)
        return path  # type: ignore[return-value]

    def sizes(self, num_classes: int) -> Sizes:
        """The sizes of a model with so many classes."""
        if num_classes not in self._sizes:
            if len(self._sizes) >= 64:
                self._sizes.clear()  # clients choose the number: they must not fill the memory
            self._sizes[num_classes] = Sizes(self.config, num_classes, self.precision)
        return self._sizes[num_classes]

    def describe(self) -> Frame:
        """What a client needs to prepare itself."""
        recipe = recipe_values(replace(self.config, precision=self.precision))
        values = self._welcome(recipe=recipe, num_classes=self.config.num_classes, architecture=self.architecture)
        return control(Kind.WELCOME, values)

    def open(self, client: str, hello: Hello) -> tuple[str, Session, Frame]:
        """The session that a client asks for with its name for `leave`, and the welcome to the client.

        Raises:
            Refused: where the client cannot train or evaluate here.
        """
        if hello.terms is None:
            raise Refused(Code.MALFORMED, "a client came without its terms")
        wanted = self.config.num_classes or hello.terms.num_classes
        if not 1 <= wanted < 2**16:
            raise Refused(Code.MISMATCH, f"num classes: the server takes 1 to 65535, the client has {wanted}")
        sizes = self.sizes(wanted)
        sizes.terms.require(hello.terms)
        if hello.mode == "inference":
            return self._open_inference(client, hello, sizes)
        if hello.plan is None:
            raise Refused(Code.MALFORMED, "a client came without its plan")
        return self._open_training(client, hello, hello.plan, sizes)

    def _welcome(self, **values: Any) -> dict[str, Any]:
        welcome = Welcome(time=time.time(), version=version("snello"), shared=self._is_shared, **values)
        return asdict(welcome)

    def _open_inference(self, client: str, hello: Hello, sizes: Sizes) -> tuple[str, Session, Frame]:
        run = self._folder(client, hello.session)
        if self._known(client, hello.session) is None:
            raise Refused(Code.UNKNOWN_SESSION, "the server does not know this session")
        if not run.model_file.is_file():
            raise Refused(Code.NO_CHECKPOINT, "the session has not finished an epoch yet")
        name = f"evaluation-{uuid.uuid4()}"
        self._make_room(name, sizes)
        upper = self._new_half(sizes.terms.num_classes, weights="none")
        session = InferenceSession(upper, run, sizes, self.config)
        self._connected.add(name)
        return name, session, control(Kind.WELCOME, self._welcome())

    def _open_training(self, client: str, hello: Hello, plan: RunShape, sizes: Sizes) -> tuple[str, Session, Frame]:
        known = self._known(client, hello.session)
        if known is not None and known != plan:
            raise Refused(Code.MISMATCH, f"pictures and steps: the session began with {known}, the client has {plan}")
        has_state = hello.step is not None or bool(hello.checkpoints)
        due = Schedule.of(self.config, plan.num_train).total_steps
        if self.config.split.stores and plan.total_steps != due:
            raise Refused(Code.MISMATCH, f"steps: the client wants {plan.total_steps}, its pictures make {due}")
        if known is None and has_state:
            raise Refused(Code.UNKNOWN_SESSION, "the server has nothing of this session")
        name = session_name(client, hello.session)
        self._make_room(name, sizes)
        try:
            session, welcome = self._enter(client, name, hello, plan, sizes, known is None, has_state)
        except CheckpointError as error:
            self.forget(name)
            raise Refused(Code.STORAGE, str(error)) from error
        except BaseException:
            self.forget(name)
            raise
        self._connected.add(name)
        self._left.pop(name, None)
        return name, session, welcome

    def _enter(
        self, client: str, name: str, hello: Hello, plan: RunShape, sizes: Sizes, new: bool, has_state: bool
    ) -> tuple[Session, Frame]:
        session = self._in_memory.get(name)
        if session is not None and self._is_in_step(session, hello):
            return session, control(Kind.WELCOME, self._position(session))
        if session is None:
            session = self._make(client, hello.session, plan, sizes)
        self._in_memory[name] = session
        session.incarnation = uuid.uuid4().hex
        step: int | None = None
        if new:
            session.save()
            whose = {"session": hello.session, "client": client, "plan": asdict(plan)}
            save_json(session.run.path / "session.json", whose)
        elif self._is_shared:
            self._resume_shared(session, hello)
        else:
            step = self._common(session, hello)
            session.go_back(step)
        values = self._position(session, step, back=has_state and (not self._is_shared or hello.step is None))
        if has_state:
            return session, control(Kind.WELCOME, values)
        values["fresh"] = True
        return session, weights_frame(Kind.WELCOME, starting_weights(self.config, sizes.terms.num_classes), values)

    @staticmethod
    def _is_in_step(session: TrainingSession, hello: Hello) -> bool:
        """Whether both still have in memory what they had when the connection broke."""
        if session.failed is not None or hello.step is None or session.incarnation != hello.incarnation:
            return False
        return hello.step <= session.step <= hello.step + 1

    def _position(self, session: TrainingSession, checkpoint: int | None = None, back: bool = False) -> dict[str, Any]:
        """Where a session stands: at a checkpoint of that number, where it went back to one."""
        step = session.step if checkpoint is None else checkpoint
        place = {"incarnation": session.incarnation, "step": step, "back": back}
        return self._welcome(**place, lost_steps=session.lost_steps)

    def _common(self, session: TrainingSession, hello: Hello) -> int:
        theirs: set[int] = set(hello.checkpoints or [0])
        ours = session.checkpoints.steps()
        both = theirs.intersection(ours)
        if not both:
            raise _no_checkpoint(theirs, ours)
        return max(both)

    def _resume_shared(self, session: TrainingSession, hello: Hello) -> None:
        """A shared half is never rolled back: what a client lost since its checkpoint stays in it, and is counted."""
        at = hello.step if hello.step is not None else max(hello.checkpoints or [0])
        steps = session.checkpoints.steps()
        if not steps:
            raise _no_checkpoint({*hello.checkpoints, at}, steps)
        reached = max(session.step, *steps)
        nearest = max((step for step in steps if step <= at), default=None)
        if nearest is not None:
            session.go_back(nearest)
        session.lost_steps += max(0, reached - at)
        session.go_to(at)

    @property
    def _is_shared(self) -> bool:
        return self.config.sessions == "shared"

    def _folder(self, client: str, session: str) -> RunFolder:
        return RunFolder(self.run.path / "sessions" / f"{client}-{session[:12]}")

    def _known(self, client: str, session: str) -> RunShape | None:
        """The shape of a run that this client has begun before."""
        file = self._folder(client, session).path / "session.json"
        if not file.is_file():
            return None
        values = json.loads(file.read_text(encoding="utf-8"))
        return parse(RunShape, values["plan"]) if values["session"] == session and values["client"] == client else None

    def _make(self, client: str, session: str, plan: RunShape, sizes: Sizes) -> TrainingSession:
        run = self._folder(client, session)
        self.run.path.mkdir(parents=True, exist_ok=True)
        upper = self._shared_half(plan, sizes) if self._is_shared else self._new_half(sizes.terms.num_classes)
        made = TrainingSession(client, run, upper, sizes, plan, self.config)
        self._require_disk(made)
        run.path.mkdir(parents=True, exist_ok=True)
        return made

    def _require_disk(self, session: TrainingSession) -> None:
        """Refuses a session whose frames would not fit on the disk, before it begins."""
        if session.steps.store is None:
            return
        need, own = session.stored_disk, session.run.store_file
        used = {path: path.stat().st_size for path in self.run.path.glob(f"sessions/*/{own.name}") if path.is_file()}
        for other in self._in_memory.values():  # what they have yet to send has its place too
            if not other.finished:
                file = other.run.store_file
                used[file] = max(used.get(file, 0), other.stored_disk)
        had = used.pop(own, 0)
        held, free = sum(used.values()), shutil.disk_usage(self.run.path).free
        room = parse_bytes(self.config.max_disk, "--max-disk") - held
        if need > room or need - had > free:
            text = f"the store of this run needs up to {need} bytes on the server's disk; others hold {held}"
            raise Refused(Code.FULL, f"{text} of --max-disk {self.config.max_disk}, and {free} bytes are free")
        session.steps.store.max_disk = room

    def _new_half(self, num_classes: int, **changes: Any) -> ServerModel:
        config = replace(self.config, **changes)
        return make_server_model(config, num_classes, self.device, self.precision, self.attention)

    def _shared_half(self, plan: RunShape, sizes: Sizes) -> ServerModel:
        if self._shared is None:
            self._shared = self._new_half(sizes.terms.num_classes)
            folder = self.run.path / "shared" / "checkpoints"
            self._shared_checkpoints = Checkpoints(folder, self._shared.modules, self._shared.optimizers)
            steps = self._shared_checkpoints.steps()
            if steps:
                state = self._shared_checkpoints.load(steps[-1])
                self._shared.load_state_dict(state["upper"])
                self._shared_steps, self._shared_classes = steps[-1], state["classes"]
        self._shared_classes = self._shared_classes or plan.classes
        if plan.classes != self._shared_classes:
            reason = f"class names: the other clients' have the hash {self._shared_classes}, this one's {plan.classes}"
            raise Refused(Code.MISMATCH, f"{reason}; all who share a server half need the same folders")
        return self._shared

    def _make_room(self, session: str, sizes: Sizes) -> None:
        """Forgets sessions that nobody is connected to, longest ago first, until this one fits; or refuses it."""
        crowded = len(self._connected - {session}) >= self.config.max_sessions
        while crowded or not self._fits(session, sizes):
            idle = [name for name in self._left if name != session]
            if crowded or not idle:
                raise Refused(
                    Code.FULL,
                    f"the server has {len(self._connected)} sessions under way and room for no more (--max-sessions "
                    f"{self.config.max_sessions}, --max-memory {self.config.max_memory}; this one needs "
                    f"{sizes.messages + sizes.stored_memory + sizes.state} bytes)",
                )
            oldest = min(idle, key=lambda name: self._left[name])
            if self._in_memory[oldest].behind:  # its own steps go on when its client is back
                self._in_memory[oldest].save()
            self.forget(oldest)

    def _fits(self, session: str, sizes: Sizes) -> bool:
        num = len({session, *self._connected, *self._in_memory})
        states = 1 if self._is_shared else num
        return num * (sizes.messages + sizes.stored_memory) + states * sizes.state <= self._memory

    def leave(self, name: str) -> None:
        """The connection of a session has ended; one of training stays in memory while there is room."""
        self._connected.discard(name)
        session = self._in_memory.get(name)
        if session is None:
            return
        self._left[name] = time.monotonic()
        if session.finished or session.failed is not None:
            self.forget(name)

    def forget(self, name: str) -> None:
        """Drops a session from memory; its checkpoints stay."""
        self._in_memory.pop(name, None)
        self._left.pop(name, None)

    def forget_idle(self) -> None:
        """Drops sessions that nobody has come back to for as long as a connected client may be silent."""
        limit = time.monotonic() - self.config.idle_seconds
        for name in [name for name, since in self._left.items() if since < limit]:
            if not self._in_memory[name].behind:
                self.forget(name)

    def keeps(self, session: TrainingSession) -> bool:
        """Whether a session is still in memory."""
        return any(kept is session for kept in self._in_memory.values())

    def stepped(self) -> None:
        """Counts a session's step: checkpoints of a shared half are named by the number of all of them."""
        self._shared_steps += 1

    def saved(self) -> None:
        """Saves the half of shared sessions too, where one of them has saved."""
        if self._shared is not None and self._shared_checkpoints is not None:
            state = {"upper": self._shared.state_dict(), "classes": self._shared_classes}
            self._shared_checkpoints.save(self._shared_steps, state)

    def save_all(self) -> None:
        """Writes a checkpoint of every session that stands between two steps."""
        problems: list[CheckpointError] = []
        for session in self._in_memory.values():
            if session.between_steps and session.failed is None and session.position != session.saved:
                try:
                    session.save()
                except CheckpointError as error:
                    problems.append(error)
        self.saved()
        if problems:
            raise problems[0]


def _no_checkpoint(theirs: set[int], ours: list[int]) -> Refused:
    reason = f"the client has checkpoints of the steps {sorted(theirs)}, the server of {ours}"
    return Refused(Code.NO_CHECKPOINT, reason)


def session_name(client: str, session: str) -> str:
    """What a session is known by: one client cannot name another's."""
    return f"{client}/{session}"
