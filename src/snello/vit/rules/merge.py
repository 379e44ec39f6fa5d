"""Averages pairs of patch tokens that are alike (idea: Token Merging, arXiv:2210.09461)."""

from torch import Tensor
from typing_extensions import override

from snello.vit import tokens
from snello.vit.context import ForwardContext
from snello.vit.rules import TokenRule


class Merge(TokenRule):
    """Merges the pairs that are most alike; a token that stands for n patches counts n times from then on."""

    needs_scores = False
    has_places = False

    @override
    def reduce(self, x: Tensor, context: ForwardContext, keep: int) -> Tensor:
        y, context.sizes = tokens.merge_alike(x, context.sizes, keep, context.num_prefix_tokens)
        return y

    @override
    def least_keep(self, num_patches: int) -> int:
        return num_patches - num_patches // 2  # in pairs

    @override
    def cost(self, num_patches: int, keep: int, num_prefix_tokens: int, embed_dim: int) -> tuple[float, float]:
        averages = 2.0 * (num_prefix_tokens + keep) * (num_patches - keep) * embed_dim
        likenesses = 2.0 * (num_patches - num_patches // 2) * (num_patches // 2) * embed_dim
        return averages + likenesses, averages
