"""Accuracy by class."""

import pytest
import torch
from torch import nn

from snello.models import Preprocessing
from snello.train.scoring import Normalize, Score, score


def test_each_class_counts_the_same():
    result = Score(0.8, 1.0, right=(8, 0, 0), pictures=(8, 2, 0))
    assert result.balanced_accuracy == 0.5
    assert result.per_class(["a", "b", "c"]) == [
        {"class": "a", "pictures": 8, "accuracy": 1.0},
        {"class": "b", "pictures": 2, "accuracy": 0.0},
        {"class": "c", "pictures": 0, "accuracy": None},
    ]


class Brightness(nn.Module):
    """Says class 0 for dark pictures and class 2 for bright ones, never class 1 or 3."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bright = (images.mean((1, 2, 3)) > 0).float()
        return torch.stack([1 - bright, bright * 0, bright, bright * 0], dim=1)


def test_score_counts_in_one_pass():
    pre = Preprocessing(size=2, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0)
    images = torch.tensor([0, 0, 255, 255, 255]).view(5, 1, 1, 1).expand(5, 3, 2, 2).to(torch.uint8)
    labels = torch.tensor([0, 1, 2, 2, 0])
    batches = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    result = score(Brightness(), iter(batches), 4, Normalize(pre, torch.device("cpu")), torch.device("cpu"))
    assert (result.right, result.pictures, result.accuracy) == ((1, 0, 2, 0), (2, 1, 2, 0), 0.6)
    assert result.balanced_accuracy == 0.5
    whole = score(Brightness(), [(images, labels)], 4, Normalize(pre, torch.device("cpu")), torch.device("cpu"))
    assert whole.right == result.right and whole.loss == pytest.approx(result.loss)
