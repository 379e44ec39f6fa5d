"""Settings of the methods: ALaST and LoRA."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from snello.config.registry import RuleName
from snello.config.values import require_choices
from snello.errors import ConfigError, require

DropAt = Literal["start", "mid", "block-end"]


@dataclass(frozen=True)
class AlastConfig:
    """ALaST: an adaptive compute budget for every block (arXiv:2408.08670)."""

    # The one home of ALaST's options: `snello.ALaST` and the callbacks take them by these names.
    blocks: int | None = None
    """Blocks trained at each step; default: three quarters of the depth (9 of 12)."""
    start_budget: float = 0.9
    """Budget of every block at the start, in (0, 1]: the share of patch tokens that a block passes on."""
    min_budget: float = 0.5
    """Lowest budget a block can fall to, in (0, start_budget]."""
    alpha: float | None = None
    """Step size of the budgets, >= 0; default: the base learning rate (--lr)."""
    draw: Literal["proportional", "softmax", "lowest-first"] = "proportional"
    """Which blocks train: drawn in proportion to the budgets, by softmax of the budgets, or always all but the lowest
    (`lowest-first`, the cheapest: the backward pass ends early)."""
    temperature: float = 1.0
    """Temperature of the softmax draw, > 0; small values favour high budgets."""
    drop_at: DropAt = "mid"
    """Where tokens are dropped or merged: between attention and MLP (`mid`), after the block (`block-end`, as
    published), or, by a rule that does not look at attention, before the block (`start`)."""
    rule: RuleName = "drop"
    """What becomes of the tokens that a block does not pass on: discarded, those with the least attention (`drop`, as
    published), or averaged with the token that is most like them (`merge`)."""
    merge_blocks: tuple[int, ...] = ()
    """The blocks, from 0 on, that drop or merge tokens, as `0 1`; the others pass on all; default: every block."""
    train_embeddings: bool = True
    """Train the patch, position and prefix embeddings too."""
    flops: float | None = None
    """FLOPs of a step that drops tokens, as a share of full fine-tuning's, in (0, 1]; scales all budgets alike."""
    full_tail: float = 0.0
    """Last share of the training steps that drops no tokens, in [0, 1]."""
    token_multiple: int = 1
    """Round the number of kept patch tokens up to a multiple of this: fewer shapes for torch.compile, and in bf16 on a
    CPU fewer kernels to compile and keep (less memory and time with 8)."""
    optimizer_state: Literal["keep", "release"] = "keep"
    """Optimizer state (AdamW's moments) of a frozen block: kept (exact), or released to save memory."""

    def __post_init__(self) -> None:
        require_choices(self, section="alast")
        self._require(self.blocks is None or self.blocks >= 1, "blocks", "at least 1")
        self._require(0 < self.start_budget <= 1, "start_budget", "in (0, 1]")
        most = f"in (0, {self.start_budget}] (start_budget)"
        self._require(0 < self.min_budget <= self.start_budget, "min_budget", most)
        self._require(self.alpha is None or self.alpha >= 0, "alpha", "0 or more")
        self._require(self.temperature > 0, "temperature", "above 0")
        self._require(self.flops is None or 0 < self.flops <= 1, "flops", "in (0, 1]")
        self._require(0 <= self.full_tail <= 1, "full_tail", "in [0, 1]")
        self._require(self.token_multiple >= 1, "token_multiple", "at least 1")

    def _require(self, ok: bool, name: str, rule: str) -> None:
        require(ok, name, rule, getattr(self, name), section="alast")

    def with_options(self, options: Mapping[str, Any]) -> "AlastConfig":
        """These settings, but for some of them.

        Raises:
            ConfigError: for an option that ALaST does not have, or a value out of range.
        """
        known = [f.name for f in fields(self)]
        unknown = sorted(options.keys() - set(known))
        if unknown:
            raise ConfigError(f"ALaST has no option {', '.join(unknown)}; it has: {', '.join(known)}")
        return replace(self, **options)


@dataclass(frozen=True)
class LoraConfig:
    """LoRA: low-rank adapters beside frozen weights (arXiv:2106.09685), through peft: pip install 'snello[lora]'."""

    r: int = 8
    """Rank of the adapters."""
    alpha: float = 16.0
    """Scale of the adapters' output, divided by the rank."""
    dropout: float = 0.0
    """Dropout on the adapters' input, in [0, 1)."""
    target_modules: tuple[str, ...] = ("attention",)
    """Which linear layers of the blocks get adapters: `attention`, `mlp`, `all`, or names as `attn.qkv` or `q_proj`."""
    start: Path | None = None
    """Start from the adapters in this folder, as a run leaves them in adapter/."""

    def __post_init__(self) -> None:
        require(self.r >= 1, "--lora.r", "at least 1", self.r)
        require(0 < self.alpha < math.inf, "--lora.alpha", "above 0 and finite", self.alpha)
        require(0 <= self.dropout < 1, "--lora.dropout", "in [0, 1)", self.dropout)
        require(len(self.target_modules) > 0, "--lora.target-modules", "at least one name", "none")
