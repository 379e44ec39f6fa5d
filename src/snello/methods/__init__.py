"""What is trained: each method is one entry of METHODS, and the training loop knows only the interface `Method`."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from snello.config import Recipe
from snello.errors import ConfigError
from snello.methods.alast import ALaST
from snello.methods.lora import Adapters
from snello.vit import ViT


class Method(Protocol):
    """What the training loop asks of a method."""

    def step(self, lr: float, optimizer: torch.optim.Optimizer, progress: float) -> None:
        """Called once per optimizer step, before its first forward.

        Args:
            lr: base learning rate.
            optimizer: holds all parameters.
            progress: share of the steps that are done, in [0, 1).
        """

    def discount(self) -> None:
        """Called after a forward whose samples do not count: they are another rank's."""

    def metrics(self) -> dict[str, Any]:
        """What is logged of the step under way."""

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as values that JSON can hold."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict()`."""

    def detach(self) -> None:
        """Leaves the model as it was found."""


class Fixed:
    """Trains the same parameters at every step: all of them, the head, or the last blocks with norm and head."""

    def __init__(self, vit: ViT, trained: set[int]) -> None:
        self._frozen = [p for name, p in vit.model.named_parameters() if id(p) not in trained and p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def step(self, lr: float, optimizer: torch.optim.Optimizer, progress: float) -> None:
        """Changes nothing."""

    def discount(self) -> None:
        """Nothing."""

    def metrics(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""

    def detach(self) -> None:
        """Makes trainable what was."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)


class AdaptiveMethod:
    """ALaST in the training loop, with its tail of steps that drop no tokens."""

    def __init__(self, vit: ViT, config: Recipe) -> None:
        options = {name: value for name, value in vars(config.alast).items() if name != "full_tail"}
        if options["blocks"] is not None and vit.depth < vit.top_layer - 1:  # a half trains its share of them
            options["blocks"] = max(1, round(options["blocks"] * vit.depth / (vit.top_layer - 1)))
        try:
            self.alast = ALaST(vit, **options, seed=config.seed)
        except ConfigError as error:
            raise ConfigError(f"--alast.{error}") from None  # the name as the user typed it
        self._tail = 1 - config.alast.full_tail

    def step(self, lr: float, optimizer: torch.optim.Optimizer, progress: float) -> None:
        """Moves budgets, draws and freezes; drops tokens until the tail."""
        self.alast.dropping = progress < self._tail
        self.alast.step(lr, optimizer)

    def discount(self) -> None:
        """ALaST's."""
        self.alast.discount()

    def metrics(self) -> dict[str, Any]:
        """Budgets, trained blocks, and where a FLOP target scales the budgets, what the step dropped tokens by."""
        summary = self.alast.summary()
        row = {"budgets": summary["budgets"], "trained": summary["trained"]}
        return row if self.alast.target is None else row | {"step_budgets": self.alast.step_budgets}

    def state_dict(self) -> dict[str, Any]:
        """ALaST's."""
        return self.alast.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """ALaST's."""
        self.alast.load_state_dict(state)

    def detach(self) -> None:
        """ALaST's."""
        self.alast.detach()


class Lora:
    """Adapters in the blocks and the classifier train, all or those that ALaST draws."""

    def __init__(self, vit: ViT, config: Recipe, adaptive: bool) -> None:
        self.adapters = Adapters(vit, config.lora, config.model)
        self._inner: Method | None = AdaptiveMethod(vit, config) if adaptive else None

    def step(self, lr: float, optimizer: torch.optim.Optimizer, progress: float) -> None:
        """ALaST's, where it draws."""
        if self._inner is not None:
            self._inner.step(lr, optimizer, progress)

    def discount(self) -> None:
        """ALaST's."""
        if self._inner is not None:
            self._inner.discount()

    def metrics(self) -> dict[str, Any]:
        """ALaST's."""
        return {} if self._inner is None else self._inner.metrics()

    def state_dict(self) -> dict[str, Any]:
        """ALaST's."""
        return {} if self._inner is None else self._inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """ALaST's."""
        if self._inner is not None:
            self._inner.load_state_dict(state)

    def detach(self) -> None:
        """Takes the adapters out again."""
        if self._inner is not None:
            self._inner.detach()
        self.adapters.remove()


def _full(vit: ViT, config: Recipe) -> Method:
    return Fixed(vit, {id(p) for p in vit.model.parameters()})


def _head(vit: ViT, config: Recipe) -> Method:
    return Fixed(vit, {id(p) for p in vit.head_parameters()})


def _last_k(vit: ViT, config: Recipe) -> Method:
    depth = vit.top_layer - 1
    if config.last_k > depth:
        raise ConfigError(f"--last-k must be in 1..{depth} (the model's depth), got {config.last_k}")
    first = depth - config.last_k + 1
    return Fixed(vit, {id(p) for name, p in vit.model.named_parameters() if vit.layer_of(name) >= first})


def _alast(vit: ViT, config: Recipe) -> Method:
    return AdaptiveMethod(vit, config)


def _lora(vit: ViT, config: Recipe) -> Method:
    return Lora(vit, config, adaptive=False)


def _alast_lora(vit: ViT, config: Recipe) -> Method:
    return Lora(vit, config, adaptive=True)


METHODS: dict[str, Callable[[ViT, Recipe], Method]] = {
    "alast": _alast,
    "full": _full,
    "head": _head,
    "last-k": _last_k,
    "lora": _lora,
    "alast+lora": _alast_lora,
}


def make_method(vit: ViT, config: Recipe, name: str | None = None) -> Method:
    """The method that `name`, or else `config`, names, attached to a model or a part of one.

    Nothing is frozen by ALaST before its first step.

    Raises:
        ConfigError: where an option does not fit the model.
    """
    if config.grad_checkpointing:
        vit.set_grad_checkpointing(True)
    return METHODS[name or config.method_name](vit, config)
