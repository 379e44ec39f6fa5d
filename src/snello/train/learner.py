"""What the training loop drives: a whole model here, or one that is cut (`snello.split.learner`).

The loop knows pictures, steps and checkpoints; a learner knows how one micro-step makes gradients and how they become
an update.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typing_extensions import override

from snello.config import FinetuneConfig
from snello.data.loaders import Batch
from snello.methods import Method, make_method
from snello.seeds import mix
from snello.train.mixing import Mixing
from snello.train.optim import make_optimizer, set_lr
from snello.vit import ViT, logits_of
from snello.vit.times import Times

# These keep the seeds of the model's noise and the codec's apart from those of order and augmentation.
NOISE, CODEC, SERVER_NOISE = 1, 2, 3


@dataclass(frozen=True)
class MicroStep:
    """One forward and backward pass, or one exchange across a cut."""

    batches: Sequence[Batch]
    """Normalised pictures (B, 3, H, W) and labels (B,) on the device, up to `Learner.buffer` of them."""
    step: int
    micro: int
    """Within the step."""
    num_samples: int
    """Pictures in the whole step."""
    number: int
    """Number of its first batch in the run: what is random depends on it, the rank and the run's seed alone."""
    rank: int = 0

    def noise_seed(self, seed: int) -> int:
        """The seed of the model's noise, in a run of this seed."""
        return mix(seed, NOISE, self.number, *([self.rank] if self.rank else []))

    def codec_seed(self, seed: int) -> int:
        """The seed of what is random in the codec."""
        return mix(seed, CODEC, self.number)


class Learner(ABC):
    """One model in training; every call is about the step under way."""

    buffer = 1
    """Batches that make one micro-step."""
    max_steps: int | None = None
    """Optimizer steps after which a budget is spent; None without one."""
    modules: Mapping[str, nn.Module]
    """Modules with weights to save; `model` is the whole model, or the half that is here, in the whole's names."""
    optimizers: Mapping[str, torch.optim.Optimizer]
    evaluator: nn.Module
    """Normalised pictures (B, 3, H, W) to logits (B, C), in eval mode."""

    @abstractmethod
    def begin(self, step: int, progress: float, num_micro: int) -> None:
        """Begins the optimizer step `step`, from 0 on; `progress` is the share of the run that is done, in [0, 1)."""

    @abstractmethod
    def backward(self, work: MicroStep) -> Tensor:
        """Takes a micro-step forward and backward.

        Returns:
            The micro-step's part of the step's mean loss, () float32, of this rank's pictures.
        """

    @abstractmethod
    def clip(self, max_norm: float) -> dict[str, Tensor]:
        """Clips gradients (0: not) and returns their norms before that, named for the log."""

    @abstractmethod
    def update(self, lr: float) -> None:
        """Moves the weights and drops the gradients."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that is neither in `modules` nor in `optimizers`, as values that JSON can hold."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a `state_dict()`."""

    def restart(self) -> None:
        """Goes back to where the step under way began."""

    def share_spent(self) -> float | None:
        """Share of a budget that is spent, in [0, 1), where it decides how far the run is; else steps do."""
        return None

    def behind(self) -> int:
        """Steps that another side has left to take by itself after the last step, before there is a result."""
        return 0

    def catch_up(self) -> dict[str, Any]:
        """Lets it take some of them, and returns what is logged of it; nothing where the other side logs it."""
        return {}

    def spent(self, step: int) -> bool:
        """Whether the budget leaves no room for another step after `step` of them."""
        return False

    def metrics(self) -> dict[str, Any]:
        """What is logged of the step."""
        return {}

    def eval_metrics(self) -> dict[str, Any]:
        """What is logged of an evaluation."""
        return {}

    @abstractmethod
    def describe(self) -> str:
        """What trains at each step, of all there is."""

    def status(self) -> str:
        """What the progress bar adds."""
        return ""

    def traffic(self) -> dict[str, Any]:
        """Fields of `snello.runs.summary.Traffic`; empty where nothing is cut."""
        return {}

    def save_adapters(self, folder: Path) -> None:
        """Writes the adapters as peft's own files, where there are any."""


class WholeLearner(Learner):
    """A model in one piece, on Accelerate, the same in every process of the run."""

    def __init__(
        self,
        vit: ViT,
        config: FinetuneConfig,
        accelerator: Accelerator,
        num_classes: int,
        times: Times | None = None,
    ) -> None:
        self.config, self.accelerator, device = config, accelerator, accelerator.device
        self._mixing = Mixing(config.augment, num_classes) if config.augment.mixes else None
        self.method: Method = make_method(vit, config, times=times)
        if accelerator.num_processes > 1:
            self.method.process_group = torch.distributed.group.WORLD
        optimizer = make_optimizer(
            vit, lr=config.lr, weight_decay=config.weight_decay, layer_decay=config.layer_decay, device=device
        )
        self._model, self._optimizer = accelerator.prepare(vit.model, optimizer)
        self.modules = {"model": accelerator.unwrap_model(self._model)}
        self.optimizers = {"optimizer": self._optimizer}
        self.evaluator = self.modules["model"]  # not wrapped: ranks evaluate different numbers of batches
        self._num_micro = 1

    @override
    def save_adapters(self, folder: Path) -> None:
        self.method.save(folder)

    @override
    def begin(self, step: int, progress: float, num_micro: int) -> None:
        self._num_micro = num_micro
        self._model.train()
        self.method.step(self.config.lr, self._optimizer, progress)

    @override
    def backward(self, work: MicroStep) -> Tensor:
        ((images, labels),) = work.batches
        images, targets = (images, labels) if self._mixing is None else self._mixing(images, labels)
        last = work.micro == self._num_micro - 1  # only then are gradients averaged over the ranks
        with nullcontext() if last else self.accelerator.no_sync(self._model):
            with self.accelerator.autocast():
                logits = logits_of(self._model(images))
            if len(labels) == 0:  # keeps step with the batches of other ranks, and weighs nothing
                self.method.discount()
                loss: Tensor = logits.float().sum() * 0
            else:
                loss = cross_entropy(logits.float(), targets, label_smoothing=self.config.label_smoothing)
                loss = loss * (len(labels) / work.num_samples)
            self.accelerator.backward(loss * self.accelerator.num_processes)  # whose mean is then the sum
        return loss.detach()

    @override
    def clip(self, max_norm: float) -> dict[str, Tensor]:
        norm = self.accelerator.clip_grad_norm_(self._model.parameters(), max_norm or math.inf)
        assert norm is not None
        return {"grad_norm": norm}

    @override
    def update(self, lr: float) -> None:
        set_lr(self._optimizer, lr)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    @override
    def describe(self) -> str:
        return self.method.describe()

    @override
    def metrics(self) -> dict[str, Any]:
        return self.method.metrics()

    @override
    def state_dict(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {"method": self.method.state_dict()} | ({} if scaler is None else {"scaler": scaler.state_dict()})

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.method.load_state_dict(state["method"])
        if "scaler" in state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
