"""What the callbacks share: ALaST on a host's model, its steps, its state in the host's checkpoints, its metrics."""

import inspect
from typing import Any, Literal

import torch
from torch import nn

from snello.errors import CheckpointError, ConfigError, require
from snello.methods.alast import ALaST
from snello.vit import ViT

Log = Literal["blocks", "mean", "none"]

OPTIONS = {name: p.default for name, p in inspect.signature(ALaST).parameters.items() if p.kind is p.KEYWORD_ONLY}
"""ALaST's options with their defaults."""


class Attachment:
    """ALaST's options, and ALaST itself from the start of a host's training to its end.

    Args:
        options: of `ALaST`.
        full_tail: last share of the training steps that drops no tokens, in [0, 1].
        log: what `metrics` says: `blocks` (all), `mean` (mean and lowest budget) or `none`.

    Raises:
        ConfigError: for an option that ALaST does not have, or a value out of range.
    """

    def __init__(self, options: dict[str, Any], full_tail: float, log: Log) -> None:
        unknown = sorted(options.keys() - OPTIONS.keys())
        if unknown:
            raise ConfigError(f"ALaST has no option {', '.join(unknown)}; it has: {', '.join(OPTIONS)}")
        require(0 <= full_tail <= 1, "full_tail", "in [0, 1]", full_tail)
        require(log in ("blocks", "mean", "none"), "log", "blocks, mean or none", log)
        self.options, self.full_tail, self.log = options, full_tail, log
        self.alast: ALaST | None = None
        """The one in use, or after training the one that was."""
        self._lr = 0.0

    @property
    def attached(self) -> ALaST:
        """ALaST, where the host has started training."""
        assert self.alast is not None, "the host has not started training"
        return self.alast

    def attach(self, model: nn.Module | ViT) -> None:
        """Attaches ALaST to a model."""
        self.alast = ALaST(model, **self.options)

    def detach(self) -> None:
        """Leaves the model as it was found; does nothing the second time."""
        if self.alast is not None:
            self.alast.detach()

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the optimizer's initial learning rate as the base one, the highest where its groups differ."""
        self._lr = max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)

    def step(self, optimizer: torch.optim.Optimizer, done: int, total: float) -> None:
        """ALaST's step, before the first forward of an optimizer step.

        Args:
            optimizer: of the host, or its wrapper around one.
            done: optimizer steps before this one.
            total: optimizer steps of the whole training.
        """
        self.set_dropping(done, total)
        self.attached.step(self._lr, optimizer)

    def set_dropping(self, done: int, total: float) -> None:
        """Passes on all tokens in the tail of the training."""
        self.attached.dropping = self.full_tail == 0 or done / total < 1 - self.full_tail

    def metrics(self) -> dict[str, float]:
        """Budgets and the blocks that train (1.0) or are frozen (0.0), as a logger takes them."""
        if self.log == "none":
            return {}
        budgets, trained = self.attached.budgets, self.attached.trained
        values = {"alast/budget_mean": sum(budgets) / len(budgets), "alast/budget_min": min(budgets)}
        if self.log == "blocks":
            values |= {f"alast/budget_{index}": budget for index, budget in enumerate(budgets)}
            values |= {f"alast/trained_{index}": float(index in trained) for index in range(len(budgets))}
        return values

    def state(self) -> dict[str, Any]:
        """All that a resumed training needs, as numbers, texts, lists and dictionaries."""
        return {"settings": self._settings(), "lr": self._lr, "alast": self.attached.state_dict()}

    def resume(self, state: Any) -> None:
        """Goes on from `state`; call it after the model was wrapped for data parallelism, for it freezes blocks.

        Raises:
            CheckpointError: where there is none, or it is of other settings.
        """
        if not isinstance(state, dict):
            raise CheckpointError(
                "the checkpoint holds no state of ALaST, so its training cannot be resumed with ALaSTCallback: "
                "go on without it, or start anew from the checkpoint's weights"
            )
        ours, theirs = self._settings(), {**OPTIONS, **state["settings"]}
        differ = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
        if differ:
            was, now = (", ".join(f"{name}={side.get(name)!r}" for name in differ) for side in (theirs, ours))
            raise CheckpointError(f"the checkpoint is of ALaST with {was}, but ALaSTCallback was given {now}")
        self._lr = state["lr"]
        self.attached.load_state_dict(state["alast"])

    def _settings(self) -> dict[str, Any]:
        return {**OPTIONS, **self.options, "blocks": self.attached.num_blocks, "full_tail": self.full_tail}
