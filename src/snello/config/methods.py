"""Settings of the methods: ALaST and LoRA."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from snello.config.registry import RuleChoice
from snello.config.values import require_choices
from snello.errors import ConfigError, require

DropAt = Literal["start", "queries", "mid", "block-end"]


@dataclass(frozen=True)
class AlastConfig:
    """ALaST: an adaptive compute budget for every block (arXiv:2408.08670)."""

    # The one home of ALaST's options: `snello.ALaST` and the callbacks take them by these names.
    blocks: float | None = None
    """Blocks trained at each step, or below 1 their share of the depth; default: all."""
    start_budget: float | None = None
    """Budget of a block at the start, in (0, 1]: the share of patch tokens that it passes on; default: 0.5 where few
    blocks merge, 0.9 where every block does."""
    min_budget: float | None = None
    """Lowest budget a block can fall to, in (0, start_budget]; default: half of that."""
    adapt: Literal["share", "difference"] | None = None
    """How budgets move: each towards its share of what the blocks do for the CLS token, a running mean, so that a block
    that does less gives up more (`share`, the default); or by the difference to the step before, as published."""
    alpha: float | None = None
    """Step size of the budgets, >= 0; default: 0.05 of the way (share), or the base learning rate (difference)."""
    draw: Literal["proportional", "softmax", "lowest-first"] | None = None
    """Which blocks train: drawn in proportion to the budgets (the default), by softmax of the budgets, or always all
    but the lowest (`lowest-first`, the cheapest: the backward pass ends early)."""
    temperature: float = 1.0
    """Temperature of the softmax draw, > 0; small values favour high budgets."""
    drop_at: DropAt | None = None
    """Where tokens are dropped or merged: between attention and MLP (`mid`, the default) or after the block
    (`block-end`, as published); or, by a rule that does not look at attention, before the block (`start`), or before it
    but for its keys and values, so that those that are left attend to all (`queries`)."""
    rule: RuleChoice = "auto"
    """What becomes of the tokens that a block does not pass on: discarded, those with the least attention (`drop`, as
    published); averaged with the token that is most like them, the pairs most alike first (`merge`); or with the most
    alike of those that stay, which are evenly spaced, any number at once (`merge-even`). `auto` is merge-even, or drop
    where the classifier averages patch tokens or a cut comes after the last block."""
    merge_blocks: tuple[int, ...] | None = None
    """The blocks, from 0 on, that drop or merge tokens, as `0 1`; the others pass on all. Default: the first two with
    merge-even, else every block."""
    train_embeddings: bool = True
    """Train the patch, position and prefix embeddings too."""
    flops: float | None = None
    """FLOPs of a step that drops tokens, as a share of full fine-tuning's, in (0, 1]; scales all budgets alike."""
    time: float | None = None
    """The same as a share of full fine-tuning's time here, in (0, 1], from a short measurement at the start."""
    full_tail: float = 0.0
    """Last share of the training steps that drops no tokens, in [0, 1]."""
    token_multiple: int | None = None
    """Round the tokens that a block passes on, prefix tokens too, to the nearest multiple of this: fewer shapes for
    torch.compile, fewer kernels to compile and keep, and sizes that suit them; default: 16, less for few tokens."""
    optimizer_state: Literal["keep", "release"] = "keep"
    """Optimizer state (AdamW's moments) of a frozen block: kept (exact), or released to save memory."""

    def __post_init__(self) -> None:
        require_choices(self, section="alast")
        blocks, start, least = self.blocks, self.start_budget, self.min_budget
        if blocks is not None:
            fits = 0 < blocks < 1 or (1 <= blocks < math.inf and blocks == int(blocks))
            self._require(fits, "blocks", "a number of blocks, or a share in (0, 1)")
            object.__setattr__(self, "blocks", int(blocks) if blocks >= 1 else blocks)
        self._require(start is None or 0 < start <= 1, "start_budget", "in (0, 1]")
        most = "in (0, 1]" if start is None else f"in (0, {start}] (start_budget)"
        self._require(least is None or 0 < least <= (start or 1), "min_budget", most)
        self._require(self.alpha is None or self.alpha >= 0, "alpha", "0 or more")
        self._require(self.temperature > 0, "temperature", "above 0")
        self._require(self.flops is None or 0 < self.flops <= 1, "flops", "in (0, 1]")
        self._require(0 <= self.full_tail <= 1, "full_tail", "in [0, 1]")
        self._require(self.time is None or 0 < self.time <= 1, "time", "in (0, 1]")
        if self.time is not None and self.flops is not None:
            raise ConfigError("--alast.time and --alast.flops are two targets for one thing: give one of them")
        self._require(self.token_multiple is None or self.token_multiple >= 1, "token_multiple", "at least 1")
        if self.merge_blocks is not None:
            fits, text = min(self.merge_blocks, default=-1) >= 0, " ".join(map(str, self.merge_blocks))
            require(fits, "merge_blocks", "block numbers from 0 on", text or "none", section="alast")

    def _require(self, ok: bool, name: str, rule: str) -> None:
        require(ok, name, rule, getattr(self, name), section="alast")

    def published(self) -> "AlastConfig":
        """These settings, with those of the paper and its released code for all that are left to their default."""
        return self.filled(PUBLISHED)

    def filled(self, values: Mapping[str, Any]) -> "AlastConfig":
        """These settings, with those of `values` that are left to their default here."""
        usual = {field.name: field.default for field in fields(self)}
        left = {name: value for name, value in values.items() if getattr(self, name) == usual[name]}
        if self.start_budget is not None and "min_budget" in left:
            left["min_budget"] = min(left["min_budget"], self.start_budget)
        return replace(self, **left)

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


PUBLISHED: dict[str, Any] = {
    "blocks": 0.75,
    "start_budget": 0.9,
    "min_budget": 0.5,
    "adapt": "difference",
    "draw": "softmax",
    "drop_at": "block-end",
    "rule": "drop",
    "token_multiple": 1,
}
"""ALaST as in arXiv:2408.08670 and its released code."""
EARLIER = PUBLISHED | {"draw": "proportional", "drop_at": "mid"}
"""What was left open in runs of before there was `adapt`."""


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
