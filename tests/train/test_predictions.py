"""What is kept of each held-out picture: the same, however many ranks share the pictures."""

import json

import numpy as np
import torch
from conftest import finetune
from torch import Tensor

from snello.config import FinetuneConfig
from snello.data.sets import ArrayPictures
from snello.train.predictions import Predictions

CPU = torch.device("cpu")
LOGITS = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)) * 3
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0])
PICTURES = ArrayPictures(np.zeros((7, 4, 4), np.uint8), LABELS.numpy(), ("a", "b", "c"), "picture")


def predictions_of(start: int, end: int) -> Predictions:
    predictions = Predictions(7, 3, start, CPU)
    for first in range(start, end, 2):
        last = min(first + 2, end)
        predictions.add(LOGITS[first:last], LABELS[first:last])
    return predictions


def test_rows_name_the_most_probable_classes_and_the_labels_share() -> None:
    rows = list(predictions_of(0, 7).rows(PICTURES))
    assert [row["name"] for row in rows] == [f"picture {i}" for i in range(7)]
    probabilities = LOGITS.double().softmax(1)
    for row, expected, label in zip(rows, probabilities, LABELS.tolist(), strict=True):
        assert row["label"] == label and row["predicted"] == int(expected.argmax())
        assert abs(row["p"] - float(expected[label])) < 1e-5  # type: ignore[operator]
        assert [c for c, _ in row["top"]] == expected.argsort(descending=True).tolist()  # type: ignore[attr-defined]


def test_ranks_bring_theirs_together() -> None:
    parts = [predictions_of(0, 4), predictions_of(4, 7)]
    values = torch.zeros(7, 7, dtype=torch.float64)

    def add(mine: Tensor) -> Tensor:
        values.add_(mine)
        return values

    for part in parts:
        part.gather(add)
    assert list(parts[1].rows(PICTURES)) == list(predictions_of(0, 7).rows(PICTURES))


def test_a_run_keeps_those_of_the_weights_it_keeps(small: FinetuneConfig) -> None:
    summary = finetune(small, report=True)
    assert small.out is not None
    rows = [json.loads(line) for line in (small.out / "report" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 9 and {row["label"] for row in rows} == {0, 1, 2}
    assert sum(row["label"] == row["predicted"] for row in rows) / 9 == summary["accuracy"]


def test_a_run_without_a_report_keeps_none(small: FinetuneConfig) -> None:
    finetune(small)
    assert small.out is not None and not (small.out / "report").exists()
