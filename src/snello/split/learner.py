"""A model cut in two in training (a `Learner`): the client's half is here, the server's at the other end of a link.

In one process the link holds the server's half, over a network a connection to it. All else is the same, so that what
is trained over a network is what is trained in one process.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import override

from snello.codecs.base import Codec
from snello.devices import synchronize
from snello.split.build import cut_model, make_codec, modules_of
from snello.split.halves import ClientHalf, ServerHalf
from snello.split.ledger import Ledger
from snello.split.steps import ServerModel, ServerSteps
from snello.split.wire import frames
from snello.split.wire.frames import EVALUATION_KINDS, Flags, Frame, Kind
from snello.split.wire.refusals import Code, Refused
from snello.train.learner import Learner, MicroStep
from snello.train.place import Setup
from snello.vit import ViT

MAX_MEMORY = 1 << 30
"""Bytes of stored samples that a server's half in the same process keeps decoded."""


class Link(Protocol):
    """The way to the server's half."""

    may_break: bool
    """Whether steps can be lost, so that the state at the start of a step is kept."""

    def exchange(self, frame: Frame) -> Frame:
        """The server's answer to a frame."""

    def begin(self, step: int) -> None:
        """Begins an optimizer step."""

    def settle(self, overflow: bool, share: float | None) -> None:
        """Tells the server that the step is over, and whether a gradient overflowed here: then both sides skip it.

        `share` is that of the budget that was spent before the step, where the learning rate goes by it.

        Raises:
            TrainingError: where the server's gradients are not finite.
        """

    def behind(self) -> int:
        """Steps on stored samples that the server has left, when all has been sent."""

    def catch_up(self) -> dict[str, Any]:
        """Lets the server take some of them, and returns what is logged of it."""

    def metrics(self) -> dict[str, Any]:
        """What is logged of the step: above all the seconds that the other side took."""

    def eval_metrics(self) -> dict[str, Any]:
        """What is logged of an evaluation."""

    def method_metrics(self) -> dict[str, Any] | None:
        """What the method of the server's half says; None where that is not known here."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint here has to keep of the other side."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a `state_dict()`."""


