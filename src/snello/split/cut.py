"""A model cut in two halves inside one process: what a network would carry is written, counted and read here."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, takewhile
from typing import Any

import torch
from torch import Tensor, nn

from snello.codecs.base import Codec
from snello.config import FinetuneConfig
from snello.devices import Precision, autocast, synchronize
from snello.errors import ConfigError
from snello.loading import Batch
from snello.methods import AdaptiveMethod, Method, make_method
from snello.optim import make_optimizer, set_lr
from snello.split import frames
from snello.split.frames import Counters, Flags, Frame, Kind
from snello.split.halves import ClientHalf, Half, ServerHalf
from snello.split.link import Link, parse_bytes
from snello.split.traffic import Exchange, exchange_bytes, uncompressed_bytes
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
        split = config.split
        self.config, self.vit, self.device, self.num_classes = config, vit, device, num_classes
        self.codec = Codec(
            codec_text,
            embed_dim=vit.embed_dim,
            eval_text=split.eval_codec,
            seed=config.seed,
            flag="--split.codec",
            eval_flag="--split.eval-codec",
        ).to(device)
        self._scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
        if self._scaler is not None:
            self._scaler.scale(torch.zeros((), device=device))  # it is lazy, and halves scale by themselves
        try:
            lower, upper = vit.cut(split.cut, head_below=split.labels == "client")
        except ConfigError as error:
            raise ConfigError(f"--split.{error}") from None  # the name as the user typed it
        options = {
            "labels": split.labels,
            "num_classes": num_classes,
            "label_smoothing": config.label_smoothing,
            "autocast": lambda: autocast(device, precision),
            "scale": self._scale,
        }
        self.client = ClientHalf(*self._side(lower, "client"), self.codec, **options)
        self.server = ServerHalf(*self._side(upper, "server"), self.codec, **options)
        self.buffer = self.codec.buffer
        self.modules: Mapping[str, nn.Module] = {"model": vit.model}
        if next(self.codec.parameters(), None) is not None:
            self.modules = {**self.modules, "codec": self.codec}
        self.optimizers: Mapping[str, torch.optim.Optimizer] = {
            "client": self.client.optimizer,
            "server": self.server.optimizer,
        }
        self.evaluator: nn.Module = _OverTheCut(self)
        self.counters = Counters()
        self.uncompressed = 0
        """Bytes that the same exchanges would have taken in fp32 without a codec."""
        self.seconds = {"client_seconds": 0.0, "server_seconds": 0.0}
        self._round_trips = 0
        self._at_begin = (0, 0)  # training bytes and round trips before the step under way
        self._skip = False  # whether half precision overflowed
        self.link = None if split.link is None else Link.parse(split.link, "--split.link")
        self.max_bytes = None if split.max_bytes is None else parse_bytes(split.max_bytes, "--split.max-bytes")
        self._step_bytes = [] if self.max_bytes is None else self._plan(step_samples)
        self.max_steps: int | None = None if self.max_bytes is None else self._steps_within(self.max_bytes)

    def _side(self, part: ViT, name: str) -> tuple[ViT, Method, torch.optim.Optimizer]:
        config = self.config
        attached = config.method != "alast" or config.split.alast in (name, "both")
        own = self.codec.client_parameters() if name == "client" else self.codec.server_parameters()
        optimizer = make_optimizer(
            part,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            device=self.device,
            others=own,
        )
        return part, make_method(part, config, config.method if attached else "full"), optimizer

    @property
    def _halves(self) -> tuple[Half, Half]:
        return self.client, self.server

    # ------------------------------------------------------------------------------------------------- one step

    def begin(self, progress: float) -> None:
        """See `Learner`."""
        self._at_begin = self.counters.training, self._round_trips
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        for half, timer in zip(self._halves, self.seconds, strict=True):
            with self._timed(timer):
                half.begin(self.config.lr, progress)

    def backward(self, batches: Sequence[Batch], *, step: int, micro: int, num_samples: int, seed: int) -> Tensor:
        """One exchange; see `Learner`."""
        with self._timed("client_seconds"):
            first = self.client.start(batches, step=step, micro=micro, num_samples=num_samples, seed=seed)
        frame: Frame | None = first
        with_gradient, kinds = Flags.FORWARD_ONLY not in first.flags, set()
        while frame is not None:
            kinds.add(frame.kind)
            arrived = self.carry(frame)
            with self._timed("server_seconds"):
                answer = self.server.answer(arrived)
            arrived = self.carry(answer)
            self._round_trips += 1
            with self._timed("client_seconds"):
                frame = self.client.answer(arrived)
        shape = self._shape(sum(len(labels) for _, labels in batches))
        self.uncompressed += uncompressed_bytes(
            replace(shape, with_gradient=with_gradient, with_feature_gradient=Kind.FEATURE_GRADIENTS in kinds)
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
            if self._scaler is not None:
                self._scaler.unscale_(half.optimizer)
            norms[name] = nn.utils.clip_grad_norm_(list(half.parameters()), max_norm or float("inf"))
        self._skip = any(half.overflow for half in self._halves) or not all(bool(n.isfinite()) for n in norms.values())
        return norms

    def update(self, lr: float) -> None:
        """See `Learner`; in half precision an overflow in either half skips the step in both."""
        for half, timer in zip(self._halves, self.seconds, strict=True):
            with self._timed(timer):
                set_lr(half.optimizer, lr)
                if self._scaler is None or not self._skip:
                    half.optimizer.step()
                half.optimizer.zero_grad(set_to_none=True)
        if self._scaler is not None:
            if self._skip:
                self._scaler.update(self._scaler.get_scale() * self._scaler.get_backoff_factor())
            else:
                self._scaler.update()

    def spent(self, step: int) -> bool:
        """Whether the step after `step` steps would go over the budget."""
        if self.max_bytes is None:
            return False
        return self.counters.training + self._step_bytes[step % len(self._step_bytes)] > self.max_bytes

    # -------------------------------------------------------------------------------------- what is said and saved

    def metrics(self) -> dict[str, Any]:
        """Bytes so far, seconds of each half, seconds of the link, and what codec and methods say."""
        before, trips = self._at_begin
        row: dict[str, Any] = {
            "uplink_bytes": self.counters.total("uplink"),
            "downlink_bytes": self.counters.total("downlink"),
            **{name: round(value, 4) for name, value in self.seconds.items()},
            **self.codec.metrics(),
        }
        if self.link is not None:
            seconds = self.link.seconds(self.counters.training - before, self._round_trips - trips)
            row["link_seconds"] = round(seconds, 4)
        return row | self._budgets()

    def _budgets(self) -> dict[str, Any]:
        """ALaST's budgets and trained blocks over the whole depth; a half without it passes on and trains all."""
        if self.config.method != "alast":
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

    def summary(self) -> dict[str, Any]:
        """Training bytes of each way and kind, what they would be uncompressed, and bytes of evaluation."""
        counters = self.counters
        return {
            "cut": self.config.split.cut,
            "codec": self.codec.text,
            "labels": self.config.split.labels,
            "uplink_bytes": counters.total("uplink"),
            "downlink_bytes": counters.total("downlink"),
            "uncompressed_bytes": self.uncompressed,
            "ratio": counters.training / self.uncompressed if self.uncompressed else None,
            "eval_bytes": counters.evaluation,
            "uplink_bytes_by_kind": dict(counters.uplink),
            "downlink_bytes_by_kind": dict(counters.downlink),
        }

    def state_dict(self) -> dict[str, Any]:
        """See `Learner`."""
        return {
            "method": {"client": self.client.method.state_dict(), "server": self.server.method.state_dict()},
            "counters": self.counters.state_dict(),
            "uncompressed": self.uncompressed,
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Learner`."""
        self.client.method.load_state_dict(state["method"]["client"])
        self.server.method.load_state_dict(state["method"]["server"])
        self.counters.load_state_dict(state["counters"])
        self.uncompressed = state["uncompressed"]
        if self._scaler is not None and state["scaler"] is not None:
            self._scaler.load_state_dict(state["scaler"])

    # -------------------------------------------------------------------------------------------------- shapes

    def _shape(self, num_samples: int, num_tokens: int | None = None) -> Exchange:
        """An exchange's shape; by default that of the uncompressed reference, in which no token is dropped."""
        vit = self.vit
        return Exchange(
            num_samples=num_samples,
            num_tokens=num_tokens or vit.num_prefix_tokens + vit.num_patches,
            embed_dim=vit.embed_dim,
            num_prefix_tokens=vit.num_prefix_tokens,
            num_classes=self.num_classes,
            labels=self.config.split.labels,
            features=vit.features_shape,
        )

    def _plan(self, step_samples: Sequence[int]) -> list[int]:
        """The training bytes of an epoch's steps, with ALaST's budgets as they are now."""
        num_patches, batch_size = self.vit.num_patches, self.config.batch_size * self.buffer
        if isinstance(self.client.method, AdaptiveMethod):
            alast = self.client.method.alast
            for index in range(alast.vit.depth):
                num_patches = alast.num_keep(index, num_patches)
        num_tokens = self.vit.num_prefix_tokens + num_patches
        head = {id(p) for p in self.client.vit.head_parameters()}
        below = any(p.requires_grad and id(p) not in head for p in self.client.parameters())
        above = any(p.requires_grad for p in self.server.parameters())

        @lru_cache
        def exchange(num_samples: int) -> int:
            shape = self._shape(num_samples, num_tokens)
            shape = replace(shape, with_gradient=below, with_feature_gradient=below or above)
            return sum(exchange_bytes(self.codec, shape))

        return [sum(exchange(min(batch_size, num - at)) for at in range(0, num, batch_size)) for num in step_samples]

    def _steps_within(self, budget: int) -> int:
        """Steps whose training bytes fit into a budget."""
        epochs, left = divmod(budget, sum(self._step_bytes))
        begun = list(takewhile(lambda total: total <= left, accumulate(self._step_bytes)))
        steps = epochs * len(self._step_bytes) + len(begun)
        if steps == 0:
            raise ConfigError(
                f"--split.max-bytes {self.config.split.max_bytes} is less than the {self._step_bytes[0]} bytes of one "
                "step: raise it, or use a smaller --batch-size or a codec that sends less"
            )
        return steps

    # ---------------------------------------------------------------------------------------------------- helpers

    def _scale(self) -> float:
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

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
