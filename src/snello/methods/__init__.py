"""What is trained. The training loop knows a method by the interface `Method` alone.

alast.py        adaptive budgets: `ALaST` for any loop, `AlastMethod` for ours
showing.py      what ALaST makes of a picture, to be looked at
budgets.py      what ALaST's options leave open, and where its budgets go
target.py       ALaST's budgets scaled to meet a share of full fine-tuning's FLOPs or time
lora.py         adapters, alone and on ALaST's budgets
fixed.py        the same parameters at every step: all, the head, the last blocks

A new method is a subclass of `Method` in a file here, and a line in `snello.config.registry.METHODS`.
"""

from pathlib import Path
from typing import Any

import torch

from snello.config import Recipe
from snello.config.registry import METHODS, find
from snello.vit import ViT
from snello.vit.times import Times


class Method:
    """What the training loop asks of a method of a model or a part of one, which overrides what it does otherwise."""

    process_group: "torch.distributed.ProcessGroup | None" = None
    """The processes that train the model together: what a method learns of a step is averaged over them."""

    def __init__(self, vit: ViT, config: Recipe, times: Times | None = None) -> None:
        self.vit = vit

    def step(self, lr: float, optimizer: torch.optim.Optimizer, progress: float) -> None:
        """Called once per optimizer step, before its first forward.

        `lr` is the base learning rate, `progress` the share of the steps that are done, in [0, 1).
        """

    def discount(self) -> None:
        """Called after a forward whose samples do not count: they are another rank's."""

    def num_left(self, num_patches: int) -> int:
        """How many of so many patch tokens the model passes on in the step under way."""
        return num_patches

    def describe(self) -> str:
        """What trains at each step, of all there is: `trains 2.1 of 2.7 M parameters, 9 of 12 blocks`."""
        parameters = list(self.vit.model.parameters())
        blocks = sum(any(p.requires_grad for p in block.parameters()) for block in self.vit.blocks)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        return training_share(trained, sum(p.numel() for p in parameters), blocks, self.vit.depth)

    def metrics(self) -> dict[str, Any]:
        """What is logged of the step under way."""
        return {}

    def save(self, folder: Path) -> None:
        """Writes what of the method can be used without its run, as adapters can, into a folder of their own."""

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as values that JSON can hold."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a `state_dict()`."""

    def detach(self) -> None:
        """Leaves the model as it was found."""
        self.vit.set_exact_savings(False)


def make_method(vit: ViT, config: Recipe, name: str | None = None, times: Times | None = None) -> Method:
    """The method that `name`, or else `config`, names, attached to a model or a part of one.

    ALaST freezes no block before its first step; `times` of a block here are for its time target.

    Raises:
        ConfigError: where an option does not fit the model.
    """
    if config.grad_checkpointing:
        vit.set_grad_checkpointing(True)
    vit.set_exact_savings(config.exact_savings, mlp=not config.grad_checkpointing)
    method: Method = find(METHODS[name or config.method_name])(vit, config, times)
    return method


def training_share(trained: int, parameters: int, blocks: int, depth: int) -> str:
    """What trains, in words: parameters in millions, and blocks."""
    return f"trains {_millions(trained)} of {_millions(parameters)} M parameters, {blocks} of {depth} blocks"


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f}" if number >= 100_000 else f"{number / 1e6:.2g}"
