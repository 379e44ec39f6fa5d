"""Mixup and CutMix: what they make of a batch, of a run, and of one that is cut off."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import QUIET, assert_same_run, finetune, flags, resumed, rows_of, with_method
from helpers.resuming import cut_off, whole
from helpers.run_folders import make_transformers
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from snello import cli
from snello.config import AugmentConfig
from snello.data import splits_of
from snello.train import learner as learners
from snello.train.loop import Trainer
from snello.train.mixing import Mixing
from snello.train.place import LocalPlace
from snello.vit import logits_of

MIXUP, CUTMIX, BOTH = AugmentConfig(mixup=0.8), AugmentConfig(cutmix=1.0), AugmentConfig(mixup=0.8, cutmix=1.0)
CLASSES = 7


def flat_batch(size: int = 5, side: int = 64) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, H, W), the i-th with the value i everywhere, and label i."""
    labels = torch.arange(size)
    return labels.float().reshape(-1, 1, 1, 1).expand(-1, 3, side, side).contiguous(), labels


def own_shares(targets: Tensor, labels: Tensor) -> Tensor:
    """Lambda of every picture (B,): the probability of its own label; the rest must be that of the one before it."""
    rows = torch.arange(len(labels))
    own, other = targets[rows, labels], targets[rows, labels.roll(1)]
    assert targets.shape == (len(labels), CLASSES) and targets.dtype == torch.float32
    assert targets.min() >= 0
    torch.testing.assert_close(own + other, torch.ones(len(labels)), rtol=0, atol=1e-6)
    torch.testing.assert_close(targets.sum(1), torch.ones(len(labels)), rtol=0, atol=1e-6)
    return own


def is_blend(images: Tensor, before: Tensor) -> bool:
    """Whether there are values that stood in neither of the two pictures."""
    return bool(((images != before) & (images != before.roll(1, 0))).any())


# ------------------------------------------------------------------------------------------------------ definitions


@pytest.mark.parametrize("size", [2, 5])
def test_mixup_is_the_convex_combination(size):
    images = torch.randn(size, 3, 8, 10)
    labels, before = torch.arange(size), images.clone()
    for seed in range(20):
        torch.manual_seed(seed)
        mixed, targets = Mixing(MIXUP, CLASSES)(images, labels)
        share = own_shares(targets, labels)
        assert len(set(share.tolist())) == 1, "lambda is the batch's"
        weight = share.reshape(-1, 1, 1, 1)
        torch.testing.assert_close(mixed, weight * images + (1 - weight) * images.roll(1, 0), rtol=0, atol=1e-5)
        assert torch.equal(images, before)


def test_cutmix_pastes_one_rectangle_whose_area_is_the_others_share_of_the_label():
    images, labels = flat_batch()
    before, cut_off_by_an_edge = images.clone(), 0
    for seed in range(60):
        torch.manual_seed(seed)
        mixed, targets = Mixing(CUTMIX, CLASSES)(images, labels)
        assert torch.equal(images, before)
        pasted = mixed != images
        assert torch.equal(torch.where(pasted, images.roll(1, 0), images), mixed)
        assert (pasted == pasted[:1, :1]).all(), "the same place in every picture and channel"
        rows, columns = pasted[0, 0].any(1), pasted[0, 0].any(0)
        assert torch.equal(pasted[0, 0], rows[:, None] & columns)
        assert all(sum(a != b for a, b in pairwise([False, *line.tolist(), False])) <= 2 for line in (rows, columns))
        area = float(pasted[0, 0].sum()) / 64**2  # of a power of two: exact
        assert (1 - own_shares(targets, labels) == area).all()
        cut_off_by_an_edge += rows.sum() != columns.sum()
    assert cut_off_by_an_edge > 10, "a square, or not all of the rule was tested"


@pytest.mark.parametrize("value", [0.75, 0.64])
def test_the_rectangle_has_the_area_1_minus_lambda_where_no_edge_cuts_it_off(monkeypatch, value):
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self, shape=(): torch.tensor([value]))
    images, labels = flat_batch(2)
    shares = []
    for seed in range(40):
        torch.manual_seed(seed)
        shares.append(1 - float(Mixing(CUTMIX, CLASSES)(images, labels)[1][0, 0]))
    side = 2 * int(64 * (1 - value) ** 0.5 / 2)  # whole pixels to both sides of the centre
    assert max(shares) == side**2 / 64**2 == pytest.approx(1 - value, abs=0.03)
    assert min(shares) < 0.75 * max(shares)


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0, 20.0, 100.0])
def test_lambda_follows_beta(alpha):
    images, labels = flat_batch(2, 1)
    torch.manual_seed(0)
    mixing = Mixing(AugmentConfig(mixup=alpha), CLASSES)
    drawn = torch.stack([mixing(images, labels)[1][0, 0] for _ in range(1500)])
    deviation = (1 / (4 * (2 * alpha + 1))) ** 0.5
    assert float(drawn.mean()) == pytest.approx(0.5, abs=4 * deviation / 1500**0.5)
    assert float(drawn.std()) == pytest.approx(deviation, rel=0.1)


def test_with_both_each_batch_takes_one_half_of_them_each():
    images, labels = torch.rand(3, 3, 8, 8), torch.arange(3)
    torch.manual_seed(0)
    mixing = Mixing(BOTH, CLASSES)
    blends = [is_blend(mixing(images, labels)[0], images) for _ in range(400)]
    assert 160 < sum(blends) < 240
    for augment, expected in ((MIXUP, True), (CUTMIX, False)):
        mixing = Mixing(augment, CLASSES)
        assert {is_blend(mixing(images, labels)[0], images) for _ in range(30)} == {expected}


