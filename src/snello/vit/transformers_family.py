"""transformers' ViT, DeiT, DINOv2 and DINOv2 with registers, for image classification.

Queries and keys come through transformers' attention interface: an attention under observation gets a config of its
own (the model's is shared, and saved with it) that names our function, which looks and calls the one it had before.
"""

import copy
import sys
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.activations import GELUActivation
from transformers.models.deit import modeling_deit as deit
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as registers
from transformers.models.vit import modeling_vit as vit
from typing_extensions import override

from snello.errors import ModelError
from snello.vit.blocks import AttentionPath, BlockAdapter
from snello.vit.family import Family, keep_blocks, shell, unsupported
from snello.vit.savings import listened

OBSERVED = "snello_observed"
"""Our name in transformers' attention interface."""
IMPLEMENTATIONS: dict[AttentionPath, str] = {"fused": "sdpa", "explicit": "eager"}

MODELS: dict[type, str] = {
    vit.ViTForImageClassification: "vit",
    deit.DeiTForImageClassification: "deit",
    deit.DeiTForImageClassificationWithTeacher: "deit",
    dinov2.Dinov2ForImageClassification: "dinov2",
    registers.Dinov2WithRegistersForImageClassification: "dinov2_with_registers",
}
"""The attribute that holds the model without its head."""


@dataclass
class _Watch:
    """Who looks at an attention, and the config that it has but for that."""

    config: PreTrainedConfig
    adapters: "weakref.WeakSet[TransformersBlock]"  # weak: an adapter holds its block, so its attention


_watches: "weakref.WeakKeyDictionary[nn.Module, _Watch]" = weakref.WeakKeyDictionary()


class TransformersFamily(Family):
    """One of MODELS, or a part of one."""

    tables = ("cls_token", "distillation_token", "register_tokens", "position_embeddings", "mask_token")
    attention_modules = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")

    def __init__(self, model: nn.Module) -> None:
        if type(model) not in MODELS:
            name = f"model {type(model).__name__}"
            if isinstance(model, PreTrainedModel) and model.config.model_type in MODELS.values():
                load = "load it with transformers.AutoModelForImageClassification"
                raise ModelError(f"{name} has no classification head: {load}")
            raise unsupported(name)
        self.model = model
        self._name = MODELS[type(model)]
        base = self._base(model)
        encoder = hasattr(base, "encoder")
        self.embeddings = (f"{self._name}.embeddings.",)
        self.block_prefix = f"{self._name}.{'encoder.layer' if encoder else 'layers'}."
        self.blocks = list(base.encoder.layer if encoder else base.layers)
        self.head_names = tuple(name for name, _ in model.named_children() if name.endswith("classifier"))
        config: Any = model.config
        self.num_prefix_tokens = 1 + getattr(config, "num_register_tokens", 0) + (self._name == "deit")
        self.has_cls = True
        self.pools_patches = self._name.startswith("dinov2")
        if not isinstance(base.embeddings, nn.Identity):  # an upper part has none
            patches = base.embeddings.patch_embeddings
            self.num_patches, self.patch_size = int(patches.num_patches), max(patches.patch_size)
        self.embed_dim = D = config.hidden_size
        self._has_teacher = type(model) is deit.DeiTForImageClassificationWithTeacher
        self.reads = None if self.pools_patches else 2 if self._has_teacher else 1
        self.features_shape = (2 * D,) if self.pools_patches else (2, D) if self._has_teacher else (D,)

    def _base(self, model: nn.Module) -> Any:
        return getattr(model, MODELS[type(model)])

    @override
    def adapter(self, block: Any, index: int) -> "TransformersBlock":
        for kind, attention, adapter in BLOCKS:
            if type(block) is kind and type(block.attention) is attention:
                return adapter(block, index, self.num_prefix_tokens, self.has_cls)
        name = type(getattr(block, "attention", None)).__name__
        raise unsupported(f"block {type(block).__name__} with attention {name}")

    @override
    def divide(self, lower: Any, upper: Any, blocks: int) -> None:
        for part, kept in ((lower, range(blocks)), (upper, range(blocks, len(self.blocks)))):
            base = shell(self._base(self.model))
            setattr(part, self._name, base)
            layers = keep_blocks(nn.ModuleList(), kept, self.blocks)
            if hasattr(base, "encoder"):
                base.encoder = shell(base.encoder)
                base.encoder.layer = layers
            else:
                base.layers = layers
        self._base(lower).layernorm = nn.Identity()
        self._base(upper).embeddings = nn.Identity()

    @override
    def tokens(self, x: Tensor) -> Tensor:
        base = self._base(self.model)
        z = base.embeddings(x)
        for block in self.blocks:
            z = block(z)
        y: Tensor = base.layernorm(z)
        return y

    @override
    def features(self, z: Tensor) -> Tensor:
        if self.pools_patches:
            return torch.cat([z[:, 0], z[:, self.num_prefix_tokens :].mean(dim=1)], dim=1)
        return z[:, :2] if self._has_teacher else z[:, 0]

    @override
    def head(self, features: Tensor) -> Tensor:
        model = self.model
        y: Tensor
        if not self._has_teacher:
            y = model.classifier(features)
            return y
        y = (model.cls_classifier(features[:, 0]) + model.distillation_classifier(features[:, 1])) / 2
        return y

    @override
    def set_grad_checkpointing(self, on: bool) -> None:
        if on:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.activation_checkpointing_disable()


