"""timm's models, by their names."""

import difflib
from pathlib import Path

import timm
import torch
from timm.models import VisionTransformer, load_state_dict
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

import snello.assets.micro  # noqa: F401  registers the micro ViT with timm
from snello.config.default_model import TOY
from snello.errors import ModelError, one_line
from snello.models.hub import hub, hub_is_out_of_reach
from snello.models.preprocessing import Preprocessing
from snello.models.weights import FILE, misfits, require_size, some, weights_file
from snello.vit import SUPPORTED, ViT


def create(name: str, weights: str, num_classes: int, image_size: int | None) -> nn.Module:
    """Creates a model as `snello.models.create_model` describes."""
    _check_name(name)
    with torch.device("meta"):  # refuse before anything is downloaded
        require_size(name, image_size, ViT(_build(name)).patch_size)
    options = {"num_classes": num_classes} | ({} if image_size is None else {"img_size": image_size})
    if weights == "pretrained":
        return _build_pretrained(name, options)
    model = _build(name, **options)
    if weights != "none":
        _load_weights(model, Path(weights))
    return model


def preprocessing(model: nn.Module, image_size: int | None) -> Preprocessing:
    """How `model` wants its pictures, from its own timm config."""
    own = timm.data.resolve_model_data_config(model)
    size, mean, std = image_size or own["input_size"][-1], tuple(own["mean"]), tuple(own["std"])
    return Preprocessing(size, mean, std, own["interpolation"], own["crop_pct"])


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


def _build(name: str, **options: object) -> nn.Module:
    """The model with random weights; one that cannot be built without data is no plain Vision Transformer."""
    try:
        model: nn.Module = timm.create_model(name, **options)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"model {name} is not supported ({one_line(error)}); supported: {SUPPORTED}") from error
    return model


def _build_pretrained(name: str, options: dict[str, int]) -> nn.Module:
    out_of_reach = hub_is_out_of_reach()
    try:
        with hub(offline=out_of_reach):
            model: nn.Module = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # the hub, its cache, the network: each raises its own
        reason = "the hub cannot be reached, and they are not in its cache" if out_of_reach else one_line(error)
        raise ModelError(
            f"the pretrained weights of {name} could not be loaded ({reason}); offline? on a machine with a connection "
            f"{_how_to_get(name)}, and give the file: --weights FILE (--weights none starts from random weights; "
            f"--model {TOY} is a toy to try things with)"
        ) from error
    return model


def _how_to_get(name: str) -> str:
    """What to type, or where to look, for the file with the weights of a model."""
    known = timm.get_pretrained_cfg(name)
    if known is None or not (known.hf_hub_id or known.url):
        return "get the safetensors file of the model"
    return (
        f"run `hf download {known.hf_hub_id} {known.hf_hub_filename or FILE}`"
        if known.hf_hub_id
        else f"get {known.url}"
    )


def _load_weights(model: nn.Module, path: Path) -> None:
    """Loads a safetensors file (or a PyTorch file that holds tensors only) into the model, its head if that fits."""
    assert isinstance(model, VisionTransformer)
    file = weights_file(path)
    try:
        state: dict[str, Tensor] = checkpoint_filter_fn(load_state_dict(str(file), weights_only=True), model)
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise TypeError("not all of its values are tensors")
    except Exception as error:  # safetensors, pickle and zip each raise their own
        raise ModelError(f"the weights file {file} cannot be read: {one_line(error)}") from error
    own = {name: value.shape for name, value in model.state_dict().items()}
    for name in {*own, *state}:
        fits = name in state and own.get(name) == state[name].shape
        if not fits and name.partition(".")[0] in ("head", "head_dist"):  # starts at random
            own.pop(name, None)
            state.pop(name, None)
    if problems := misfits(state, own):
        raise ModelError(f"the weights file {file} does not fit the model: {some(problems, '; ')}")
    model.load_state_dict(state, strict=False)
