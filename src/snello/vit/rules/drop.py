"""Discards the patch tokens that receive the least attention, as ALaST was published."""

from torch import Tensor
from typing_extensions import override

from snello.vit import tokens
from snello.vit.context import ForwardContext
from snello.vit.rules import TokenRule


class Drop(TokenRule):
    """Keeps the tokens with the most attention from the CLS token, or without one from all tokens on average."""

    needs_scores = True
    has_places = True

    @override
    def reduce(self, x: Tensor, context: ForwardContext, keep: int) -> Tensor:
        assert context.scores is not None
        return context.keep(x, tokens.keep_top(context.scores, keep, context.num_prefix_tokens))