class SplitLearner(Learner):
    """The client's half with its own optimizer, clipping and method, a link, and the bytes that cross it.

    Args:
        vit: the whole model, for its sizes.
        lower: the client's part of it, with memory.

    Raises:
        ConfigError: where codec or budget do not fit the model.
    """

    def __init__(self, vit: ViT, lower: ViT, codec: Codec, setup: Setup, link: Link) -> None:
        config = setup.config
        self.config, self.device, self.codec, self.link = config, setup.device, codec, link
        self.half = ClientHalf(lower, config, codec, setup.num_classes, setup.device, setup.precision)
        self.buffer = self.codec.buffer
        self.modules = modules_of(lower.model, self.codec)
        self.optimizers = {"client": self.half.optimizer}
        self.evaluator = Evaluator(self.half, self.exchange)
        self.ledger = Ledger(vit, config, self.codec, setup.num_classes)
        schedule = setup.schedule
        self._schedule = schedule
        self.max_steps = self.ledger.plan(self.half, [schedule.num_samples(i) for i in range(schedule.steps_per_epoch)])
        self.step = 0
        """Steps done."""
        self.between_steps = True
        """Whether no exchange of a step under way has been answered."""
        self._seconds = 0.0
        self._overflow = False
        self._at_begin: dict[str, Any] | None = None  # of the step under way, before it moved anything

    @override
    def begin(self, step: int, progress: float, num_micro: int) -> None:
        self.step = step
        if self.link.may_break:
            remembered = self.codec.format.snapshot()
            method, ledger = self.half.method.state_dict(), self.ledger.state_dict()
            self._at_begin = {"method": method, "ledger": ledger, "format": remembered}
        self.ledger.begin()
        self.link.begin(step)
        self._seconds, self._overflow = 0.0, False
        split = self.config.split
        first = split.trained_epochs * self._schedule.steps_per_epoch if split.freezes else math.inf
        self.half.freeze(step >= first)
        if step == first:
            self.codec.forget()  # the server keeps what comes from now on, and no frame from before
        with self._timed():
            self.half.begin(self.config.lr, progress)

    @override
    def backward(self, work: MicroStep) -> Tensor:
        with self._timed():
            first = self.half.start(
                work.batches,
                step=work.step,
                micro=work.micro,
                num_samples=work.num_samples,
                seed=work.codec_seed(self.config.seed),
            )
        frame: Frame | None = first
        kinds: list[Kind] = []
        while frame is not None:
            kinds.append(frame.kind)
            answer = self._answer(frame)
            self.between_steps = False
            with self._timed():
                frame = self.half.answer(answer)
        self.ledger.exchanged(
            sum(len(labels) for _, labels in work.batches),
            len(kinds),
            gradient=Flags.FORWARD_ONLY not in first.flags,
            feature_gradient=Kind.FEATURE_GRADIENTS in kinds,
        )
        return self.half.loss

    def _answer(self, frame: Frame) -> Frame:
        """The server's answer to a frame of training, which is sent in another way where it does not understand it."""
        try:
            return self.exchange(frame)
        except Refused as refused:
            if refused.code != Code.UNKNOWN_BASIS or frame.kind != Kind.ACTIVATIONS:
                raise
        return self.exchange(self.half.again())

    def exchange(self, frame: Frame) -> Frame:
        """The server's answer to a frame; both are counted when it is there."""
        answer = self.link.exchange(frame)
        for carried in (frame, answer):
            self.ledger.counters.add(carried, frames.sizes(carried))
        return answer

    @override
    def clip(self, max_norm: float) -> dict[str, Tensor]:
        norm = self.half.clip(max_norm)
        self._overflow = self.half.scaler.is_enabled() and (self.half.overflow or not bool(norm.isfinite()))
        return {"grad_norm_client": norm}

    @override
    def update(self, lr: float) -> None:
        self.link.settle(self._overflow, self.ledger.share_at_begin)
        with self._timed():
            self.half.update(lr, self._overflow)
        self.step += 1
        self.between_steps, self._at_begin = True, None

    @override
    def share_spent(self) -> float | None:
        return self.ledger.share_spent()

    @override
    def behind(self) -> int:
        return self.link.behind()

    @override
    def catch_up(self) -> dict[str, Any]:
        return self.link.catch_up()

    @override
    def restart(self) -> None:
        if self._at_begin is not None:
            self.half.method.load_state_dict(self._at_begin["method"])
            self.ledger.load_state_dict(self._at_begin["ledger"])
            self.codec.format.restore(self._at_begin["format"])
        self._forget()

    @override
    def spent(self, step: int) -> bool:
        return self.ledger.spent(step)

    @override
    def metrics(self) -> dict[str, Any]:
        seconds = {"client_seconds": round(self._seconds, 4)}
        return self.ledger.metrics() | seconds | self.link.metrics() | self.codec.metrics() | self._method_metrics()

    def _method_metrics(self) -> dict[str, Any]:
        """ALaST's budgets and trained blocks over the whole depth; a half without it passes on and trains all."""
        own, other = self.half.method.metrics(), self.link.method_metrics()
        if other is None or "budgets" not in {**own, **other}:
            return own
        total, cut = self.half.vit.top_layer - 1, self.half.vit.depth
        budgets: list[float] = []
        trained: list[int] = []
        for metrics, first, depth in ((own, 0, cut), (other, cut, total - cut)):
            budgets += metrics.get("budgets", [1.0] * depth)
            trained += [first + block for block in metrics.get("trained", range(depth))]
        return {"budgets": budgets, "trained": trained}

    @override
    def eval_metrics(self) -> dict[str, Any]:
        return {"training_bytes": self.ledger.counters.training} | self.link.eval_metrics()

    @override
    def describe(self) -> str:
        if self.config.split.client == "frozen":
            return "the client's half is frozen"
        return f"the client's half {self.half.method.describe()}"

    @override
    def status(self) -> str:
        return self.ledger.status()

    @override
    def traffic(self) -> dict[str, Any]:
        own = {} if self._schedule.replay is None else {"server_steps": self._schedule.server_steps}
        return self.ledger.summary() | own

    @override
    def state_dict(self) -> dict[str, Any]:
        """A step that has begun, but of which the server knows nothing yet, has not."""
        begun = self._at_begin if self.between_steps else None
        if begun is not None:
            self.codec.format.restore(begun["format"])  # what is saved beside this, with the codec's weights
        other = self.link.state_dict()
        own = self.half.method.state_dict() if begun is None else begun["method"]
        return {
            **other,
            "method": {"client": own, **other.get("method", {})},
            **self.ledger.state_dict(),
            "step": self.step,
            "scaler": self.half.scaler.state_dict() or None,
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.half.method.load_state_dict(state["method"]["client"])
        self.link.load_state_dict(state)
        self.ledger.load_state_dict(state)
        self.step = state.get("step", 0)  # older runs in one process have none, and `begin` says it
        self._forget()
        self.half.scaler.load_state_dict(state["scaler"])

    def _forget(self) -> None:
        """Drops what belongs to exchanges that are done again."""
        self.between_steps, self._at_begin = True, None
        self.half.forget()
        self.codec.metrics()
        self.half.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        synchronize(self.device)
        self._seconds += time.perf_counter() - started


class Evaluator(nn.Module):
    """The cut model in evaluation: normalised pictures (B, 3, H, W) to logits (B, C), over the link.

    Args:
        exchange: brings a frame to the server's half and its answer back.
    """

    def __init__(self, half: ClientHalf, exchange: Callable[[Frame], Frame]) -> None:
        super().__init__()
        self._half, self._exchange = half, exchange

    def train(self, mode: bool = True) -> "Evaluator":
        """Switches the client's half and the codec; the server's half switches by the frames that it gets."""
        super().train(mode)
        self._half.train(mode)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """The logits (B, C)."""
        parts = torch.split(images, self._half.config.batch_size)  # the server's half takes no more at once
        return torch.cat([self._half.logits(self._exchange(self._half.evaluate(part))) for part in parts])


class LocalLink:
    """A link to a server's half in this process."""

    may_break = False

    def __init__(self, model: ServerModel, setup: Setup) -> None:
        self.model, self._bytes, self._device = model, setup.config.split.frames, setup.device
        store = model.store(setup.run, MAX_MEMORY) if setup.schedule.replay and setup.run else None
        self.steps = ServerSteps(model, setup.schedule, undo=False, store=store)
        self._seconds, self._norm = 0.0, torch.zeros(())
        self._replayed: list[float] = []

    def exchange(self, frame: Frame) -> Frame:
        """The server's answer to a frame, through the bytes of the protocol."""
        arrived = self._carry(frame)
        with self._timed():
            answer = self.steps.evaluate(arrived) if frame.kind in EVALUATION_KINDS else self.steps.exchange(arrived)
        return self._carry(answer)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """What the server computes, with noise of its own."""
        started = time.perf_counter()
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            yield
        synchronize(self._device)
        self._seconds += time.perf_counter() - started

    def _carry(self, frame: Frame) -> Frame:
        return frames.read(frames.write(frame)) if self._bytes else frame

    def begin(self, step: int) -> None:
        """Makes the server wait for this step."""
        self._seconds = 0.0
        self.steps.go_to(step)

    def settle(self, overflow: bool, share: float | None) -> None:
        """Moves the server's weights, and those that follow from what it has stored, but for what can wait."""
        with self._timed():
            self._norm = self.steps.finish(overflow, share)
        while self.steps.behind and not self.steps.all_sent:
            self._replayed.append(self.catch_up()["loss"])

    def behind(self) -> int:
        """Steps on stored samples that are left when all has been sent."""
        return self.steps.behind

    def catch_up(self) -> dict[str, Any]:
        """Takes one of them."""
        before = self._seconds
        with self._timed():
            loss = self.steps.replay()
        return {"server_step": self.steps.done, "loss": loss, "server_seconds": round(self._seconds - before, 4)}

    def metrics(self) -> dict[str, Any]:
        """Seconds of the server's half, and the norm of its gradients."""
        row = {"server_seconds": round(self._seconds, 4), "grad_norm_server": float(self._norm)}
        if self._replayed:
            row |= {"server_steps": self.steps.done, "replay_loss": sum(self._replayed) / len(self._replayed)}
            self._replayed = []
        return row

    def eval_metrics(self) -> dict[str, Any]:
        """Nothing: the server's steps have rows of their own."""
        return {}

    def method_metrics(self) -> dict[str, Any] | None:
        """What the method of the server's half says."""
        return self.model.half.method.metrics()

    def state_dict(self) -> dict[str, Any]:
        """The server's half's method and loss scale."""
        state = self.model.state_dict()
        return {"method": {"server": state["method"]}, "server_scaler": state["scaler"], **self.steps.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a `state_dict()`."""
        scaler = state.get("server_scaler", state["scaler"])
        self.model.load_state_dict({"method": state["method"]["server"], "scaler": scaler})
        self.steps.load_state_dict(state.get("step", 0), state)


def make_split_learner(vit: ViT, setup: Setup) -> SplitLearner:
    """A learner with both halves of a model in this process.

    Raises:
        ConfigError: where cut, codec or budget do not fit the model.
    """
    vit.model.to(setup.device)
    codec = make_codec(setup.config, str(setup.codec), vit.embed_dim).to(setup.device)
    lower, upper = cut_model(vit, setup.config)
    server = ServerModel(ServerHalf(upper, setup.config, codec, setup.num_classes, setup.device, setup.precision))
    link = LocalLink(server, setup)
    learner = SplitLearner(vit, lower, codec, setup, link)
    link.steps.schedule = replace(setup.schedule, buffer=learner.buffer, max_steps=learner.max_steps)
    learner.modules = modules_of(vit.model, codec)
    learner.optimizers = {**learner.optimizers, **server.optimizers}
    return learner
