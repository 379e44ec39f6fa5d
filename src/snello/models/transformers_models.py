"""transformers' models: `hf:NAME` from the hub or its cache, or a folder that `save_pretrained` made."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from snello.errors import ModelError, one_line
from snello.models.hub import hub, hub_is_out_of_reach
from snello.models.preprocessing import Preprocessing
from snello.models.weights import require_size, some, weights_file
from snello.vit import SUPPORTED

try:
    import transformers
    from safetensors.torch import load_file
    from transformers.image_processing_base import ImageProcessingMixin
    from transformers.utils import logging
except ImportError as error:  # pragma: no cover  tested in an environment of its own
    raise ModelError(f"models of transformers need it ({error.name} is missing): pip install 'snello[hf]'") from error

POSITIONS = {"vit": 1, "deit": 2, "dinov2": 1, "dinov2_with_registers": 1}
"""Supported model types, with the prefix tokens that have a position embedding."""
UNUSED = ("mask_token",)
"""Weights that classification does not use: they may be missing."""
PREPROCESSING = "snello_preprocessing"
"""In an architecture: how the model wants its pictures."""
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def create(
    name: str, weights: str, num_classes: int, image_size: int | None, architecture: Mapping[str, Any] | None
) -> nn.Module:
    """Creates a model as `snello.models.create_model` describes."""
    source = name.removeprefix("hf:")
    if not source:
        raise ModelError(f"the name of a model is missing in {name!r}: give hf:NAME, or a folder")
    offline = not Path(source).is_dir() and hub_is_out_of_reach()
    with quiet(offline):
        config, wanted = (_config(name, source), None) if architecture is None else _rebuilt(name, architecture)
        _require_supported(config, name, image_size)
        wanted = wanted or _wishes(source, config)
        size = image_size or wanted.size
        config.num_labels = num_classes
        if weights == "none":
            config.image_size = size
            model = transformers.AutoModelForImageClassification.from_config(config)
        elif weights == "pretrained":
            model = _resized(_pretrained(name, source, config), size)
        else:
            model = _resized(_with_weights(config, Path(weights)), size)
    model.snello_preprocessing = replace(wanted, size=size)
    return model  # type: ignore[no-any-return]


def architecture_of(model: Any) -> dict[str, Any]:
    """A transformers model's config, as values that JSON and YAML can hold."""
    values: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    pre = asdict(model.snello_preprocessing)
    own = {"mean": list(pre["mean"]), "std": list(pre["std"])}
    return values | {"architectures": [type(model).__name__], PREPROCESSING: pre | own}


def _rebuilt(name: str, architecture: Mapping[str, Any]) -> tuple[Any, Preprocessing]:
    values = dict(architecture)
    try:
        pre = values.pop(PREPROCESSING)
        wanted = Preprocessing(**pre | {"mean": tuple(pre["mean"]), "std": tuple(pre["std"])})
        return transformers.AutoConfig.for_model(**values), wanted
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"what model {name} is made of cannot be read: {one_line(error)}") from error


def _config(name: str, source: str) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(source)
    except Exception as error:  # the hub, its cache, the network, JSON: each raises its own
        if Path(source).is_dir():
            raise ModelError(f"the folder {source} holds no model of transformers ({one_line(error)})") from error
        raise _not_loaded(f"model {name}", source, error) from error


def _not_loaded(what: str, source: str, error: Exception) -> ModelError:
    reason = "the hub cannot be reached, and it is not in its cache" if hub_is_out_of_reach() else one_line(error)
    return ModelError(
        f"{what} could not be loaded ({reason}); offline? on a machine with a connection run "
        f"`hf download {source} --local-dir FOLDER`, copy the folder and give it: --model FOLDER"
    )


def _require_supported(config: Any, name: str, image_size: int | None) -> None:
    if config.model_type == "timm_wrapper":
        architecture = getattr(config, "architecture", "")
        raise ModelError(f"model {name} is timm's: --model {architecture} --weights FOLDER, or timm's pretrained ones")
    if config.model_type not in POSITIONS:
        raise ModelError(f"model {name} is a {config.model_type}, which is not supported; supported: {SUPPORTED}")
    require_size(name, image_size, _patch(config))


def _patch(config: Any) -> int:
    return int(config.patch_size if isinstance(config.patch_size, int) else max(config.patch_size))


def _wishes(source: str, config: Any) -> Preprocessing:
    """What the image processor's file beside the model says, else the usual."""
    values: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # many folders have none
        values, _ = ImageProcessingMixin.get_image_processor_dict(source)
    own = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    resized = _side(values.get("size")) or own
    cropped = (_side(values.get("crop_size")) if values.get("do_center_crop") else None) or resized
    if cropped % _patch(config):
        cropped = resized = own
    mean, std = (tuple(values.get(name, (0.5, 0.5, 0.5))) for name in ("image_mean", "image_std"))
    return Preprocessing(cropped, mean, std, RESAMPLING.get(values.get("resample", 3), "bicubic"), cropped / resized)


def _side(size: Any) -> int | None:
    """The shorter side in pixels, in any of the ways in which an image processor may say it."""
    if isinstance(size, int):
        return size
    found: int | None = size and (size.get("shortest_edge") or size.get("height"))
    return found


def _pretrained(name: str, source: str, config: Any) -> Any:
    """The model with its own weights; a head of another number of classes starts at random."""
    try:
        return _loaded(config, source, source)
    except ModelError:
        raise
    except Exception as error:  # the hub, its cache, the network, the files: each raises its own
        if Path(source).is_dir():
            raise ModelError(f"the weights in {source} could not be loaded ({one_line(error)})") from error
        raise _not_loaded(f"the pretrained weights of {name}", source, error) from error


def _with_weights(config: Any, path: Path) -> Any:
    """The model with the weights of a safetensors file, or of a folder with one."""
    file = weights_file(path)
    try:
        return _loaded(config, None, str(file), state_dict=load_file(file))
    except ModelError:
        raise
    except Exception as error:  # safetensors' own and OSError
        raise ModelError(f"the weights file {file} cannot be read: {one_line(error)}") from error


def _loaded(config: Any, source: str | None, where: str, **options: Any) -> Any:
    """The model as transformers loads it, which knows older names of its weights; nothing but a head is left out."""
    with torch.device("meta"):
        kind = type(transformers.AutoModelForImageClassification.from_config(config))
    model, loaded = kind.from_pretrained(
        source, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **options
    )
    changed = [*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])]
    lost = sorted(key for key in changed if not key.split(".")[0].endswith("classifier") and not key.endswith(UNUSED))
    if lost:
        raise ModelError(f"the weights in {where} do not fit the model: no {some(lost)} of its size")
    return model


def _resized(model: Any, size: int) -> Any:
    """The model for pictures of `size`: its position embeddings resampled, as timm does it."""
    config = model.config
    if config.image_size == size:
        return model
    state, prefix = model.state_dict(), POSITIONS[config.model_type]
    for name in [name for name in state if name.endswith("embeddings.position_embeddings")]:
        state[name] = resample_abs_pos_embed(state[name], [size // _patch(config)] * 2, num_prefix_tokens=prefix)
    config.image_size = size
    made = type(model)(config)
    made.load_state_dict(state)
    return made


@contextlib.contextmanager
def quiet(offline: bool) -> Iterator[None]:
    """transformers without its warnings and bars: what they say here is said by the errors above."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with hub(offline):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
