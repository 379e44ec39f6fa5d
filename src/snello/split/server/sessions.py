"""Sessions of a server: every frame of a client applied once, wherever connections, clients or the server break.

Nothing here knows the network. A session stands before a frame that it waits for, (step, micro-step, kind); the last
frame that it applied is answered from its last reply when it comes again; any other is refused. Both sides write
checkpoints at the same steps, when the client says so, and go back to the newest that both have.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from snello import files
from snello.config import ServeConfig
from snello.errors import CheckpointError, ProtocolError, TrainingError
from snello.runs.checkpoint import with_weights
from snello.runs.folder import RunFolder
from snello.split.build import replace_weights
from snello.split.checkpoints import Checkpoints
from snello.split.ledger import Ledger
from snello.split.server.half import Sizes
from snello.split.steps import ServerModel, ServerSteps
from snello.split.wire import chunks, frames
from snello.split.wire.frames import Flags, Frame, Kind, control, control_values, weights_frame, weights_of
from snello.split.wire.handshake import RunShape
from snello.split.wire.refusals import Code, Refused
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
    """One client's training with a server half, of this session alone or shared, in the folder of the session."""

    def __init__(
        self, client: str, run: RunFolder, model: ServerModel, sizes: Sizes, plan: RunShape, config: ServeConfig
    ) -> None:
        self.client, self.run, self.model, self.plan, self.config = client, run, model, plan, config
        self.shared = config.sessions == "shared"
        weights = sizes.state // 4 + (1 << 20) if config.accept_weights else 0
        self.max_body = max(sizes.max_frame, weights)
        self.ledger = Ledger(sizes.vit, config, model.codec, model.num_classes)
        whole = Schedule.of(config, plan.num_train)
        self.schedule = replace(whole, buffer=model.codec.buffer, max_steps=plan.total_steps)
        store = None if self.schedule.replay is None else model.store(run, sizes.stored_memory)
        self.stored_disk = 0 if store is None else sizes.stored_disk(self.schedule)
        """Bytes that its frames may take."""
        self.steps = ServerSteps(model, self.schedule, shared=self.shared, store=store)
        own = ({}, {}) if self.shared else (model.modules, model.optimizers)
        self.checkpoints = Checkpoints(run.path / "checkpoints", *own)
        self.incarnation = ""
        self.accuracy = -1.0
        self.loss = 0.0
        """Loss of the last step, where the labels are here."""
        self.lost_steps = 0
        self.finished = False
        self.failed: Refused | None = None
        self.saved = (-1, -1)
        """The `position` of the last checkpoint."""
        self._evaluated = False  # after the last step of all
        self.in_background = False
        """Whether the next of its own steps is waiting for its turn."""
        self._last: tuple[tuple[Kind, int, int], list[bytes]] | None = None
        self._seconds = 0.0

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.steps.step

    @property
    def between_steps(self) -> bool:
        """Whether no step is under way."""
        return self.steps.between_steps

    @property
    def behind(self) -> int:
        """Steps on stored samples that come before the next frame, or after the last."""
        return 0 if self.failed is not None or self.finished else self.steps.behind

    @property
    def position(self) -> tuple[int, int]:
        """A checkpoint's number, and the steps that the half has taken."""
        # What an evaluation adds to the ledger must not get into a checkpoint that the client may yet go back to.
        return self.schedule.checkpoint(self.step, self._evaluated), self.steps.done

    def take(self, data: bytearray) -> Answer:
        """Applies a frame, or recognizes that it has been applied, and answers it; see `Session`."""
        if self.failed is not None:
            raise self.failed
        frame = frames.read([data], self.max_body)
        key = (frame.kind, frame.step, frame.micro)
        if self._last is not None and self._last[0] == key:
            return Answer(self._last[1], repeated=True)
        settled = self.settle(frame.flags)
        started = time.perf_counter()
        answer, after = self._apply(frame)
        if settled and after is None:
            after = _nothing  # what follows a step is still to be done
        answer = replace(answer, step=frame.step, micro=frame.micro)
        sizes = frames.sizes(frame), frames.sizes(answer)
        self.ledger.counters.add(frame, sizes[0])
        self.ledger.counters.add(answer, sizes[1])
        parts = chunks.of(answer)
        self._last = key, parts
        self._seconds += time.perf_counter() - started
        return Answer(parts, after, sizes=sizes)

    def settle(self, flags: Flags) -> bool:
        """Moves the weights by a step that waited for the client's next frame, whose flags these are, and says so."""
        due = self.steps.due
        if due:
            self._update(overflow=Flags.SKIPPED in flags)
        return due

    def _apply(self, frame: Frame) -> tuple[Frame, Callable[[], None] | None]:
        try:
            if frame.kind in (Kind.ACTIVATIONS, Kind.FEATURE_GRADIENTS):
                self._catch_up()
                return self._exchange(frame)
            self._require_between_steps(frame)
            if frame.kind not in (Kind.WAIT, Kind.SAVE):
                self._catch_up()
            if frame.kind == Kind.EVALUATION:
                answer = self.steps.evaluate(frame)
                self._evaluated = self.steps.all_sent
                return answer, None
            return self._control(frame), None
        except TrainingError as error:
            raise Refused(Code.NOT_FINITE, str(error)) from error
        except CheckpointError as error:
            raise Refused(Code.STORAGE, f"the server could not save: {error}") from error

    def _catch_up(self) -> None:
        """Takes the few steps on stored samples that come before the next frame; after the last they are too many."""
        if self.behind and self.steps.all_sent:
            left = f"the server has {self.behind} steps on stored samples left"
            raise Refused(Code.OUT_OF_TURN, f"{left}, and a client waits for them")
        while self.behind:
            self.replay()
        if self.failed is not None:
            raise self.failed

    def replay(self) -> None:
        """Takes one step on stored samples, and saves now and then where no client is waited for."""
        started = time.perf_counter()
        try:
            loss = self.steps.replay()
        except TrainingError as error:
            self.failed = Refused(Code.NOT_FINITE, f"{error} at step {self.steps.done + 1} of the server")
            return
        except CheckpointError as error:
            self.failed = Refused(Code.STORE, str(error))
            return
        row = {"kind": "replay", "step": self.step, "server_step": self.steps.done, "loss": loss}
        self._log(row | {"seconds": round(time.perf_counter() - started, 4)})
        every = self.config.checkpoint_steps
        due = not self.behind or (every and self.steps.done % every == 0)
        if due and self.steps.all_sent and self.failed is None:
            try:
                self.save()
            except CheckpointError as error:
                self.failed = Refused(Code.STORAGE, f"the server could not save: {error}")

    def _require_between_steps(self, frame: Frame) -> None:
        if not self.between_steps or frame.step != self.step:
            raise Refused(
                Code.OUT_OF_TURN,
                f"a frame of kind {frame.kind.name} came for step {frame.step}, the server is at {self.steps.position}",
            )

    def _exchange(self, frame: Frame) -> tuple[Frame, Callable[[], None] | None]:
        step, micro = self.step, self.steps.micro
        if self.between_steps:
            self.ledger.begin()
            self._seconds = 0.0
        answer = self.steps.exchange(frame)
        if self.steps.awaited == Kind.FEATURE_GRADIENTS:
            return answer, None
        in_u_shape = frame.kind == Kind.FEATURE_GRADIENTS
        batch = self.config.batch_size * self.schedule.buffer
        self.ledger.exchanged(
            min(batch, self.schedule.num_samples(step) - micro * batch),
            1 + in_u_shape,
            gradient="gradients" in answer.arrays,
            feature_gradient=in_u_shape,
        )
        # In half precision the client may yet find that its own gradient overflowed: its next frame says so.
        waits = self.model.half.scaler.is_enabled()
        return answer, self._update if self.steps.due and not waits else None

    def _update(self, overflow: bool = False) -> None:
        """Moves the weights by the step that has just ended; runs while the client computes, if it can."""
        started = time.perf_counter()
        try:
            norm = self.steps.finish(overflow, self.ledger.share_at_begin)
        except TrainingError as error:
            self.failed = Refused(Code.NOT_FINITE, f"{error} at step {self.step}; its weights were not touched")
            return
        self.loss = self.steps.loss
        row: dict[str, Any] = {"kind": "step", "step": self.step, "epoch": self.schedule.epoch(self.step - 1)}
        row |= {"loss": self.loss} if self.config.split.labels == "server" else {}
        row |= {"grad_norm": float(norm)} | self.ledger.metrics() | self.model.half.method.metrics()
        self._log(row | {"seconds": round(self._seconds + time.perf_counter() - started, 4)})

    def _log(self, row: dict[str, Any]) -> None:
        try:
            self.run.log(row)
        except CheckpointError as error:
            self.failed = Refused(Code.STORAGE, f"the server could not write: {error}")

    def _control(self, frame: Frame) -> Frame:
        if frame.kind == Kind.WAIT:
            return control(Kind.WAITED, {"left": self.behind})
        if frame.kind == Kind.SAVE:
            return self._save_for(frame)
        if frame.kind == Kind.FINISH:
            return self._finish()
        if frame.kind == Kind.GET_WEIGHTS:
            return released_weights(self.model, self.config)
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
            for name, module in with_weights(self.model.modules).items():
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
        own = {} if self.shared else self.model.state_dict()
        rest = {"ledger": self.ledger.state_dict(), "accuracy": self.accuracy, **self.steps.state_dict()}
        self.checkpoints.save(self.position[0], {"upper": own, **rest})
        self.saved = self.position

    def go_back(self, number: int) -> None:
        """Goes to a checkpoint, and forgets what came later.

        Raises:
            CheckpointError: where it is not there or damaged.
            Refused: where what it needs of the store is not there.
        """
        state, step = self.checkpoints.load(number), min(number, self.schedule.total_steps)
        if not self.shared:
            self.model.load_state_dict(state["upper"])
        self.ledger.load_state_dict(state["ledger"])
        self.accuracy = state["accuracy"]
        self.go_to(step)
        try:
            self.steps.load_state_dict(step, state)
        except CheckpointError as error:
            raise Refused(Code.STORE, str(error)) from error
        self._evaluated = number > step
        self.saved = self.position

        def is_later(row: dict[str, Any]) -> bool:
            replayed = row["kind"] == "replay" and row["server_step"] > self.steps.done
            at_the_end = self.schedule.checkpoint(row["step"], finished=True) > number
            return replayed or (row["kind"] == "eval" and at_the_end)

        self.run.forget_after(step, is_later)

    def go_to(self, step: int) -> None:
        """Waits for `step` next, whatever was under way."""
        self.steps.go_to(step)
        self._last = self.failed = None

    def _finish(self) -> Frame:
        self.finished = True
        summary = {
            "client": self.client,
            "accuracy": self.accuracy,
            "steps": self.step,
            "lost_steps": self.lost_steps,
            "server_seconds": round(sum(row["seconds"] for row in self.run.rows() if "seconds" in row), 3),
            **self.ledger.summary(),
            "model": self.config.model,
            "method": self.config.method_name,
            "num_classes": self.model.num_classes,
        }
        files.save_json(self.run.summary_file, summary)
        return control(Kind.FINISHED, {"summary": self.ledger.summary()})

    def _set_weights(self, frame: Frame) -> Frame:
        if not self.config.accept_weights:
            raise Refused(Code.FORBIDDEN, "this server takes no weights from clients (--accept-weights)")
        try:
            replace_weights(self.model.half.weights(), weights_of(frame), "server")
        except CheckpointError as error:
            raise ProtocolError(str(error)[:200]) from None
        return control(Kind.WEIGHTS, {})


