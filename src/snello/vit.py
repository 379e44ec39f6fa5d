"""The one place that knows timm: its Vision Transformers, their blocks, prefix tokens and attention.

A block is observed through an adapter, one small class per block class, that replaces the block's `forward` while it
is attached and calls the block's own submodules. Switched off, or in eval mode, it calls the block's own forward.

B: samples, N: tokens including prefix tokens, D: embed dim, H: heads, K: kept tokens.
"""

import copy
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from snello import tokens
from snello.errors import ConfigError, ModelError

AttentionPath = Literal["fused", "explicit"]
DropAt = Literal["mid", "block-end"]
Score = Literal["auto", "cls", "received"]

SUPPORTED = (
    "timm VisionTransformer models (ViT, DeiT with and without distillation token, DINOv2, registers) made of "
    "standard blocks and attention, with CLS, average or max pooling"
)
POOLS = ("token", "avg", "avgmax", "max")
PREFIX_PARAMETERS = ("cls_token", "reg_token", "dist_token", "pos_embed")
EMBEDDINGS = (*PREFIX_PARAMETERS, "patch_embed", "norm_pre")
HEADS = ("head", "head_dist")


class BlockObserver(Protocol):
    """What decides over the tokens of a block and is told what the block did. Asked in training mode only."""

    drop_at: DropAt

    def num_keep(self, index: int, num_patches: int) -> int:
        """How many of its patch tokens block `index` passes on, in 1..num_patches."""

    def record(self, index: int, change: Tensor) -> None:
        """Told once per forward of block `index`: the mean squared change of its CLS token, () float32."""


