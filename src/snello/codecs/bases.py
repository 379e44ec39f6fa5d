"""The bases of principal components that both sides of a cut compute with: made, named, sent, and kept.

B: samples, N: tokens, D: embed dim, K: components.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

KEPT = 2
"""Bases that a receiver keeps: frames that were under way may still name the one before."""


@dataclass(frozen=True)
class Basis:
    """K directions in the space of tokens, in 8 bits; both sides compute with the same rounded numbers."""

    codes: Tensor
    """(D, K) int8."""
    rows: int = 0
    """Samples that it was made of; known to the sender alone."""

    @cached_property
    def name(self) -> bytes:
        """Eight bytes that tell bases apart."""
        text = str(tuple(self.codes.shape)).encode() + self.codes.numpy().tobytes()
        return hashlib.blake2b(text, digest_size=8).digest()

    @cached_property
    def directions(self) -> Tensor:
        """The directions, (D, K) float64, each of length 1."""
        whole = self.codes.to(torch.int64)
        lengths = (whole * whole).sum(dim=0).double().sqrt().clamp_min(1)
        directions: Tensor = whole / lengths
        return directions

    @cached_property
    def inverse(self) -> Tensor:
        """What gives the components of a token, (D, K) float64: rounding leaves the directions not quite orthogonal."""
        inverse: Tensor = torch.linalg.solve(self.directions.T @ self.directions, self.directions.T).T
        return inverse


@dataclass(frozen=True)
class Options:
    """What one direction is written with."""

    step: float
    """Of rounding, in the root mean square of what is written, > 0."""
    centre: bool
    """Whether the mean prefix token and the mean patch are taken off, and travel apart."""
    dct: bool
    """Whether patches on a square grid go through a cosine transform."""


class Way:
    """The bases of one direction."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.current: Basis | None = None
        """What is sent with."""
        self.age = 0
        """Frames sent since it was made, that one included."""
        self.known: dict[bytes, Basis] = {}
        """What came, by name, the last at the end."""

    def learn(self, basis: Basis, most: int) -> None:
        """Keeps a basis that came, and the `most` last ones in all."""
        self.known.pop(basis.name, None)
        self.known[basis.name] = basis
        while len(self.known) > most:
            del self.known[next(iter(self.known))]

    def basis_for(self, tokens: Tensor, every: int) -> tuple[Basis, bool]:
        """The basis to send tokens (B, N, D) with, and whether it is new to the other side."""
        old = self.current
        # One of a small batch, such as the last of an epoch, would be worse than an old one.
        lasts = old is not None and (self.age < every or 2 * len(tokens) < old.rows)
        if old is not None and lasts and len(old.codes) == tokens.shape[2]:
            self.age += 1
            return old, False
        self.current, self.age = principal(tokens, self.options.step), 1
        return self.current, True


def principal(tokens: Tensor, finest: float) -> Basis:
    """The principal components of tokens (B, N, D) that a step of `finest` root mean squares still sees."""
    x = tokens.flatten(0, 1)
    largest = float(x.abs().max())
    scaled = x / largest if largest > 0 else x
    moments = (scaled.T @ scaled / len(scaled)).double().cpu()
    variances, vectors = torch.linalg.eigh(moments)
    deviations = variances.clamp_min(0).sqrt().flip(0)
    num = max(1, int((deviations > 0.15 * finest * deviations.square().mean().sqrt()).sum()))
    vectors = vectors.flip(1)[:, :num]
    codes = (vectors * (127 / vectors.abs().amax(dim=0))).round().to(torch.int8)
    return Basis(codes.contiguous(), len(tokens))