def _nothing() -> None:
    """Does nothing."""


class InferenceSession:
    """A client that evaluates or predicts with the best weights of its session, which a fresh half gets; it changes
    nothing.
    """

    def __init__(self, model: ServerModel, run: RunFolder, sizes: Sizes, config: ServeConfig) -> None:
        self.model, self.config, self.max_body = model, config, sizes.max_frame
        for name, module in with_weights(model.modules).items():
            module.load_state_dict(files.load_tensors(run.weights_files[name])[0])

    def take(self, data: bytearray) -> Answer:
        """Answers a frame of evaluation or a request for weights; nothing moves."""
        frame = frames.read([data], self.max_body)
        if frame.kind == Kind.EVALUATION:
            answer = self.model.answer(frame, training=False)
        elif frame.kind == Kind.GET_WEIGHTS:
            answer = released_weights(self.model, self.config)
        else:
            raise Refused(Code.OUT_OF_TURN, f"a frame of kind {frame.kind.name} came in a session of evaluation")
        answer = replace(answer, step=frame.step, micro=frame.micro)
        return Answer(chunks.of(answer), sizes=(frames.sizes(frame), frames.sizes(answer)))


def released_weights(model: ServerModel, config: ServeConfig) -> Frame:
    """The half's weights; Refused where the server does not release them."""
    if not config.release_weights:
        raise Refused(Code.FORBIDDEN, "this server does not release its half of the model (--no-release-weights)")
    return weights_frame(Kind.WEIGHTS, model.half.weights())
