"""ALaST that says what a test means, whatever its defaults are."""

from typing import Any

from torch import nn

from snello.methods.alast import ALaST
from snello.vit.times import Times

DROPPING: dict[str, Any] = {
    "blocks": 0.75,
    "start_budget": 0.9,
    "min_budget": 0.5,
    "adapt": "difference",
    "rule": "drop",
    "token_multiple": 1,
}
"""Every block drops the share of its tokens that its budget says, and budgets move by the change of delta."""


def dropping(model: nn.Module, *, seed: int = 0, **options: Any) -> ALaST:
    """ALaST with the settings DROPPING, but for `options`."""
    return ALaST(model, seed=seed, **DROPPING | options)


LINEAR = Times(
    tokens=(1, 5, 13, 17),
    attention=(0.1, 0.5, 1.3, 1.7),
    mlp=(0.2, 1.0, 2.6, 3.4),
    frozen_attention=(0.07, 0.35, 0.91, 1.19),
    frozen_mlp=(0.14, 0.7, 1.82, 2.38),
    reducing=(0.01, 0.05, 0.13, 0.17),
    last=(0.1, 0.3, 0.7, 0.9),
    plain=5.3,
    embedding=0.5,
    optimizer=0.3,
)
"""Of a block of `tiny_vit`, in proportion to its tokens."""
