"""A server half in training: weights, method and optimizer, of one session or shared by many."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from snello.config import ServeConfig
from snello.devices import Precision
from snello.models import create_model
from snello.seeds import mix
from snello.split.build import LossScale, codec_text, cut_model, make_codec, make_half, meta_vit, modules_of
from snello.split.halves import ServerHalf
from snello.split.ledger import Ledger
from snello.split.wire.frames import Frame
from snello.split.wire.handshake import Terms, make_terms
from snello.train.optim import set_lr
from snello.vit import AttentionPath, ViT


class Upper:
    """The server's half of a fresh model.

    Args:
        config: of the server.
        num_classes: C.
        device: where it computes.
        precision: of its forward passes.
        attention: path of its attention.

    Raises:
        SnelloError: where model, weights, cut, codec or method do not fit each other.
    """

    def __init__(
        self,
        config: ServeConfig,
        num_classes: int,
        *,
        device: torch.device,
        precision: Precision,
        attention: AttentionPath,
    ) -> None:
        self.config, self.num_classes, self.device = config, num_classes, device
        vit = make_vit(config, num_classes)
        self.codec = make_codec(config, codec_text(config), vit.embed_dim).to(device)
        _, upper = cut_model(vit, config)
        upper.set_attention_paths([attention] * upper.depth)
        upper.model.to(device)
        self.scale = LossScale(device, precision)
        options: dict[str, Any] = {"num_classes": num_classes, "device": device, "precision": precision}
        self.half = make_half(ServerHalf, upper, config, self.codec, scale=self.scale, **options)
        self.half.max_rows = config.batch_size * self.codec.buffer
        self.modules: Mapping[str, nn.Module] = modules_of(upper.model, self.codec)
        self.optimizers: Mapping[str, torch.optim.Optimizer] = {"server": self.half.optimizer}

    def begin(self, progress: float) -> None:
        """Once per optimizer step of a session."""
        self.half.begin(self.config.lr, progress)

    def answer(self, frame: Frame, *, training: bool, seed: int) -> Frame:
        """The half's answer, with its own noise drawn from `seed`."""
        if self.half.vit.model.training != training or self.codec.training != training:
            self.half.train(training)
        torch.manual_seed(seed)
        if training:
            return self.half.answer(frame)
        with torch.no_grad():
            return self.half.answer(frame)

    def update(self, lr: float) -> Tensor:
        """Clips and moves the weights, unless a gradient is not finite; returns the norm of the gradients, ()."""
        self.scale.unscale(self.half.optimizer)
        norm = self.half.clip(self.config.clip_norm)
        finite = bool(norm.isfinite()) and not self.half.overflow
        if finite:
            set_lr(self.half.optimizer, lr)
            self.half.optimizer.step()
        self.half.optimizer.zero_grad(set_to_none=True)
        self.scale.update(finite)
        return norm

    def snapshot(self) -> dict[str, Any]:
        """What an exchange may change besides gradients."""
        buffers = [value.clone() for value in self.codec.buffers()]
        return {"method": self.half.method.state_dict(), "buffers": buffers}

    def undo(self, before: dict[str, Any]) -> None:
        """Stands where `snapshot` was taken; the exchange's gradients are dropped."""
        self.half.method.load_state_dict(before["method"])
        for value, old in zip(self.codec.buffers(), before["buffers"], strict=True):
            value.copy_(old)
        self.swap_gradients(None)
        self.half.forget()

    def swap_gradients(self, gradients: list[Tensor | None] | None) -> list[Tensor | None]:
        """Puts other gradients in place (None: none at all) and returns those that were there."""
        parameters = list(self.half.parameters())
        before = [parameter.grad for parameter in parameters]
        for parameter, gradient in zip(parameters, gradients or [None] * len(parameters), strict=True):
            parameter.grad = gradient
        return before

    def weights(self) -> dict[str, Tensor]:
        """The weights themselves, by their names in the whole model; a codec's begin with `codec.`"""
        return self.half.weights()

    def state_dict(self) -> dict[str, Any]:
        """All that is neither in `modules` nor in `optimizers`, as values that JSON can hold."""
        return {
            "method": self.half.method.state_dict(),
            "scaler": self.scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict()`."""
        self.half.method.load_state_dict(state["method"])
        self.half.optimizer.zero_grad(set_to_none=True)
        self.scale.load_state_dict(state["scaler"])


class Sizes:
    """What can be said of a session from shapes alone, on the device `meta`.

    Args:
        config: of the server.
        num_classes: C.
        precision: of forward passes.
    """

    def __init__(self, config: ServeConfig, num_classes: int, precision: Precision) -> None:
        self.vit = meta_vit(config, num_classes)
        self.codec = make_codec(config, codec_text(config), self.vit.embed_dim)
        self.terms: Terms = make_terms(
            self.vit.model,
            config,
            codec=self.codec.text,
            num_classes=num_classes,
            precision=precision,
        )
        self.max_frame: int = Ledger(self.vit, config, self.codec, num_classes).largest_frame(config.batch_size)
        _, upper = cut_model(self.vit, config)
        weights = sum(p.numel() * p.element_size() for p in upper.model.parameters())
        self.messages: int = 2 * self.max_frame
        """Bytes of a session's messages: the one that comes in, and the last answer."""
        self.state: int = 4 * weights
        """Bytes of weights, gradients and AdamW's moments."""


def make_vit(config: ServeConfig, num_classes: int) -> ViT:
    """The whole model as every run of this seed begins with."""
    torch.manual_seed(mix(config.seed))  # the head's random start
    return ViT(create_model(config.model, config.weights, num_classes, config.image_size))


def starting_weights(config: ServeConfig, num_classes: int) -> dict[str, Tensor]:
    """What the client's half begins with, by names in the whole model."""
    lower, _ = cut_model(make_vit(config, num_classes), config)
    state: dict[str, Tensor] = lower.model.state_dict()
    return state
