"""A model in two halves in one process, trained on made-up pictures."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snello.config import FinetuneConfig, SplitConfig
from snello.devices import Precision
from snello.split.learner import LocalLink, make_split_learner
from snello.split.wire.frames import Frame
from snello.train.learner import MicroStep
from snello.train.place import Setup
from snello.train.schedule import Schedule
from snello.vit import ViT

CPU = torch.device("cpu")
CLASSES = 5
LR = 1e-2

Batches = Sequence[tuple[Tensor, Tensor]]


class Cut:
    """A learner with both halves, under short names for what tests look at; it takes steps on any batches."""

    def __init__(
        self, model: nn.Module, config: FinetuneConfig, precision: Precision = "fp32", num_classes: int = CLASSES
    ) -> None:
        self.vit, self.num_classes = ViT(model), num_classes
        setup = Setup(config, num_classes, CPU, precision, Schedule(8, 8, 1, 1), config.split.codec_text)
        self.learner = make_split_learner(self.vit, setup)
        assert isinstance(self.learner.link, LocalLink)
        self.link = self.learner.link
        self.client, self.server = self.learner.half, self.link.model.half
        self.codec, self.ledger, self.counters = self.learner.codec, self.learner.ledger, self.learner.ledger.counters
        self.buffer, self.optimizers, self.evaluator = (
            self.learner.buffer,
            self.learner.optimizers,
            self.learner.evaluator,
        )

    def begin(self, step: int = 0, batches: Batches = ()) -> None:
        """Begins a step on these batches."""
        batches = batches or [batch()]
        sizes = [len(labels) for _, labels in batches]
        self.link.steps.schedule = Schedule(sum(sizes), max(sizes), len(batches), 1 << 20, buffer=self.buffer)
        self.learner.begin(step, 0.0, -(-len(batches) // self.buffer))

    def backward(self, batches: Batches, step: int, micro: int, num_samples: int) -> Tensor:
        """One exchange."""
        return self.learner.backward(MicroStep(batches, step, micro, num_samples, step))

    def frames(self, act: Callable[[], Any]) -> list[Frame]:
        """What crosses the cut, both ways, while `act` runs."""
        seen: list[Frame] = []
        exchange = self.link.exchange

        def watched(frame: Frame) -> Frame:
            seen.append(frame)
            seen.append(exchange(frame))
            return seen[-1]

        self.link.exchange = watched  # type: ignore[method-assign]
        try:
            act()
        finally:
            del self.link.exchange
        return seen


def batch(n: int = 4, seed: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 16, 16, generator=generator), torch.randint(CLASSES, (n,), generator=generator)


def make_cut(model: nn.Module, codec: str = "none", cut: int = 2, precision: Precision = "fp32", **options: Any) -> Cut:
    run = {
        key: options.pop(key)
        for key in ("method", "alast", "exact_savings", "label_smoothing", "seed")
        if key in options
    }
    split = SplitConfig(cut=cut, codec=codec, **options)
    return Cut(
        model,
        FinetuneConfig(**{"method": "full", "lr": LR, "warmup": 0.0, "clip_norm": 0.0, "split": split, **run}),
        precision,
    )


def step(cut: Cut, batches: Batches, index: int = 0, update: bool = True) -> Tensor:
    cut.begin(index, batches)
    num = sum(len(labels) for _, labels in batches)
    micros = [batches[at : at + cut.buffer] for at in range(0, len(batches), cut.buffer)]
    torch.manual_seed(index)
    loss = torch.zeros(())
    for micro, some in enumerate(micros):
        loss = loss + cut.backward(some, index, micro, num)
    if update:
        cut.learner.clip(0.0)
        cut.learner.update(LR)
    else:  # the server's are kept aside, where another client's would not be added to them
        cut.link.model.swap_gradients(cut.link.steps._gradients)
    return loss