class ViT:
    """A supported Vision Transformer, seen as prefix tokens, patch tokens and blocks.

    Args:
        model: a timm VisionTransformer; used as it is, never copied.

    Raises:
        ModelError: where the model, one of its blocks or its pooling is not supported, naming it.
    """

    def __init__(self, model: nn.Module) -> None:
        # torch.compile(model) wraps the model, model.compile() changes it in place.
        if hasattr(model, "_orig_mod") or any(part._compiled_call_impl is not None for part in model.modules()):
            raise ModelError("the model is already compiled: attach first, then call torch.compile")
        if not isinstance(model, VisionTransformer):
            raise _unsupported(f"model {type(model).__name__}")
        if model.global_pool not in POOLS:
            raise _unsupported(f"pooling {model.global_pool!r}")
        self.model = model
        self.blocks: list[Any] = list(model.blocks)  # timm has no types
        self.num_prefix_tokens: int = model.num_prefix_tokens
        self.has_cls: bool = model.has_class_token
        self.num_patches = int(model.patch_embed.num_patches)
        """Patch tokens of one picture at the model's own size."""
        self.embed_dim: int = model.embed_dim
        self.top_layer = len(self.blocks) + 1
        """The layer of what comes after the blocks; in a part of a model, that of the whole."""
        self._adapters = [_adapter(block, index, self) for index, block in enumerate(self.blocks)]

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    def embedding_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the patch, position and prefix embeddings."""
        return (p for name, p in self.model.named_parameters() if name.split(".")[0] in EMBEDDINGS)

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the classifier, both of them with a distillation token."""
        return (p for name, p in self.model.named_parameters() if name.split(".")[0] in HEADS)

    def layer_of(self, name: str) -> int:
        """The layer of the parameter `name`: 0 for embeddings, i + 1 for block i, `top_layer` for what comes after."""
        top, *rest = name.split(".")
        if top in EMBEDDINGS:
            return 0
        return int(rest[0]) + 1 if top == "blocks" else self.top_layer

    @staticmethod
    def decays(name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies: not to biases, norms, position and prefix tokens."""
        return parameter.ndim > 1 and name.split(".")[0] not in PREFIX_PARAMETERS

    @property
    def attention_paths(self) -> list[AttentionPath]:
        """How each block computes attention: with the fused kernel or explicitly."""
        return ["fused" if block.attn.fused_attn else "explicit" for block in self.blocks]

    def set_attention_paths(self, paths: list[AttentionPath]) -> None:
        """Makes block i compute attention by `paths[i]`; both give the same result up to rounding."""
        for block, path in zip(self.blocks, paths, strict=True):
            block.attn.fused_attn = path == "fused"

    def cut(self, blocks: int, *, head_below: bool = False) -> tuple["ViT", "ViT"]:
        """Two Vision Transformers that together are this one: embeddings and the first blocks, and all the rest.

        They share this model's modules and parameters, each under its name in the whole model, so that their
        `state_dict`s add up to the model's.

        Args:
            blocks: those of the lower part, in 1..depth - 1.
            head_below: gives the classifier to the lower part (U-shape); the upper one ends with the features.

        Raises:
            ConfigError: where `blocks` is out of range.
        """
        if not 1 <= blocks < self.depth:
            raise ConfigError(f"cut must be in 1..{self.depth - 1} (the model's depth less 1), got {blocks}")
        lower, upper = _shell(self.model), _shell(self.model)
        for part, kept in ((lower, range(blocks)), (upper, range(blocks, self.depth))):
            part.blocks = nn.Sequential()
            for index in kept:
                part.blocks.add_module(str(index), self.blocks[index])
        for name in PREFIX_PARAMETERS:
            if name in upper._parameters:
                upper._parameters[name] = None
        lower.norm = lower.fc_norm = nn.Identity()
        upper.norm_pre = upper.patch_drop = nn.Identity()
        for name in HEADS:
            if hasattr(self.model, name):
                setattr(upper if head_below else lower, name, nn.Identity())
        upper._pos_embed = _unchanged
        parts = ViT(lower), ViT(upper)
        upper.patch_embed = nn.Identity()  # only now: ViT looks at its number of patches
        for part in parts:
            part.top_layer = self.top_layer
        return parts

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) after the last block and norm, of pictures (B, 3, H, W), or of tokens in an upper part."""
        z: Tensor = self.model.forward_features(x)
        return z

    def features(self, z: Tensor) -> Tensor:
        """What the classifier sees of tokens (B, N, D): (B, D), or (B, 2, D) where a distillation token is read too."""
        if hasattr(self.model, "head_dist"):
            return z[:, :2]
        features: Tensor = self.model.forward_head(z, pre_logits=True)
        return features

    @property
    def features_shape(self) -> tuple[int, ...]:
        """The shape of one sample's features."""
        return (2, self.embed_dim) if hasattr(self.model, "head_dist") else (self.embed_dim,)

    def head(self, features: Tensor) -> Tensor:
        """The logits (B, C) of features."""
        logits: Tensor = self.model.forward_head(features) if features.ndim == 3 else self.model.head(features)
        return logits

    def watch(self, index: int) -> None:
        """Makes the attention of block `index` available to `cls_attention` after every forward in training mode."""
        self._adapters[index].watch()

    def cls_attention(self, index: int, score: Score = "auto") -> Tensor:
        """How much attention each token that the watched block passed on received in the last forward, once.

        Args:
            index: of the block.
            score: `cls` from the CLS token, `received` on average from all tokens; `auto` is the first that there is.

        Returns:
            (B, K) float32, >= 0, mean over heads, without gradient.

        Raises:
            ModelError: for `cls` in a model without CLS token.
        """
        if score == "cls" and not self.has_cls:
            raise ModelError("score=cls needs a CLS token, which this model lacks: use score=received")
        return self._adapters[index].take_attention(self.has_cls if score == "auto" else score == "cls")

    def take_positions(self) -> Tensor | None:
        """Where the tokens that the last forward kept stood before, (B, K) int64; None where it dropped none."""
        positions = None
        for adapter in self._adapters:
            kept, adapter.kept = adapter.kept, None
            if kept is not None:
                positions = kept if positions is None else positions.gather(1, kept)
        return positions

    def attach(self, observer: BlockObserver) -> None:
        """Lets `observer` see and drop tokens in every block until `detach`.

        Raises:
            ModelError: where something is attached already.
        """
        if any("forward" in vars(block) for block in self.blocks):
            raise ModelError("the model's blocks are already attached to something: call its detach() first")
        for adapter in self._adapters:
            adapter.attach(observer)

    def detach(self) -> None:
        """Gives every block its own forward back."""
        for adapter in self._adapters:
            adapter.detach()


class BlockAdapter:
    """timm's `Block` with `Attention`: pre-norm, optional LayerScale, qk_norm and drop path.

    The attention row is computed from the output of `attn.qkv`, one query per head, so that fused attention can stay.
    """

    def __init__(self, block: Any, index: int, vit: ViT) -> None:
        self.block = block
        self.index = index
        self.num_prefix_tokens = vit.num_prefix_tokens
        self.has_cls = vit.has_cls
        self.observer: BlockObserver | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self.kept: Tensor | None = None
        """Indices (B, K) of the tokens that the last forward kept; None where it dropped none."""
        self._capturing = False
        self._watched: torch.utils.hooks.RemovableHandle | None = None
        self._qkv: Tensor | None = None

    def watch(self) -> None:
        """Keeps what the attention row is computed from, in training mode, with or without an observer."""
        if self._watched is None:
            self._watched = self.block.attn.qkv.register_forward_hook(self._capture_watched)

    def attach(self, observer: BlockObserver) -> None:
        """Replaces the block's forward."""
        self.observer = observer
        self._hook = self.block.attn.qkv.register_forward_hook(self._capture)
        self.block.forward = self.forward

    def detach(self) -> None:
        """Restores the block's forward; does nothing where nothing is attached."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            del self.block.forward
        self.observer = None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """The block on x (B, N, D); returns (B, K, D), where K = N unless the observer drops tokens."""
        block, observer = self.block, self.observer
        original = type(block).forward
        if observer is None or not block.training:
            result: Tensor = original(block, x, attn_mask=attn_mask, is_causal=is_causal)
            return result
        if attn_mask is not None or is_causal:
            raise ModelError("attention masks are not supported while tokens are dropped: detach first")
        self.kept = None
        num_patches = x.shape[1] - self.num_prefix_tokens
        num_keep = observer.num_keep(self.index, num_patches)
        if num_keep >= num_patches:
            y: Tensor = original(block, x)
            self._record(observer, x, y)
            return y
        return self._forward_dropping(observer, x, num_keep)

    def _forward_dropping(self, observer: BlockObserver, x: Tensor, num_keep: int) -> Tensor:
        block = self.block
        self._capturing = True
        try:
            h = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
        finally:
            self._capturing = False
        index = tokens.keep_top(self._scores(self.has_cls), num_keep, self.num_prefix_tokens)
        self.kept = index
        if observer.drop_at == "mid":
            h = tokens.gather(h, index)
        y: Tensor = h + block.drop_path2(block.ls2(block.mlp(block.norm2(h))))
        if observer.drop_at == "mid":
            self._record(observer, x, y, index)
            return y
        self._record(observer, x, y)
        return tokens.gather(y, index)

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
        observer.record(self.index, (after.float() - before.float()).square().sum(-1).mean())

    def _capture(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if self._capturing:
            self._qkv = output.detach()

    def _capture_watched(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if self.block.training and not recomputing():
            self._qkv = output.detach()

    def take_attention(self, from_cls: bool) -> Tensor:
        """Attention that each token which the watched block passed on received, (B, K) float32."""
        scores = self._scores(from_cls, take=True)
        return scores if self.kept is None else scores.gather(1, self.kept)

    @torch.no_grad()
    def _scores(self, from_cls: bool, take: bool = False) -> Tensor:
        """Attention that each token receives, (B, N) float32: from the CLS token, or the mean over all queries."""
        attn, qkv = self.block.attn, self._qkv
        assert qkv is not None
        if take or self._watched is None:
            self._qkv = None  # held no longer than needed: it counts as memory
        B, N, _ = qkv.shape
        q, k, _ = qkv.view(B, N, 3, attn.num_heads, attn.head_dim).unbind(2)
        if from_cls:
            q = q[:, :1]
        q, k = attn.q_norm(q).transpose(1, 2), attn.k_norm(k).transpose(1, 2)  # (B, H, 1 or N, head_dim)
        logits = (q * attn.scale) @ k.transpose(-2, -1)
        scores: Tensor = logits.float().softmax(dim=-1).mean(dim=(1, 2))
        return scores


def _adapter(block: Any, index: int, vit: ViT) -> BlockAdapter:
    """The adapter of a block; the exact types of block and attention decide what is supported."""
    if type(block) is not Block:
        raise _unsupported(f"block {type(block).__name__}")
    attn = block.attn
    if type(attn) is not Attention:
        raise _unsupported(f"attention {type(attn).__name__}")
    if attn.gate is not None or not isinstance(attn.norm, nn.Identity):
        raise _unsupported("attention with a gate" if attn.gate is not None else "attention with scale_norm")
    return BlockAdapter(block, index, vit)


def _shell(model: Any) -> Any:
    """A copy of a module that shares all it holds, and can be given other parts without changing the first."""
    shell = copy.copy(model)
    for name in ("_modules", "_parameters", "_buffers"):
        setattr(shell, name, dict(getattr(model, name)))
    return shell


def _unchanged(x: Tensor) -> Tensor:
    return x


def _unsupported(what: str) -> ModelError:
    return ModelError(f"{what} is not supported; supported: {SUPPORTED}")


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass, as gradient checkpointing does to recompute activations."""
    return torch._C._current_graph_task_id() != -1
