"""How good a model is on labelled pictures: accuracy, and what it hides where classes differ in size."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from snello.data.loaders import Batch
from snello.models import Preprocessing
from snello.vit import logits_of


@dataclass(frozen=True)
class Score:
    """One pass over labelled pictures; accuracies are in [0, 1]."""

    accuracy: float
    loss: float
    """Mean cross-entropy."""
    right: tuple[int, ...]
    """Pictures of each class that were recognised."""
    pictures: tuple[int, ...]
    """Pictures of each class."""

    @property
    def balanced_accuracy(self) -> float:
        """Mean accuracy of the classes that have pictures: each counts the same, however many it has."""
        recalls = [right / num for right, num in zip(self.right, self.pictures, strict=True) if num]
        return sum(recalls) / len(recalls)

    def per_class(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Name, pictures and accuracy (recall) of each class; the accuracy is None where it has no pictures."""
        return [
            {"class": name, "pictures": num, "accuracy": right / num if num else None}
            for name, right, num in zip(classes, self.right, self.pictures, strict=True)
        ]


class Normalize:
    """Turns pictures (B, 3, H, W) uint8 into the float32 a model wants, on its device."""

    def __init__(self, pre: Preprocessing, device: torch.device) -> None:
        self._mean = torch.tensor(pre.mean, device=device).view(3, 1, 1) * 255
        self._std = torch.tensor(pre.std, device=device).view(3, 1, 1) * 255

    def __call__(self, images: Tensor) -> Tensor:
        """The normalised pictures, (B, 3, H, W) float32."""
        return (images.float() - self._mean) / self._std


def no_one(logits: Tensor, labels: Tensor) -> None:
    """Who wants to know nothing of each batch."""


@torch.no_grad()
def score(
    model: nn.Module,
    labelled: Iterable[Batch],
    num_classes: int,
    normalize: Normalize,
    device: torch.device,
    total: Callable[[Tensor], Tensor] = lambda counts: counts,
    each: Callable[[Tensor, Tensor], None] = no_one,
) -> Score:
    """Accuracy, overall and by class, and mean cross-entropy over labelled batches; leaves the model in eval mode.

    `total` adds up what the ranks have counted, each over its share of the batches; `each` is told the logits (B, C)
    and labels (B,) of every batch.
    """
    model.eval()
    loss = torch.zeros((), device=device)
    right = pictures = torch.zeros(num_classes, dtype=torch.int64, device=device)
    for images, labels in labelled:
        labels = labels.to(device)
        logits = logits_of(model(normalize(images.to(device)))).float()
        each(logits, labels)
        pictures = pictures + torch.bincount(labels, minlength=num_classes)
        right = right + torch.bincount(labels[logits.argmax(1) == labels], minlength=num_classes)
        loss += cross_entropy(logits, labels, reduction="sum")
    loss, right, pictures = total(loss), total(right), total(pictures)
    num = int(pictures.sum())
    return Score(int(right.sum()) / num, float(loss) / num, tuple(right.tolist()), tuple(pictures.tolist()))
