"""A block under observation: it scores, drops and records tokens around its own submodules.

A block is observed through an adapter, one small class per library, that replaces the block's `forward` while it is
attached and calls the block's own submodules. Switched off, or in eval mode, it calls the block's own forward.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from snello.errors import ModelError
from snello.vit import tokens

AttentionPath = Literal["fused", "explicit"]
DropAt = Literal["mid", "block-end"]
TokenRule = Literal["drop", "merge"]
Score = Literal["auto", "cls", "received"]


class BlockObserver(Protocol):
    """What decides over the tokens of a block and is told what the block did. Asked in training mode only."""

    drop_at: DropAt
    rule: TokenRule
    """`drop` discards the tokens that are not passed on, `merge` averages them into those that are most alike."""

    def num_keep(self, index: int, num_patches: int) -> int:
        """How many of its patch tokens block `index` passes on, in 1..num_patches."""

    def record(self, index: int, change: Tensor, num_samples: int) -> None:
        """Told once per forward of block `index`: the mean squared change of its CLS token, () float32."""


class BlockAdapter(ABC):
    """A pre-norm block: attention and its residual, then MLP and its residual.

    Args:
        block: the library's.
        index: in the model.
        num_prefix_tokens: of the model.
        has_cls: whether the model has a CLS token.
    """

    def __init__(self, block: Any, index: int, num_prefix_tokens: int, has_cls: bool) -> None:
        self.block = block
        self.index = index
        self.num_prefix_tokens = num_prefix_tokens
        self.has_cls = has_cls
        self.observer: BlockObserver | None = None
        self.kept: Tensor | None = None
        """Indices (B, K) of the tokens that the last forward kept; None where it dropped none."""
        self.previous: BlockAdapter | None = None
        """The block below."""
        self.sizes: Tensor | None = None
        """Patches that each token of the last forward's output stands for, (B, K) float32; None: one each."""
        self._capturing = False
        self._watched = False

    # What a library's blocks differ in.

    path: AttentionPath
    """How the block computes attention."""

    @abstractmethod
    def attend(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attention and its residual, (B, N, D); `bias` (B, 1, 1, N) is added to the logits of every key."""

    @abstractmethod
    def feed(self, h: Tensor) -> Tensor:
        """MLP and its residual, (B, K, D)."""

    @abstractmethod
    def masked(self, args: tuple[Any, ...], options: dict[str, Any]) -> bool:
        """Whether what the block's forward was given beside its tokens asks for a mask."""

    @abstractmethod
    def capture(self) -> None:
        """Makes the block keep queries and keys where `wanted` says so, from its next forward on."""

    @abstractmethod
    def release(self) -> None:
        """Ends `capture`; does nothing without it."""

    @abstractmethod
    def intact(self) -> bool:
        """Whether the block's attention is still made of the modules that `capture` found."""

    @abstractmethod
    def queries_and_keys(self, from_cls: bool, keep: bool) -> tuple[Tensor, Tensor, float]:
        """Those of the last forward that was captured, (B, H, 1 or N, D / H) and (B, H, N, D / H), and the scale.

        Args:
            from_cls: only the CLS token's query.
            keep: for another call; else they are dropped: they count as memory.
        """

    # What they share.

    def wanted(self) -> bool:
        """Whether this forward's queries and keys are wanted."""
        return self._capturing or (self._watched and self.block.training and not recomputing())

    def watch(self) -> None:
        """Keeps what the attention row is computed from, in training mode, with or without an observer."""
        self._watched = True
        self.capture()

    def attach(self, observer: BlockObserver) -> None:
        """Replaces the block's forward."""
        self.observer = observer
        self.capture()
        self.block.forward = self.forward

    def detach(self) -> None:
        """Restores the block's forward; does nothing where nothing is attached."""
        if self.observer is None:
            return
        self.observer = self.sizes = None
        del self.block.forward
        if not self._watched:
            self.release()

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """The block on x (B, N, D); returns (B, K, D), where K = N unless the observer drops or merges tokens."""
        block, observer = self.block, self.observer
        original = type(block).forward
        if observer is None or not block.training:
            result: Tensor = original(block, x, *args, **options)
            return result
        if self.masked(args, options):
            raise ModelError("attention masks are not supported while tokens are dropped: detach first")
        self.kept = None
        self.sizes = sizes = None if self.previous is None else self.previous.sizes
        num_patches = x.shape[1] - self.num_prefix_tokens
        num_keep = observer.num_keep(self.index, num_patches)
        if num_keep < num_patches and observer.rule == "drop":
            return self._forward_dropping(observer, x, num_keep)
        if num_keep < num_patches or sizes is not None:
            return self._forward_merging(observer, x, num_keep, sizes)
        y: Tensor = original(block, x)
        self._record(observer, x, y)
        return y

    def _forward_dropping(self, observer: BlockObserver, x: Tensor, num_keep: int) -> Tensor:
        self._capturing = True
        try:
            h = self.attend(x)
        finally:
            self._capturing = False
        index = tokens.keep_top(self._scores(self.has_cls), num_keep, self.num_prefix_tokens)
        self.kept = index
        if observer.drop_at == "mid":
            h = tokens.gather(h, index)
        y = self.feed(h)
        if observer.drop_at == "mid":
            self._record(observer, x, y, index)
            return y
        self._record(observer, x, y)
        return tokens.gather(y, index)

    def _forward_merging(self, observer: BlockObserver, x: Tensor, num_keep: int, sizes: Tensor | None) -> Tensor:
        # A token that stands for n patches counts n times in the softmax.
        z = self.attend(x, None if sizes is None else sizes.log()[:, None, None].to(_matmul_dtype(x)))
        if observer.drop_at == "block-end":
            z = self.feed(z)
        if num_keep < x.shape[1] - self.num_prefix_tokens:
            z, self.sizes = tokens.merge_alike(z, sizes, num_keep, self.num_prefix_tokens)
        if observer.drop_at == "mid":
            z = self.feed(z)
        self._record(observer, x, z)
        return z

    @torch.no_grad()
    def _record(self, observer: BlockObserver, x: Tensor, y: Tensor, index: Tensor | None = None) -> None:
        """Tells the observer how much the block changed the CLS token, or without one the patch tokens on average."""
        if recomputing():
            return
        if self.has_cls:
            before, after = x[:, :1], y[:, :1]
        else:
            before = x if index is None else tokens.gather(x, index)
            before, after = before[:, self.num_prefix_tokens :], y[:, self.num_prefix_tokens :]
        observer.record(self.index, (after.float() - before.float()).square().sum(-1).mean(), len(x))

    def take_attention(self, from_cls: bool) -> Tensor:
        """Attention that each token which the watched block passed on received, (B, K) float32; once per forward."""
        scores = self._scores(from_cls, take=True)
        return scores if self.kept is None else scores.gather(1, self.kept)

    @torch.no_grad()
    def _scores(self, from_cls: bool, take: bool = False) -> Tensor:
        """Attention that each token receives, (B, N) float32: from the CLS token, or the mean over all queries."""
        q, k, scale = self.queries_and_keys(from_cls, keep=self._watched and not take)
        logits = (q * scale) @ k.transpose(-2, -1)
        scores: Tensor = logits.float().softmax(dim=-1).mean(dim=(1, 2))
        return scores


def _matmul_dtype(x: Tensor) -> torch.dtype:
    """What products are computed in: adding a wider type to them would widen what is saved for backward."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass, as gradient checkpointing does to recompute activations."""
    return torch._C._current_graph_task_id() != -1
