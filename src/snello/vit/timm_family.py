"""timm's VisionTransformer, and its standard blocks."""

from typing import Any

from timm.layers import Mlp
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from snello.vit.blocks import AttentionPath, BlockAdapter
from snello.vit.family import Family, keep_blocks, unsupported
from snello.vit.savings import listened

POOLS = ("token", "avg", "avgmax", "max")


class TimmFamily(Family):
    """A timm VisionTransformer, or a part of one."""

    tables = ("cls_token", "reg_token", "dist_token", "pos_embed")
    embeddings = (*tables, "patch_embed.", "norm_pre.")
    block_prefix = "blocks."
    head_names = ("head", "head_dist")
    attention_modules = ("attn.qkv", "attn.proj")

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, VisionTransformer):
            raise unsupported(f"model {type(model).__name__}")
        if model.global_pool not in POOLS:
            raise unsupported(f"pooling {model.global_pool!r}")
        self.model = model
        self.blocks = list(model.blocks)
        self.num_prefix_tokens = model.num_prefix_tokens
        self.has_cls = model.has_class_token
        self.pools_patches = model.global_pool != "token"
        if not isinstance(model.patch_embed, nn.Identity):  # an upper part has none
            self.num_patches = int(model.patch_embed.num_patches)
            self.patch_size = max(model.patch_embed.patch_size)
        self.embed_dim = model.embed_dim
        read = 2 if hasattr(model, "head_dist") else 1
        self.features_shape = (2, self.embed_dim) if read == 2 else (self.embed_dim,)
        self.reads = None if self.pools_patches else read

    @override
    def adapter(self, block: Any, index: int) -> "TimmBlock":
        # The exact types of block and attention decide what is supported.
        if type(block) is not Block:
            raise unsupported(f"block {type(block).__name__}")
        attn = block.attn
        if type(attn) is not Attention:
            raise unsupported(f"attention {type(attn).__name__}")
        if attn.gate is not None or not isinstance(attn.norm, nn.Identity):
            raise unsupported("attention with a gate" if attn.gate is not None else "attention with scale_norm")
        return TimmBlock(block, index, self.num_prefix_tokens, self.has_cls)

    @override
    def divide(self, lower: Any, upper: Any, blocks: int) -> None:
        lower.blocks = keep_blocks(nn.Sequential(), range(blocks), self.blocks)
        upper.blocks = keep_blocks(nn.Sequential(), range(blocks, len(self.blocks)), self.blocks)
        for name in self.tables:
            if name in upper._parameters:
                upper._parameters[name] = None
        lower.norm = lower.fc_norm = nn.Identity()
        upper.norm_pre = upper.patch_drop = upper.patch_embed = nn.Identity()
        upper._pos_embed = _unchanged

    @override
    def tokens(self, x: Tensor) -> Tensor:
        y: Tensor = self.model.forward_features(x)
        return y

    @override
    def features(self, z: Tensor) -> Tensor:
        if hasattr(self.model, "head_dist"):
            return z[:, :2]
        y: Tensor = self.model.forward_head(z, pre_logits=True)
        return y

    @override
    def head(self, features: Tensor) -> Tensor:
        y: Tensor = self.model.forward_head(features) if features.ndim == 3 else self.model.head(features)
        return y

    @override
    def set_grad_checkpointing(self, on: bool) -> None:
        self.model.set_grad_checkpointing(on)


