"""Which pictures, steps and learning rates a run has: a pure function of its settings, the same on both sides of a cut.

A step is one optimizer step of up to `accumulate` micro-steps; a step never spans two epochs.
"""

import math
from dataclasses import dataclass

from snello.train.optim import lr_factor


@dataclass(frozen=True)
class Schedule:
    """The steps of a run."""

    num_train: int
    """Pictures in an epoch."""
    batch_size: int
    """Pictures in a batch, over all ranks."""
    accumulate: int
    epochs: int
    buffer: int = 1
    """Batches that make one exchange at a cut."""
    max_steps: int | None = None
    """Steps after which a budget of traffic is spent; it decides alone."""

    @property
    def batches_per_epoch(self) -> int:
        """Batches in an epoch, the last perhaps smaller."""
        return math.ceil(self.num_train / self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the last may have fewer batches."""
        return math.ceil(self.batches_per_epoch / self.accumulate)

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the run."""
        return self.max_steps or self.epochs * self.steps_per_epoch

    @property
    def total_epochs(self) -> int:
        """Epochs that those steps begin."""
        return math.ceil(self.total_steps / self.steps_per_epoch)

    def epoch(self, step: int) -> int:
        """The epoch that `step` is in, from 0 on."""
        return step // self.steps_per_epoch

    def num_samples(self, step: int) -> int:
        """Pictures in a step."""
        per_step = self.batch_size * self.accumulate
        return min(per_step, self.num_train - step % self.steps_per_epoch * per_step)

    def batch_samples(self, number: int) -> int:
        """Pictures in a batch, counted from the start of the run."""
        return min(self.batch_size, self.num_train - number % self.batches_per_epoch * self.batch_size)

    def num_batches(self, step: int) -> int:
        """Batches in a step."""
        return math.ceil(self.num_samples(step) / self.batch_size)

    def num_micro(self, step: int) -> int:
        """Micro-steps in a step."""
        return math.ceil(self.num_batches(step) / self.buffer)

    def batches_of(self, step: int, micro: int) -> range:
        """The batches of a micro-step, counted from the start of the run."""
        epoch, index = divmod(step, self.steps_per_epoch)
        first = epoch * self.batches_per_epoch + index * self.accumulate
        begin = first + micro * self.buffer
        return range(begin, min(begin + self.buffer, first + self.num_batches(step)))

    def progress(self, step: int) -> float:
        """Share of the run that is done before `step`, in [0, 1)."""
        return step / self.total_steps

    def lr(self, step: int, base: float, warmup: float) -> float:
        """The learning rate of a step: linear warm-up, then a cosine to zero."""
        return base * lr_factor(step, self.total_steps, warmup)