class TransformersBlock(BlockAdapter):
    """A layer whose attention goes through transformers' attention interface."""

    @property
    def path(self) -> AttentionPath:
        """How the block computes attention."""
        return "explicit" if _own_config(self.block.attention)._attn_implementation == "eager" else "fused"

    @path.setter
    def path(self, path: AttentionPath) -> None:
        if path == self.path:
            return
        attention = self.block.attention
        config = _with_implementation(_own_config(attention), IMPLEMENTATIONS[path])
        if attention in _watches:
            _watches[attention].config = config
            config = _watched_config(config)
        attention.config = config

    @override
    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        block: Any = self.block
        call: Any = partial(super().forward, **options)
        # Their layers checkpoint in the forward that ours replaces, a wrapper around the plain one.
        wrapped = block.gradient_checkpointing and hasattr(type(block).forward, "__wrapped__")
        if wrapped and self.replaced and torch.is_grad_enabled():
            call = partial(block._gradient_checkpointing_func, call)
        y: Tensor = call(x, *args)
        return y

    @override
    def arguments(self, attention_mask: Tensor | None = None, **options: Any) -> dict[str, Any] | None:
        return None if attention_mask is not None else options

    @override
    def capture(self) -> None:
        attention = self.block.attention
        if attention not in _watches:
            _watches[attention] = _Watch(_own_config(attention), weakref.WeakSet())
            attention.config = _watched_config(_watches[attention].config)
        _watches[attention].adapters.add(self)

    @override
    def release(self) -> None:
        attention = self.block.attention
        watch = _watches.get(attention)
        if watch is None or self not in watch.adapters:
            return
        watch.adapters.remove(self)
        if not watch.adapters:
            attention.config = watch.config
            del _watches[attention]

    @override
    def intact(self) -> bool:
        return True  # adapters that come later are seen, since queries and keys pass through the interface

    def see(self, query: Tensor, key: Tensor, scale: float) -> None:
        """Called by the attention interface with queries and keys (B, H, N, D / H)."""
        if self.wanted():
            self.passes.current.attention[self.index] = query.detach(), key.detach(), scale

    @override
    def queries_and_keys(self, captured: tuple[Tensor, Tensor, float], from_cls: bool) -> tuple[Tensor, Tensor, float]:
        q, k, scale = captured
        return q[:, :, :1] if from_cls else q, k, scale

    def attended(
        self, norm: nn.Module, x: Tensor, bias: Tensor | None, queries: Tensor | None, arguments: dict[str, Any]
    ) -> Tensor:
        """What the attention makes of x (B, N, D) after its norm, or of queries (B, K, D) that attend to x."""
        attention: Any = self.block.attention
        made: Tensor
        normed = norm(x)
        if queries is None:
            made = attention(normed, attention_mask=bias, **arguments)[0]
            return made
        projected = attention.q_proj(norm(queries)), attention.k_proj(normed), attention.v_proj(normed)
        q, k, v = (y.view(*y.shape[:2], -1, attention.head_dim).transpose(1, 2) for y in projected)
        options = {"dropout": attention.attention_dropout if attention.training else 0.0, "scaling": attention.scaling}
        call = _implementation(attention, attention.config._attn_implementation)
        made = attention.o_proj(call(attention, q, k, v, bias, **options, **arguments)[0].flatten(2))
        return made

    @override
    def queries_alone(self) -> bool:
        return not listened(self.block.attention)

    @override
    def plain_mlp(self) -> nn.Module | None:
        mlp: Any = self.block.mlp
        exact = type(getattr(mlp, "activation_fn", None)) is GELUActivation and not listened(mlp.activation_fn)
        plain: nn.Module = mlp
        return plain if type(plain) in MLPS and exact else None


