"""ALaST that says what a test means, whatever its defaults are."""

from typing import Any

from torch import nn

from snello.methods.alast import ALaST

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
