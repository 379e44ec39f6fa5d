"""A checkpoint is one safetensors file: the model, the optimizer's state, and everything else as JSON in its metadata.

One file, because one rename is what the file system does at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snello.errors import CheckpointError
from snello.files import load_tensors, save_tensors


def save_checkpoint(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    state: Mapping[str, Any],
) -> None:
    """Writes the modules, the optimizers' state, each under its name, and `state` (JSON values) as one file."""
    tensors = {f"{prefix}.{name}": value for prefix, m in modules.items() for name, value in m.state_dict().items()}
    for prefix, optimizer in optimizers.items():
        for index, entry in optimizer.state_dict()["state"].items():
            tensors |= {f"{prefix}.{index}.{name}": value for name, value in entry.items()}
    save_tensors(path, tensors, state)


def load_checkpoint(
    path: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]
) -> dict[str, Any]:
    """Puts back what `save_checkpoint` wrote, and returns its `state`.

    Raises:
        CheckpointError: where the file cannot be read or is of another model.
    """
    tensors, state = load_tensors(path)
    named: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        prefix, rest = name.split(".", 1)
        named.setdefault(prefix, {})[rest] = value
    for prefix, module in modules.items():
        load_into(module, named.get(prefix, {}), f"{path} does not fit the {prefix}")
    for prefix, optimizer in optimizers.items():
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in named.get(prefix, {}).items():
            index, key = name.split(".", 1)
            entries.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def with_weights(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those that a trained model consists of: a codec that only remembers something is none."""
    return {name: module for name, module in modules.items() if next(module.parameters(), None) is not None}


def load_into(module: nn.Module, state: Mapping[str, Tensor], misfit: str) -> None:
    """Loads weights; a CheckpointError that begins with `misfit` where they are another model's."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{misfit}: {' '.join(str(error).split())}") from error
