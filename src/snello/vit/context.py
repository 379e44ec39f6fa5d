"""What a forward pass in training mode knows of its tokens, from its first block to its last.

The blocks of a model share one `Passes`. Block 0 begins a context, so nothing is left of a pass that broke off; the
blocks above go on with it. Gradient checkpointing calls a block again, inside the backward pass: the block then finds
the context as it was when it was given those very tokens, however many passes came after.
"""

import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from snello.vit import tokens


@dataclass
class ForwardContext:
    """One forward pass."""

    num_prefix_tokens: int
    block: int = 0
    """The index of the block under way."""
    num_keep: int = 0
    """How many of its patch tokens the block under way passes on."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """What the caller gave the block under way beside its tokens, for the block's own attention."""
    scores: Tensor | None = None
    """Attention that each token received in the block under way, (B, N) float32, where its rule needs scores."""
    scoring: bool = False
    """Whether the block under way computes its attention to get scores."""
    kept: dict[int, Tensor] = field(default_factory=dict)
    """By block, the indices (B, K) int64 of the tokens that it passed on, where it dropped some."""
    sizes: Tensor | None = None
    """Patches that each token that is left stands for, (B, K) float32; None: one each."""
    attention: dict[int, Any] = field(default_factory=dict)
    """By block, what its attention's queries and keys are found from, where somebody wants them."""
    changes: dict[int, Tensor] = field(default_factory=dict)
    """By block, the mean squared change that it made to the CLS token, () float32."""

    @property
    def positions(self) -> Tensor | None:
        """Where the tokens that are left stood at first, (B, K) int64; None where none was dropped."""
        positions = None
        for kept in self.kept.values():
            positions = kept if positions is None else positions.gather(1, kept)
        return positions

    def keep(self, x: Tensor, index: Tensor) -> Tensor:
        """The tokens of x (B, N, D) at index (B, K), as (B, K, D); the block under way passes on no others."""
        self.kept = {**self.kept, self.block: index}
        self.sizes = None if self.sizes is None else self.sizes.gather(1, index)
        return tokens.gather(x, index)


class Passes:
    """The forward passes through a model's blocks: the one under way, and those that may be computed again."""

    sizes: Tensor | None = None
    """What the tokens of a pass that begins stand for, as `ForwardContext.sizes`."""

    def __init__(self, num_prefix_tokens: int) -> None:
        self._num_prefix_tokens = num_prefix_tokens
        # By the storage of what a block was given: checkpointing keeps it, though not the tensor, for the second time.
        self._found: weakref.WeakKeyDictionary[torch.UntypedStorage, ForwardContext] = weakref.WeakKeyDictionary()
        self.begin()

    def begin(self) -> None:
        """Begins a forward pass."""
        self.current = ForwardContext(self._num_prefix_tokens, sizes=self.sizes)

    def remember(self, x: Tensor) -> None:
        """Keeps the context as the block under way found it, as long as x, what the block was given, is kept."""
        if not torch.compiler.is_compiling():  # then nothing is computed again in Python
            now = self.current
            self._found[x.untyped_storage()] = ForwardContext(
                now.num_prefix_tokens, now.block, now.num_keep, kept=now.kept, sizes=now.sizes
            )

    def recall(self, x: Tensor) -> ForwardContext | None:
        """The context as a block found it when it was given x; None where x was moved since."""
        found = self._found.get(x.untyped_storage())
        return None if found is None else replace(found)  # a copy: a graph that is retained is computed once more
