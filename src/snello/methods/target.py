"""What a step costs by ALaST's budgets; and budgets scaled so that it costs a given share of full fine-tuning."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from snello.config import AlastConfig
from snello.errors import require
from snello.vit import ViT
from snello.vit.flops import Tokens
from snello.vit.rules import TokenRule


class StepCost(Protocol):
    """What a step costs: `snello.vit.flops.StepFlops`, or `snello.vit.times.StepTime`."""

    def full(self, num_patches: int) -> float:
        """Plain full fine-tuning of a picture with so many patch tokens."""

    def step(
        self, tokens: Sequence[Tokens], num_patches: int, trained: Collection[int], train_embeddings: bool
    ) -> float:
        """A step that begins with `num_patches` patch tokens, has `tokens` in the blocks and trains some of those."""


class BudgetCost:
    """What a picture costs in a step by given budgets.

    Args:
        cost: of a step.
        config: where tokens are dropped, and whether embeddings train.
        vit: a model as ALaST finds it: what requires gradients may train.
        rule: what becomes of the tokens that are not passed on.
        keep: how many patch tokens a block passes on: of its index, its budget and how many it gets.
    """

    def __init__(
        self, cost: StepCost, config: AlastConfig, vit: ViT, rule: TokenRule, keep: Callable[[int, float, int], int]
    ) -> None:
        self._cost = cost
        self.drop_at, self.rule, self._keep, self._vit = config.drop_at or "mid", rule, keep, vit
        self.train_embeddings = config.train_embeddings and any(p.requires_grad for p in vit.embedding_parameters())
        self.num_patches = vit.num_patches  # of the forward before

    def full(self) -> float:
        """What it costs in a step of plain full fine-tuning."""
        return self._cost.full(self.num_patches)

    def cost(self, budgets: Sequence[float], trained: Collection[int]) -> float:
        """What a picture costs in a step by these budgets."""
        tokens = self.tokens(budgets)
        return self._cost.step(tokens, self.num_patches, trained, self.train_embeddings)

    def tokens(self, budgets: Sequence[float]) -> list[Tokens]:
        """The tokens in every block by these budgets."""
        prefix, patches, tokens = self._vit.num_prefix_tokens, self.num_patches, list[Tokens]()
        queries, read = self._vit.last_rows
        for index, budget in enumerate(budgets):
            if read is not None and index == len(budgets) - 1:
                tokens.append(Tokens(prefix + patches, read, scored=False, queries=queries))
                break
            keep = self._keep(index, budget, patches)
            scored, reducing = False, (0.0, 0.0)
            if keep < patches:
                scored, reducing = self.rule.needs_scores, self.rule.cost(patches, keep, prefix, self._vit.embed_dim)
            attended = keep if self.drop_at == "start" else patches
            early = scored and self._vit.adapters[index].drops_early(self.drop_at, self.rule)
            in_mlp = patches if self.drop_at == "block-end" and not early else keep
            asking = prefix + keep if self.drop_at == "queries" and keep < patches else None
            tokens.append(Tokens(prefix + attended, prefix + in_mlp, scored, reducing, asking))
            patches = keep
        return tokens


class CostTarget(BudgetCost):
    """One factor on all budgets, found by bisection; what a step misses, since tokens are whole, the next makes up for.

    Args:
        option: what the share is called among ALaST's options.
        share: of what full fine-tuning costs.
        num_blocks: blocks that train at each step.
        cost, config, vit, rule, keep: as of `BudgetCost`.

    Raises:
        ConfigError: where a step with some of the draws cannot cost that share.
    """

    def __init__(
        self,
        option: str,
        share: float,
        cost: StepCost,
        config: AlastConfig,
        vit: ViT,
        rule: TokenRule,
        num_blocks: int,
        keep: Callable[[int, float, int], int],
    ) -> None:
        super().__init__(cost, config, vit, rule, keep)
        self.option, self.share = option, share
        self.scaled: list[float] | None = None
        """The budgets of the step under way, or of the last that dropped tokens; None before the first."""
        self._owed = 0.0  # of a picture's cost, by which the steps so far stayed below the target
        self._require_reachable(num_blocks, vit.depth)

    def scale(self, budgets: Sequence[float], trained: Collection[int]) -> None:
        """Chooses `scaled` for a step that trains the blocks `trained`."""
        target = self.share * self.full() + self._owed
        low, high = 0.0, 1 / min(budgets)
        for _ in range(20):
            factor = (low + high) / 2
            if self.cost(_times(budgets, factor), trained) <= target:
                low = factor
            else:
                high = factor
        candidates = [_times(budgets, factor) for factor in (low, high)]
        costs = [self.cost(candidate, trained) for candidate in candidates]
        cost, self.scaled = min(zip(costs, candidates, strict=True), key=lambda pair: abs(pair[0] - target))
        self._owed = target - cost

    def _require_reachable(self, num_blocks: int, depth: int) -> None:
        full = self.full()
        least = self.cost([0.0] * depth, range(num_blocks)) / full  # with the dearest draw
        most = self.cost([1.0] * depth, range(depth - num_blocks, depth)) / full  # with the cheapest
        low, high = math.ceil(100 * least - 1e-9) / 100, min(1.0, math.floor(100 * most + 1e-9) / 100)
        reach = f"in {low}..{high} for this model with {num_blocks} of {depth} blocks trained"
        require(low <= self.share <= high, self.option, reach, self.share, section="alast")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"scaled": self.scaled, "owed": self._owed, "num_patches": self.num_patches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a `state_dict()`."""
        self.scaled, self._owed, self.num_patches = state["scaled"], state["owed"], state["num_patches"]


def _times(budgets: Sequence[float], factor: float) -> list[float]:
    return [min(1.0, factor * budget) for budget in budgets]
