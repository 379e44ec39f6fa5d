"""C3-SL: R samples are bound with fixed random keys by circular convolution and summed into one.

Source: C3-SL: Circular Convolution-Based Batch-Wise Compression for Communication-Efficient Split Learning,
arXiv:2207.12397.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from snello.codecs.base import Arrays, Context, Reduced, Reducer, Shape, announced_shape, integer
from snello.errors import ProtocolError
from snello.seeds import mix


class C3SL(Reducer):
    """Sums R samples, each convolved with a key of its own; correlation with the key gets it back, with noise.

    A last group of fewer samples is summed as it is.

    Args:
        num: R, samples in one, at least 1: the ratio is 1 / R.
        seed: of the keys, equal on both sides.
    """

    last = True
    source = "https://arxiv.org/abs/2207.12397"
    example = "10"

    def __init__(self, num: int, seed: int = 0) -> None:
        super().__init__()
        self.num, self.seed = integer(num, "num", 1), seed
        self._keys: dict[int, Tensor] = {}  # by length; made again from the seed, never sent

    @override
    def encode(self, z: Tensor, context: Context) -> Reduced:
        flat = z.float().flatten(1)
        flat = pad(flat, (0, 0, 0, -len(flat) % self.num)).view(-1, self.num, flat.shape[1])
        # (ceil(B / R), R, N * D // 2 + 1)
        bound = torch.fft.rfft(flat) * self._spectra(flat.shape[-1], z.device)
        side = {"indices.shape": torch.tensor(z.shape, dtype=torch.int32)}
        return Reduced(torch.fft.irfft(bound.sum(dim=1), n=flat.shape[-1]), side)

    @override
    def decode(self, values: Tensor, side: Arrays) -> Tensor:
        num_samples, *shape = side["indices.shape"].tolist()
        length = values.shape[1]
        spectra = torch.fft.rfft(values).unsqueeze(1) * self._spectra(length, values.device).conj()
        samples: Tensor = torch.fft.irfft(spectra, n=length)
        return samples.flatten(0, 1)[:num_samples].view(num_samples, *shape)

    @override
    def decoded_shape(self, shape: Shape, side: Arrays) -> Shape:
        num_samples, num_tokens, width = announced_shape(side, 3)
        if shape != (math.ceil(num_samples / self.num), num_tokens * width):
            raise ProtocolError(f"sums of shape {shape} do not hold {num_samples} samples of {num_tokens} tokens")
        return num_samples, num_tokens, width

    def _spectra(self, length: int, device: torch.device) -> Tensor:
        """The Fourier transforms of the keys, (R, length // 2 + 1): random directions of unit length."""
        if length not in self._keys:
            generator = torch.Generator().manual_seed(mix(self.seed, length))
            keys = torch.randn(self.num, length, generator=generator)
            self._keys = {length: torch.fft.rfft(keys / keys.norm(dim=1, keepdim=True))}
        return self._keys[length].to(device)
