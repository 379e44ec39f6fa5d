"""Sessions of a server: every frame of a client applied once, wherever connections, clients or the server break.

Nothing here knows the network. A session stands before a frame that it waits for, (step, micro-step, kind); the last
frame that it applied is answered from its last reply when it comes again; any other is refused. Both sides write
checkpoints at the same steps, when the client says so, and go back to the newest that both have.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from snello import files
from snello.config import ServeConfig
from snello.errors import CheckpointError, ProtocolError, TrainingError
from snello.runs.folder import RunFolder
from snello.seeds import mix
from snello.split.build import replace_weights
from snello.split.checkpoints import Checkpoints
from snello.split.ledger import Ledger
from snello.split.server.half import Sizes, Upper
from snello.split.wire import chunks as wire
from snello.split.wire import frames
from snello.split.wire.frames import Flags, Frame, Kind, control, control_values
from snello.split.wire.handshake import Plan
from snello.split.wire.refusals import Code, Refused
from snello.split.wire.weights import weights_frame, weights_of
from snello.train.learner import SERVER_NOISE
from snello.train.schedule import Schedule


@dataclass(frozen=True)
class Answer:
    """What goes back to the client."""

    chunks: list[bytes]
    after: Callable[[], None] | None = None
    """What is left to be done when the answer is on its way."""
    repeated: bool = False
    """Whether the frame had been applied before."""
    sizes: tuple[Mapping[str, int], Mapping[str, int]] = ({}, {})
    """Bytes by kind of the frame and of its answer, for the metrics."""


class Session(Protocol):
    """What the network asks of a session."""

    max_body: int
    """Bytes that a frame's body may have."""

    def take(self, data: bytearray) -> Answer:
        """Applies a frame, or recognizes that it has been applied, and answers it.

        Raises:
            Refused: for a frame that cannot be applied; the session stands where it stood.
            ProtocolError: the same, for one that is malformed.
        """


