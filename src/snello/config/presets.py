"""Presets: what settings have that are left at their default, for a goal; each was measured (docs/alast.md)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from snello.config.methods import PUBLISHED

Preset = Literal["best", "fast", "accurate", "small-memory", "published"]


@dataclass(frozen=True)
class Settings:
    """What a preset fills in."""

    alast: Mapping[str, Any] = field(default_factory=dict)
    grad_checkpointing: bool = False
    time_of_full: bool = False
    """Train for as long as --epochs epochs of full fine-tuning would take."""


PRESETS: dict[str, Settings] = {
    "best": Settings(),
    "fast": Settings({"blocks": 0.75, "draw": "lowest-first", "train_embeddings": False}),
    "accurate": Settings(time_of_full=True),
    "small-memory": Settings(
        {"blocks": 0.5, "draw": "lowest-first", "train_embeddings": False}, grad_checkpointing=True
    ),
    "published": Settings(PUBLISHED),
}


def fill(config: Any) -> dict[str, Any]:
    """The settings that the preset of `config`, a `Recipe` with ALaST, changes, with their values."""
    preset = PRESETS[config.preset]
    frozen_anyway = ("train_embeddings",) if "lora" in config.method_name else ()
    alast = config.alast.filled({name: value for name, value in preset.alast.items() if name not in frozen_anyway})
    made: dict[str, Any] = {"alast": alast}
    if preset.grad_checkpointing:
        made["grad_checkpointing"] = True
    if preset.time_of_full and config.time_budget is None:
        made["time_budget"] = float(config.num_epochs)
    return made
