"""The server's half in training: what it is made of, and the steps that one client takes with it.

The half may be shared by several clients; where in a step a client stands, and the gradients of that step, are the
client's own. Nothing here knows whether frames come over a network.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from snello.errors import TrainingError
from snello.seeds import mix
from snello.split.build import modules_of
from snello.split.halves import ServerHalf
from snello.split.wire.frames import Flags, Frame, Kind
from snello.split.wire.refusals import Code, Refused
from snello.train.learner import SERVER_NOISE
from snello.train.schedule import Schedule


class ServerModel:
    """The server's half, and what of it is saved."""

    def __init__(self, half: ServerHalf) -> None:
        self.half, self.config, self.num_classes, self.codec = half, half.config, half.num_classes, half.codec
        self.modules: Mapping[str, nn.Module] = modules_of(half.vit.model, half.codec)
        self.optimizers: Mapping[str, torch.optim.Optimizer] = {"server": half.optimizer}

    def answer(self, frame: Frame, *, training: bool, seed: int = 0) -> Frame:
        """The half's answer, with its own noise drawn from `seed`."""
        if self.half.vit.model.training != training or self.codec.training != training:
            self.half.train(training)
        torch.manual_seed(seed)
        with torch.set_grad_enabled(training):
            return self.half.answer(frame)

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
        buffers = [value.clone() for value in self.codec.buffers()]

        def undo() -> None:
            self.half.method.load_state_dict(method)
            for value, old in zip(self.codec.buffers(), buffers, strict=True):
                value.copy_(old)
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


class ServerSteps:
    """The optimizer steps that one client takes with a server's half.

    Args:
        model: the half, of this client alone or shared.
        schedule: the client's.
        shared: whether others move the half's weights between two frames of this client.
        undo: whether an exchange that fails leaves the half as it was.
    """

    def __init__(self, model: ServerModel, schedule: Schedule, *, shared: bool = False, undo: bool = True) -> None:
        self.model, self.schedule, self.config = model, schedule, model.config
        self._shared, self._undo = shared, undo
        self.go_to(0)

    def go_to(self, step: int) -> None:
        """Waits for the first frame of `step`, whatever was under way."""
        self.step, self.micro, self.awaited = step, 0, Kind.ACTIVATIONS
        self.due = False
        """Whether a step has all its gradients and `finish` is to move the weights."""
        self.loss = 0.0
        """The loss of the step under way, where the labels are here."""
        self._activations: Frame | None = None  # of the exchange under way, in U-shape
        self._gradients: list[Tensor | None] | None = None  # of the step under way
        self._again = self._overflow = False

    @property
    def between_steps(self) -> bool:
        """Whether no step is under way."""
        return self.micro == 0 and self.awaited == Kind.ACTIVATIONS and not self.due

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
        if (frame.kind, frame.step, frame.micro) != (self.awaited, self.step, self.micro) or (
            self.step >= self.schedule.total_steps
        ):
            came = f"{frame.kind.name.lower().replace('_', ' ')} of step {frame.step}.{frame.micro} came"
            raise Refused(Code.OUT_OF_TURN, f"{came}, the server is at {self.position}")
        undo = self.model.snapshot() if self._undo else None
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

    def finish(self, overflow: bool = False) -> Tensor:
        """Moves the weights by the step that is due, unless a gradient overflowed here or on the client's side.

        What is returned is the norm of the gradients, () float32.

        Raises:
            TrainingError: where it is not finite without a loss scale to blame; the weights are not touched.
        """
        self.model.swap_gradients(self._gradients)
        skipped, self._overflow, self._gradients, self.due = overflow or self._overflow, False, None, False
        return self.model.update(self.schedule.lr(self.step - 1, self.config.lr, self.config.warmup), skipped)

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
        answer = self.model.answer(frame, training=True, seed=seed)
        if not bool(answer.arrays.get("gradients.loss", torch.zeros(1)).isfinite()):
            raise TrainingError("the loss is not finite")
        return answer

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
            self._overflow = not all(bool(g.isfinite().all()) for g in self._gradients or () if g is not None)
            if self._overflow:
                return Frame(answer.kind, answer.step, answer.micro, answer.arrays, answer.flags | Flags.OVERFLOW)
        return answer
