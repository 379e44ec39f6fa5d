"""FedLite: product quantization of the activations, with a correction of the gradient for what was lost.

Source: FedLite: A Scalable Approach for Federated Learning on Resource-constrained Clients, arXiv:2201.11865.
Every token is cut into subvectors; one codebook of them all is sent with the index of each subvector's nearest entry.
The gradient of the whole decoded tensor comes down uncompressed, so the ratio of both ways stays above one half.
Deviation: the codebook is learned on a sample of the subvectors, then set to the means of all that are nearest.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from snello.codecs.base import Arrays, Context, Format, Shape, announced_shape, integer, number
from snello.codecs.integers import pack_bits, unpack_bits
from snello.errors import ProtocolError, require
from snello.vit.tokens import kmeans

SAMPLE = 2048
CODE_BITS = (1, 2, 4, 8)


class FedLite(Format):
    """Subvectors of every token as indices into a codebook; gradients uncompressed.

    Args:
        subvectors: that a token is cut into; the last numbers that do not fill one are padded with zeros.
        clusters: entries of the codebook, in 2..256.
        correction: weight of the quantization error that is added to the gradient, >= 0.
    """

    source = "https://arxiv.org/abs/2201.11865"
    example = "32"

    def __init__(self, subvectors: int = 16, clusters: int = 16, correction: float = 1e-4) -> None:
        self.subvectors = integer(subvectors, "subvectors", 1)
        self.clusters = integer(clusters, "clusters", 2)
        require(clusters <= 256, "clusters", "at most 256", clusters)
        self.correction = number(correction, "correction")
        require(self.correction >= 0, "correction", "0 or more", correction)
        self.bits = next(bits for bits in CODE_BITS if 2**bits >= clusters)

    @override
    def pack(self, x: Tensor, context: Context) -> Arrays:
        width = math.ceil(x.shape[-1] / self.subvectors)
        padded = torch.nn.functional.pad(x.float(), (0, width * self.subvectors - x.shape[-1]))
        vectors = padded.reshape(-1, width)
        codebook = self._codebook(vectors, context)
        codes = torch.cdist(vectors, codebook).argmin(dim=1)
        sums = torch.zeros_like(codebook).index_add_(0, codes, vectors)
        sizes = codes.bincount(minlength=len(codebook)).unsqueeze(1)
        codebook = torch.where(sizes > 0, sums / sizes.clamp_min(1), codebook)
        shape = torch.tensor(x.shape, dtype=torch.int32)
        codes = codes.to(torch.uint8).view(*x.shape[:-1], self.subvectors)
        return {"values": pack_bits(codes, self.bits), "scales": codebook, "indices.shape": shape}

    @override
    def unpack(self, arrays: Mapping[str, Tensor]) -> Tensor:
        shape = arrays["indices.shape"].tolist()
        codes = unpack_bits(arrays["values"], self.bits, self.subvectors).long()
        if bool((codes >= len(arrays["scales"])).any()):  # on a GPU it would be the end of the process
            raise ProtocolError("a code is outside its codebook")
        return arrays["scales"][codes].flatten(-2)[..., : shape[-1]].reshape(shape)

    @override
    def unpacked_shape(self, arrays: Mapping[str, Tensor]) -> Shape:
        codes, codebook = tuple(arrays["values"].shape), tuple(arrays["scales"].shape)
        shape = announced_shape(arrays, len(codes))
        due = (*shape[:-1], math.ceil(self.subvectors * self.bits / 8))
        width = math.ceil(shape[-1] / self.subvectors)
        if codes != due or codebook[1:] != (width,) or codebook[0] > self.clusters:
            raise ProtocolError(f"codes of shape {codes} in a codebook of {codebook} do not make tokens of {shape}")
        return shape

    @override
    def pack_gradient(self, x: Tensor, context: Context) -> Arrays:
        return {"values": x.contiguous()}

    @override
    def unpack_gradient(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return arrays["values"].detach()

    @override
    def gradient_shape(self, arrays: Mapping[str, Tensor]) -> Shape:
        return tuple(arrays["values"].shape)

    @override
    def correct(self, gradient: Tensor, sent: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        lost = sent.detach() - self.unpack({**arrays, "values": arrays["activations"]})
        return gradient + self.correction * lost

    def _codebook(self, vectors: Tensor, context: Context) -> Tensor:
        generator = context.generator(vectors.device)
        sample = vectors
        if len(vectors) > SAMPLE:
            chosen = torch.randint(len(vectors), (SAMPLE,), generator=generator, device=vectors.device)
            sample = vectors[chosen]
        return kmeans(sample, min(self.clusters, len(sample)), generator, max_iter=20)[1]
