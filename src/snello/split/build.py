"""What the halves of a model are made of: its two parts, and the codec that both have."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from snello.codecs.base import Codec
from snello.config import Recipe
from snello.errors import CheckpointError, ConfigError
from snello.models import create_model
from snello.vit import ViT


def make_codec(config: Recipe, text: str, embed_dim: int) -> Codec:
    """The codec of a run, equal on both sides.

    Raises:
        ConfigError: where the text does not parse, an option is out of range, or the codec has weights to train on a
            client that is frozen.
    """
    codec = Codec(
        text,
        embed_dim=embed_dim,
        eval_text=config.split.eval_codec,
        seed=config.seed,
        flag="--split.codec",
        eval_flag="--split.eval-codec",
    )
    if config.split.freezes and any(True for _ in codec.client_parameters()):
        frozen = f"--split.client {config.split.client}"
        raise ConfigError(f"--split.codec {text} does not go with {frozen}: it has weights that train on the client")
    return codec


def meta_vit(config: Recipe, num_classes: int, architecture: Mapping[str, Any] | None = None) -> ViT:
    """The whole model on the device `meta`: sizes and names, but no memory; of `architecture` where that is known."""
    with torch.device("meta"):
        return ViT(create_model(config.model, "none", num_classes, config.image_size, architecture))


def modules_of(model: nn.Module, codec: Codec) -> dict[str, nn.Module]:
    """What has a state to save, by name."""
    return {"model": model} | ({"codec": codec} if codec.state_dict() else {})


def cut_model(vit: ViT, config: Recipe) -> tuple[ViT, ViT]:
    """The client's part of a model and the server's.

    Raises:
        ConfigError: where the cut is out of range.
    """
    try:
        return vit.cut(config.split.cut, head_below=config.split.labels == "client")
    except ConfigError as error:
        raise ConfigError(f"--split.{error}") from None  # the name as the user typed it


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
