"""Rotate and code: the principal components of the embed dimension, one step for all, and an entropy coder.

Transform coding as in pictures and sound (V. Goyal, Theoretical foundations of transform coding, IEEE SPM 2001): after
the rotation few components hold nearly all of the variance, and the coder writes the others in fractions of a bit.

B: samples, N: tokens including P prefix tokens, D: embed dim, K: components of the basis.
"""

import math
import struct
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from typing_extensions import override

from snello.codecs import components
from snello.codecs.base import Arrays, Context, Format, Shape, announced_shape, integer, number
from snello.codecs.bases import KEPT, Basis, Options, Way, principal
from snello.codecs.frequencies import grid_side, groups_of, transform
from snello.errors import ProtocolError, SnelloWarning, TrainingError, require

POOR_DB = 3.0
"""Below this signal-to-noise ratio the user is told that little is left."""
FINEST = 1e-5
"""No step is a smaller part of the root mean square: the numbers themselves are hardly finer."""
DEAD_ZONE = 0.6
"""Below so many steps a number becomes zero: fewer bytes than half a step at the same accuracy."""
_HEADER = struct.Struct("<8sfHB")
"""Of the side information: the basis, the step, P, and whether patches went through a cosine transform."""


class PCA(nn.Module, Format):
    """Tokens as entropy-coded principal components, all rounded to multiples of one step; gradients likewise.

    The sender makes the basis from a batch and sends it along, again after `basis` frames; frames in between name it.

    Args:
        step: of activations, in their root mean square around the mean token, > 0.
        down: of gradients, in their root mean square, > 0; as `step` by default.
        basis: frames that a basis is used for.
        dct: 1 for a cosine transform of activations over the grid of patches, where they make a square; 0 for none.

    Raises:
        ConfigError: for an option out of range.
    """

    source = "https://doi.org/10.1109/79.952802"
    example = "1"
    needs_tokens = varies = True

    def __init__(
        self,
        step: float,
        down: float | None = None,
        basis: int = 20,
        dct: int = 1,
    ) -> None:
        super().__init__()
        require(dct in (0, 1), "dct", "0 or 1", dct)
        self.step = _positive(step, "step")
        self.every = integer(basis, "basis", 1)
        gradients = self.step if down is None else _positive(down, "down")
        self._up = Way(Options(self.step, centre=True, dct=bool(dct)))
        self._down = Way(Options(gradients, centre=False, dct=False))
        self._kept = KEPT
        self._alone = self._warned = False

    @override
    def pack(self, x: Tensor, context: Context) -> Arrays:
        return self._pack(x, context, self._up)

    @override
    def unpack(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return self._unpack(arrays, self._up)

    @override
    def pack_gradient(self, x: Tensor, context: Context) -> Arrays:
        return self._pack(x, context, self._down)

    @override
    def unpack_gradient(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return self._unpack(arrays, self._down)

    @override
    def unpacked_shape(self, arrays: Mapping[str, Tensor]) -> Shape:
        return announced_shape(arrays, 3)

    def _pack(self, x: Tensor, context: Context, way: Way) -> Arrays:
        options, x = way.options, x.float()
        num_prefix, side = min(context.num_prefix_tokens, x.shape[1]), 0
        means = _means(x, num_prefix) if options.centre else x.new_zeros(2, x.shape[2])
        centred = x - _by_token(means, num_prefix, x.shape[1])
        rms = _rms(centred)
        if not math.isfinite(rms):
            raise TrainingError("numbers are too large for pca: their sum is beyond what 32 bits hold")
        if self._alone:
            basis, is_new = principal(centred, options.step), True
        else:
            basis, is_new = way.basis_for(centred, self.every)
        step = min(max(options.step, FINEST) * rms, 1e38)
        if step < 1e-37:  # of nothing but zeros
            step, rms = 1.0, 0.0
        exact = centred @ (basis.inverse / step).float().to(x.device)
        if options.dct and (side := grid_side(x.shape[1] - num_prefix)) > 1:
            exact = transform(exact, num_prefix, side)
        dct = side > 1
        codes = exact.abs().add_(1 - DEAD_ZONE).floor_().copysign_(exact)
        if options.centre and is_new:
            self._warn((rms / step) ** 2 * x.numel(), exact, codes)
        whole = codes.clamp_(-(2**31) + 128, 2**31 - 128).to(torch.int32).cpu().numpy()
        side_bytes, arrays = components.write(whole, groups_of(x.shape[1], num_prefix, dct))
        header = _HEADER.pack(basis.name, step, num_prefix, dct)
        mean_bytes = means.bfloat16().view(torch.int16).cpu().numpy().tobytes() if options.centre else b""
        arrays["scales"] = torch.frombuffer(bytearray(header + mean_bytes + side_bytes), dtype=torch.uint8)
        arrays["indices.shape"] = torch.tensor(x.shape, dtype=torch.int32)
        if is_new:
            arrays["scales.basis"] = basis.codes
        return arrays

    def _unpack(self, arrays: Mapping[str, Tensor], way: Way) -> Tensor:
        B, N, D = announced_shape(arrays, 3)
        side, device = arrays["scales"].cpu().numpy(), arrays["values"].device
        begin = _HEADER.size + (4 * D if way.options.centre else 0)
        if side.dtype != np.uint8 or side.ndim != 1 or len(side) < begin:
            raise ProtocolError("the side information of a frame is cut off")
        name, step, num_prefix, dct = _HEADER.unpack(side[: _HEADER.size].tobytes())
        if num_prefix > N or dct > 1 or not 0 < step < math.inf:
            raise ProtocolError("the side information of a frame does not fit its tokens")
        basis = self._basis(arrays, name, D, way)
        grid = grid_side(N - num_prefix)
        if dct and grid <= 1:
            raise ProtocolError("a cosine transform came without a square grid of patches")
        groups = groups_of(N, num_prefix, bool(dct))
        codes = components.read(side[begin:], arrays, groups, (B, N, basis.codes.shape[1]))
        x = torch.from_numpy(codes).to(device).float()
        if dct:
            x = transform(x, num_prefix, grid, back=True)
        tokens: Tensor = x @ (basis.directions * step).float().to(device).T
        if not way.options.centre:
            return tokens
        means = torch.frombuffer(bytearray(side[_HEADER.size : begin]), dtype=torch.bfloat16).float().view(2, D)
        if not bool(means.isfinite().all()):
            raise ProtocolError("a mean token is not finite")
        return tokens.add_(_by_token(means.to(device), num_prefix, N))

    def _basis(self, arrays: Mapping[str, Tensor], name: bytes, dim: int, way: Way) -> Basis:
        """The basis that a frame names, which may come with it."""
        if "scales.basis" in arrays:
            codes = arrays["scales.basis"].cpu()
            if codes.dtype != torch.int8 or codes.ndim != 2 or len(codes) != dim or not 1 <= codes.shape[1] <= dim:
                raise ProtocolError(f"a basis of shape {tuple(codes.shape)} came with tokens of {dim} dimensions")
            basis = Basis(codes.clone(memory_format=torch.contiguous_format))  # else it would hold the whole frame
            if basis.name != name:
                raise ProtocolError("a frame came with another basis than it names")
            if not self._alone:
                way.learn(basis, self._kept)
            return basis
        if name not in way.known:
            raise ProtocolError("a frame names a basis that is not here", code="unknown-basis")
        if len(way.known[name].codes) != dim:
            raise ProtocolError(f"a basis of other dimensions came with tokens of {dim}")
        return way.known[name]

    @override
    def is_key(self, arrays: Mapping[str, Tensor]) -> bool:
        return "scales.basis" in arrays

    @override
    def forget(self) -> None:
        self._up.current = self._down.current = None

    @override
    def snapshot(self) -> Any:
        return tuple((way.current, way.age, dict(way.known)) for way in (self._up, self._down))

    @override
    def restore(self, state: Any) -> None:
        for way, (current, age, known) in zip((self._up, self._down), state or ((None, 0, {}),) * 2, strict=True):
            way.current, way.age, way.known = current, age, dict(known)

    @override
    def keep_all(self) -> None:
        self._kept = sys.maxsize

    @override
    def for_evaluation(self) -> None:
        self._alone = True  # nothing has to be remembered from one evaluation to the next

    @override
    def get_extra_state(self) -> Tensor:
        """The bases as the bytes of a safetensors file: a module saves tensors, and these have no fixed shape."""
        tensors: dict[str, Tensor] = {}
        for name, way in (("up", self._up), ("down", self._down)):
            tensors |= {f"{name}.known.{index}": basis.codes.clone() for index, basis in enumerate(way.known.values())}
            if way.current is not None:
                tensors[f"{name}.current"] = way.current.codes.clone()
                tensors[f"{name}.numbers"] = torch.tensor([way.current.rows, way.age])
        state: Tensor = torch.frombuffer(bytearray(save(tensors)), dtype=torch.uint8)
        return state

    @override
    def set_extra_state(self, state: Tensor) -> None:
        tensors = load(state.cpu().numpy().tobytes())
        self.restore(None)
        for name, way in (("up", self._up), ("down", self._down)):
            for index in range(KEPT):
                if f"{name}.known.{index}" in tensors:
                    way.learn(Basis(tensors[f"{name}.known.{index}"]), KEPT)
            if f"{name}.current" in tensors:
                rows, way.age = tensors[f"{name}.numbers"].tolist()
                way.current = Basis(tensors[f"{name}.current"], rows)

    def _warn(self, signal: float, exact: Tensor, codes: Tensor) -> None:
        """Says once where so little is left that hardly anything can be learned from it; `signal` is the sum of the
        squares of all numbers, in steps.
        """
        # The basis is orthonormal up to rounding, so what is lost outside and inside of it adds up.
        kept = float((2 * exact * codes - codes.square()).double().sum())
        snr = 10 * math.log10(signal / max(signal - kept, signal * 1e-9)) if signal > 0 else math.inf
        if snr < POOR_DB and not self._warned:
            self._warned = True
            text = f"pca: a step of {self.step:g} leaves a signal-to-noise ratio of {snr:.1f} dB at the cut"
            warnings.warn(f"{text}: use a smaller step", SnelloWarning, stacklevel=2)


def _positive(value: float, name: str) -> float:
    value = number(value, name)
    require(value > 0, name, "above 0", value)
    return value


def _means(x: Tensor, num_prefix: int) -> Tensor:
    """The mean prefix token and the mean patch (2, D), as the other side will have them."""
    num = len(x)
    tokens = (x.new_ones(1, num) @ x.reshape(num, -1)).view(x.shape[1:]) / num  # ten times as fast as `mean`
    parts = (tokens[:num_prefix], tokens[num_prefix:])
    means = [part.mean(dim=0) if part.numel() else x.new_zeros(x.shape[2]) for part in parts]
    return torch.stack(means).bfloat16().float()


def _by_token(means: Tensor, num_prefix: int, num_tokens: int) -> Tensor:
    """The first of `means` (2, D) for each prefix token and the second for each patch, (N, D)."""
    return torch.cat((means[:1].expand(num_prefix, -1), means[1:].expand(num_tokens - num_prefix, -1)))


def _rms(x: Tensor) -> float:
    rms = float(torch.linalg.vector_norm(x)) / math.sqrt(x.numel())
    if 1e-12 < rms < 1e12:
        return rms
    largest = float(x.abs().max())
    return largest * float((x / largest).square().mean().sqrt()) if largest > 0 else 0.0
