"""The cosine transform over a square grid of patches, and which tokens are coded by the same tables.

B: samples, N: tokens including P prefix tokens, K: components.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from snello.codecs import components

BANDS = (1, 3, 6)
"""Where bands of frequencies begin, by the sum of both frequencies; band 0 is the mean over the grid."""


def grid_side(num_patches: int) -> int:
    """The side of a square grid of so many patches; 0 where they make none."""
    side = math.isqrt(num_patches)
    return side if side * side == num_patches else 0


@lru_cache(maxsize=8)
def _cosines(side: int) -> Tensor:
    """The orthonormal cosine transform, (side, side) float32."""
    index = torch.arange(side, dtype=torch.float64)
    table = torch.cos(math.pi / side * (index + 0.5) * index.unsqueeze(1)) * math.sqrt(2 / side)
    table[0] /= math.sqrt(2)
    return table.float()


def transform(x: Tensor, num_prefix: int, side: int, *, back: bool = False) -> Tensor:
    """x (B, N, K) with its grid of patches as frequencies, or back."""
    table = _cosines(side).to(x.device)
    table = table.T if back else table
    rows = table @ x[:, num_prefix:].reshape(len(x), side, -1)
    grid = table @ rows.view(len(x) * side, side, -1)
    return torch.cat((x[:, :num_prefix], grid.view(len(x), side * side, -1)), dim=1)


@lru_cache(maxsize=64)
def groups_of(num_tokens: int, num_prefix: int, dct: bool) -> components.Groups:
    """Prefix tokens, and patches, by bands of frequencies where they are frequencies."""
    prefix, patches = np.arange(num_prefix), np.arange(num_prefix, num_tokens)
    if not dct:
        return (prefix, patches)
    side = grid_side(len(patches))
    sums = np.add.outer(np.arange(side), np.arange(side)).ravel()
    bands = np.searchsorted(BANDS, sums, side="right")
    return (prefix, *(patches[bands == band] for band in range(len(BANDS) + 1)))
