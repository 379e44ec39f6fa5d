"""Averages every token that does not stay with the most similar of evenly spaced ones: any number at once."""

from torch import Tensor
from typing_extensions import override

from snello.vit import tokens
from snello.vit.context import ForwardContext
from snello.vit.rules import TokenRule


class MergeEven(TokenRule):
    """Keeps evenly spaced patch tokens, each averaged with those most like it; they count by size from then on."""

    needs_scores = False
    has_places = False

    @override
    def reduce(self, x: Tensor, context: ForwardContext, keep: int) -> Tensor:
        y, context.sizes = tokens.merge_into(x, context.sizes, keep, context.num_prefix_tokens)
        return y

    @override
    def cost(self, num_patches: int, keep: int, num_prefix_tokens: int, embed_dim: int) -> tuple[float, float]:
        averages = 2.0 * (num_prefix_tokens + keep) * (num_prefix_tokens + num_patches) * embed_dim
        likenesses = 2.0 * (num_patches - keep) * keep * embed_dim
        return averages + likenesses, averages
