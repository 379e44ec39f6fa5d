"""The last two checkpoints of one side of a cut, named by step: the other side may have only the older one."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from snello.errors import CheckpointError, SnelloWarning
from snello.runs.checkpoint import load_checkpoint, save_checkpoint

KEEP = 2
_NAME = re.compile(r"step-(\d+)\.safetensors")


class Checkpoints:
    """Checkpoints of one session in a folder, which is made when the first is saved: modules and optimizers by name."""

    def __init__(
        self, folder: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]
    ) -> None:
        self.folder, self._modules, self._optimizers = folder, modules, optimizers

    def steps(self) -> list[int]:
        """Those that are there, in order."""
        return steps_in(self.folder)

    def path(self, step: int) -> Path:
        """The file of a checkpoint."""
        return self.folder / f"step-{step:09}.safetensors"

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Writes the checkpoint of `step`, whole or not at all, and then drops all but the last two.

        Raises:
            CheckpointError: where it cannot be written; the others stay.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be created: {error.strerror or error}") from error
        save_checkpoint(self.path(step), self._modules, self._optimizers, state)
        for old in self.steps()[:-KEEP]:
            self.path(old).unlink(missing_ok=True)

    def load(self, step: int) -> dict[str, Any]:
        """Goes back to `step`, forgets what came later, and returns the state that was saved.

        Raises:
            CheckpointError: where it is not there or damaged.
        """
        state = load_checkpoint(self.path(step), self._modules, self._optimizers)
        for later in self.steps():
            if later > step:
                self.path(later).unlink(missing_ok=True)
        return state


def steps_in(folder: Path) -> list[int]:
    """The steps of which a folder holds a checkpoint, in order; a damaged one is none, and a warning names it."""
    paths = {path: _NAME.fullmatch(path.name) for path in folder.iterdir()} if folder.is_dir() else {}
    return sorted(int(match[1]) for path, match in paths.items() if match and _is_whole(path))


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):  # looks whether the file is as long as its table says
            return True
    except (OSError, SafetensorError) as error:
        warnings.warn(f"{path} is damaged and left out: {error}", SnelloWarning, stacklevel=2)
        return False
