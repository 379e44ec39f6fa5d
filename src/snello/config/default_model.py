"""Which model a run takes where none is named: real weights for pictures of one's own, a toy to try snello with."""

from dataclasses import dataclass, replace
from typing import Any, TypeVar

from snello.environment import total_memory

C = TypeVar("C")

TOY = "vit_micro_patch4_32"
"""The model that ships with snello: it sees pictures at 32 x 32 pixels."""
USUAL, SMALLER = "deit_small_patch16_224", "deit_tiny_patch16_224"
"""Under the Apache License 2.0, pretrained on ImageNet: 22 and 6 million parameters."""
ROOM = 6 * 2**30
"""Bytes of memory that a machine has in all, below which the smaller one is taken."""
OTHERS = f"another: --model NAME (docs/models.md); to try things only: --model {TOY}, a toy"


@dataclass(frozen=True)
class DefaultModel:
    """What `auto` means."""

    name: str
    line: str
    """The first line of a run: the model, why, and what to do to have another."""


def default_model(own_pictures: bool, weights: str) -> DefaultModel:
    """The model for pictures of the user's own, by what fits this machine, or for those that ship with snello."""
    if not own_pictures:
        return DefaultModel(TOY, toy_run(TOY))
    memory, name, parameters = total_memory(), USUAL, 22
    why = "the usual for pictures of your own"
    if memory is not None and memory < ROOM:
        name, parameters = SMALLER, 6
        why = f"the small one, since this machine has {memory / 2**30:.1f} GiB of memory, less than {ROOM >> 30}"
    what = f"{name}, {'pretrained on ImageNet, ' if weights == 'pretrained' else ''}{parameters} M parameters"
    return DefaultModel(name, f"model: {what}: {why}; {OTHERS}")


def named(config: C, chosen: DefaultModel) -> C:
    """`config`, a `FinetuneConfig`, with the chosen model where it names none."""
    known: Any = config
    named: C = replace(known, model=chosen.name) if known.model == "auto" else config
    return named


def toy_run(name: str) -> str:
    """The first line of a run on the pictures that ship with snello."""
    what = f"a toy: the model ({TOY}) and the pictures ship" if name == TOY else "the pictures are those that ship"
    return f"{what} with snello, to try it with; for your own: --data FOLDER"
