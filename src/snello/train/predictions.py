"""What a model says of each held-out picture: its most probable classes, kept for the report of a run."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from snello.data import PictureSet
from snello.files import replacing

TOP = 5
"""Classes that are kept of each picture."""


class Predictions:
    """The most probable classes of `num` pictures, of which this rank sees those from `start` on, in order."""

    def __init__(self, num: int, num_classes: int, start: int, device: torch.device) -> None:
        self._top = min(TOP, num_classes)
        self._next = start
        # Probabilities, classes and the label's probability in one tensor, so that ranks can add theirs up in one go.
        self._values = torch.zeros(num, 2 * self._top + 1, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Notes the logits (B, C) of the next pictures, whose `labels` (B,) are known."""
        probabilities = logits.double().softmax(1)
        best = probabilities.topk(self._top, dim=1)
        rows = self._values[self._next : self._next + len(logits)]
        rows[:, : self._top], rows[:, self._top : -1] = best.values, best.indices.double()
        rows[:, -1] = probabilities.gather(1, labels[:, None])[:, 0]
        self._next += len(logits)

    def gather(self, total: Callable[[Tensor], Tensor]) -> None:
        """Brings together what the ranks have noted; every rank has to call it."""
        self._values = total(self._values)

    def rows(self, pictures: PictureSet) -> Iterator[dict[str, object]]:
        """A row a picture: its name and label, the class that was predicted, the best ones, and the label's share.

        Classes are numbers in the order of the logits; `top` holds `[class, probability]`, the most probable first.
        """
        for index, values in enumerate(self._values.tolist()):
            best = [[int(c), round(p, 5)] for p, c in zip(values[: self._top], values[self._top : -1], strict=True)]
            yield {
                "index": index,
                "name": pictures.name(index),
                "label": pictures.labels[index],
                "predicted": best[0][0],
                "p": round(values[-1], 5),
                "top": best,
            }

    def write(self, file: Path, pictures: PictureSet) -> None:
        """Writes the rows as JSON lines, whole or not at all."""
        file.parent.mkdir(exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows(pictures)), encoding="utf-8")
