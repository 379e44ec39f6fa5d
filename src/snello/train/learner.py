"""What the training loop drives: a whole model, a model cut in one process, or later a half of one.

The loop knows pictures, steps and checkpoints; a learner knows how one micro-step makes gradients and how they become
an update.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from snello.config import FinetuneConfig
from snello.data.loaders import Batch
from snello.methods import Method, make_method
from snello.seeds import mix
from snello.train.optim import make_optimizer, set_lr
from snello.vit import ViT, logits_of

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
    """Of its first batch in the run: what is random in it depends on that, the rank and the run's seed alone."""
    rank: int = 0

    def noise_seed(self, seed: int) -> int:
        """Of the model's noise, in a run of this seed."""
        return mix(seed, NOISE, self.number, *([self.rank] if self.rank else []))

    def codec_seed(self, seed: int) -> int:
        """Of what is random in the codec."""
        return mix(seed, CODEC, self.number)


class Learner(Protocol):
    """One model in training; every call is about the step under way."""

    buffer: int
    """Batches that make one micro-step."""
    max_steps: int | None
    """Optimizer steps after which a budget is spent; None without one."""
    modules: Mapping[str, nn.Module]
    """What has weights to save, by name; `model` is the whole model, or the half that is here, in the whole's names."""
    optimizers: Mapping[str, torch.optim.Optimizer]
    """What updates them, by name."""
    evaluator: nn.Module
    """Normalised pictures (B, 3, H, W) to logits (B, C), in eval mode."""

    def begin(self, progress: float, num_micro: int = 1) -> None:
        """Once per step, before the first of its micro-steps.

        Args:
            progress: share of the run that is done, in [0, 1).
            num_micro: micro-steps in the step.
        """

    def backward(self, batches: Sequence[Batch], *, step: int, micro: int, num_samples: int, seed: int) -> Tensor:
        """One micro-step: forward and backward over normalised pictures and labels on the device.

        Args:
            batches: up to `buffer` of them.
            step: of the optimizer.
            micro: micro-step within the step.
            num_samples: pictures in the whole step, the loss's denominator.
            seed: of what is random outside the model.

        Returns:
            The micro-step's part of the step's mean loss, () float32, of this rank's pictures.
        """

    def clip(self, max_norm: float) -> dict[str, Tensor]:
        """Clips gradients (0: not) and returns their norms before that, named for the log."""

    def update(self, lr: float) -> None:
        """Moves the weights and drops the gradients."""

    def spent(self, step: int) -> bool:
        """Whether the budget leaves no room for another step after `step` of them."""

    def metrics(self) -> dict[str, Any]:
        """What is logged of the step."""

    def eval_metrics(self) -> dict[str, Any]:
        """What is logged of an evaluation."""

    def said(self) -> str:
        """What the progress bar adds."""

    def summary(self) -> dict[str, Any]:
        """What is said of the whole run."""

    def state_dict(self) -> dict[str, Any]:
        """All that is neither in `modules` nor in `optimizers`, as values that JSON can hold."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict()`."""


class Whole:
    """A model in one piece, on Accelerate, the same in every process of the run."""

    buffer = 1
    max_steps: int | None = None

    def __init__(self, vit: ViT, config: FinetuneConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.method: Method = make_method(vit, config)
        if accelerator.num_processes > 1:
            self.method.process_group = torch.distributed.group.WORLD
        optimizer = make_optimizer(
            vit,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            device=accelerator.device,
        )
        self._model, self._optimizer = accelerator.prepare(vit.model, optimizer)
        self.modules: Mapping[str, nn.Module] = {"model": accelerator.unwrap_model(self._model)}
        self.optimizers: Mapping[str, torch.optim.Optimizer] = {"optimizer": self._optimizer}
        self.evaluator: nn.Module = self.modules["model"]  # not wrapped: ranks evaluate different numbers of batches
        self._num_micro = 1

    def save_adapters(self, folder: Path) -> None:
        """Writes the adapters as peft's own files, where there are any."""
        self.method.save(folder)

    def begin(self, progress: float, num_micro: int = 1) -> None:
        """See `Learner`."""
        self._num_micro = num_micro
        self._model.train()
        self.method.step(self.config.lr, self._optimizer, progress)

    def backward(self, batches: Sequence[Batch], *, step: int, micro: int, num_samples: int, seed: int) -> Tensor:
        """See `Learner`. A batch without labels keeps step with those of other ranks, and weighs nothing."""
        ((images, labels),) = batches
        last = micro == self._num_micro - 1  # only then are gradients averaged over the ranks
        with nullcontext() if last else self.accelerator.no_sync(self._model):
            with self.accelerator.autocast():
                logits = logits_of(self._model(images))
            if len(labels) == 0:
                self.method.discount()
                loss: Tensor = logits.float().sum() * 0
            else:
                loss = cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
                loss = loss * (len(labels) / num_samples)
            self.accelerator.backward(loss * self.accelerator.num_processes)  # whose mean is then the sum
        return loss.detach()

    def clip(self, max_norm: float) -> dict[str, Tensor]:
        """See `Learner`."""
        norm = self.accelerator.clip_grad_norm_(self._model.parameters(), max_norm or math.inf)
        assert norm is not None
        return {"grad_norm": norm}

    def update(self, lr: float) -> None:
        """See `Learner`."""
        set_lr(self._optimizer, lr)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def spent(self, step: int) -> bool:
        """Never."""
        return False

    def metrics(self) -> dict[str, Any]:
        """The method's."""
        return self.method.metrics()

    def eval_metrics(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def summary(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def said(self) -> str:
        """Nothing."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """The method's, and the gradient scaler's in half precision."""
        scaler = self.accelerator.scaler
        return {"method": self.method.state_dict()} | ({} if scaler is None else {"scaler": scaler.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Learner`."""
        self.method.load_state_dict(state["method"])
        if "scaler" in state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
