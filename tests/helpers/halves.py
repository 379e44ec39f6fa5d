"""A model in two halves in one process, trained on made-up pictures."""

from typing import Any

import torch
from torch import nn

from snello.config import FinetuneConfig, SplitConfig
from snello.split.learner import Cut
from snello.vit import ViT

CPU = torch.device("cpu")
CLASSES = 5
LR = 1e-2


def batch(n: int = 4, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 16, 16, generator=generator), torch.randint(CLASSES, (n,), generator=generator)


def make_cut(model: nn.Module, codec: str = "none", cut: int = 2, precision: str = "fp32", **options: Any) -> Cut:
    run = {key: options.pop(key) for key in ("method", "alast", "label_smoothing", "seed") if key in options}
    split = SplitConfig(cut=cut, codec=codec, **options)
    config = FinetuneConfig(**{"method": "full", "lr": LR, "split": split, **run})
    return Cut(ViT(model), config, num_classes=CLASSES, device=CPU, precision=precision, codec_text=codec)


def step(cut: Cut, batches, index: int = 0, update: bool = True) -> torch.Tensor:
    cut.begin(0.0)
    num = sum(len(labels) for _, labels in batches)
    micros = [batches[at : at + cut.buffer] for at in range(0, len(batches), cut.buffer)]
    torch.manual_seed(index)
    loss = torch.zeros(())
    for micro, some in enumerate(micros):
        loss = loss + cut.backward(some, step=index, micro=micro, num_samples=num, seed=index)
    if update:
        cut.clip(0.0)
        cut.update(LR)
    return loss
