"""What ALaST's options leave open, decided for a model; and where budgets go by their share of what blocks do."""

import math
from collections.abc import Sequence
from dataclasses import replace

from snello.config import AlastConfig
from snello.vit import ViT

MOMENTUM = 0.1
"""Weight of a step in the running mean of what a block does."""
SHARE_ALPHA, SHARE_POWER = 0.05, 0.5
"""How fast budgets follow their share, and the power of that: blocks differ by orders of magnitude."""


def decided(config: AlastConfig, vit: ViT) -> AlastConfig:
    """The options with all that they leave open decided for a model or a part of one."""
    rule, merge_blocks, start, depth = config.rule, config.merge_blocks, config.start_budget, vit.depth
    if rule == "auto":
        rule = "drop" if vit.family.reads is None else "merge-even"
    few = rule == "merge-even" if merge_blocks is None else len(set(merge_blocks)) < depth
    if merge_blocks is None:
        merge_blocks = tuple(range(min(2, depth) if few else depth))
    if start is None:
        start = 0.5 if few else 0.9
    return replace(
        config,
        rule=rule,
        adapt=config.adapt or "share",
        draw=config.draw or "proportional",
        drop_at=config.drop_at or "mid",
        merge_blocks=merge_blocks,
        start_budget=start,
        min_budget=config.min_budget or start / 2,
        token_multiple=config.token_multiple or _usual_multiple(vit.num_prefix_tokens + vit.num_patches),
    )


def num_blocks(blocks: float | None, depth: int) -> int:
    """How many of the blocks train at each step."""
    if blocks is None:
        return depth
    return int(blocks) if blocks >= 1 else max(1, round(blocks * depth))


def _usual_multiple(num_tokens: int) -> int:
    """A power of two, at most 16, that leaves a model of so many tokens a choice of at least four sizes."""
    return int(2 ** min(4, max(0, math.floor(math.log2(num_tokens / 4)))))


def running_mean(before: Sequence[float], now: Sequence[float]) -> list[float]:
    """Of what each block does, with a step more."""
    return [old + MOMENTUM * (new - old) for new, old in zip(now, before, strict=True)]


def towards_shares(budgets: Sequence[float], deltas: Sequence[float], config: AlastConfig) -> list[float]:
    """How far each budget goes in a step towards start_budget * sqrt(delta / geometric mean of delta).

    So a block that does less for the CLS token gives up more, and the product of the budgets, what is left at the end,
    stays. Blocks that pass on all do not count. Not of the paper, whose rule is the difference to the step before.

    Args:
        budgets: of every block, in (0, 1].
        deltas: running mean of every block's squared change of the CLS token, >= 0.
        config: decided.
    """
    alpha = SHARE_ALPHA if config.alpha is None else config.alpha
    reducing, start = sorted(set(config.merge_blocks or ())), config.start_budget or 1.0
    logs = [math.log(max(deltas[index], 1e-30)) for index in reducing]
    mean, moves = sum(logs) / len(logs), [0.0] * len(deltas)
    for index, value in zip(reducing, logs, strict=True):
        moves[index] = alpha * (start * math.exp(SHARE_POWER * (value - mean)) - budgets[index])
    return moves
