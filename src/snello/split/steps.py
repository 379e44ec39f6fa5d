"""The server's half in training: what it is made of, and the steps that one client takes with it.

The half may be shared by several clients; where in a step a client stands, and the gradients of that step, are the
client's own. Nothing here knows whether frames come over a network.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from snello.errors import ProtocolError, TrainingError
from snello.runs.folder import RunFolder
from snello.seeds import mix
from snello.split.build import modules_of
from snello.split.halves import ServerHalf, overflowed
from snello.split.store import MIXED, Samples, Store, cutmix, draw
from snello.split.wire.frames import Flags, Frame, Kind
from snello.split.wire.refusals import Code, Refused
from snello.train.learner import SERVER_NOISE
from snello.train.schedule import Schedule

# These keep the seeds of steps on stored samples apart from others.
DRAWN, REPLAYED = 16, 18
REPLAYED_SHARE = 0.8
"""Of the samples drawn from the store, those that are mixed by default."""


class ServerModel:
    """The server's half, and what of it is saved."""

    def __init__(self, half: ServerHalf) -> None:
        self.half, self.config, self.num_classes, self.codec = half, half.config, half.num_classes, half.codec
        self.modules: Mapping[str, nn.Module] = modules_of(half.vit.model, half.codec)
        self.optimizers: Mapping[str, torch.optim.Optimizer] = {"server": half.optimizer}

    def answer(self, frame: Frame, *, training: bool, seed: int = 0, samples: Samples | None = None) -> Frame:
        """The half's answer, with noise drawn from `seed`; `samples` is what a frame of a frozen client holds."""
        if self.half.vit.model.training != training or self.codec.training != training:
            self.half.train(training)
        torch.manual_seed(seed)
        with torch.set_grad_enabled(training):
            return self.half.answer(frame) if samples is None else self.half.answer_stored(frame, samples)

    def store(self, run: RunFolder, max_memory: int) -> Store:
        """An empty store for frames of this half in a run's folder."""
        return Store(run, _Archive(self.half), max_memory)

    def update(self, lr: float, overflow: bool) -> Tensor:
        """Clips and moves the weights, unless a gradient overflowed; returns the norm of the gradients, () float32.

        Raises:
            TrainingError: where it is not finite without a loss scale to blame; the weights are not touched.
        """
        norm = self.half.clip(self.config.clip_norm)
        if not self.half.scaler.is_enabled() and not bool(norm.isfinite()):
            raise TrainingError("the gradient of the server half is not finite")
        self.half.update(lr, overflow)
        return norm

    def snapshot(self) -> Callable[[], None]:
        """Remembers what an exchange may change besides weights; what is returned undoes the exchange."""
        method = self.half.method.state_dict()
        buffers, remembered = [value.clone() for value in self.codec.buffers()], self.codec.format.snapshot()

        def undo() -> None:
            self.half.method.load_state_dict(method)
            for value, old in zip(self.codec.buffers(), buffers, strict=True):
                value.copy_(old)
            self.codec.format.restore(remembered)
            self.swap_gradients(None)
            self.half.forget()

        return undo

    def swap_gradients(self, gradients: list[Tensor | None] | None) -> list[Tensor | None]:
        """Puts other gradients in place (None: none at all) and returns those that were there."""
        parameters = list(self.half.parameters())
        before = [parameter.grad for parameter in parameters]
        for parameter, gradient in zip(parameters, gradients or [None] * len(parameters), strict=True):
            parameter.grad = gradient
        return before

    def state_dict(self) -> dict[str, Any]:
        """All that is neither in `modules` nor in `optimizers`, as values that JSON can hold."""
        return {"method": self.half.method.state_dict(), "scaler": self.half.scaler.state_dict() or None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a `state_dict()`."""
        self.half.method.load_state_dict(state["method"])
        self.half.optimizer.zero_grad(set_to_none=True)
        self.half.scaler.load_state_dict(state["scaler"])


class _Archive:
    """Decodes stored frames of a half (a `snello.split.store.Decoder`)."""

    def __init__(self, half: ServerHalf) -> None:
        self._half, self._codec = half, half.codec.archive()

    def __call__(self, frame: Frame) -> Samples:
        return self._half.samples(frame, self._codec)

    def is_key(self, frame: Frame) -> bool:
        return self._codec.is_key(frame.arrays)

    def snapshot(self) -> Any:
        return self._codec.format.snapshot()

    def restore(self, state: Any) -> None:
        self._codec.format.restore(state)


class ServerSteps:
    """The optimizer steps that one client takes with a server's half.

    Args:
        model: the half, of this client alone or shared.
        schedule: the client's.
        shared: whether others move the half's weights between two frames of this client.
        undo: whether an exchange that fails leaves the half as it was.
        store: where the frames of a frozen client are kept; None where the schedule has no steps on them.
    """

    def __init__(
        self,
        model: ServerModel,
        schedule: Schedule,
        *,
        shared: bool = False,
        undo: bool = True,
        store: Store | None = None,
    ) -> None:
        self.model, self.schedule, self.config, self.store = model, schedule, model.config, store
        self._shared, self._undo = shared, undo
        self._format: Any = None  # what the codec remembers of this client
        self.go_to(0)

    def go_to(self, step: int, done: int | None = None) -> None:
        """Waits for the first frame of `step`, whatever was under way, when the half has taken `done` steps in all."""
        self.step, self.micro, self.awaited = step, 0, Kind.ACTIVATIONS
        self.done = self.schedule.server_step(step) if done is None else done
        """Steps that the half has taken, on what came and on what was stored."""
        self.due = False
        """Whether a step has all its gradients and `finish` is to move the weights."""
        self.loss = 0.0
        """The loss of the step under way, where the labels are here."""
        self._activations: Frame | None = None  # of the exchange under way, in U-shape
        self._gradients: list[Tensor | None] | None = None  # of the step under way
        self._again = self._overflow = False
        self._format = None

    def state_dict(self) -> dict[str, Any]:
        """Between steps: what was stored, and the steps taken on it, as values that JSON can hold."""
        if self.store is None:
            return {}
        if self._draws:
            self.store.sync()
        return {"done": self.done, "store": self.store.state_dict()}

    def load_state_dict(self, step: int, state: Mapping[str, Any]) -> None:
        """Waits for the first frame of `step`, with a `state_dict()` from there.

        Raises:
            CheckpointError: where the store is gone or damaged.
        """
        self.go_to(step, state.get("done"))
        if self.store is not None and self._draws:
            self.store.load_state_dict(state["store"])
        elif self.store is not None:
            self.store.recall(state["store"])

    @property
    def _draws(self) -> bool:
        """Whether there are steps on stored samples yet: after the last, the store may go."""
        return self.done < self.schedule.server_steps

    @property
    def between_steps(self) -> bool:
        """Whether no step is under way."""
        return self.micro == 0 and self.awaited == Kind.ACTIVATIONS and not self.due

    @property
    def behind(self) -> int:
        """Steps on stored samples that come before the next frame, or after the last."""
        return self.schedule.server_step(self.step) - self.done if self.between_steps else 0

    @property
    def all_sent(self) -> bool:
        """Whether no frame of activations is to come."""
        return self.step >= self.schedule.total_steps

    @property
    def position(self) -> str:
        """What is waited for, in words."""
        return f"step {self.step}.{self.micro} and waits for {self.awaited.name.lower().replace('_', ' ')}"

    def evaluate(self, frame: Frame) -> Frame:
        """The half's answer to held-out pictures."""
        return self.model.answer(frame, training=False)

    def exchange(self, frame: Frame) -> Frame:
        """The half's answer to a frame of training, whose gradients are added to those of the step.

        Raises:
            Refused: for a frame that is not the one that is waited for.
            ProtocolError: for one that is malformed.
            TrainingError: where loss or gradients are not finite.
        """
        if (frame.kind, frame.step, frame.micro) != (self.awaited, self.step, self.micro) or self.all_sent:
            came = f"{frame.kind.name.lower().replace('_', ' ')} of step {frame.step}.{frame.micro} came"
            raise Refused(Code.OUT_OF_TURN, f"{came}, the server is at {self.position}")
        with self._own_format():
            undo = self._snapshot() if self._undo else None
            try:
                answer = self._answer(frame)
            except BaseException:
                if undo is not None:
                    undo()  # as if the frame had not come: the right one may still follow
                self._again = frame.kind == Kind.FEATURE_GRADIENTS
                raise
        self._again = False
        self._add(self.model.swap_gradients(None))
        self._overflow = self.model.half.overflow
        return self._advance(answer)

    def _snapshot(self) -> Callable[[], None]:
        """`ServerModel.snapshot`, and the keys that belong to stored frames: no others may be known."""
        undo, keys = self.model.snapshot(), None if self.store is None else self.store.decode.snapshot()

        def undo_all() -> None:
            undo()
            if self.store is not None:
                self.store.decode.restore(keys)

        return undo_all

    @contextmanager
    def _own_format(self) -> Iterator[None]:
        """Lets the codec remember what this client's frames were, where several share it."""
        if not self._shared:
            yield
            return
        number_format = self.model.codec.format
        others = number_format.snapshot()
        number_format.restore(self._format)
        try:
            yield
        finally:
            self._format = number_format.snapshot()
            number_format.restore(others)

    def finish(self, overflow: bool = False, share: float | None = None) -> Tensor:
        """Moves the weights by the step that is due, unless a gradient overflowed here or on the client's side.

        `share` is that of a budget that was spent before the step, where the learning rate goes by it. What is
        returned is the norm of the gradients, () float32.

        Raises:
            TrainingError: where it is not finite without a loss scale to blame; the weights are not touched.
        """
        self.model.swap_gradients(self._gradients)
        skipped, self._overflow, self._gradients, self.due = overflow or self._overflow, False, None, False
        lr = self.schedule.lr(self.step - 1, self.config.lr, self.config.warmup, share)
        norm = self.model.update(lr, skipped)
        self.done += 1
        return norm

    def replay(self) -> float:
        """Takes one of the steps that the half is behind, on stored samples, and returns its loss.

        What is drawn depends on the run's seed and the number of the step alone.

        Raises:
            TrainingError: where loss or gradients are not finite; the weights are not touched.
            CheckpointError: where the store can no longer be read.
        """
        assert self.store is not None and self.behind > 0
        config, half, at = self.config, self.model.half, self.done
        num = min(config.batch_size * config.accumulate, self.schedule.num_train)
        samples = draw(self.store, num, mix(config.seed, DRAWN, at))
        num = len(samples.z)  # fewer at first, and where samples were merged
        share = REPLAYED_SHARE if config.split.cutmix is None else config.split.cutmix
        if share and half.mixes(samples.z.shape[1]):
            samples = cutmix(samples, share, half.vit.num_prefix_tokens, mix(config.seed, MIXED, at, REPLAYED))
        half.begin(config.lr, at / self.schedule.server_steps)
        torch.manual_seed(mix(config.seed, SERVER_NOISE, at, REPLAYED))
        loss = 0.0
        for begin in range(0, num, config.batch_size):
            part = samples.pick(torch.arange(begin, min(begin + config.batch_size, num)))
            loss += float(half.learn(part, len(part.z) / num))
        if not math.isfinite(loss):
            self.model.swap_gradients(None)
            raise TrainingError("the loss on stored samples is not finite")
        self.model.update(self.schedule.lr_at(at, config.lr, config.warmup), half.overflows())
        self.done += 1
        return loss

    def _answer(self, frame: Frame) -> Frame:
        if self.between_steps:
            self.loss = 0.0
            self.model.half.begin(self.config.lr, self.schedule.progress(self.step))
        self.model.half.overflow = self._overflow
        seed = mix(self.config.seed, SERVER_NOISE, self.schedule.batches_of(self.step, self.micro).start)
        if frame.kind == Kind.ACTIVATIONS:
            self._activations = frame if self.config.split.labels == "client" else None
        elif self._shared or self._again:
            # Another session may have moved the weights since, so what was computed before cannot be gone back through.
            assert self._activations is not None
            self.model.answer(self._activations, training=True, seed=seed)
        stores = self.schedule.replay is not None and self.step >= self.schedule.replay.first
        samples = self._samples(frame) if stores else None
        answer = self.model.answer(frame, training=True, seed=seed, samples=samples)
        if not bool(answer.arrays.get("gradients.loss", torch.zeros(1)).isfinite()):
            raise TrainingError("the loss is not finite")
        if samples is not None and self.store is not None:
            self.store.append(frame, samples)
        return answer

    def _samples(self, frame: Frame) -> Samples:
        """What a frame of a frozen client holds."""
        assert self.store is not None
        if Flags.FORWARD_ONLY not in frame.flags:
            raise ProtocolError(f"from step {self.step} on the client's half is frozen, but it wants a gradient")
        return self.store.decode(frame)

    def _add(self, gradients: list[Tensor | None]) -> None:
        """Adds up the gradients of a step here: sessions that share a half are between each other's micro-steps."""
        if self._gradients is None:
            self._gradients = gradients
            return
        pairs = zip(self._gradients, gradients, strict=True)
        self._gradients = [new if old is None else old if new is None else old.add_(new) for old, new in pairs]

    def _advance(self, answer: Frame) -> Frame:
        """Waits for the next frame; the last answer of a step says whether a gradient of the step overflowed here."""
        if answer.kind == Kind.FEATURES and Flags.FORWARD_ONLY not in answer.flags:
            self.awaited = Kind.FEATURE_GRADIENTS
            return answer
        if "gradients.loss" in answer.arrays:
            self.loss += float(answer.arrays["gradients.loss"])
        self.awaited, self.micro, self._activations = Kind.ACTIVATIONS, self.micro + 1, None
        if self.micro < self.schedule.num_micro(self.step):
            return answer
        self.step, self.micro, self.due = self.step + 1, 0, True
        if self.model.half.scaler.is_enabled() and not self._overflow:
            self._overflow = overflowed(self._gradients or ())
            if self._overflow:
                return Frame(answer.kind, answer.step, answer.micro, answer.arrays, answer.flags | Flags.OVERFLOW)
        return answer
