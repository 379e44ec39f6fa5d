"""A Vision Transformer of timm or transformers, seen as prefix tokens, patch tokens and blocks."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from snello.errors import ConfigError, ModelError
from snello.vit.blocks import AttentionPath, BlockAdapter, BlockObserver, Score
from snello.vit.context import ForwardContext, Passes
from snello.vit.family import Family
from snello.vit.timm_family import TimmFamily


class ViT:
    """A supported Vision Transformer, seen as prefix tokens, patch tokens and blocks.

    Args:
        model: of timm or transformers, as it is or inside peft's or transformers' wrapper; never copied.

    Raises:
        ModelError: where the model, one of its blocks or its pooling is not supported, naming it.
    """

    def __init__(self, model: nn.Module) -> None:
        # torch.compile(model) wraps the model, model.compile() changes it in place.
        if hasattr(model, "_orig_mod") or any(part._compiled_call_impl is not None for part in model.modules()):
            raise ModelError("the model is already compiled: attach first, then call torch.compile")
        self._adopt(_family(model))
        self.top_layer = len(self.blocks) + 1
        """The layer of what comes after the blocks; in a part of a model, that of the whole."""

    def _adopt(self, family: Family) -> None:
        self.family = family
        self.model: nn.Module = family.model
        """The library's model, without a wrapper around it."""
        self.blocks = family.blocks
        self.num_prefix_tokens, self.has_cls = family.num_prefix_tokens, family.has_cls
        self.num_patches, self.patch_size = family.num_patches, family.patch_size
        """Patch tokens of one picture at the model's own size, and the longer side of a patch in pixels."""
        self.embed_dim, self.features_shape = family.embed_dim, family.features_shape
        self._passes = Passes(self.num_prefix_tokens)
        self.adapters = [family.adapter(block, index) for index, block in enumerate(self.blocks)]
        """Around each of the blocks."""
        for adapter in self.adapters:
            adapter.passes = self._passes
        self.adapters[-1].is_last = True

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    def embedding_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the patch, position and prefix embeddings."""
        return (p for name, p in self.model.named_parameters() if self.family.is_embedding(name))

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the classifier, both of them with a distillation token."""
        return (p for name, p in self.model.named_parameters() if self.family.is_head(name))

    def layer_of(self, name: str) -> int:
        """The layer of the parameter `name`: 0 for embeddings, i + 1 for block i, `top_layer` for what comes after."""
        if self.family.is_embedding(name):
            return 0
        prefix = self.family.block_prefix
        return int(name.removeprefix(prefix).split(".")[0]) + 1 if name.startswith(prefix) else self.top_layer

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies: not to biases, norms, position and prefix tokens."""
        table = self.family.is_embedding(name) and name.endswith(self.family.tables)
        return parameter.ndim > 1 and not table

    @property
    def attention_paths(self) -> list[AttentionPath]:
        """How each block computes attention: with the fused kernel or explicitly."""
        return [adapter.path for adapter in self.adapters]

    def set_attention_paths(self, paths: list[AttentionPath]) -> None:
        """Makes block i compute attention by `paths[i]`; both give the same result up to rounding."""
        for adapter, path in zip(self.adapters, paths, strict=True):
            adapter.path = path

    def set_grad_checkpointing(self, on: bool) -> None:
        """Keeps only the blocks' inputs for the backward pass, which computes the rest again; or no longer."""
        self.family.set_grad_checkpointing(on)

    def set_exact_savings(self, on: bool, *, mlp: bool = True) -> None:
        """Computes and keeps less in training mode, for the same gradients up to rounding; or no longer.

        The last block works only on the tokens that the classifier reads: `model.forward_features` then returns no
        others. Where it pools patches, and where something watches the block, on all. The MLPs compute GELU again in
        the backward pass, which has no use with gradient checkpointing: `mlp` leaves it out. Eval mode is untouched.
        """
        for adapter in self.adapters:
            adapter.save_exactly(self.family.reads if on and adapter.is_last else None, on and mlp)

    @property
    def last_rows(self) -> tuple[int | None, int | None]:
        """The leading tokens that attention and MLP of the last block work on in training mode; None: on all."""
        return self.adapters[-1].computes()

    def cut(self, blocks: int, *, head_below: bool = False) -> tuple["ViT", "ViT"]:
        """Two Vision Transformers that together are this one: embeddings and the first `blocks` blocks, and the rest.

        They share this model's modules and parameters, each under its name in the whole model, so that their
        `state_dict`s add up to the model's. `head_below` gives the classifier to the lower part (U-shape); the upper
        one then ends with the features.

        Raises:
            ConfigError: where `blocks` is not in 1..depth - 1.
        """
        if not 1 <= blocks < self.depth:
            raise ConfigError(f"cut must be in 1..{self.depth - 1} (the model's depth less 1), got {blocks}")
        parts = ViT.__new__(ViT), ViT.__new__(ViT)
        for part, family in zip(parts, self.family.cut(blocks, head_below), strict=True):
            part._adopt(family)
            part.top_layer = self.top_layer
        return parts

    def tokens(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Tokens (B, N, D) after the last block and norm, of pictures (B, 3, H, W), or of tokens in an upper part.

        There `sizes` (B, N) float32, > 0, say how many each token stands for: in training mode it counts as often in
        attention.

        Raises:
            ValueError: for sizes where this ViT has no observer, so that its blocks would not look at them.
        """
        if sizes is not None and self.observer is None:
            raise ValueError("sizes count in blocks that are observed: attach first")
        self._passes.sizes = sizes
        try:
            self._passes.begin()
            return self.family.tokens(x)
        finally:
            self._passes.sizes = None

    def features(self, z: Tensor) -> Tensor:
        """What the classifier sees of tokens (B, N, D): (B, F), or (B, 2, D) where a distillation token is read too."""
        return self.family.features(z)

    def head(self, features: Tensor) -> Tensor:
        """The logits (B, C) of features."""
        return self.family.head(features)

    def watch(self, index: int) -> None:
        """Makes the attention of block `index` available to `cls_attention` after every forward in training mode."""
        self.adapters[index].watch()

    def cls_attention(self, index: int, score: Score = "auto") -> Tensor:
        """How much attention each token that the watched block `index` passed on received in the last forward, once.

        (B, K) float32, >= 0, mean over heads, without gradient. `score` says from where: `cls` from the CLS token,
        `received` on average from all tokens; `auto` is the first that there is.

        Raises:
            ModelError: for `cls` in a model without CLS token.
        """
        if score == "cls" and not self.has_cls:
            raise ModelError("score=cls needs a CLS token, which this model lacks: use score=received")
        return self.adapters[index].take_attention(self.has_cls if score == "auto" else score == "cls")

    @property
    def context(self) -> ForwardContext:
        """What the last forward in training mode knew of its tokens."""
        return self._passes.current

    @property
    def attached(self) -> bool:
        """Whether something observes the blocks."""
        owners = (
            getattr(vars(block)["forward"], "__self__", None) for block in self.blocks if "forward" in vars(block)
        )
        return any(not isinstance(owner, BlockAdapter) or owner.observer is not None for owner in owners)

    @property
    def observer(self) -> BlockObserver | None:
        """What was attached through this ViT; another of the same model may have attached something else."""
        return self.adapters[0].observer

    def attach(self, observer: BlockObserver) -> None:
        """Lets `observer` see and drop tokens in every block until `detach`.

        Raises:
            ModelError: where something is attached already.
        """
        if self.attached:
            raise ModelError("the model's blocks are already attached to something: call its detach() first")
        for adapter in self.adapters:
            adapter.attach(observer)

    def detach(self) -> None:
        """Gives every block its own forward back."""
        self._passes.begin()
        for adapter in self.adapters:
            adapter.detach()

    def require_intact(self) -> None:
        """Raises a ModelError where adapters (LoRA) came into the blocks after they were attached or watched."""
        if not all(adapter.intact() for adapter in self.adapters):
            raise ModelError("the blocks were given adapters after ALaST was attached: apply peft first, then attach")


def logits_of(output: Any) -> Tensor:
    """The logits (B, C) in what a model returned: timm's are a tensor, transformers' are in an object."""
    return output if isinstance(output, Tensor) else output.logits


def _family(model: Any) -> Family:
    """The model itself, where peft or transformers' timm wrapper is around it."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    model = getattr(model, "timm_model", model)
    if any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__):
        from snello.vit.transformers_family import TransformersFamily  # else timm's users would have to have it

        return TransformersFamily(model)
    return TimmFamily(model)
