"""Weights in a frame, and back."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from snello.split.wire.frames import Frame, Kind, control


def weights_frame(kind: Kind, weights: Mapping[str, Tensor], values: Mapping[str, Any] | None = None) -> Frame:
    """A frame that carries weights."""
    return control(kind, values or {}, {f"weights.{name}": value.detach().cpu() for name, value in weights.items()})


def weights_of(frame: Frame) -> dict[str, Tensor]:
    """The weights that a frame carries, by name."""
    prefix = "weights."
    return {name[len(prefix) :]: value for name, value in frame.arrays.items() if name.startswith(prefix)}