@pytest.mark.parametrize("augment", [MIXUP, CUTMIX, BOTH])
def test_a_picture_alone_and_none_stay_as_they_are(augment):
    mixing = Mixing(augment, CLASSES)
    images, labels = torch.rand(1, 3, 8, 8), torch.tensor([4])
    mixed, targets = mixing(images, labels)
    assert mixed is images and targets.tolist() == [[0, 0, 0, 0, 1, 0, 0]] and targets.dtype == torch.float32
    mixed, targets = mixing(images, labels[:0])  # of a rank that only keeps step
    assert mixed is images and targets.shape == (0, CLASSES)


# ------------------------------------------------------------------------------------------------------------- runs


def trainer_of(config) -> Trainer:
    return Trainer(config, splits_of(config), LocalPlace(config), QUIET)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_mixed_pictures_and_smoothed_labels(small, smoothing):
    config = replace(small, augment=BOTH, label_smoothing=smoothing)
    trainer = trainer_of(config)
    work = next(trainer._micro_steps(0))
    ((images, labels),) = work.batches
    torch.manual_seed(work.noise_seed(config.seed))
    mixed, targets = Mixing(BOTH, 3)(images, labels)
    assert not torch.equal(mixed, images)
    trainer.learner.begin(0, 0.0, 1)
    logits = logits_of(trainer.learner.modules["model"](mixed))
    expected = float(-((1 - smoothing) * targets + smoothing / 3).mul(log_softmax(logits, 1)).sum(1).mean().detach())
    assert float(trainer._backward(work)) == pytest.approx(expected, rel=1e-5)
    trainer.close()


def test_off_draws_nothing_and_leaves_labels_as_they_are(small, monkeypatch):
    seen = []

    def watched(logits, targets, **options):
        seen.append(targets)
        return cross_entropy(logits, targets, **options)

    monkeypatch.setattr(learners, "Mixing", None)
    monkeypatch.setattr(learners, "cross_entropy", watched)
    trainer = trainer_of(small)
    work = next(trainer._micro_steps(0))
    trainer.learner.begin(0, 0.0, 1)
    trainer._backward(work)
    left = torch.get_rng_state()
    torch.manual_seed(work.noise_seed(small.seed))
    assert torch.equal(torch.get_rng_state(), left)
    assert seen[0] is work.batches[0][1]
    trainer.close()


RUNS = {
    "mixup": {"augment": MIXUP},
    "cutmix": {"augment": CUTMIX},
    "both, accumulating": {"accumulate": 3, "checkpoint_steps": 1},
    "both, alast": {"method": "alast"},
    "both, alast, bf16, accumulating": {
        "method": "alast",
        "precision": "bf16",
        "accumulate": 3,
        "checkpoint_steps": 1,
    },
    "both, recomputed": {"grad_checkpointing": True},
    "both, lora": {"method": "lora"},
    "both, alast+lora": {"method": "alast+lora"},
    "both, transformers": {"model": "transformers"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_cut_off_and_resumed_is_the_same_bit_for_bit(small, tmp_path, monkeypatch, name):
    config = with_method(small, **{"augment": BOTH, "checkpoint_steps": 3} | RUNS[name])
    if "lora" in config.method:
        pytest.importorskip("peft")
    if config.model == "transformers":
        pytest.importorskip("transformers")
        shape = {"num_labels": 3, "intermediate_size": 64}
        config = replace(config, model=str(make_transformers(tmp_path / "model", **shape)), image_size=None)
    other = whole(config, tmp_path / "whole")
    cut_off(config, monkeypatch, Trainer, "_backward", 11)
    torch.manual_seed(99)  # whatever the random state of the process is
    finetune(resumed(config), QUIET)
    assert_same_run(config.out, other)
    augment = replace(config.augment, mixup=0.0, cutmix=0.0)
    without = whole(replace(config, augment=augment, epochs=1), tmp_path / "without")
    rows = zip(rows_of(without, "step"), rows_of(other, "step"), strict=False)
    assert all(one["loss"] != two["loss"] for one, two in rows), "nothing was mixed, so nothing was tested"


def test_the_last_batch_of_an_epoch_may_be_one_picture(small):
    config = replace(small, batch_size=5, augment=BOTH)  # 26 pictures
    assert finetune(config, QUIET)["steps"] == 12


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--augment.mixup", "-1"], "--augment.mixup must be 0 (off) or in 0.01..100, got -1.0"),
        (["--augment.cutmix", "nan"], "--augment.cutmix must be 0 (off) or in 0.01..100, got nan"),
        (["--augment.mixup", "inf"], "--augment.mixup must be 0 (off) or in 0.01..100, got inf"),
        (
            ["--augment.cutmix", "1", "--split.cut", "3"],
            "--augment.cutmix has no effect with --split.cut, where --split.cutmix mixes tokens at the server",
        ),
    ],
)
def test_what_cannot_be_is_one_line(small, capfd, args, message):
    assert cli.main(["finetune", *flags(small), *args]) == 2
    assert capfd.readouterr().err == f"snello: error: {message} (snello finetune --help-all lists the options)\n"
    assert not small.out.exists()
