"""Rand-top-k: top-k where a share of the picks is random, so that small numbers train too.

Source: Reducing Communication for Split Learning by Randomized Top-k Sparsification, arXiv:2305.18469.
"""

import torch
from torch import Tensor
from typing_extensions import override

from snello.codecs.base import Context, number
from snello.codecs.topk import TopK
from snello.errors import require


class RandTopK(TopK):
    """Top-k with a share of its picks replaced by random others.

    Args:
        ratio: share of the uncompressed bytes of both ways, in (0, 1].
        share: of the picks that are random, in [0, 1].
    """

    source = "https://arxiv.org/abs/2305.18469"

    def __init__(self, ratio: float, share: float = 0.1) -> None:
        super().__init__(ratio)
        self.share = number(share, "share")
        require(0 <= self.share <= 1, "share", "in [0, 1]", share)

    @override
    def _choose(self, sizes: Tensor, num_kept: int, context: Context) -> Tensor:
        top = super()._choose(sizes, num_kept, context)
        num_random = min(round(self.share * num_kept), sizes.shape[1] - num_kept)
        if num_random == 0:
            return top
        generator = context.generator(sizes.device)
        order = torch.rand(top.shape, generator=generator, device=sizes.device).argsort(dim=1)
        kept = top.gather(1, order[:, num_random:])
        keys = torch.rand(sizes.shape, generator=generator, device=sizes.device).scatter_(1, top, -1.0)
        return torch.cat((kept, keys.topk(num_random, dim=1, sorted=False).indices), dim=1)
