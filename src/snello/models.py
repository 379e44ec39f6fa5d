"""Building a model by its name: weights, head and preprocessing, with one clear line for all that can go wrong."""

import contextlib
import difflib
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from logging import ERROR
from pathlib import Path

import timm
import torch
from huggingface_hub import constants
from huggingface_hub.utils import logging
from timm.models import VisionTransformer, load_state_dict
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

import snello.assets.micro  # noqa: F401  registers the micro ViT with timm
from snello.errors import ModelError
from snello.vit import SUPPORTED, ViT


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its pictures: side in pixels, normalisation of values in 0..1, resizing."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float


def create_model(name: str, weights: str, num_classes: int, image_size: int | None = None) -> nn.Module:
    """A supported Vision Transformer with a head for `num_classes`.

    Args:
        name: a timm model name, with or without a pretrained tag.
        weights: `pretrained` (timm's, downloaded once), `none` (random), or the path of a weights file. A head of
            another number of classes is left out and starts at random.
        num_classes: classes of the head.
        image_size: side of the pictures in pixels, a multiple of the patch size; default: the model's own.

    Raises:
        ModelError: for an unknown or unsupported model, a picture size that is no multiple of the patch size, or
            weights that cannot be loaded or do not fit.
    """
    _check_name(name)
    with torch.device("meta"):  # refuse before anything is downloaded
        _check_size(ViT(_build(name)), name, image_size)
    options = {"num_classes": num_classes} | ({} if image_size is None else {"img_size": image_size})
    if weights == "none":
        return _build(name, **options)
    if weights == "pretrained":
        return _build_pretrained(name, options)
    model = _build(name, **options)
    _load_weights(model, Path(weights))
    return model


def preprocessing(model: nn.Module, image_size: int | None = None) -> Preprocessing:
    """How `model` wants its pictures, from its own timm config."""
    config = timm.data.resolve_model_data_config(model)
    return Preprocessing(
        size=image_size or config["input_size"][-1],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
    )


def _check_name(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        plain = [*timm.list_models(module="vision_transformer"), *timm.list_models(module="micro")]
        near = difflib.get_close_matches(architecture, plain, n=3, cutoff=0.4)
        near += difflib.get_close_matches(architecture, timm.list_models(module="deit"), n=2, cutoff=0.6)
        nearest = sorted(set(near), key=lambda known: -difflib.SequenceMatcher(None, architecture, known).ratio())
        raise ModelError(f"unknown model {name!r}; nearest: {', '.join(nearest[:3]) or 'none'}; supported: {SUPPORTED}")
    if tag and name not in timm.list_pretrained(f"{architecture}*"):
        tags = ", ".join(timm.list_pretrained(f"{architecture}.*")) or "none"
        raise ModelError(f"unknown pretrained tag in {name!r}; known: {tags}")


def _check_size(vit: ViT, name: str, image_size: int | None) -> None:
    patch = vit.patch_size
    if image_size is not None and (image_size < patch or image_size % patch):
        raise ModelError(f"--image-size for {name} must be a multiple of its patch size {patch}, got {image_size}")


def _build(name: str, **options: object) -> nn.Module:
    """The model with random weights; one that cannot be built without data is no plain Vision Transformer."""
    try:
        model: nn.Module = timm.create_model(name, **options)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"model {name} is not supported ({_line(error)}); supported: {SUPPORTED}") from error
    return model


def _build_pretrained(name: str, options: dict[str, int]) -> nn.Module:
    out_of_reach = _hub_is_out_of_reach()
    try:
        with _hub(offline=out_of_reach):
            model: nn.Module = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # the hub, its cache, the network: each raises its own
        reason = "the hub cannot be reached, and they are not in its cache" if out_of_reach else _line(error)
        raise ModelError(
            f"the pretrained weights of {name} could not be loaded ({reason}); offline? download the safetensors "
            "file of the model on a machine with a connection and give its path: --weights FILE "
            "(--weights none starts from random weights)"
        ) from error
    return model


def _hub_is_out_of_reach() -> bool:
    """Whether the hub's name cannot even be resolved; behind a proxy that says nothing."""
    if urllib.request.getproxies():
        return False
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False


@contextlib.contextmanager
def _hub(offline: bool) -> Iterator[None]:
    """The hub's client told to look into its cache only, instead of trying for a minute; and without its warnings."""
    before, verbosity = constants.HF_HUB_OFFLINE, logging.get_verbosity()
    constants.HF_HUB_OFFLINE = before or offline
    logging.set_verbosity(ERROR)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        logging.set_verbosity(verbosity)


def _load_weights(model: nn.Module, path: Path) -> None:
    """Loads a safetensors file (or a PyTorch file that holds tensors only) into the model, its head if that fits."""
    if not path.is_file():
        raise ModelError(f"--weights must be `pretrained`, `none` or a file; there is no file {path}")
    assert isinstance(model, VisionTransformer)
    try:
        state: dict[str, Tensor] = checkpoint_filter_fn(load_state_dict(str(path), weights_only=True), model)
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise TypeError("not all of its values are tensors")
    except Exception as error:  # safetensors, pickle and zip each raise their own
        raise ModelError(f"the weights file {path} cannot be read: {_line(error)}") from error
    own = model.state_dict()
    for key in [key for key in state if key.split(".")[0] in ("head", "head_dist")]:
        if key not in own or state[key].shape != own[key].shape:
            del state[key]
    wrong = [
        f"{key} is {tuple(state[key].shape)}, the model's is {tuple(own[key].shape)}"
        for key in state
        if key in own and state[key].shape != own[key].shape
    ]
    missing = [key for key in own if key not in state and key.split(".")[0] not in ("head", "head_dist")]
    unknown = [key for key in state if key not in own]
    problems = wrong + [f"{key} is missing" for key in missing] + [f"{key} is unknown" for key in unknown]
    if problems:
        more = f" (+{len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ModelError(f"the weights file {path} does not fit the model: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(state, strict=False)


def _line(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters."""
    text = str(error).strip().split("\n")[0] or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