class ViTBlock(TransformersBlock):
    """ViT's and DeiT's layer."""

    @override
    def attend(self, x: Tensor, bias: Tensor | None = None, queries: Tensor | None = None, **arguments: Any) -> Tensor:
        block = self.block
        attended = self.attended(block.layernorm_before, x, bias, queries, arguments)
        y: Tensor = block.dropout(attended) + (x if queries is None else queries)
        return y

    @override
    def feed(self, h: Tensor) -> Tensor:
        block = self.block
        y: Tensor = block.dropout(block.mlp(block.layernorm_after(h))) + h
        return y


class Dinov2Block(TransformersBlock):
    """DINOv2's layer, with LayerScale and drop path."""

    @override
    def attend(self, x: Tensor, bias: Tensor | None = None, queries: Tensor | None = None, **arguments: Any) -> Tensor:
        block = self.block
        attended = self.attended(block.norm1, x, bias, queries, arguments)
        y: Tensor = block.drop_path(block.layer_scale1(attended)) + (x if queries is None else queries)
        return y

    @override
    def feed(self, h: Tensor) -> Tensor:
        block = self.block
        y: Tensor = block.drop_path(block.layer_scale2(block.mlp(block.norm2(h)))) + h
        return y


BLOCKS: tuple[tuple[Any, Any, type[TransformersBlock]], ...] = (
    (vit.ViTLayer, vit.ViTAttention, ViTBlock),
    (deit.DeiTLayer, deit.DeiTAttention, ViTBlock),
    (dinov2.Dinov2Layer, dinov2.Dinov2Attention, Dinov2Block),
    (registers.Dinov2WithRegistersLayer, registers.Dinov2WithRegistersAttention, Dinov2Block),
)
MLPS: tuple[Any, ...] = (vit.ViTMLP, deit.DeiTMLP, dinov2.Dinov2MLP, registers.Dinov2WithRegistersMLP)
"""Two linear layers with an activation between them."""


def _own_config(attention: Any) -> PreTrainedConfig:
    """The attention's config but for who looks at it."""
    if attention in _watches:
        return _watches[attention].config
    config: PreTrainedConfig = attention.config
    if config._attn_implementation != OBSERVED:
        return config
    return _with_implementation(config, config.snello_wraps)  # a deep copy of an attention that somebody looks at


def _watched_config(config: PreTrainedConfig) -> PreTrainedConfig:
    made = _with_implementation(config, OBSERVED)
    made.snello_wraps = config._attn_implementation
    return made


def _with_implementation(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    made = copy.copy(config)
    made._attn_implementation_internal = name  # the property's setter would check the name against the model's
    return made


def _observed(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    """Looks at queries and keys, then calls the implementation that the attention had before."""
    if module in _watches:  # not in a deep copy
        for adapter in _watches[module].adapters:
            adapter.see(query, key, options["scaling"])
    config: Any = module.config
    return _implementation(module, config.snello_wraps)(module, query, key, value, mask, **options)


def _implementation(attention: nn.Module, name: str) -> Any:
    eager = sys.modules[type(attention).__module__].eager_attention_forward
    return AttentionInterface().get_interface(name, eager)


AttentionInterface.register(OBSERVED, _observed)
