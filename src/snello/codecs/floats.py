"""Numbers as floats: as they are, or in 16 bits."""

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from snello.codecs.base import Arrays, Context, Format


class Float32(Format):
    """Every number as it is: no compression."""

    source = "-"

    @override
    def pack(self, x: Tensor, context: Context) -> Arrays:
        return {"values": x.contiguous()}

    @override
    def unpack(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return arrays["values"].detach()


class BFloat16(Format):
    """Every number in bfloat16: 8 bits of precision, any range; relative error at most 2^-8."""

    source = "-"
    dtype = torch.bfloat16

    @override
    def pack(self, x: Tensor, context: Context) -> Arrays:
        return {"values": x.to(self.dtype).contiguous()}

    @override
    def unpack(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return arrays["values"].detach().float()


class Float16(BFloat16):
    """Every number in half precision: 11 bits of precision, clipped to +-65504; relative error at most 2^-11."""

    dtype = torch.float16

    @override
    def pack(self, x: Tensor, context: Context) -> Arrays:
        most = torch.finfo(torch.float16).max
        return super().pack(x.clamp(-most, most), context)
