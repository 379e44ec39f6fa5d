"""How good a model is on labelled pictures: accuracy, and what it hides where classes differ in size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """One pass over labelled pictures; accuracies are in [0, 1]."""

    accuracy: float
    loss: float
    """Mean cross-entropy."""
    right: tuple[int, ...]
    """Of each class, the pictures that were recognised."""
    pictures: tuple[int, ...]
    """Of each class, the pictures that there were."""

    @property
    def balanced_accuracy(self) -> float:
        """Mean accuracy of the classes that have pictures: each counts the same, however many it has."""
        recalls = [right / num for right, num in zip(self.right, self.pictures, strict=True) if num]
        return sum(recalls) / len(recalls)

    def per_class(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Of each class its name, pictures and accuracy (recall), which is None where it has no pictures."""
        return [
            {"class": name, "pictures": num, "accuracy": right / num if num else None}
            for name, right, num in zip(classes, self.right, self.pictures, strict=True)
        ]
