"""Top-k: of every sample the largest numbers, with their places; the gradient comes back for those alone.

Rand-top-k: a share of the picks is random, so that small numbers train too. Source of both: Reducing Communication for
Split Learning by Randomized Top-k Sparsification, arXiv:2305.18469, which starts from top-k.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from snello.codecs.base import Arrays, Context, Reduced, Reducer, Shape, announced_shape, in_0_1, number
from snello.codecs.integers import pack_bits, unpack_bits
from snello.errors import ProtocolError, require


class TopK(Reducer):
    """The largest numbers of every sample and their places, sent as a bitmap or as indices, whichever is smaller.

    Args:
        ratio: share of the uncompressed bytes of both ways, in (0, 1], that numbers and places may take together.
    """

    last = True
    source = "https://arxiv.org/abs/2305.18469"
    example = "0.1"

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = in_0_1(ratio, "ratio")

    @override
    def encode(self, z: Tensor, context: Context) -> Reduced:
        flat = z.reshape(len(z), -1)
        layout = _Layout.of(flat.shape[1], self.ratio)
        index = self._choose(flat.detach().abs(), layout.num_kept, context).sort(dim=1).values
        if layout.as_bitmap:
            places = pack_bits(torch.zeros_like(flat, dtype=torch.uint8).scatter_(1, index, 1), 1)
        else:
            places = _as_bytes(index, layout.index_bytes)
        side = {"indices": places, "indices.shape": torch.tensor(z.shape[1:], dtype=torch.int32)}
        return Reduced(flat.gather(1, index), side)  # (B, m)

    @override
    def decode(self, values: Tensor, side: Arrays) -> Tensor:
        num_tokens, width = side["indices.shape"].tolist()
        num = num_tokens * width
        if _Layout.of(num, self.ratio).as_bitmap:
            index = unpack_bits(side["indices"], 1, num).nonzero()[:, 1].view(values.shape)
        else:
            index = _from_bytes(side["indices"])
            if bool((index >= num).any()):  # on a GPU it would be the end of the process
                raise ProtocolError("a place of a number is outside its sample")
        flat = torch.zeros(len(values), num, dtype=values.dtype, device=values.device)
        return flat.scatter(1, index, values).view(-1, num_tokens, width)

    @override
    def decoded_shape(self, shape: Shape, side: Arrays) -> Shape:
        num_tokens, width = announced_shape(side, 2)
        layout = _Layout.of(num_tokens * width, self.ratio)
        bitmap, places = math.ceil(num_tokens * width / 8), (layout.num_kept, layout.index_bytes)
        due = (len(side["indices"]), *((bitmap,) if layout.as_bitmap else places))
        if shape != (due[0], layout.num_kept) or side["indices"].shape != due:
            raise ProtocolError(f"{shape} numbers in places of shape {tuple(side['indices'].shape)} make no sample")
        return shape[0], num_tokens, width

    def _choose(self, sizes: Tensor, num_kept: int, context: Context) -> Tensor:
        """Places (B, m) of the numbers to send, given their sizes (B, N * D)."""
        return sizes.topk(num_kept, dim=1, sorted=False).indices


class RandTopK(TopK):
    """Top-k with a share of its picks replaced by random others.

    Args:
        ratio: share of the uncompressed bytes of both ways, in (0, 1].
        share: of the picks that are random, in [0, 1].
    """

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


class _Layout(NamedTuple):
    num_kept: int
    as_bitmap: bool
    index_bytes: int

    @classmethod
    def of(cls, num: int, ratio: float) -> "_Layout":
        """How many of `num` numbers fit: each takes 4 bytes up, 4 down, and its share of what says where it stood."""
        index_bytes = max(1, math.ceil(math.log2(max(2, num)) / 8))
        budget = 8 * num * ratio
        by_index = budget / (8 + index_bytes)
        by_bitmap = (budget - num / 8) / 8
        return cls(max(1, min(num, int(max(by_index, by_bitmap)))), by_bitmap > by_index, index_bytes)


def _as_bytes(index: Tensor, num_bytes: int) -> Tensor:
    """Places (B, m) as (B, m, num_bytes) uint8, the lowest byte first."""
    return torch.stack([(index >> 8 * byte & 0xFF).to(torch.uint8) for byte in range(num_bytes)], dim=2)


def _from_bytes(packed: Tensor) -> Tensor:
    parts = [packed[..., byte].long() << 8 * byte for byte in range(packed.shape[2])]
    return torch.stack(parts).sum(dim=0)