class TimmBlock(BlockAdapter):
    """timm's `Block` with `Attention`: optional LayerScale, qk_norm and drop path.

    The attention row is computed from the output of `attn.qkv`, one query per head, so that fused attention can stay.
    """

    _hook: RemovableHandle | None = None
    _hooked: nn.Module | None = None

    @property
    def path(self) -> AttentionPath:
        """How the block computes attention."""
        return "fused" if self.block.attn.fused_attn else "explicit"

    @path.setter
    def path(self, path: AttentionPath) -> None:
        self.block.attn.fused_attn = path == "fused"

    @override
    def attend(self, x: Tensor, bias: Tensor | None = None, queries: Tensor | None = None, **arguments: Any) -> Tensor:
        block = self.block
        if queries is None:
            attended = block.attn(block.norm1(x), attn_mask=bias, **arguments)
        else:
            attended = self._attended(block.norm1(queries), block.norm1(x), bias)
            x = queries
        y: Tensor = x + block.drop_path1(block.ls1(attended))
        return y

    def _attended(self, queries: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """What `Attention` makes of queries (B, K, D) that attend to x (B, N, D), (B, K, D)."""
        attn: Any = self.block.attn
        (B, K, _), N, H = queries.shape, x.shape[1], attn.num_heads
        of_q, of_kv = self._projected(queries, x)
        q = attn.q_norm(of_q.view(B, K, H, -1)).transpose(1, 2)
        k, v = of_kv.view(B, N, 2, H, -1).permute(2, 0, 3, 1, 4)
        k = attn.k_norm(k)
        if attn.fused_attn:
            drop = attn.attn_drop.p if attn.training else 0.0
            y = scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop)
        else:
            logits = (q * attn.scale) @ k.transpose(-2, -1)
            y = attn.attn_drop((logits if bias is None else logits + bias).softmax(dim=-1)) @ v
        made: Tensor = attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(2)))
        return made

    def _projected(self, queries: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, K, D), and keys and values (B, N, 2 D), from the one layer that makes all three."""
        attn: Any = self.block.attn
        qkv, width = attn.qkv, attn.num_heads * attn.head_dim
        if type(qkv) is not nn.Linear:  # adapters
            return qkv(queries)[..., :width], qkv(x)[..., width:]
        (q, kv), biases = _split(qkv.weight, width), _split(qkv.bias, width)
        return linear(queries, q, biases[0]), linear(x, kv, biases[1])

    @override
    def queries_alone(self) -> bool:
        attn = self.block.attn
        others = [hook for hook in attn.qkv._forward_hooks if self._hook is None or hook != self._hook.id]
        return type(attn.qkv) is nn.Linear and not others and not attn.qkv._forward_pre_hooks and not listened(attn)

    @override
    def plain_mlp(self) -> nn.Module | None:
        mlp: Any = self.block.mlp
        if type(mlp) is not Mlp or not isinstance(mlp.norm, nn.Identity) or mlp.drop1.p or mlp.drop2.p:
            return None
        exact = type(mlp.act) is nn.GELU and mlp.act.approximate == "none" and not listened(mlp.act)
        plain: nn.Module = mlp
        return plain if exact else None

    @override
    def feed(self, h: Tensor) -> Tensor:
        block = self.block
        y: Tensor = h + block.drop_path2(block.ls2(block.mlp(block.norm2(h))))
        return y

    @override
    def arguments(self, attn_mask: Tensor | None = None, is_causal: bool = False, **options: Any) -> Any:
        return None if attn_mask is not None or is_causal else options

    @override
    def capture(self) -> None:
        if self._hook is None:
            self._hooked = self.block.attn.qkv
            self._hook = self._hooked.register_forward_hook(self._keep)

    @override
    def release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = self._hooked = None

    @override
    def intact(self) -> bool:
        return self._hooked is None or self._hooked is self.block.attn.qkv

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if self.wanted():
            self.passes.current.attention[self.index] = output.detach()

    @override
    def queries_and_keys(self, captured: Tensor, from_cls: bool) -> tuple[Tensor, Tensor, float]:
        attn = self.block.attn
        B, N, _ = captured.shape
        q, k, _ = captured.view(B, N, 3, attn.num_heads, attn.head_dim).unbind(2)
        if from_cls:
            q = q[:, :1]
        return attn.q_norm(q).transpose(1, 2), attn.k_norm(k).transpose(1, 2), attn.scale


def _split(weights: Any, width: int) -> Any:
    """The rows of queries, and those of keys and values; by one split: two slices would have two gradients to add."""
    return (None, None) if weights is None else weights.split([width, 2 * width])


def _unchanged(x: Tensor) -> Tensor:
    return x
