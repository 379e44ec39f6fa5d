"""Numbers as 8, 4 or 2 bits with a zero and a step per token; bits are really packed, zeros and steps are counted.

x is written as q = round((x - zero) / step), an integer in 0..2^bits - 1. Zero and step are rounded outwards to what
they travel in, so that every number lies within the grid and the error is at most half a step.
"""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from snello.codecs.base import Arrays, Context, Format, Shape, integer, number
from snello.errors import ProtocolError, require

ScaleType = Literal["bf16", "fp32", "pow2"]
# Half the width of the uniform quantizer with the least squared error for normal numbers, in standard deviations.
BEST_CLIP = {2: 1.5}

Group = Literal["token", "sample", "channel", "tensor"]


class Integers(Format):
    """Uniform quantization of activations and gradients.

    Args:
        down: bits of the gradient on its way down, 2, 4 or 8; default: as on the way up.
        scale: what zero and step travel in: `bf16` (4 bytes), `fp32` (8 bytes), `pow2` (2 bytes: the step a power of
            two, the zero a multiple of it).
        per: what has a zero and a step of its own: each `token`, each `sample`, each `channel` (the
            last dimension, over the whole batch: best after `bottlenet`), or the whole `tensor`.
        clip: covers mean +- clip standard deviations only, and moves what lies outside to the ends: with few bits
            that loses less; 0 covers all, `auto` is 1.5 for 2 bits, about the best for normal numbers, and else 0.
    """

    source = "-"
    bits: ClassVar[int]

    def __init__(
        self,
        down: int | None = None,
        scale: ScaleType = "bf16",
        per: Group = "token",
        clip: float | Literal["auto"] = 0,
    ) -> None:
        self.down = self.bits if down is None else integer(down, "down", 2)
        require(self.down in (2, 4, 8), "down", "2, 4 or 8", down)
        require(scale in ("bf16", "fp32", "pow2"), "scale", "bf16, fp32 or pow2", scale)
        require(per in ("token", "sample", "channel", "tensor"), "per", "token, sample, channel or tensor", per)
        self.clip = clip if clip == "auto" else number(clip, "clip")
        require(self.clip == "auto" or self.clip >= 0, "clip", "0 or more, or auto", clip)
        self.scale, self.per = scale, per

    @override
    def pack(self, x: Tensor, context: Context) -> Arrays:
        return self._pack(x, self.bits)

    @override
    def unpack(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return self._unpack(arrays, self.bits)

    @override
    def unpacked_shape(self, arrays: Mapping[str, Tensor]) -> Shape:
        *rest, num_bytes = arrays["values"].shape
        per_byte = 8 // self.bits
        length = int(arrays["indices.length"]) if "indices.length" in arrays else num_bytes * per_byte
        if math.ceil(length / per_byte) != num_bytes:
            raise ProtocolError(f"{num_bytes} bytes do not hold numbers of length {length}")
        return (*rest, length)

    @override
    def pack_gradient(self, x: Tensor, context: Context) -> Arrays:
        return self._pack(x, self.down)

    @override
    def unpack_gradient(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return self._unpack(arrays, self.down)

    def _pack(self, x: Tensor, bits: int) -> Arrays:
        x = x.float()
        low, high = self._range(x, BEST_CLIP.get(bits, 0.0) if self.clip == "auto" else self.clip)
        levels = 2**bits - 1
        scales = _pow2_grid(low, high, levels) if self.scale == "pow2" else _grid(low, high, levels, self.scale)
        zero, step = _zero_and_step(scales)
        codes = ((x - zero) / step).round_().clamp_(0, levels).to(torch.uint8)
        arrays = {"values": pack_bits(codes, bits), "scales": scales}
        if codes.shape[-1] % (8 // bits):
            arrays["indices.length"] = torch.tensor([codes.shape[-1]], dtype=torch.int32)
        return arrays

    def _unpack(self, arrays: Mapping[str, Tensor], bits: int) -> Tensor:
        zero, step = _zero_and_step(arrays["scales"])
        length = int(arrays["indices.length"]) if "indices.length" in arrays else None
        codes = unpack_bits(arrays["values"], bits, length)
        if zero.ndim != codes.ndim or any(n not in (1, most) for n, most in zip(zero.shape, codes.shape, strict=True)):
            raise ProtocolError(f"scales of shape {tuple(zero.shape)} do not belong to numbers of {tuple(codes.shape)}")
        return torch.addcmul(zero, step, codes.float())

    def _range(self, x: Tensor, clip: float) -> tuple[Tensor, Tensor]:
        """Least and largest number that every group's grid covers, each of x's rank with a 1 wherever it is shared, and
        one more dimension of 1 at the end."""
        dims = {
            "token": [x.ndim - 1],
            "sample": list(range(1, x.ndim)),
            "channel": list(range(x.ndim - 1)),
            "tensor": list(range(x.ndim)),
        }[self.per]
        low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
        if clip:
            mean = x.mean(dims, keepdim=True)
            reach = clip * x.var(dims, correction=0, keepdim=True).sqrt()
            low, high = torch.maximum(low, mean - reach), torch.minimum(high, mean + reach)
        return low.unsqueeze(-1), high.unsqueeze(-1)


class Int8(Integers):
    """Every number in 8 bits, with a zero and a step per token; error at most half a step."""

    bits = 8


class Int4(Integers):
    """Every number in 4 bits, with a zero and a step per token; error at most half a step."""

    bits = 4


class Int2(Integers):
    """Every number in 2 bits, with a zero and a step per token; error at most half a step."""

    bits = 2


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., D) uint8 below 2^bits as (..., ceil(D * bits / 8)) uint8, the first in the lowest bits."""
    per_byte = 8 // bits
    if per_byte == 1:
        return codes
    missing = -codes.shape[-1] % per_byte
    if missing:
        codes = torch.nn.functional.pad(codes, (0, missing))
    lanes = codes.reshape(*codes.shape[:-1], -1, per_byte)
    packed = lanes[..., 0].clone()
    for lane in range(1, per_byte):
        packed |= lanes[..., lane] << (bits * lane)
    return packed


def unpack_bits(packed: Tensor, bits: int, length: int | None = None) -> Tensor:
    """What `pack_bits` was given, (..., length) uint8; by default all that there is room for."""
    per_byte = 8 // bits
    if per_byte == 1:
        return packed
    lanes = [(packed >> (bits * lane)) & (2**bits - 1) for lane in range(per_byte)]
    return torch.stack(lanes, dim=-1).flatten(-2)[..., :length]


def _grid(low: Tensor, high: Tensor, levels: int, scale: ScaleType) -> Tensor:
    """Zero and step (..., 2) such that the grid covers low..high after rounding to the type they travel in."""
    if scale == "fp32":
        step = (high - low) / levels
        # One digit more where the rounded step falls short of the largest number.
        step = torch.where(low + step * levels < high, step * (1 + 2**-22), step)
        return torch.cat((low, step), dim=-1)
    zero = _bf16_down(low)
    return torch.cat((zero, _bf16_up((high - zero) / levels)), dim=-1).bfloat16()


def _pow2_grid(low: Tensor, high: Tensor, levels: int) -> Tensor:
    """Zero in steps and exponent of the step, (..., 2) int8, such that the grid covers low..high."""
    largest = torch.maximum(low.abs(), high.abs())
    least = torch.maximum((high - low) / levels, largest / 127).clamp_min(2.0**-120)
    exponent = torch.frexp(least).exponent  # least <= 2^exponent
    for _ in range(2):  # a zero that is a multiple of the step may cost one step more than fits
        step = torch.exp2(exponent.float())
        too_fine = (high / step).ceil() - (low / step).floor() > levels
        exponent = exponent + too_fine.to(exponent.dtype)
    zero = (low / torch.exp2(exponent.float())).floor()
    return torch.cat((zero.clamp(-128, 127), exponent.float().clamp(-127, 127)), dim=-1).to(torch.int8)


def _zero_and_step(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Both float32, of the rank of what they scale; a step of 0 (all numbers are equal, all codes 0) becomes 1."""
    first, second = scales.float().unbind(dim=-1)
    if scales.dtype == torch.int8:
        step = torch.exp2(second)
        return first * step, step
    return first, torch.where(second > 0, second, torch.ones_like(second))


def _bf16_up(x: Tensor) -> Tensor:
    """The least bfloat16 number not below x, as float32; x >= 0."""
    return ((x.contiguous().view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _bf16_down(x: Tensor) -> Tensor:
    """The largest bfloat16 number not above x, as float32."""
    bits = x.contiguous().view(torch.int32)
    # Cutting digits off brings a negative number closer to zero, which is up.
    return (torch.where(x < 0, bits + 0xFFFF, bits) & ~0xFFFF).view(torch.float32)
