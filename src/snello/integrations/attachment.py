"""What the callbacks share: ALaST on a host's model, its steps, its state in the host's checkpoints, its metrics."""

from dataclasses import fields
from typing import Any, Literal

import torch
from torch import nn

from snello.config import AlastConfig
from snello.errors import CheckpointError, require
from snello.methods.alast import ALaST
from snello.vit import ViT

Log = Literal["blocks", "mean", "none"]

DEFAULTS: dict[str, Any] = {"seed": 0, **{field.name: field.default for field in fields(AlastConfig)}}
"""What ALaST takes, with its defaults."""


class Attachment:
    """ALaST's options, its `seed` among them, and ALaST itself from the start of a host's training to its end.

    Raises:
        ConfigError: for an option that ALaST does not have, or a value out of range.
    """

    def __init__(self, options: dict[str, Any], log: Log) -> None:
        self.config = AlastConfig().with_options({key: value for key, value in options.items() if key != "seed"})
        require(log in ("blocks", "mean", "none"), "log", "blocks, mean or none", log)
        self.options, self.log = options, log
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
        """ALaST's step, before the first forward of the optimizer step that comes after `done` of `total`."""
        self.attached.step(self._lr, optimizer, progress=done / total, process_group=_processes())

    def metrics(self) -> dict[str, float]:
        """Budgets and the blocks that train (1.0) or are frozen (0.0), all or as `log` says, as a logger takes them."""
        if self.log == "none":
            return {}
        budgets, trained = self.attached.budgets, self.attached.trained
        values = {"alast/budget_mean": sum(budgets) / len(budgets), "alast/budget_min": min(budgets)}
        if self.log == "blocks":
            values |= {f"alast/budget_{index}": budget for index, budget in enumerate(budgets)}
            values |= {f"alast/trained_{index}": float(index in trained) for index in range(len(budgets))}
        return values

    def state(self, together: bool) -> dict[str, Any]:
        """All that resuming needs, as JSON holds it; one process alone only if no forward was since the last step."""
        alast = self.attached.state_dict(_processes() if together else None)
        return {"settings": self._settings(), "lr": self._lr, "alast": alast}

    def resume(self, state: Any) -> None:
        """Takes over a `state`; call it after the model was wrapped for data parallelism, for it freezes blocks.

        Raises:
            CheckpointError: where there is none, or it is of other settings.
        """
        if not isinstance(state, dict):
            raise CheckpointError(
                "the checkpoint holds no state of ALaST, so its training cannot be resumed with ALaSTCallback: "
                "go on without it, or start anew from the checkpoint's weights"
            )
        ours, theirs = self._settings(), {**DEFAULTS, **state["settings"]}
        differ = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
        if differ:
            was, now = (", ".join(f"{name}={side.get(name)!r}" for name in differ) for side in (theirs, ours))
            raise CheckpointError(f"the checkpoint is of ALaST with {was}, but ALaSTCallback was given {now}")
        self._lr = state["lr"]
        self.attached.load_state_dict(state["alast"])

    def _settings(self) -> dict[str, Any]:
        return {**DEFAULTS, **self.options, "blocks": self.attached.num_blocks}


def _processes() -> Any:
    """The processes that train together, where there are several."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.group.WORLD if several else None
