"""Where a run lives: what the training loop leaves to others.

The loop asks for a model and a learner, and hands over what is to be saved. Whether weights lie in one process or with
a server, and what is to be done where the other side has lost steps, it does not know.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from snello import files
from snello.config import FinetuneConfig
from snello.devices import Precision
from snello.methods.lora import merged_state
from snello.models import create_model
from snello.runs import checkpoint
from snello.runs.folder import RunFolder, require_same_config, require_same_length
from snello.runs.resolved import Resolved, ServerAddress
from snello.train.learner import Learner, WholeLearner
from snello.train.optim import optimizer_bytes
from snello.train.ranks import ALONE, Ranks, make_accelerator
from snello.train.schedule import Schedule
from snello.train.tracking import require_trackers
from snello.vit import ViT
from snello.vit.times import Times

State = dict[str, Any]
"""What a checkpoint says beside weights and optimizers, as values that JSON can hold."""


class GoBack(Exception):
    """Steps have been lost elsewhere: `Place.go_back` says where the run continues."""


@dataclass
class Progress:
    """How far a run has come; saved in every checkpoint."""

    step: int = 0
    accuracy: float = -1.0
    """Best held-out accuracy so far, of the weights in model.safetensors."""
    best_epoch: int = 0
    last_accuracy: float = -1.0
    epochs: int = 0
    """Epochs trained."""
    finished: bool = False
    right: list[int] = field(default_factory=list)
    """For each class, the held-out pictures that the weights in model.safetensors recognise."""


@dataclass(frozen=True)
class Setup:
    """What a learner is made for."""

    config: FinetuneConfig
    num_classes: int
    device: torch.device
    precision: Precision
    schedule: Schedule
    """Without the learner's own buffer and budget."""
    codec: str | None = None
    """The codec at the cut, `auto` resolved."""
    times: Times | None = None
    """What a block takes here, for --alast.time."""
    ranks: Ranks = ALONE
    stop: list[int] = field(default_factory=list)
    """Fills when the user asks to stop."""
    run: RunFolder | None = None
    """Where the learner may keep files; None where it takes no step."""


MakeLearner = Callable[[ViT, Setup], Learner]


class Place(ABC):
    """Where a run lives; `saved` is what was decided when it began, None for a new one."""

    server: ServerAddress | None = None
    """Where the other half of the model is, if it is not here."""

    def __init__(self, config: FinetuneConfig, run: RunFolder, saved: Resolved | None = None) -> None:
        self.config, self.run, self.saved = config, run, saved

    @abstractmethod
    def make_model(self, num_classes: int) -> nn.Module:
        """The model to train."""

    @abstractmethod
    def make_learner(self, vit: ViT, setup: Setup) -> Learner:
        """What the loop drives."""

    @abstractmethod
    def begin(self, learner: Learner, resolved: Resolved, state: Callable[[], State]) -> State | None:
        """Puts a new run, whose `state` can be asked for, in its folder, or weights and optimizers of an old one back.

        Returns:
            The state to resume from; None at the start.
        """

    @abstractmethod
    def save(self, learner: Learner, progress: Progress, state: State) -> None:
        """Writes a checkpoint, from which `begin` can resume."""

    @abstractmethod
    def command(self) -> str:
        """What the user types to resume the run."""

    def checkpoint(self) -> Path | None:
        """The last checkpoint, where there is one."""
        return self.run.checkpoint_file if self.run.checkpoint_file.exists() else None

    def go_back(self, error: GoBack, progress: Progress) -> State | None:
        """Loads the checkpoint from which the run continues; None where only the step under way is done again."""
        raise error

    def require_room(self, learner: Learner) -> None:
        """Raises a CheckpointError where what the next epoch saves does not fit on the disk."""
        modules, optimizers = learner.modules, learner.optimizers
        kept, all_weights = (
            sum(value.nbytes for module in some.values() for value in module.state_dict().values())
            for some in (checkpoint.with_weights(modules), modules)
        )
        moments = sum(optimizer_bytes(optimizer) for optimizer in optimizers.values())
        started = self.checkpoint() is not None
        advice = f"free space, then: {self.command()}" if started else "free space or choose another --out"
        self.run.require_room(kept, all_weights + moments, advice)

    def begin_evaluation(self) -> None:
        """Called before an evaluation."""

    def end_evaluation(self, progress: Progress) -> None:
        """Called after an evaluation."""

    def finish(self) -> None:
        """Called when all steps are done; may raise GoBack."""

    def traffic(self) -> Mapping[str, Any]:
        """Fields of `snello.runs.summary.Traffic` that only the place knows."""
        return {}

    def close(self) -> None:
        """Ends what the place holds open."""
        self.run.release()

    def save_best(self, learner: Learner) -> None:
        """Writes the weights that are the best so far, adapters merged, and beside them the adapters."""
        for name, module in checkpoint.with_weights(learner.modules).items():
            files.save_tensors(self.run.weights_files[name], merged_state(module))
        learner.save_adapters(self.run.adapter_folder)

    def save_method(self, progress: Progress, state: State) -> None:
        """Writes alast.json at the end of a run."""
        if "alast" in self.config.method_name and progress.finished:
            files.save_json(self.run.alast_file, state["learner"]["method"])


def make_whole_learner(vit: ViT, setup: Setup) -> Learner:
    """A learner for a model in one piece."""
    accelerator = make_accelerator(setup.device, setup.precision, setup.ranks)
    return WholeLearner(vit, setup.config, accelerator, setup.num_classes, setup.times)


class LocalPlace(Place):
    """A run with all of its model, whole or cut, in this process, or in several that torchrun started.

    Raises:
        SnelloError: where the run folder cannot be used; nothing has been written.
    """

    def __init__(
        self, config: FinetuneConfig, make_learner: MakeLearner = make_whole_learner, ranks: Ranks = ALONE
    ) -> None:
        self._make_learner, self._ranks = make_learner, ranks
        super().__init__(config, *ranks.from_main(lambda: _open(config)))

    @override
    def make_model(self, num_classes: int) -> nn.Module:
        return create_model(self.config.model, self.config.weights, num_classes, self.config.image_size)

    @override
    def make_learner(self, vit: ViT, setup: Setup) -> Learner:
        return self._make_learner(vit, setup)

    @override
    def begin(self, learner: Learner, resolved: Resolved, state: Callable[[], State]) -> State | None:
        if self.saved is None:
            self._ranks.on_main(lambda: self.run.create(self.config, resolved))
            return None
        self._ranks.on_main(self.run.lock)
        if not self._ranks.from_main(self.run.checkpoint_file.exists):
            self._ranks.on_main(lambda: self.run.forget_after(0))
            return None
        with self._ranks.together():
            return checkpoint.load_checkpoint(self.run.checkpoint_file, learner.modules, learner.optimizers)

    @override
    def save(self, learner: Learner, progress: Progress, state: State) -> None:
        def write() -> None:
            checkpoint.save_checkpoint(self.run.checkpoint_file, learner.modules, learner.optimizers, state)
            self.save_method(progress, state)

        self._ranks.on_main(write)

    @override
    def command(self) -> str:
        return self._ranks.command(["finetune", "--out", str(self.run.path), "--resume"])


def _open(config: FinetuneConfig) -> tuple[RunFolder, Resolved | None]:
    """The run folder, and what was resolved where a run is resumed."""
    require_trackers(config.track)
    run = RunFolder.of(config)
    if not config.resume:
        return run, None
    saved_config, saved = run.read()
    if saved.server is None:
        require_same_length(run, saved_config, config)
    require_same_config(saved_config, config, run.path)
    run.require_resumable(config)
    return run, saved
