"""What becomes of the tokens that a block does not pass on.

drop.py   discarded, those with the least attention
merge.py  averaged with those that are most alike
merge_even.py  averaged with evenly spaced ones, in one product

A new rule is a subclass of `TokenRule` in a file here, and a line in `snello.config.registry.RULES`.
"""

from abc import ABC, abstractmethod

from torch import Tensor

from snello.config.registry import RULES, find
from snello.vit.context import ForwardContext


class TokenRule(ABC):
    """Makes fewer patch tokens of many. It has no state: what it has to know and to tell is in the context."""

    needs_scores: bool
    """Whether it looks at `ForwardContext.scores`: computing them costs one more product of queries and keys."""
    has_places: bool
    """Whether each token that is left stands where it stood (`ForwardContext.keep` was told): only then can tokens
    cross a cut, which names them by their place, and be averaged by a classifier, in which each counts once."""

    @abstractmethod
    def reduce(self, x: Tensor, context: ForwardContext, keep: int) -> Tensor:
        """The tokens (B, P + keep, D) that are left of x (B, P + n, D); the P prefix tokens stay as they are."""

    def least_keep(self, num_patches: int) -> int:
        """The fewest patch tokens that can be left of so many."""
        return 1

    def cost(self, num_patches: int, keep: int, num_prefix_tokens: int, embed_dim: int) -> tuple[float, float]:
        """FLOPs of one picture, forward and backward, without those of the scores."""
        return 0.0, 0.0


def make_rule(name: str) -> TokenRule:
    """The rule of that name in `RULES`."""
    rule: TokenRule = find(RULES[name])()
    return rule
