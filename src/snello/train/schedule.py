"""Which pictures, steps and learning rates a run has: a pure function of its settings, the same on both sides of a cut.

A step is one optimizer step of up to `accumulate` micro-steps; a step never spans two epochs. Where a server trains on
what it has stored, the run's steps are those whose activations are sent; `Replay` says how many more the server takes.
"""

import math
from dataclasses import dataclass, replace

from snello.config import Recipe
from snello.train.optim import lr_factor

FINE = 1 << 20
"""Parts of a run whose progress is no number of steps."""
LEAST_STEPS, MOST_EPOCHS = 250, 50
"""What a run has that does not say how many epochs: so many steps, if that takes no more epochs."""


def enough_epochs(config: Recipe, num_train: int, processes: int = 1) -> int:
    """The epochs of a run on so many pictures: as it says, else the usual or, of few pictures, as many as they need.

    Five epochs of a hundred pictures are ten steps, in which nothing is learned (results/few_pictures.json). Across a
    cut, where an epoch costs traffic, they are the usual.
    """
    if config.epochs is not None or config.split.cut:
        return config.num_epochs
    steps = Schedule.of(config, num_train, processes).steps_per_epoch
    return max(config.num_epochs, min(MOST_EPOCHS, math.ceil(LEAST_STEPS / steps)))


@dataclass(frozen=True)
class Replay:
    """The steps that a server takes on stored activations, between and after those that are sent."""

    first: int
    """The step from which on the client's half is frozen and what it sends is stored."""
    each: int
    """Steps on stored samples after each one that is sent from there on."""
    total: int
    """Steps of the server in all."""

    def server_step(self, step: int) -> int:
        """The server's steps before the one that is sent as `step`."""
        return step + max(0, step - self.first) * self.each


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
    replay: Replay | None = None
    """The server's steps on what it has stored; None where it stores nothing."""

    @classmethod
    def of(cls, config: Recipe, num_train: int, processes: int = 1) -> "Schedule":
        """The schedule of a run on so many pictures."""
        split = config.split
        made = cls(num_train, config.batch_size * processes, config.accumulate, split.sent_epochs(config.num_epochs))
        if not split.stores:
            return made
        per_epoch = made.steps_per_epoch
        first, each = split.trained_epochs * per_epoch, split.replay
        return replace(made, replay=Replay(first, each, config.num_epochs * per_epoch))

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

    @property
    def server_steps(self) -> int:
        """Optimizer steps of the half or model that takes most."""
        return self.total_steps if self.replay is None else self.replay.total

    def server_step(self, step: int) -> int:
        """The server's steps before the one that is sent as `step`; after the last one is sent, all of them."""
        if self.replay is None or step >= self.total_steps:
            return step if self.replay is None else self.replay.total
        return self.replay.server_step(step)

    def checkpoint(self, step: int, finished: bool) -> int:
        """The number of a checkpoint after `step` steps: theirs, or one more for the end of a run with a replay.

        Before its last evaluation such a run has a checkpoint of the last step already: the client may leave then.
        """
        return step + int(finished and self.replay is not None and step >= self.total_steps)

    def progress(self, step: int) -> float:
        """Share of the run that is done before `step`, in [0, 1)."""
        return self.server_step(step) / self.server_steps

    def lr(self, step: int, base: float, warmup: float, share: float | None = None) -> float:
        """The learning rate of a step: linear warm-up, then a cosine to zero.

        They go over the steps; or where the `share` of the run that is done, in [0, 1), is known otherwise, over that.
        """
        if share is not None:
            return base * lr_factor(min(int(share * FINE), FINE - 1), FINE, warmup)
        return self.lr_at(self.server_step(step), base, warmup)

    def lr_at(self, server_step: int, base: float, warmup: float) -> float:
        """The learning rate of a step of the server."""
        return base * lr_factor(server_step, self.server_steps, warmup)
