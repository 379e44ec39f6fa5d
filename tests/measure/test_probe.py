"""The linear probe: least cross-entropy on features, of all pictures or of a sample."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import small_config, write_pictures

from snello.data import splits_of
from snello.measure import probe as probing
from snello.measure.probe import LEAST, Linear, fit, probe, sample
from snello.models import create_model
from snello.vit import ViT

CPU = torch.device("cpu")


def test_separable_features_are_told_apart_whatever_their_scale():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.eye(3)[labels].repeat(1, 4) + 0.1 * torch.randn(300, 12, generator=generator)
    features = features * torch.logspace(-3, 3, 12) + 100
    assert torch.equal(fit(features, labels, 3)(features).argmax(1), labels)


def test_two_pictures_by_hand():
    """Features -1 and 1: by symmetry weights (-w, w) / 2, where sigmoid(-w) = L2 w / 2 - the gradient is zero."""
    features, labels = torch.tensor([[3.0], [5.0]]), torch.tensor([0, 1])
    fitted = fit(features, labels, 2)
    logits = fitted(features)
    w = float(logits[1, 1] - logits[1, 0])
    assert logits[0, 0] - logits[0, 1] == pytest.approx(w) and 1 / (1 + math.exp(w)) == pytest.approx(
        probing.L2 * w / 2, rel=1e-3
    )


def test_it_is_the_optimum():
    """No step in any direction is better."""
    generator = torch.Generator().manual_seed(1)
    features, labels = torch.randn(60, 5, generator=generator), torch.randint(3, (60,), generator=generator)
    fitted = fit(features, labels, 3)

    def loss(weights: torch.Tensor) -> float:
        logits = Linear(fitted._mean, fitted._std, weights)(features)
        return float(torch.nn.functional.cross_entropy(logits, labels) + probing.L2 / 2 * weights[:-1].square().sum())

    best = fitted._weights
    for _ in range(20):
        assert loss(best + 0.01 * torch.randn(best.shape, generator=generator, dtype=best.dtype)) > loss(best)


def test_a_feature_that_never_changes_says_nothing():
    features = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.1], [1.0, 0.9]])
    assert fit(features, torch.tensor([0, 1, 0, 1]), 2)(features).argmax(1).tolist() == [0, 1, 0, 1]


def test_classes_without_pictures_are_never_said():
    features = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    assert fit(features, torch.arange(8) % 2, 5)(features).argmax(1).max() <= 1


@pytest.mark.parametrize("epochs", [1, 5, 10, 40])
def test_the_sample_is_stratified_and_bounded(epochs):
    labels = [0] * 1000 + [1] * 4000 + [2] * 7
    chosen = sample(labels, epochs, seed=3)
    assert chosen == sorted(set(chosen)) == sample(labels, epochs, seed=3)
    counts = [sum(labels[index] == label for index in chosen) for label in range(3)]
    assert counts == [min(1000, max(LEAST, 50 * epochs)), min(4000, 200 * epochs), 7]
    assert epochs == 40 or chosen != sample(labels, epochs, seed=4)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    write_pictures(folder / "train", {"blue": 70, "green": 55, "red": 20})
    write_pictures(folder / "val", {"blue": 8, "green": 8, "red": 8}, seed=1)
    return replace(small_config(folder), batch_size=16)


def test_it_is_deterministic_and_of_the_model_at_the_start(config):
    splits = splits_of(config)
    found = probe(config, splits, CPU, "fp32", 1)
    torch.manual_seed(99)
    assert probe(config, splits, CPU, "fp32", 1) == found
    assert found.pictures == 50 + 50 + 20 and found.accuracy == 1.0, "colours are told apart by random weights too"
    assert probe(config, splits, CPU, "fp32", 20).pictures == 145


def test_features_are_what_the_classifier_sees(config):
    model = create_model("test_vit", "none", 3, 48).eval()
    vit, splits = ViT(model), splits_of(config)
    features, labels = probing._features(vit, splits.val, config, CPU, "fp32")
    assert labels.tolist() == splits.val.labels and features.shape == (24, vit.embed_dim)
    seen: list[torch.Tensor] = []
    model.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pre = probing.preprocessing(model, 48)
    transform = probing.eval_transform(pre.size, pre.interpolation, pre.crop_pct)
    with torch.no_grad():
        model(probing.Normalize(pre, CPU)(transform(splits.val.open(3))[None]))
    assert torch.allclose(seen[0][0], features[3], atol=1e-5)
