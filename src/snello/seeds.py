"""Numbers and orders drawn from seeds: the same on every machine, and unrelated for neighbouring seeds."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def mix(*values: int) -> int:
    """One number in [0, 2**63) from several, in this order: the finalizer of splitmix64 after adding each in turn.

    Neighbouring values give unrelated results, also in the low 32 bits, the only ones torch's CPU generator uses.
    """
    mask, state = 2**64 - 1, 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def permutation(num: int, seed: int) -> list[int]:
    """The numbers 0..num-1 in an order drawn from `seed`."""
    order: list[int] = torch.randperm(num, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws from torch's global CPU generator as of `seed` in this block; what follows draws as if it had not been."""
    state = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed GPUs, for good
        yield
    finally:
        torch.set_rng_state(state)
