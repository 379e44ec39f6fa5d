"""Files and folders of weights, and whether they fit a model."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from snello.errors import ModelError

FILE = "model.safetensors"
"""What both libraries call the weights in a model's folder."""


def weights_file(path: Path) -> Path:
    """The file that `--weights path` means: itself, or the one in a folder.

    Raises:
        ModelError: where there is none.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        what = f"a file or a folder with a {FILE}; {path} has none" if path.is_dir() else "a file or a folder"
        raise ModelError(f"--weights must be `pretrained`, `none`, {what}; there is no file {file}")
    return file


def load_fitting(model: nn.Module, state: dict[str, Tensor], heads: Sequence[str], path: Path) -> None:
    """Puts `state`, read from `path`, into the model; its head only where that fits.

    Raises:
        ModelError: where anything else is missing, unknown or of another shape, naming the first three.
    """
    own = model.state_dict()
    for key in [key for key in state if key.split(".")[0] in heads]:
        if key not in own or state[key].shape != own[key].shape:
            del state[key]
    wrong = [
        f"{key} is {tuple(state[key].shape)}, the model's is {tuple(own[key].shape)}"
        for key in state
        if key in own and state[key].shape != own[key].shape
    ]
    missing = [key for key in own if key not in state and key.split(".")[0] not in heads]
    unknown = [key for key in state if key not in own]
    problems = wrong + [f"{key} is missing" for key in missing] + [f"{key} is unknown" for key in unknown]
    if problems:
        more = f" (+{len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ModelError(f"the weights file {path} does not fit the model: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(state, strict=False)
