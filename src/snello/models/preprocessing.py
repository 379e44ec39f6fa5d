"""How a model wants its pictures."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its pictures: side in pixels, normalisation of values in 0..1, resizing."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