class TrainingSession:
    """One client's training with a server half.

    Args:
        client: name of the client.
        run: folder of the session.
        upper: the half, of this session alone or shared.
        sizes: of the model.
        plan: the client's.
        config: of the server.
    """

    def __init__(
        self, client: str, run: RunFolder, upper: Upper, sizes: Sizes, plan: Plan, config: ServeConfig
    ) -> None:
        self.client, self.run, self.upper, self.plan, self.config = client, run, upper, plan, config
        self.shared = config.sessions == "shared"
        weights = sizes.state // 4 + (1 << 20) if config.accept_weights else 0
        self.max_body = max(sizes.max_frame, weights)
        self.ledger = Ledger(sizes.vit, config, upper.codec, upper.num_classes)
        self.schedule = Schedule(
            plan.num_train,
            config.batch_size,
            config.accumulate,
            config.epochs,
            buffer=upper.codec.buffer,
            max_steps=plan.total_steps,
        )
        own = ({}, {}) if self.shared else (upper.modules, upper.optimizers)
        self.checkpoints = Checkpoints(run.path / "checkpoints", *own)
        self.step, self.micro, self.awaited = 0, 0, Kind.ACTIVATIONS
        self.incarnation = ""
        self.accuracy = -1.0
        self.loss = 0.0
        """Of the last step, where the labels are here."""
        self.lost_steps = 0
        self.finished = False
        self.failed: Refused | None = None
        self._last: tuple[tuple[Kind, int, int], list[bytes]] | None = None
        self._activations: Frame | None = None  # of the exchange under way, in U-shape
        self._gradients: list[Tensor | None] | None = None  # of the step under way
        self._again = self._overflow = False
        self._loss = self._seconds = 0.0

    # ------------------------------------------------------------------------------------------------ one frame

    def take(self, data: bytearray) -> Answer:
        """See `Session`."""
        if self.failed is not None:
            raise self.failed
        frame = frames.read([data], self.max_body)
        key = (frame.kind, frame.step, frame.micro)
        if self._last is not None and self._last[0] == key:
            return Answer(self._last[1], repeated=True)
        started = time.perf_counter()
        answer, after = self._apply(frame)
        answer = replace(answer, step=frame.step, micro=frame.micro)
        sizes = frames.sizes(frame), frames.sizes(answer)
        self.ledger.counters.add(frame, sizes[0])
        self.ledger.counters.add(answer, sizes[1])
        chunks = list(wire.chunks(frames.write(answer)))
        self._last = key, chunks
        self._seconds += time.perf_counter() - started
        return Answer(chunks, after, sizes=sizes)

    def _apply(self, frame: Frame) -> tuple[Frame, Callable[[], None] | None]:
        try:
            if frame.kind in (Kind.ACTIVATIONS, Kind.FEATURE_GRADIENTS):
                return self._exchange(frame)
            self._require_between_steps(frame)
            if frame.kind == Kind.EVALUATION:
                return self.upper.answer(frame, training=False, seed=0), None
            return self._control(frame), None
        except TrainingError as error:
            raise Refused(Code.NOT_FINITE, str(error)) from error
        except CheckpointError as error:
            raise Refused(Code.STORAGE, f"the server could not save its checkpoint: {error}") from error

    def _require_between_steps(self, frame: Frame) -> None:
        if not self.between_steps or frame.step != self.step:
            raise Refused(
                Code.OUT_OF_TURN,
                f"a frame of kind {frame.kind.name} came for step {frame.step}, the server is at {self.where}",
            )

    @property
    def between_steps(self) -> bool:
        """Whether no step is under way."""
        return self.micro == 0 and self.awaited == Kind.ACTIVATIONS

    @property
    def where(self) -> str:
        """What the session waits for, in words."""
        return f"step {self.step}.{self.micro} and waits for {self.awaited.name.lower().replace('_', ' ')}"

    # ----------------------------------------------------------------------------------------------- one exchange

    def _exchange(self, frame: Frame) -> tuple[Frame, Callable[[], None] | None]:
        if (frame.kind, frame.step, frame.micro) != (self.awaited, self.step, self.micro) or (
            self.step >= self.schedule.total_steps
        ):
            came = f"{frame.kind.name.lower().replace('_', ' ')} of step {frame.step}.{frame.micro} came"
            raise Refused(Code.OUT_OF_TURN, f"{came}, the server is at {self.where}")
        before = self.upper.snapshot()
        try:
            answer = self._answer(frame)
        except BaseException:
            self.upper.undo(before)  # as if the frame had not come: the right one may still follow
            self._again = frame.kind == Kind.FEATURE_GRADIENTS
            raise
        self._again = False
        self._add(self.upper.swap_gradients(None))
        self._overflow = self.upper.half.overflow
        if answer.kind == Kind.FEATURES and Flags.FORWARD_ONLY not in answer.flags:
            self.awaited = Kind.FEATURE_GRADIENTS
            return answer, None
        if "gradients.loss" in answer.arrays:
            self._loss += float(answer.arrays["gradients.loss"])
        self._note(frame, answer)
        self.awaited, self.micro, self._activations = Kind.ACTIVATIONS, self.micro + 1, None
        if self.micro < self.schedule.num_micro(self.step):
            return answer, None
        self.step, self.micro = self.step + 1, 0
        return answer, self._update

    def _answer(self, frame: Frame) -> Frame:
        self.upper.half.overflow = self._overflow
        if self.between_steps:
            self.ledger.begin()
            self._loss = self._seconds = 0.0
            self.upper.begin(self.schedule.progress(self.step))
        number = self.schedule.batches_of(self.step, self.micro).start
        seed = mix(self.config.seed, SERVER_NOISE, number)
        if frame.kind == Kind.ACTIVATIONS:
            self._activations = frame if self.config.split.labels == "client" else None
        elif self.shared or self._again:
            # Another session may have moved the weights since, so what was computed before cannot be gone back through.
            assert self._activations is not None
            self.upper.answer(self._activations, training=True, seed=seed)
        answer = self.upper.answer(frame, training=True, seed=seed)
        if not bool(answer.arrays.get("gradients.loss", torch.zeros(1)).isfinite()):
            raise TrainingError("the loss is not finite")
        return answer

    def _add(self, gradients: list[Tensor | None]) -> None:
        """Adds up the gradients of a step here, as sessions that share a half are between each other's micro-steps."""
        if self._gradients is None:
            self._gradients = gradients
            return
        pairs = zip(self._gradients, gradients, strict=True)
        self._gradients = [new if old is None else old if new is None else old.add_(new) for old, new in pairs]

    def _note(self, frame: Frame, answer: Frame) -> None:
        in_u_shape = frame.kind == Kind.FEATURE_GRADIENTS
        batch = self.config.batch_size * self.schedule.buffer
        self.ledger.exchanged(
            min(batch, self.schedule.num_samples(self.step) - self.micro * batch),
            1 + in_u_shape,
            gradient="gradients" in answer.arrays,
            feature_gradient=in_u_shape,
        )

    def _update(self) -> None:
        """Moves the weights by the step that has just ended; runs while the client computes."""
        started = time.perf_counter()
        step = self.step - 1
        self.upper.swap_gradients(self._gradients)
        self.upper.half.overflow, self._overflow, self._gradients = self._overflow, False, None
        norm = self.upper.update(self.schedule.lr(step, self.config.lr, self.config.warmup))
        if self.upper.scale.scaler is None and not bool(norm.isfinite()):
            reason = f"the gradient of the server half is not finite at step {step + 1}; its weights were not touched"
            self.failed = Refused(Code.NOT_FINITE, reason)
            return
        self.loss = self._loss
        row: dict[str, Any] = {"kind": "step", "step": self.step, "epoch": self.schedule.epoch(step)}
        row |= {"loss": self._loss} if self.config.split.labels == "server" else {}
        row |= {"grad_norm": float(norm)} | self.ledger.metrics() | self.upper.half.method.metrics()
        self._log(row | {"seconds": round(self._seconds + time.perf_counter() - started, 4)})

    def _log(self, row: dict[str, Any]) -> None:
        try:
            self.run.log(row)
        except CheckpointError as error:
            self.failed = Refused(Code.STORAGE, f"the server could not write: {error}")

    # ------------------------------------------------------------------------------------------------- between steps

    def _control(self, frame: Frame) -> Frame:
        if frame.kind == Kind.SAVE:
            return self._save_for(frame)
        if frame.kind == Kind.FINISH:
            return self._finish(frame)
        if frame.kind == Kind.GET_WEIGHTS:
            return self._get_weights()
        if frame.kind == Kind.SET_WEIGHTS:
            return self._set_weights(frame)
        raise Refused(Code.OUT_OF_TURN, f"a client does not send frames of kind {frame.kind.name}")

    def _save_for(self, frame: Frame) -> Frame:
        values = control_values(frame)
        accuracy = values.get("accuracy")
        if accuracy is not None:
            if not isinstance(accuracy, (int, float)) or not 0 <= accuracy <= 1:
                raise ProtocolError("an accuracy must be in [0, 1]")
            self.accuracy = accuracy
        if values.get("best") is True:
            for name, module in self.upper.modules.items():
                files.save_tensors(self.run.weights_files[name], module.state_dict())
        self.save()
        if accuracy is not None:
            self._log({"kind": "eval", "step": self.step, "accuracy": accuracy, **self.ledger.metrics()})
        return control(Kind.SAVED, {})

    def save(self) -> None:
        """Writes a checkpoint, between steps.

        Raises:
            CheckpointError: where it cannot be written.
        """
        own = {} if self.shared else self.upper.state_dict()
        self.checkpoints.save(self.step, {"upper": own, "ledger": self.ledger.state_dict(), "accuracy": self.accuracy})

    def go_back(self, step: int) -> None:
        """Goes to a checkpoint, and forgets what came later.

        Raises:
            CheckpointError: where it is not there or damaged.
        """
        state = self.checkpoints.load(step)
        if not self.shared:
            self.upper.load_state_dict(state["upper"])
        self.ledger.load_state_dict(state["ledger"])
        self.accuracy = state["accuracy"]
        self.go_to(step)
        self.run.forget_after(step)

    def go_to(self, step: int) -> None:
        """Waits for `step` next, whatever was under way."""
        self.step, self.micro, self.awaited = step, 0, Kind.ACTIVATIONS
        self._last = self._activations = self._gradients = self.failed = None
        self._again = self._overflow = False

    def _finish(self, frame: Frame) -> Frame:
        self.finished = True
        summary = self.summary()
        files.save_json(self.run.summary_file, summary)
        return control(Kind.FINISHED, {"summary": self.ledger.summary()})

    def summary(self) -> dict[str, Any]:
        """The session's result."""
        rows = list(self.run.rows("step"))
        return {
            "client": self.client,
            "accuracy": self.accuracy,
            "steps": self.step,
            "lost_steps": self.lost_steps,
            "server_seconds": round(sum(row["seconds"] for row in rows), 3),
            **self.ledger.summary(),
            "model": self.config.model,
            "method": self.config.method_name,
            "num_classes": self.upper.num_classes,
        }

    def _get_weights(self) -> Frame:
        require_release(self.config)
        return weights_frame(Kind.WEIGHTS, {name: value.clone() for name, value in self.upper.weights().items()})

    def _set_weights(self, frame: Frame) -> Frame:
        if not self.config.accept_weights:
            raise Refused(Code.FORBIDDEN, "this server takes no weights from clients (--accept-weights)")
        try:
            replace_weights(self.upper.weights(), weights_of(frame), "server")
        except CheckpointError as error:
            raise ProtocolError(str(error)[:200]) from None
        return control(Kind.WEIGHTS, {})


