"""An entropy coder for small whole numbers: many rANS coders side by side, each step of all of them one numpy call.

Source: J. Duda, Asymmetric numeral systems, arXiv:1311.2540; interleaved as in F. Giesen, arXiv:1402.3392. Tables and
coder compute in whole numbers alone, so that both sides of a network decode alike on any machine. Libraries that do
this have no wheels for Linux on ARM, which is what small devices are.

A table has three bytes: how many symbols are not zero, how fast the others become rarer, and the largest one.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from snello.errors import ProtocolError

LARGEST = 127
"""Symbols are whole numbers from -LARGEST to LARGEST."""
BITS = 12
SLOTS = 1 << BITS
"""Of a table: a symbol's share of them is its probability."""
LOW = 1 << 16
"""A coder's state stays in LOW..LOW << 16."""
_ALPHABET = 2 * LARGEST + 1

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]


def _shares() -> Ints:
    """What the first byte of a table means: slots of all symbols but zero, falling by about 2 %, then by one."""
    shares = [4000]
    while len(shares) < 256:
        shares.append(max(1, shares[-1] * 45 // 46))
    return np.array(shares)


SHARES = _shares()


@dataclass(frozen=True)
class Tables:
    """What symbols T tables are made of."""

    frequency: NDArray[np.uint32]
    """(T * _ALPHABET,): slots of each symbol."""
    start: NDArray[np.uint32]
    """(T * _ALPHABET,): slots of the symbols below."""

    @cached_property
    def slots(self) -> NDArray[np.uint32]:
        """(T * SLOTS,): of the symbol in a slot, its frequency, the slots of it before this one, and the symbol."""
        num = len(self.frequency) // _ALPHABET
        first = (self.frequency << 20) - (self.start << 8) + np.tile(np.arange(_ALPHABET, dtype=np.uint32), num)
        slots = np.repeat(first, self.frequency).reshape(num, SLOTS)
        slots += np.arange(SLOTS, dtype=np.uint32) << 8
        return slots.ravel()

    @classmethod
    def of(cls, parameters: Bytes) -> "Tables":
        """Makes the tables of `parameters` (T, 3).

        Raises:
            ProtocolError: for a largest symbol of 0 or above LARGEST.
        """
        if not len(parameters):
            return cls(np.zeros(0, np.uint32), np.zeros(0, np.uint32))
        share, decay, largest = parameters.astype(np.int64).T
        if (largest < 1).any() or (largest > LARGEST).any():
            raise ProtocolError("a table of the entropy coder has an impossible largest symbol")
        nonzero = np.maximum(SHARES[share], 2 * largest)
        magnitude = np.arange(1, int(largest.max()) + 1)
        weight = np.empty((len(share), len(magnitude)), np.int64)
        weight[:, 0] = 1 << 24
        for index in range(1, len(magnitude)):
            weight[:, index] = weight[:, index - 1] * decay >> 8
        weight *= magnitude <= largest[:, None]
        # Every symbol has a slot; the others are shared out by weight, and what is left over goes to zero.
        spare = nonzero - 2 * largest
        each = (magnitude <= largest[:, None]) + spare[:, None] * weight // (2 * weight.sum(axis=1, keepdims=True))
        frequency = np.zeros((len(share), _ALPHABET), np.int64)
        frequency[:, LARGEST + magnitude] = frequency[:, LARGEST - magnitude] = each
        frequency[:, LARGEST] = SLOTS - frequency.sum(axis=1)
        start = frequency.cumsum(axis=1) - frequency
        return cls(frequency.ravel().astype(np.uint32), start.ravel().astype(np.uint32))


def fit(counts: Ints) -> Bytes:
    """Parameters (T, 3) of tables for symbols that occur `counts` (T, 2 * LARGEST + 1) times."""
    total, zeros = counts.sum(axis=1), counts[:, LARGEST]
    magnitude = np.abs(np.arange(_ALPHABET) - LARGEST)
    others = np.maximum(total - zeros, 1)
    share = np.abs(SHARES - (others * SLOTS / np.maximum(total, 1))[:, None]).argmin(axis=1)
    mean = (counts * magnitude).sum(axis=1) / others
    decay = np.rint(256 * (1 - 1 / np.maximum(mean, 1))).clip(0, 255)
    largest = ((counts > 0) * magnitude).max(axis=1).clip(1)
    return np.stack((share, decay, largest), axis=1).astype(np.uint8)


def num_lanes(num_symbols: int) -> int:
    """Coders side by side: many are fast, but each costs two bytes."""
    return min(2048, 1 + num_symbols // 2048)


def places(symbols: NDArray[np.int8], rows: NDArray[np.int32]) -> Ints:
    """Where each of `symbols` (n,) stands in tables one after the other, when `rows` (n,) names a table for it."""
    where = rows.astype(np.int64)
    where *= _ALPHABET
    where += symbols
    where += LARGEST
    return where


def histograms(where: Ints, num: int) -> Ints:
    """How often each symbol of `num` tables occurs, (num, 2 * LARGEST + 1), given the symbols' `places`."""
    return np.bincount(where, minlength=num * _ALPHABET).reshape(num, _ALPHABET)


def encode(where: Ints, tables: Tables) -> Bytes:
    """The bytes of symbols (n,), given their `places` in the tables."""
    num = len(where)
    lanes = num_lanes(num)
    steps = -(-num // lanes)
    frequency, start = np.zeros((2, steps * lanes), np.uint32)
    frequency[:num], start[:num] = tables.frequency[where], tables.start[where]
    frequency[num:] = SLOTS // 2  # nothing stands there: one bit each, and the decoder drops it
    state = np.full(lanes, LOW, np.uint32)
    words: list[NDArray[np.uint16]] = []
    for own, below in zip(frequency.reshape(steps, lanes)[::-1], start.reshape(steps, lanes)[::-1], strict=True):
        full = np.flatnonzero(state >= own << (32 - BITS))
        taken = state[full]
        words.append(taken.astype(np.uint16))
        state[full] = taken >> 16
        # The half keeps the quotient 2^-13 away from the next whole number: more than doubles are off by.
        whole = ((state + 0.5) / own).astype(np.uint32)
        state += whole * (SLOTS - own) + below
    return np.concatenate((state.view(np.uint16), *reversed(words))).view(np.uint8)


def decode(data: Bytes, rows: NDArray[np.int32], tables: Tables) -> NDArray[np.int8]:
    """The symbols (n,) that `encode` was given, by the tables that `rows` (n,) names for them.

    Raises:
        ProtocolError: where the bytes are too many or too few, or are none that `encode` makes.
    """
    num = len(rows)
    lanes = num_lanes(num)
    steps = -(-num // lanes)
    if len(data) % 2 or len(data) < 4 * lanes or len(data) > 4 * lanes + 2 * steps * lanes:
        raise ProtocolError(f"{len(data)} bytes are not those of {num} symbols")
    words = np.ascontiguousarray(data).view(np.uint16)
    state, words = words[: 2 * lanes].copy().view(np.uint32), words[2 * lanes :]
    begins = np.full(steps * lanes, len(tables.slots), np.int32)
    np.multiply(rows, SLOTS, out=begins[:num])
    slots = np.append(tables.slots, _padding())
    found = np.empty((steps, lanes), np.uint8)
    at = 0
    for begin, row in zip(begins.reshape(steps, lanes), found, strict=True):
        entry = slots[begin + (state & (SLOTS - 1)).view(np.int32)]
        row[:] = entry & 0xFF
        state = (entry >> 20) * (state >> BITS) + (entry >> 8 & (SLOTS - 1))
        low = np.flatnonzero(state < LOW)
        after = at + len(low)
        if after > len(words):
            raise ProtocolError("the words of the entropy coder end too early")
        state[low] = state[low] << 16 | words[at:after]
        at = after
    if at != len(words) or (state != LOW).any():
        raise ProtocolError("the words of the entropy coder are damaged: it does not end where it began")
    symbols: NDArray[np.int8] = (found.ravel()[:num] - np.uint8(LARGEST)).view(np.int8)
    return symbols


def _padding() -> NDArray[np.uint32]:
    """A table in which a state's lowest bits mean two symbols of half the slots each."""
    half = SLOTS // 2
    slot = np.arange(SLOTS, dtype=np.uint32)
    packed: NDArray[np.uint32] = np.uint32(half << 20) | slot % half << 8
    return packed
