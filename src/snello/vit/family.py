"""What `ViT` asks of a library's models."""

import copy
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from snello.errors import ModelError
from snello.vit.blocks import BlockAdapter

SUPPORTED = (
    "timm VisionTransformer models (ViT, DeiT with and without distillation token, DINOv2, registers) made of "
    "standard blocks and attention, with CLS, average or max pooling; transformers' ViT, DeiT, DINOv2 and DINOv2 with "
    "registers for image classification"
)


class Family(ABC):
    """A model of one library; attributes are filled in by its subclass."""

    model: Any  # the library's; it has no types that would help
    blocks: list[Any]
    num_prefix_tokens: int
    has_cls: bool
    pools_patches: bool
    """Whether the classifier reads an average or maximum of the patch tokens."""
    num_patches: int
    """Patch tokens of one picture at the model's own size."""
    patch_size: int
    """The longer side of a patch in pixels."""
    embed_dim: int
    features_shape: tuple[int, ...]
    """Of what the classifier sees of one sample."""
    reads: int | None
    """The leading tokens that the classifier reads after the last block; None: all, or there is no classifier here."""
    embeddings: tuple[str, ...]
    """What the names of the parameters of patch, position and prefix embeddings begin with."""
    tables: tuple[str, ...]
    """How those of position and prefix embeddings end: tables that weight decay would only shrink."""
    block_prefix: str
    """What the names of the blocks' parameters begin with, up to the block's number."""
    head_names: tuple[str, ...]
    """The classifiers, as named in the model."""
    attention_modules: tuple[str, ...]
    """The linear layers of a block's attention, as named in the block."""

    @abstractmethod
    def __init__(self, model: nn.Module) -> None: ...

    @abstractmethod
    def adapter(self, block: Any, index: int) -> BlockAdapter:
        """Around one of the blocks, or a copy of one; a ModelError where it is not supported, naming it."""

    @abstractmethod
    def divide(self, lower: Any, upper: Any, blocks: int) -> None:
        """Leaves each of two shells of the model its part, but for the classifiers: `blocks` blocks, and the others."""

    @abstractmethod
    def tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) after the last block and norm, of pictures, or in an upper part of tokens."""

    @abstractmethod
    def features(self, z: Tensor) -> Tensor:
        """What the classifier sees of tokens (B, N, D)."""

    @abstractmethod
    def head(self, features: Tensor) -> Tensor:
        """The logits (B, C) of features."""

    @abstractmethod
    def set_grad_checkpointing(self, on: bool) -> None:
        """Switches the library's gradient checkpointing."""

    def cut(self, blocks: int, head_below: bool) -> tuple["Family", "Family"]:
        """Both parts of a cut after `blocks` blocks, as `ViT.cut` describes them."""
        lower, upper = shell(self.model), shell(self.model)
        self.divide(lower, upper, blocks)
        for name in self.head_names:
            if hasattr(self.model, name):
                setattr(upper if head_below else lower, name, nn.Identity())
        below, above = type(self)(lower), type(self)(upper)
        below.reads = None  # all of them cross the cut
        above.num_patches, above.patch_size = self.num_patches, self.patch_size
        return below, above

    def is_embedding(self, name: str) -> bool:
        """Whether a parameter of this name belongs to patch, position or prefix embeddings."""
        return name.startswith(self.embeddings)

    def is_head(self, name: str) -> bool:
        """Whether a parameter of this name belongs to a classifier."""
        return name.split(".")[0] in self.head_names


def shell(model: Any) -> Any:
    """A copy of a module that shares all it holds, and can be given other parts without changing the first."""
    made = copy.copy(model)
    for name in ("_modules", "_parameters", "_buffers"):
        setattr(made, name, dict(getattr(model, name)))
    return made


def keep_blocks(container: nn.Module, kept: range, blocks: list[Any]) -> nn.Module:
    """The container with some of the blocks only, each under its number in the whole model."""
    for index in kept:
        container.add_module(str(index), blocks[index])
    return container


def unsupported(what: str) -> ModelError:
    """The error for a model that has `what`."""
    return ModelError(f"{what} is not supported; supported: {SUPPORTED}")
