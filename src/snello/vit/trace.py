"""Which token each patch of a picture is in after each block, in a forward pass as in training.

Any rule makes new tokens by a linear map from tokens to tokens, so its gradient says what went where: a feature of each
new token is asked for what it came from. Nothing of this is in the blocks: for one pass they have an observer that
stands before their own, and asks its rule in its place.

B: pictures, n: patches of one, N: tokens, P: prefix tokens, k: patch tokens that are left, D: embed dim.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from snello.vit.blocks import BlockObserver
from snello.vit.context import ForwardContext
from snello.vit.model import ViT
from snello.vit.rules import TokenRule

DROPPED = -1


@dataclass
class Trace:
    """What the blocks of a ViT did with the patches of a batch."""

    depth: int
    num_patches: int = 0
    """n."""
    steps: dict[int, Tensor] = field(default_factory=dict)
    """By block that reduced tokens, the token (B, n') int64 that each one before it went into, or DROPPED."""
    left: dict[int, int] = field(default_factory=dict)
    """By the same blocks, how many patch tokens were left."""

    @property
    def groups(self) -> list[Tensor]:
        """After each block, the token (B, n) that each patch is part of, in 0..k-1, or DROPPED.

        (1, n) as long as all pictures are as they came.
        """
        now, groups = torch.arange(self.num_patches)[None], list[Tensor]()
        for block in range(self.depth):
            if block in self.steps:
                now = compose(now, self.steps[block])
            groups.append(now)
        return groups

    def changes(self, picture: int) -> list[tuple[int, int, list[int]]]:
        """Of a picture, by block that reduced tokens: the block, the patch tokens left, and each patch's token."""
        groups = self.groups
        return [(block, self.left[block], groups[block][picture].tolist()) for block in sorted(self.left)]


def trace(vit: ViT, x: Tensor, sizes: Tensor | None = None) -> Trace:
    """What becomes of the patches of x in a forward pass in training mode; arguments as of `ViT.tokens`."""
    with tracing(vit) as found:
        z = vit.tokens(x, sizes)
    found.num_patches = found.num_patches or z.shape[1] - vit.num_prefix_tokens
    return found


@contextmanager
def tracing(vit: ViT) -> Iterator[Trace]:
    """Follows the patches of the pass in this block, the last one where there are several.

    Tokens are reduced as in training, but no noise is drawn and every token computed, nothing is recorded, and no
    gradient flows. Afterwards the model is exactly as it was, in whatever mode that is.
    """
    found = Trace(vit.depth)
    modes = [(module, module.training) for module in vit.model.modules()]
    adapters = [(adapter, adapter.observer, adapter.reads) for adapter in vit.adapters]
    passes, under_way = vit._passes, vit._passes.current
    device = next(vit.model.parameters()).device
    try:
        for module, _ in modes:
            module.training = False
        for block in vit.blocks:  # what looks at the mode of a block asks whether tokens are to be reduced
            block.training = True
        for adapter, observer, _ in adapters:
            adapter.observer = None if observer is None else _Follower(observer, found)
            adapter.reads = None
        noise = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with torch.inference_mode(False), torch.no_grad(), noise:  # in inference mode no gradient could be asked for
            yield found
    finally:
        passes.current = under_way
        for adapter, observer, reads in adapters:
            adapter.observer, adapter.reads = observer, reads
        for module, training in modes:
            module.training = training


def compose(groups: Tensor, step: Tensor) -> Tensor:
    """The tokens (B, n) that patches are in which were in `groups` (B or 1, n), when these have gone as `step` says."""
    groups = groups.expand(len(step), -1)
    return step.gather(1, groups.clamp_min(0)).where(groups >= 0, DROPPED)


def origins(x: Tensor, y: Tensor, num_prefix_tokens: int) -> Tensor:
    """The patch token of y that most of each patch token of x has gone into: (B, n) int64 on the CPU, or DROPPED.

    y (R, P + k, D) was made of x (B, P + n, D) by one linear map from tokens to tokens for all features, with its
    graph; a row of y may be made of several of x.
    """
    num_left, width = y.shape[1] - num_prefix_tokens, y.shape[2]
    shares = []
    for first in range(0, num_left, width):  # each of so many tokens by a feature of its own: one backward for all
        index = torch.arange(first, min(first + width, num_left), device=y.device)
        weights = torch.zeros_like(y)
        weights[:, num_prefix_tokens + index, index - first] = 1.0
        (share,) = torch.autograd.grad(y, x, weights, retain_graph=True)
        shares.append(share[:, num_prefix_tokens:, : len(index)])
    most, where = torch.cat(shares, dim=2).abs().max(dim=2)
    return where.where(most > 0, DROPPED).cpu()


def grid_of(num_patches: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the patches of a picture: of all shapes that so many have, the one most like the picture."""
    shapes = [(rows, num_patches // rows) for rows in range(1, num_patches + 1) if num_patches % rows == 0]
    return min(shapes, key=lambda shape: abs(math.log(shape[0] * width / (shape[1] * height))))


class _Follower:
    """An observer that decides as another does, and remembers."""

    def __init__(self, observer: BlockObserver, found: Trace) -> None:
        self._observer, self._found = observer, found
        self.drop_at = observer.drop_at
        self.rule: TokenRule = _Following(observer.rule, found)

    def num_keep(self, index: int, num_patches: int) -> int:
        """As the other says."""
        if index == 0:
            self._found.num_patches = num_patches
            self._found.steps.clear()
            self._found.left.clear()
        return self._observer.num_keep(index, num_patches)

    def record(self, changes: Sequence[Tensor], num_samples: int) -> None:
        """The other does not hear of a pass that trains nothing."""


class _Following(TokenRule):
    """A rule that does as another does, and finds out what that was."""

    def __init__(self, rule: TokenRule, found: Trace) -> None:
        self._rule, self._found = rule, found
        self.needs_scores, self.has_places = rule.needs_scores, rule.has_places

    @override
    def reduce(self, x: Tensor, context: ForwardContext, keep: int) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = self._rule.reduce(x, context, keep)
        self._found.steps[context.block] = origins(x, y, context.num_prefix_tokens)
        self._found.left[context.block] = y.shape[1] - context.num_prefix_tokens
        return y.detach()

    @override
    def least_keep(self, num_patches: int) -> int:
        return self._rule.least_keep(num_patches)
