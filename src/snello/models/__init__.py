"""Building a model by its name: weights, head and preprocessing, with one clear line for all that can go wrong.

hub.py                  the hub, told to answer at once where it cannot be reached
weights.py              files and folders of weights, and whether they fit
timm_models.py          timm's models, by their names
transformers_models.py  those of transformers, as hf:NAME or a folder
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from snello.models import timm_models
from snello.models.preprocessing import Preprocessing


def create_model(
    name: str,
    weights: str,
    num_classes: int,
    image_size: int | None = None,
    architecture: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A supported Vision Transformer with a head for `num_classes`.

    Args:
        name: a timm model name, with or without a pretrained tag; `hf:` and a name on the Hugging Face hub; or a
            folder with a transformers model, with or without `hf:`.
        weights: `pretrained` (downloaded once, or in the model's folder), `none` (random), or the path of a weights
            file or of a folder with one. A head of another number of classes is left out and starts at random.
        num_classes: classes of the head.
        image_size: side of the pictures in pixels, a multiple of the patch size; default: the model's own.
        architecture: what `architecture_of` said of a transformers model; then its folder or the hub is not asked.

    Raises:
        ModelError: for an unknown or unsupported model, a picture size that is no multiple of the patch size, or
            weights that cannot be loaded or do not fit.
    """
    if architecture is not None or is_transformers(name):
        from snello.models import transformers_models

        return transformers_models.create(name, weights, num_classes, image_size, architecture)
    return timm_models.create(name, weights, num_classes, image_size)


def is_transformers(name: str) -> bool:
    """Whether a model's name means one of transformers: `hf:...`, or a folder."""
    folder = Path(name)
    return name.startswith("hf:") or (folder.is_dir() and (len(folder.parts) > 1 or (folder / "config.json").is_file()))


def preprocessing(model: nn.Module, image_size: int | None = None) -> Preprocessing:
    """How a model that was created here wants its pictures."""
    known = getattr(model, "snello_preprocessing", None)
    return known if isinstance(known, Preprocessing) else timm_models.preprocessing(model, image_size)


def architecture_of(model: nn.Module) -> dict[str, Any] | None:
    """What `create_model` needs to build a transformers model again without its folder, elsewhere; None for timm's."""
    if not hasattr(model, "snello_preprocessing"):
        return None
    from snello.models import transformers_models

    return transformers_models.architecture_of(model)


__all__ = ["Preprocessing", "architecture_of", "create_model", "is_transformers", "preprocessing"]
