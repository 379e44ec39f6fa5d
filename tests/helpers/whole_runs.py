"""What every source of pictures must stand: a run of two epochs that is cut off and resumed, workers, no surprises."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import QUIET, assert_same_run, finetune, resumed
from PIL import Image

from snello.config import EvaluateConfig, FinetuneConfig
from snello.data import Splits, splits_of
from snello.errors import DataError
from snello.inference import evaluate
from snello.train.loop import Trainer
from snello.train.place import LocalPlace


def coloured(channel: int, seed: int, size: int = 16) -> Image.Image:
    """A noisy picture of one colour: red, green or blue."""
    values = np.random.default_rng(seed).integers(0, 90, (size, size, 3), dtype=np.uint8)
    values[..., int(channel)] += 150
    return Image.fromarray(values)


def save(path: Path, channel: int, seed: int, size: int = 16) -> Path:
    """The same in a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coloured(channel, seed, size).save(path)
    return path


def load(source: str | Path, check: bool = True, **settings: Any) -> Splits:
    """`splits_of` a run with the usual settings."""
    return splits_of(FinetuneConfig(data=source, **{"val_share": 0.25, "check_pictures": check, **settings}))


def error_of(source: str | Path, **settings: Any) -> str:
    """The one line that a source is refused with."""
    with pytest.raises(DataError) as caught:
        load(source, **settings)
    text = str(caught.value)
    assert "\n" not in text
    return text


def assert_whole_run(config: FinetuneConfig, folder: Path) -> dict[str, Any]:
    """Trains two epochs, once at a stretch and once cut off and resumed, with a worker: the same, bit for bit.

    Returns:
        The summary.
    """
    whole = replace(config, out=folder / "whole", workers=0)
    summary = finetune(whole, QUIET)
    assert summary["epochs"] == 2
    cut = replace(config, out=folder / "cut", checkpoint_steps=1, workers=1)
    trainer = Trainer(cut, splits_of(cut), LocalPlace(cut), QUIET)
    trainer.advance(trainer.total_steps // 2 + 1)
    trainer.close()
    finetune(resumed(cut), QUIET)
    assert_same_run(whole.out, cut.out)
    result = evaluate(EvaluateConfig(whole.out, device="cpu", workers=0))
    assert (result["accuracy"], result["per_class"]) == (summary["accuracy"], summary["per_class"])
    splits = splits_of(config)
    for pictures in (splits.train, splits.val):
        copied = pickle.loads(pickle.dumps(pictures))
        assert copied.labels == pictures.labels and copied.name(0) == pictures.name(0)
        assert np.array_equal(np.asarray(copied.open(0)), np.asarray(pictures.open(0)))
        assert pictures.file_bytes() > 0
    return summary
