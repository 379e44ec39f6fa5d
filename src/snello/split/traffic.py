"""Exact bytes of an exchange, before it happens: from the shapes alone, through the same frames."""

import copy
import warnings
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from snello.codecs.base import Codec, Context
from snello.errors import SnelloWarning
from snello.split.labels import Labels, labels_to_arrays
from snello.split.wire.frames import Frame, Kind, sizes
from snello.vit import ViT


@dataclass(frozen=True)
class Exchange:
    """The shape of an exchange."""

    num_samples: int
    num_tokens: int
    """Including prefix tokens, as they leave the client's blocks."""
    embed_dim: int
    num_prefix_tokens: int
    num_classes: int
    labels: Labels = "server"
    features: tuple[int, ...] = ()
    """Shape of what the classifier sees of one sample; needed where the labels are on the client."""
    with_gradient: bool = True
    """Whether the client trains anything below the cut."""
    with_feature_gradient: bool = True
    """Whether anything below the classifier trains, where the labels are on the client."""

    @classmethod
    def of(cls, vit: ViT, num_samples: int, num_classes: int, labels: Labels) -> "Exchange":
        """The shape of an exchange of this model in which no token is dropped."""
        num_tokens, prefix = vit.num_prefix_tokens + vit.num_patches, vit.num_prefix_tokens
        return cls(num_samples, num_tokens, vit.embed_dim, prefix, num_classes, labels, vit.features_shape)


def exchange_bytes(codec: Codec, shape: Exchange) -> tuple[int, int]:
    """Bytes up and down of one exchange in training mode.

    Where sizes depend on the values (`adc(..., min_cluster=n)`) they are those of random ones.
    """
    generator = torch.Generator().manual_seed(0)
    B, N, D = shape.num_samples, shape.num_tokens, shape.embed_dim
    z = torch.randn(B, N, D, generator=generator)
    attention = torch.rand(B, N, generator=generator)
    context = Context(num_prefix_tokens=shape.num_prefix_tokens, attention=attention)
    codec = copy.deepcopy(codec).cpu().train()  # statistics and counts are those of real exchanges
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", SnelloWarning)
        message = codec.encode(z, context)
        gradients = codec.encode_gradient(torch.zeros_like(message.sent), context) if shape.with_gradient else {}
    up = dict(message.arrays)
    if shape.labels == "server":
        up |= labels_to_arrays(torch.zeros(B, dtype=torch.int64), message, shape.num_classes)
        up["labels.share"] = torch.zeros(1)
        return _size(Kind.ACTIVATIONS, up), _size(Kind.GRADIENTS, gradients | {"gradients.loss": torch.zeros(1)})
    features = torch.empty(message.num_rows, *shape.features, dtype=codec.feature_dtype, device="meta")
    uplink, downlink = _size(Kind.ACTIVATIONS, up), _size(Kind.FEATURES, {"activations": features})
    if shape.with_feature_gradient:
        uplink += _size(Kind.FEATURE_GRADIENTS, {"gradients": features})
        downlink += _size(Kind.GRADIENTS, gradients)
    return uplink, downlink


@lru_cache(maxsize=64)
def uncompressed_bytes(shape: Exchange) -> int:
    """Bytes of both ways of the same exchange in fp32 without a codec."""
    return sum(exchange_bytes(Codec("none", embed_dim=shape.embed_dim), shape))


def _size(kind: Kind, arrays: dict[str, Tensor]) -> int:
    return sum(sizes(Frame(kind, 0, 0, arrays)).values())