class InferenceSession:
    """A client that evaluates or predicts with the best weights of its session; it changes nothing.

    Args:
        upper: a fresh half, which gets those weights.
        run: folder of the session.
        sizes: of the model.
        config: of the server.
    """

    def __init__(self, upper: Upper, run: RunFolder, sizes: Sizes, config: ServeConfig) -> None:
        self.upper, self.config, self.max_body = upper, config, sizes.max_frame
        for name, module in upper.modules.items():
            module.load_state_dict(files.load_tensors(run.weights_files[name])[0])

    def take(self, data: bytearray) -> Answer:
        """See `Session`."""
        frame = frames.read([data], self.max_body)
        if frame.kind == Kind.EVALUATION:
            answer = self.upper.answer(frame, training=False, seed=0)
        elif frame.kind == Kind.GET_WEIGHTS:
            require_release(self.config)
            answer = weights_frame(Kind.WEIGHTS, self.upper.weights())
        else:
            raise Refused(Code.OUT_OF_TURN, f"a frame of kind {frame.kind.name} came in a session of evaluation")
        answer = replace(answer, step=frame.step, micro=frame.micro)
        return Answer(list(wire.chunks(frames.write(answer))), sizes=(frames.sizes(frame), frames.sizes(answer)))


def require_release(config: ServeConfig) -> None:
    """Refuses to give weights away where the server does not release them."""
    if not config.release_weights:
        raise Refused(Code.FORBIDDEN, "this server does not release its half of the model (--no-release-weights)")


def session_values(session: str, client: str, plan: Plan) -> dict[str, Any]:
    """What a session's session.json says."""
    return {"session": session, "client": client, "plan": asdict(plan)}
