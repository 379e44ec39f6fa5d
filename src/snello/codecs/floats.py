"""Numbers as floats: as they are, or in 16 bits."""

from collections.abc import Mapping

import torch
from torch import Tensor

from snello.codecs.base import Arrays, Context, Format


class Float32(Format):
    """Every number as it is: no compression."""

    source = "-"

    def pack(self, x: Tensor, context: Context) -> Arrays:
        """The tensor itself."""
        return {"values": x.contiguous()}

    def unpack(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """The tensor itself, detached from its sender."""
        return arrays["values"].detach()


class BFloat16(Format):
    """Every number in bfloat16: 8 bits of precision, any range; relative error at most 2^-8."""

    source = "-"
    dtype = torch.bfloat16

    def pack(self, x: Tensor, context: Context) -> Arrays:
        """Rounded to nearest."""
        return {"values": x.to(self.dtype).contiguous()}

    def unpack(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """As float32."""
        return arrays["values"].detach().float()


class Float16(BFloat16):
    """Every number in half precision: 11 bits of precision, clipped to +-65504; relative error at most 2^-11."""

    dtype = torch.float16

    def pack(self, x: Tensor, context: Context) -> Arrays:
        """Rounded to nearest; what is too large becomes the largest number, not infinity."""
        most = torch.finfo(torch.float16).max
        return super().pack(x.clamp(-most, most), context)
