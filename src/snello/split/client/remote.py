"""The client's half in training, with the server's half at the other end of a connection (a `Learner`)."""

import copy
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from snello.config import FinetuneConfig
from snello.data.loaders import Batch
from snello.devices import Precision, synchronize
from snello.errors import ConfigError
from snello.methods import AdaptiveMethod
from snello.split.build import LossScale, cut_model, make_codec, make_half, modules_of
from snello.split.client.connection import Connection
from snello.split.halves import ClientHalf
from snello.split.ledger import Ledger
from snello.split.wire import frames
from snello.split.wire.frames import Flags, Frame, Kind
from snello.train.learner import MicroStep
from snello.train.optim import set_lr
from snello.vit import ViT


class Remote:
    """A client half and a connection.

    Args:
        vit: the whole model, on the device `meta`: only the client's part gets memory.
        config: of the run.
        connection: to the server.
        num_classes: C.
        device: of the half.
        precision: of its forward passes.
        codec_text: what the server's codec was resolved to.
        step_samples: pictures in each step of an epoch.

    Raises:
        ConfigError: where cut, codec or budget do not fit the model.
    """

    def __init__(
        self,
        vit: ViT,
        config: FinetuneConfig,
        connection: Connection,
        *,
        num_classes: int,
        device: torch.device,
        precision: Precision,
        codec_text: str,
        step_samples: Sequence[int],
    ) -> None:
        self.config, self.connection, self.device = config, connection, device
        self.codec = make_codec(config, codec_text, vit.embed_dim).to(device)
        lower, _ = cut_model(vit, config)
        lower.model.to_empty(device=device)
        self._scale = LossScale(device, precision)
        options: dict[str, Any] = {"num_classes": num_classes, "device": device, "precision": precision}
        self.half = make_half(ClientHalf, lower, config, self.codec, scale=self._scale, **options)
        self.buffer = self.codec.buffer
        self.modules: Mapping[str, nn.Module] = modules_of(lower.model, self.codec)
        self.optimizers: Mapping[str, torch.optim.Optimizer] = {"client": self.half.optimizer}
        self.evaluator: nn.Module = _OverTheNetwork(self)
        self.ledger = Ledger(vit, config, self.codec, num_classes)
        self.max_steps = self.ledger.plan(self.half, None, step_samples)
        connection.max_body = self.ledger.largest_frame(config.batch_size)
        self.step = 0
        """Steps done."""
        self.between_steps = True
        """Whether no exchange of a step under way has been answered."""
        self._seconds, self._waited = 0.0, 0.0
        self.upcoming: Callable[[], MicroStep | None] = lambda: None
        """The micro-step that follows the one under way, for prefetching; None at the end."""
        self._prefetched: dict[tuple[int, int], tuple[ClientHalf, Frame]] = {}
        self._at_begin: dict[str, Any] | None = None  # of the step under way, before it moved anything
        self._aside: ThreadPoolExecutor | None = None
        self._twins: deque[ClientHalf] = deque()
        if False:
            self._prepare_prefetch()

    def _prepare_prefetch(self) -> None:
        if isinstance(self.half.method, AdaptiveMethod):
            raise ConfigError(
                "--split.prefetch does not go with ALaST on the client, which draws before each forward pass: "
                "use --split.alast server or another --method"
            )
        self._aside = ThreadPoolExecutor(1, "snello-exchange")
        # The weights move while the next forward pass waits for its gradient, which goes back through the old ones.
        kept = {id(self._scale): self._scale}  # of which there is one
        self._twins = deque(copy.deepcopy(self.half, dict(kept)) for _ in range(2))

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Begins with the weights that the server sent."""
        self.half.vit.model.load_state_dict(dict(weights))

    # ------------------------------------------------------------------------------------------------- one step

    def begin(self, progress: float, num_micro: int = 1) -> None:
        """See `Learner`."""
        self._at_begin = {"method": self.half.method.state_dict(), "ledger": self.ledger.state_dict()}
        self.ledger.begin()
        self._seconds = self._waited = 0.0
        with self._timed():
            self.half.begin(self.config.lr, progress)

    def backward(self, batches: Sequence[Batch], *, step: int, micro: int, num_samples: int, seed: int) -> Tensor:
        """One exchange; see `Learner`, and for what it raises besides `Connection.exchange`."""
        half, first = self._prefetched.pop((step, micro), (None, None))
        if half is None or first is None:
            half, first = self._start(batches, step=step, micro=micro, num_samples=num_samples, seed=seed)
        frame: Frame | None = first
        kinds: list[Kind] = []
        while frame is not None:
            kinds.append(frame.kind)
            arrived = self.carry(frame, self.connection.exchange if self._aside is None else self._exchange_aside)
            self.between_steps = False
            with self._timed():
                frame = half.answer(arrived)
                self._collect(half)
        self.ledger.exchanged(
            sum(len(labels) for _, labels in batches),
            len(kinds),
            gradient=Flags.FORWARD_ONLY not in first.flags,
            feature_gradient=Kind.FEATURE_GRADIENTS in kinds,
        )
        return half.loss

    def _start(self, batches: Sequence[Batch], **options: Any) -> tuple[ClientHalf, Frame]:
        """The forward pass of a micro-step, and the half that computed it: with prefetching a twin of ours."""
        half = self.half
        with self._timed():
            if self._twins:
                half = self._twins[0]
                self._twins.rotate()
                half.train()
                for ours, its in zip(_tensors(self.half), _tensors(half), strict=True):
                    its.detach().copy_(ours.detach())
            frame = half.start(batches, **options)
            if half is not self.half:  # what a codec counts in its forward pass
                for ours, its in zip(self.half.codec.buffers(), half.codec.buffers(), strict=True):
                    ours.copy_(its)
        return half, frame

    def _collect(self, half: ClientHalf) -> None:
        """Adds the gradients of a twin to ours."""
        if half is self.half:
            return
        self.half.overflow |= half.overflow
        half.overflow = False
        for ours, its in zip(self.half.parameters(), half.parameters(), strict=True):
            if its.grad is not None:
                ours.grad = its.grad if ours.grad is None else ours.grad + its.grad
                its.grad = None

    def _exchange_aside(self, frame: Frame) -> Frame:
        """An exchange, while this thread computes the forward pass of the micro-step that follows."""
        assert self._aside is not None
        answer = self._aside.submit(self.connection.exchange, frame)
        work = self.upcoming() if frame.kind == Kind.ACTIVATIONS else None
        if work is not None:
            seed = self.config.seed
            torch.manual_seed(work.noise_seed(seed))
            self._prefetched[work.step, work.micro] = self._start(
                work.batches,
                step=work.step,
                micro=work.micro,
                num_samples=work.num_samples,
                seed=work.codec_seed(seed),
            )
        return answer.result()

    def close(self) -> None:
        """Ends what prefetching needs."""
        if self._aside is not None:
            self._aside.shutdown(wait=False)

    def carry(self, frame: Frame, exchange: Callable[[Frame], Frame]) -> Frame:
        """The server's answer to a frame; both are counted when it is there."""
        started = time.perf_counter()
        answer = exchange(frame)
        self._waited += time.perf_counter() - started
        for carried in (frame, answer):
            self.ledger.counters.add(carried, frames.sizes(carried))
        return answer

    def clip(self, max_norm: float) -> dict[str, Tensor]:
        """Clips this half by its own norm; see `Learner`."""
        self._scale.unscale(self.half.optimizer)
        return {"grad_norm": self.half.clip(max_norm)}

    def update(self, lr: float) -> None:
        """See `Learner`; in half precision an overflow skips the step in the half that met it."""
        with self._timed():
            set_lr(self.half.optimizer, lr)
            finite = self._scale.scaler is None or (not self.half.overflow and self._is_finite())
            if finite:
                self.half.optimizer.step()
            self.half.optimizer.zero_grad(set_to_none=True)
            self._scale.update(finite)
        self.step += 1
        self.between_steps, self._at_begin = True, None

    def spent(self, step: int) -> bool:
        """Whether the step after `step` steps would go over the budget."""
        return self.ledger.spent(step)

    # -------------------------------------------------------------------------------------- what is said and saved

    def metrics(self) -> dict[str, Any]:
        """Bytes so far, seconds of this half and of waiting for the server, and what codec and method say."""
        seconds = {"client_seconds": round(self._seconds, 4), "wait_seconds": round(self._waited, 4)}
        return self.ledger.metrics() | seconds | self.codec.metrics() | self.half.method.metrics()

    def eval_metrics(self) -> dict[str, Any]:
        """Training bytes so far."""
        return {"training_bytes": self.ledger.counters.training}

    def said(self) -> str:
        """Traffic so far."""
        return self.ledger.said()

    def summary(self) -> dict[str, Any]:
        """Training bytes of each way and kind, what they would be uncompressed, and bytes of evaluation."""
        return self.ledger.summary()

    def state_dict(self) -> dict[str, Any]:
        """See `Learner`. A step that has begun, but of which the server knows nothing yet, has not."""
        begun = self._at_begin if self.between_steps else None
        return {
            "method": {"client": self.half.method.state_dict() if begun is None else begun["method"]},
            **self.ledger.state_dict(),
            "step": self.step,
            "scaler": self._scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Learner`."""
        self.half.method.load_state_dict(state["method"]["client"])
        self.ledger.load_state_dict(state)
        self.step = state["step"]
        self._forget()
        self._scale.load_state_dict(state["scaler"])

    def restart(self) -> None:
        """Stands where the step under way began."""
        if self._at_begin is not None:
            self.half.method.load_state_dict(self._at_begin["method"])
            self.ledger.load_state_dict(self._at_begin["ledger"])
        self._forget()

    def _forget(self) -> None:
        self.between_steps, self._at_begin, self._prefetched = True, None, {}
        for half in (self.half, *self._twins):
            half.forget()
            half.codec.metrics()  # what it counted of exchanges that are done again
            half.optimizer.zero_grad(set_to_none=True)

    # ---------------------------------------------------------------------------------------------------- helpers

    def _is_finite(self) -> bool:
        return all(bool(p.grad.isfinite().all()) for p in self.half.parameters() if p.grad is not None)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        synchronize(self.device)
        self._seconds += time.perf_counter() - started


def _tensors(half: ClientHalf) -> Iterator[Tensor]:
    """All weights and counters of a half."""
    for module in (half.vit.model, half.codec):
        yield from module.parameters()
        yield from module.buffers()


class _OverTheNetwork(nn.Module):
    """The model in evaluation, its upper half on the server."""

    def __init__(self, remote: Remote) -> None:
        super().__init__()
        self._remote = remote

    def train(self, mode: bool = True) -> "_OverTheNetwork":
        """Training or eval mode of this half and the codec."""
        super().train(mode)
        self._remote.half.train(mode)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of normalised pictures (B, 3, H, W)."""
        remote = self._remote
        frame = replace(remote.half.evaluate(images), step=remote.step)
        answer = remote.carry(frame, lambda asked: remote.connection.request(asked, remote.step))
        return remote.half.logits(answer)
