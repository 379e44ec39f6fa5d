"""Files and folders of weights, and whether they fit a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from snello.errors import ModelError, printable

FILE = "model.safetensors"
"""What both libraries call the weights in a model's folder."""


def weights_file(path: Path) -> Path:
    """The file that `--weights path` means: itself, or the one in a folder; a ModelError where there is none."""
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        what = f"a file or a folder with a {FILE}; {path} has none" if path.is_dir() else "a file or a folder"
        raise ModelError(f"--weights must be `pretrained`, `none`, {what}; there is no file {file}")
    return file


def misfits(state: Mapping[str, Tensor], own: Mapping[str, torch.Size]) -> list[str]:
    """Says of weights that are of another shape than the model's `own`, missing or unknown, what they are."""
    wrong = [key for key in own if key in state and state[key].shape != own[key]]
    return [
        *(f"{key} is {tuple(state[key].shape)}, the model's is {tuple(own[key])}" for key in wrong),
        *(f"{key} is missing" for key in own if key not in state),
        *(f"{printable(key)} is unknown" for key in sorted(state.keys() - own.keys())),
    ]


def require_size(name: str, image_size: int | None, patch: int) -> None:
    """Refuses, with a ModelError, pictures of a size that a model's patches do not divide."""
    if image_size is not None and (image_size < patch or image_size % patch):
        raise ModelError(f"--image-size for {name} must be a multiple of its patch size {patch}, got {image_size}")


def some(texts: Sequence[str], between: str = ", ") -> str:
    """Names the first three, and counts the others."""
    return between.join(texts[:3]) + (f" (+{len(texts) - 3} more)" if len(texts) > 3 else "")
