"""A block under observation: it scores, drops or merges and records tokens around its own submodules.

A block is observed through an adapter, one small class per library, that replaces the block's `forward` while it is
attached and calls the block's own submodules. Switched off, or in eval mode, it calls the block's own forward. What a
forward pass knows is in its `ForwardContext`: an adapter holds nothing of it.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from snello.config.methods import DropAt
from snello.errors import ModelError
from snello.vit import savings, tokens
from snello.vit.context import ForwardContext, Passes
from snello.vit.rules import TokenRule
from snello.vit.rules.drop import Drop

AttentionPath = Literal["fused", "explicit"]
Score = Literal["auto", "cls", "received"]


class BlockObserver(Protocol):
    """What decides over the tokens of the blocks and hears what the blocks did. Asked in training mode only."""

    drop_at: DropAt
    rule: TokenRule
    """What becomes of the tokens that are not passed on."""

    def num_keep(self, index: int, num_patches: int) -> int:
        """How many of its patch tokens block `index` passes on, in rule.least_keep(num_patches)..num_patches."""

    def record(self, changes: Sequence[Tensor], num_samples: int) -> None:
        """Called at the end of a whole forward pass with every block's mean squared change of the CLS token.

        Changes are () float32 each, on the model's device.
        """


class Counting:
    """Observes blocks that pass on every token, so that they count sizes in attention and do nothing else."""

    drop_at: DropAt = "mid"
    rule: TokenRule = Drop()

    def num_keep(self, index: int, num_patches: int) -> int:
        """All of them."""
        return num_patches

    def record(self, changes: Sequence[Tensor], num_samples: int) -> None:
        """Nobody asks."""


class BlockAdapter(ABC):
    """A pre-norm block of a library: attention and its residual, then MLP and its residual."""

    path: AttentionPath
    """How the block computes attention."""
    is_last = False
    """Whether a forward pass ends with this block."""
    observer: BlockObserver | None = None
    reads: int | None = None
    """The leading tokens whose values somebody reads after this block, the others need not be computed; None: all."""
    _watched = False
    _mlp: nn.Module | None = None

    def __init__(self, block: Any, index: int, num_prefix_tokens: int, has_cls: bool) -> None:
        self.block, self.index = block, index
        self.num_prefix_tokens, self.has_cls = num_prefix_tokens, has_cls
        self.passes = Passes(num_prefix_tokens)
        """Shared by all blocks of a model."""

    # What a library's blocks differ in.

    @abstractmethod
    def attend(self, x: Tensor, bias: Tensor | None = None, queries: Tensor | None = None, **arguments: Any) -> Tensor:
        """Attention and its residual on x (B, N, D): (B, N, D); or of `queries` (B, K, D) to x, (B, K, D).

        `bias` (B, 1, 1, N) is added to the logits of every key; `arguments` found those of the block's own attention.
        """

    @abstractmethod
    def queries_alone(self) -> bool:
        """Whether the attention of some tokens costs less than that of all, and nobody listens to it."""

    @abstractmethod
    def plain_mlp(self) -> nn.Module | None:
        """The block's MLP, where it is made of `fc1`, exact GELU and `fc2`; None for any other."""

    @abstractmethod
    def feed(self, h: Tensor) -> Tensor:
        """MLP and its residual, (B, K, D)."""

    @abstractmethod
    def arguments(self, *args: Any, **options: Any) -> dict[str, Any] | None:
        """What the block's attention gets of what the block was given beside its tokens; None where that is a mask."""

    @abstractmethod
    def capture(self) -> None:
        """Makes the block put queries and keys into the context where `wanted` says so, from its next forward on."""

    @abstractmethod
    def release(self) -> None:
        """Ends `capture`; does nothing without it."""

    @abstractmethod
    def intact(self) -> bool:
        """Whether the block's attention is still made of the modules that `capture` found."""

    @abstractmethod
    def queries_and_keys(self, captured: Any, from_cls: bool) -> tuple[Tensor, Tensor, float]:
        """Queries (B, H, N, D / H) or the CLS token's (B, H, 1, D / H), keys (B, H, N, D / H) and the scale."""

    # What they share.

    def wanted(self) -> bool:
        """Whether this forward's queries and keys are wanted."""
        scoring = self.passes.current.scoring and self.passes.current.block == self.index
        return scoring or (self._watched and self.block.training and not recomputing())

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
        """Ends `attach`; does nothing where nothing is attached."""
        if self.observer is None:
            return
        self.observer = None
        if not self._watched:
            self.release()
        self._restore()

    def save_exactly(self, reads: int | None, mlp: bool) -> None:
        """Computes no other tokens than the first `reads`, and keeps less of the MLP for the backward pass; or not."""
        owner = self._owner()
        if reads is not None and isinstance(owner, BlockAdapter) and owner is not self and owner.observer is not None:
            raise ModelError("the model's blocks are already attached to something: call its detach() first")
        self.reads = reads
        if reads is not None:
            self.block.forward = self.forward
        self._restore()
        if self._mlp is not None:
            savings.restore(self._mlp)
        self._mlp = self.plain_mlp() if mlp else None
        if self._mlp is not None:
            savings.recompute_gelu(self._mlp)

    def _restore(self) -> None:
        """Gives the block its own forward back where nothing needs ours."""
        if self.observer is None and self.reads is None and self._owner() is self:
            del self.block.forward

    def _owner(self) -> object:
        """Whose forward the block has; None for its own."""
        return getattr(vars(self.block).get("forward"), "__self__", None)

    @property
    def replaced(self) -> bool:
        """Whether the forward of the block is ours now."""
        return self.block.training and (self.observer is not None or self.reads is not None)

    def computes(self) -> tuple[int | None, int | None]:
        """The leading tokens that attention and MLP work on in training mode; None: on all of them."""
        # Noise is drawn for as many tokens as there are, so with fewer of them it would be other noise.
        if self.reads is None or self._watched or savings.listened(self.block) or _draws_noise(self.block):
            return None, None
        return self.reads if self.queries_alone() else None, self.reads

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """The block on x (B, N, D); returns (B, K, D), where K = N unless tokens are dropped, merged or not read."""
        observer, passes = self.observer, self.passes
        if not self.replaced:
            y: Tensor = type(self.block).forward(self.block, x, *args, **options)
            return y
        if observer is None:
            return self._alone(x, args, options)
        if not recomputing():
            if self.index == 0:
                passes.begin()
            passes.current.block = self.index
            passes.current.num_keep = observer.num_keep(self.index, x.shape[1] - self.num_prefix_tokens)
            passes.remember(x)
            return self._observed(observer, passes.current, x, args, options)
        before, passes.current = passes.current, passes.recall(x) or self._unknown(observer, x)
        try:
            return self._observed(observer, passes.current, x, args, options)
        finally:
            passes.current = before

    def _unknown(self, observer: BlockObserver, x: Tensor) -> ForwardContext:
        """The context of a pass that is computed again, but of which nothing is known."""
        if not observer.rule.has_places or self.passes.current.sizes is not None:
            text = "gradient checkpointing gave a block other tensors than before (offloaded?), which merging does not"
            raise ModelError(f"{text} support: use rule=drop")
        num_keep = observer.num_keep(self.index, x.shape[1] - self.num_prefix_tokens)
        return ForwardContext(self.num_prefix_tokens, self.index, num_keep)

    def _observed(
        self, observer: BlockObserver, context: ForwardContext, x: Tensor, args: tuple[Any, ...], options: Any
    ) -> Tensor:
        arguments = self.arguments(*args, **options)
        if arguments is None:
            raise ModelError("attention masks are not supported while tokens are dropped: detach first")
        context.arguments = arguments
        reducing = context.num_keep < x.shape[1] - self.num_prefix_tokens
        z: Tensor
        if self.computes()[1] is not None:
            z = self._read(x, context)
        elif reducing:
            return self._reducing(observer, context, x)
        elif context.sizes is not None:
            z = self.feed(self._attend(context, x, scoring=False))
        else:
            z = inspect.unwrap(type(self.block).forward)(self.block, x, *args, **options)
        self._record(observer, context, x, z)
        return z

    def _reducing(self, observer: BlockObserver, context: ForwardContext, x: Tensor) -> Tensor:
        """The block on x (B, N, D) where it passes on fewer tokens, (B, K, D)."""
        rule, drop_at, keep = observer.rule, observer.drop_at, context.num_keep
        if drop_at == "start":
            z = self._attend(context, rule.reduce(x, context, keep), scoring=False)
        elif drop_at == "queries":
            bias, queries = _bias(context.sizes, x), rule.reduce(x, context, keep)
            z = self.attend(x, bias, queries, **context.arguments)
        else:
            z = self._attend(context, x, scoring=rule.needs_scores)
        early = drop_at == "mid" or self.drops_early(drop_at, rule)
        z = self.feed(rule.reduce(z, context, keep) if early else z)
        self._record(observer, context, x, z)
        return rule.reduce(z, context, keep) if drop_at == "block-end" and not early else z

    def drops_early(self, drop_at: DropAt, rule: TokenRule) -> bool:
        """Whether tokens that are dropped after the block can go before its MLP, which works on each token apart.

        They are chosen by attention, so they are the same, and what the MLP would make of them nobody reads.
        """
        unread = drop_at == "block-end" and rule.needs_scores and rule.has_places and self.has_cls
        if not unread or self._mlp is None:
            return False
        return not savings.listened(self._mlp) and not _draws_noise(self.block)

    def _attend(self, context: ForwardContext, x: Tensor, scoring: bool) -> Tensor:
        context.scoring = scoring
        h = self.attend(x, _bias(context.sizes, x), **context.arguments)
        context.scoring = False
        if scoring:
            context.scores = self._scores(context, self.has_cls, keep=self._watched, sizes=context.sizes)
        return h

    def _alone(self, x: Tensor, args: tuple[Any, ...], options: Any) -> Tensor:
        """The block that nobody observes, on the tokens that are read."""
        arguments = self.arguments(*args, **options)
        if arguments is None or self.computes()[1] is None:
            y: Tensor = inspect.unwrap(type(self.block).forward)(self.block, x, *args, **options)
            return y
        return self._read(x, ForwardContext(self.num_prefix_tokens, self.index, arguments=arguments))

    def _read(self, x: Tensor, context: ForwardContext) -> Tensor:
        """The tokens that are read, (B, R, D), after the block."""
        rows, read = self.computes()
        queries = None if rows is None else x[:, :rows]
        return self.feed(self.attend(x, _bias(context.sizes, x), queries, **context.arguments)[:, :read])

    @torch.no_grad()
    def _record(self, observer: BlockObserver, context: ForwardContext, x: Tensor, y: Tensor) -> None:
        """Notes how much the block changed the CLS token, or without one the patch tokens on average."""
        if recomputing():
            return
        if self.has_cls:
            before, after = x[:, :1], y[:, :1]
        else:
            index = context.kept.get(self.index)
            before = x if index is None else tokens.gather(x, index)
            before, after = before[:, self.num_prefix_tokens :], y[:, self.num_prefix_tokens :]
        context.changes[self.index] = (after.float() - before.float()).square().sum(-1).mean()
        if self.is_last and len(context.changes) == self.index + 1:  # not where it was called alone
            observer.record(list(context.changes.values()), len(x))

    def take_attention(self, from_cls: bool) -> Tensor:
        """Attention that each token which the watched block passed on received, (B, K) float32; once per forward."""
        context = self.passes.current
        scores, kept = self._scores(context, from_cls, keep=False), context.kept.get(self.index)
        return scores if kept is None else scores.gather(1, kept)

    @torch.no_grad()
    def _scores(self, context: ForwardContext, from_cls: bool, keep: bool, sizes: Tensor | None = None) -> Tensor:
        """Attention that each token receives, (B, N) float32: from the CLS token, or the mean over all queries.

        What was captured, which counts as memory, is kept for another call where `keep` says so. `sizes` (B, N)
        float32 count as they did in the block.
        """
        captured = context.attention[self.index] if keep else context.attention.pop(self.index)
        q, k, scale = self.queries_and_keys(captured, from_cls)
        logits = ((q * scale) @ k.transpose(-2, -1)).float()
        if sizes is not None:
            logits += sizes.log()[:, None, None]
        return logits.softmax(dim=-1).mean(dim=(1, 2))


def _bias(sizes: Tensor | None, x: Tensor) -> Tensor | None:
    """What makes a token that stands for n patches count n times in the softmax: (B, 1, 1, N), on the logits."""
    return None if sizes is None else sizes.log()[:, None, None].to(_matmul_dtype(x))


def _draws_noise(block: nn.Module) -> bool:
    """Whether dropout is on in a block; drop path draws per picture, not per token."""
    parts = list(block.modules())
    return any(isinstance(part, nn.Dropout) and part.p > 0 for part in parts) or any(
        getattr(part, "attention_dropout", 0) > 0 for part in parts
    )


def _matmul_dtype(x: Tensor) -> torch.dtype:
    """What products are computed in: adding a wider type to them would widen what is saved for backward."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass, as gradient checkpointing does to recompute activations."""
    return torch._C._current_graph_task_id() != -1
