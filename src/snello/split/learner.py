"""A model cut in two halves inside one process: what a network would carry is written, counted and read here."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from snello.config import FinetuneConfig
from snello.data.loaders import Batch
from snello.devices import Precision, synchronize
from snello.split.build import LossScale, cut_model, make_codec, make_half, modules_of
from snello.split.halves import ClientHalf, Half, ServerHalf
from snello.split.ledger import Ledger
from snello.split.wire import frames
from snello.split.wire.frames import Counters, Flags, Frame, Kind
from snello.train.optim import set_lr
from snello.vit import ViT


class Cut:
    """Both halves, each with its own optimizer, clipping and method, and the bytes between them (a `Learner`).

    Args:
        vit: the whole model, on its device.
        config: of the run.
        num_classes: C.
        device: of both halves.
        precision: of both halves' forward passes.
        codec_text: what `config.split.codec` was resolved to.
        step_samples: pictures in each step of an epoch, needed where traffic has a budget.

    Raises:
        ConfigError: where cut, codec or budget do not fit the model.
    """

    def __init__(
        self,
        vit: ViT,
        config: FinetuneConfig,
        *,
        num_classes: int,
        device: torch.device,
        precision: Precision,
        codec_text: str,
        step_samples: Sequence[int] = (),
    ) -> None:
        self.config, self.vit, self.device, self.num_classes = config, vit, device, num_classes
        self.codec = make_codec(config, codec_text, vit.embed_dim).to(device)
        self._scale = LossScale(device, precision)
        lower, upper = cut_model(vit, config)
        options: dict[str, Any] = {"num_classes": num_classes, "device": device, "precision": precision}
        self.client = make_half(ClientHalf, lower, config, self.codec, scale=self._scale, **options)
        self.server = make_half(ServerHalf, upper, config, self.codec, scale=self._scale, **options)
        self.buffer = self.codec.buffer
        self.modules: Mapping[str, nn.Module] = modules_of(vit.model, self.codec)
        self.optimizers: Mapping[str, torch.optim.Optimizer] = {
            "client": self.client.optimizer,
            "server": self.server.optimizer,
        }
        self.evaluator: nn.Module = _OverTheCut(self)
        self.ledger = Ledger(vit, config, self.codec, num_classes)
        self.max_steps = self.ledger.plan(self.client, self.server, step_samples)
        self.seconds = {"client_seconds": 0.0, "server_seconds": 0.0}
        self._skip = False  # whether half precision overflowed

    @property
    def counters(self) -> Counters:
        """Bytes so far."""
        return self.ledger.counters

    @property
    def uncompressed(self) -> int:
        """Bytes that the same exchanges would have taken in fp32 without a codec."""
        return self.ledger.uncompressed

    @property
    def _halves(self) -> tuple[Half, Half]:
        return self.client, self.server

    # ------------------------------------------------------------------------------------------------- one step

    def begin(self, progress: float, num_micro: int = 1) -> None:
        """See `Learner`."""
        self.ledger.begin()
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        for half, timer in zip(self._halves, self.seconds, strict=True):
            with self._timed(timer):
                half.begin(self.config.lr, progress)

    def backward(self, batches: Sequence[Batch], *, step: int, micro: int, num_samples: int, seed: int) -> Tensor:
        """One exchange; see `Learner`."""
        with self._timed("client_seconds"):
            first = self.client.start(batches, step=step, micro=micro, num_samples=num_samples, seed=seed)
        frame: Frame | None = first
        kinds: list[Kind] = []
        while frame is not None:
            kinds.append(frame.kind)
            arrived = self.carry(frame)
            with self._timed("server_seconds"):
                answer = self.server.answer(arrived)
            arrived = self.carry(answer)
            with self._timed("client_seconds"):
                frame = self.client.answer(arrived)
        self.ledger.exchanged(
            sum(len(labels) for _, labels in batches),
            len(kinds),
            gradient=Flags.FORWARD_ONLY not in first.flags,
            feature_gradient=Kind.FEATURE_GRADIENTS in kinds,
        )
        return self.client.loss

    def carry(self, frame: Frame) -> Frame:
        """What the other side receives of a frame: the same bytes, counted."""
        if not self.config.split.frames:
            self.counters.add(frame, frames.sizes(frame))
            return frame
        buffers = frames.write(frame)
        self.counters.add(frame, frames.sizes(frame))
        return frames.read(buffers)

    def clip(self, max_norm: float) -> dict[str, Tensor]:
        """Clips each half by its own norm; see `Learner`."""
        norms = {}
        for half, name in zip(self._halves, ("grad_norm_client", "grad_norm_server"), strict=True):
            self._scale.unscale(half.optimizer)
            norms[name] = half.clip(max_norm)
        self._skip = any(half.overflow for half in self._halves) or not all(bool(n.isfinite()) for n in norms.values())
        return norms

    def update(self, lr: float) -> None:
        """See `Learner`; in half precision an overflow in either half skips the step in both."""
        for half, timer in zip(self._halves, self.seconds, strict=True):
            with self._timed(timer):
                set_lr(half.optimizer, lr)
                if self._scale.scaler is None or not self._skip:
                    half.optimizer.step()
                half.optimizer.zero_grad(set_to_none=True)
        self._scale.update(finite=not self._skip)

    def spent(self, step: int) -> bool:
        """Whether the step after `step` steps would go over the budget."""
        return self.ledger.spent(step)

    # -------------------------------------------------------------------------------------- what is said and saved

    def metrics(self) -> dict[str, Any]:
        """Bytes so far, seconds of each half, seconds of the link, and what codec and methods say."""
        seconds = {name: round(value, 4) for name, value in self.seconds.items()}
        return self.ledger.metrics() | seconds | self.codec.metrics() | self._budgets()

    def _budgets(self) -> dict[str, Any]:
        """ALaST's budgets and trained blocks over the whole depth; a half without it passes on and trains all."""
        if self.config.method_name != "alast":
            return {}
        budgets: list[float] = []
        trained: list[int] = []
        for half in self._halves:
            depth, first = half.vit.depth, len(budgets)
            own = half.method.metrics()
            budgets += own.get("budgets", [1.0] * depth)
            trained += [first + block for block in own.get("trained", range(depth))]
        return {"budgets": budgets, "trained": trained}

    def eval_metrics(self) -> dict[str, Any]:
        """Training bytes so far."""
        return {"training_bytes": self.counters.training}

    def said(self) -> str:
        """Traffic so far."""
        return self.ledger.said()

    def summary(self) -> dict[str, Any]:
        """Training bytes of each way and kind, what they would be uncompressed, and bytes of evaluation."""
        return self.ledger.summary()

    def state_dict(self) -> dict[str, Any]:
        """See `Learner`."""
        return {
            "method": {"client": self.client.method.state_dict(), "server": self.server.method.state_dict()},
            **self.ledger.state_dict(),
            "scaler": self._scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Learner`."""
        self.client.method.load_state_dict(state["method"]["client"])
        self.server.method.load_state_dict(state["method"]["server"])
        self.ledger.load_state_dict(state)
        self._scale.load_state_dict(state["scaler"])

    # ---------------------------------------------------------------------------------------------------- helpers

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] += time.perf_counter() - started


class _OverTheCut(nn.Module):
    """The cut model in evaluation, over the same frames."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self._cut = cut

    def train(self, mode: bool = True) -> "_OverTheCut":
        """Training or eval mode of both halves and the codec."""
        super().train(mode)
        for half in (self._cut.client, self._cut.server):
            half.train(mode)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of normalised pictures (B, 3, H, W)."""
        cut = self._cut
        return cut.client.logits(cut.carry(cut.server.answer(cut.carry(cut.client.evaluate(images)))))
