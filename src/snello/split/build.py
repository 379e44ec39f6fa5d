"""Making the halves of a model, each with its own method and optimizer, around a codec that both have."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from snello.codecs.base import Codec
from snello.config import Recipe
from snello.devices import Precision, autocast
from snello.errors import CheckpointError, ConfigError
from snello.methods import make_method
from snello.models import create_model
from snello.split.halves import ClientHalf, Half, ServerHalf
from snello.train.optim import make_optimizer
from snello.vit import ViT

H = TypeVar("H", bound=Half)


def make_codec(config: Recipe, text: str, embed_dim: int) -> Codec:
    """The codec of a run, equal on both sides.

    Raises:
        ConfigError: where the text does not parse or an option is out of range.
    """
    return Codec(
        text,
        embed_dim=embed_dim,
        eval_text=config.split.eval_codec,
        seed=config.seed,
        flag="--split.codec",
        eval_flag="--split.eval-codec",
    )


def meta_vit(config: Recipe, num_classes: int, architecture: Mapping[str, Any] | None = None) -> ViT:
    """The whole model on the device `meta`: sizes and names, but no memory; of `architecture` where that is known."""
    with torch.device("meta"):
        return ViT(create_model(config.model, "none", num_classes, config.image_size, architecture))


def modules_of(model: nn.Module, codec: Codec) -> dict[str, nn.Module]:
    """What has weights to save, by name."""
    return {"model": model} | ({"codec": codec} if next(codec.parameters(), None) is not None else {})


class LossScale:
    """The factor on the loss against underflow in half precision; in other precisions it is 1 and nothing is skipped.

    Args:
        device: where it computes.
        precision: of the forward pass.
    """

    def __init__(self, device: torch.device, precision: Precision) -> None:
        self.scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
        if self.scaler is not None:
            self.scaler.scale(torch.zeros((), device=device))  # it is lazy, and halves scale by themselves

    def __call__(self) -> float:
        """The factor, > 0."""
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the factor out of the gradients that `optimizer` holds."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def update(self, finite: bool) -> None:
        """Once per step: the factor falls where a gradient was not finite, and rises after many that were."""
        if self.scaler is not None:
            self.scaler.update(None if finite else self.scaler.get_scale() * self.scaler.get_backoff_factor())

    def state_dict(self) -> dict[str, Any] | None:
        """As values that JSON can hold; None where there is no factor."""
        return None if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Goes on from a `state_dict()`."""
        if self.scaler is not None and state is not None:
            self.scaler.load_state_dict(state)


def cut_model(vit: ViT, config: Recipe) -> tuple[ViT, ViT]:
    """The client's part of a model and the server's.

    Raises:
        ConfigError: where the cut is out of range.
    """
    try:
        return vit.cut(config.split.cut, head_below=config.split.labels == "client")
    except ConfigError as error:
        raise ConfigError(f"--split.{error}") from None  # the name as the user typed it


def make_half(
    kind: type[H],
    part: ViT,
    config: Recipe,
    codec: Codec,
    *,
    num_classes: int,
    device: torch.device,
    precision: Precision,
    scale: Callable[[], float] = lambda: 1.0,
) -> H:
    """A half around its part of the model, on `device`, with method and optimizer as `config` says."""
    if kind is ClientHalf:
        name, own = "client", codec.client_parameters()
    else:
        assert kind is ServerHalf
        name, own = "server", codec.server_parameters()
    attached = config.method_name != "alast" or config.split.alast in (name, "both")
    optimizer = make_optimizer(
        part,
        lr=config.lr,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
        device=device,
        others=own,
    )
    return kind(
        part,
        make_method(part, config, config.method_name if attached else "full"),
        optimizer,
        codec,
        labels=config.split.labels,
        num_classes=num_classes,
        label_smoothing=config.label_smoothing,
        autocast=lambda: autocast(device, precision),
        scale=scale,
    )


def replace_weights(own: Mapping[str, Tensor], state: Mapping[str, Tensor], side: str) -> None:
    """Puts other values into the tensors of a half.

    Raises:
        CheckpointError: where names or shapes are not those of the half; nothing was changed.
    """
    wrong = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        raise CheckpointError(f"the weights do not fit the {side} half: {wrong[0]}")
    for name, value in own.items():
        value.detach().copy_(state[name])
