"""The linear probe: what the model knew before the run, as the accuracy of a linear classifier on its features.

Fine-tuning that does not end above it was not needed. Features are those that the classifier sees, of pictures without
augmentation, one pass over each; the classifier is multinomial logistic regression, to its optimum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from snello.config import FinetuneConfig
from snello.data import PictureSet, Splits
from snello.data.loaders import batches, eval_loader, eval_transform
from snello.devices import Precision, autocast
from snello.models import create_model, preprocessing
from snello.seeds import mix, permutation
from snello.train.scoring import Normalize
from snello.vit import ViT

L2 = 0.01
"""Weight of half the squared norm of the classifier's weights, beside the mean cross-entropy."""
MOST_STEPS = 200  # of L-BFGS, each with a line search
SHARE, LEAST = 20, 50
"""A pass over a 20th of all pictures that the run has trained on, all epochs together, but 50 of each class."""
_DRAW = 0x70726F6265  # keeps the draw of the sample apart from others by the same seed


@dataclass(frozen=True)
class Probe:
    """What the probe found."""

    accuracy: float
    """On the held-out pictures, in [0, 1]."""
    pictures: int
    """Training pictures that it has seen: all, or a sample."""


@torch.no_grad()
def probe(config: FinetuneConfig, splits: Splits, device: torch.device, precision: Precision, epochs: int) -> Probe:
    """Probes the model of a run, as it was at the start, with the training pictures that `sample` takes for `epochs`.

    Raises:
        SnelloError: where the model or a picture cannot be loaded any more.
    """
    torch.manual_seed(mix(config.seed))  # of weights that start at random, as in the run
    vit = ViT(create_model(config.model, config.weights, len(splits.train.classes), config.image_size))
    vit.model.to(device).eval()
    train = splits.train.subset(sample(splits.train.labels, epochs, config.seed))
    known, labels = _features(vit, train, config, device, precision)
    fitted = fit(known, labels, len(splits.train.classes))
    held_out, truth = _features(vit, splits.val, config, device, precision)
    return Probe(float((fitted(held_out).argmax(1) == truth).double().mean()), len(train))


def sample(labels: Sequence[int], epochs: int, seed: int) -> list[int]:
    """Indices of the pictures that are probed: all, or of each class the same share, drawn by the seed, in order.

    The share keeps the probe to a few per cent of a run of `epochs`; classes with few pictures keep LEAST of them.
    """
    of_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        of_class.setdefault(label, []).append(index)
    chosen: list[int] = []
    for label, indices in sorted(of_class.items()):
        wanted = max(LEAST, len(indices) * epochs // SHARE)
        order = permutation(len(indices), mix(seed, _DRAW, label))[:wanted]
        chosen += [indices[place] for place in order]
    return sorted(chosen)


class Linear:
    """A linear classifier on standardised features."""

    def __init__(self, mean: Tensor, std: Tensor, weights: Tensor) -> None:
        self._mean, self._std, self._weights = mean, std, weights

    def __call__(self, features: Tensor) -> Tensor:
        """The logits (N, C) of features (N, F)."""
        return _with_ones((features.double() - self._mean) / self._std) @ self._weights


@torch.enable_grad()
def fit(features: Tensor, labels: Tensor, num_classes: int) -> Linear:
    """The classifier of least mean cross-entropy plus L2, for features (N, F) and labels (N,); from zero, by L-BFGS."""
    features = features.double()
    mean, std = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    inputs = _with_ones((features - mean) / std)
    weights = torch.zeros(inputs.shape[1], num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=MOST_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(inputs @ weights, labels) + L2 / 2 * weights[:-1].square().sum()
        torch.autograd.backward(value)
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return Linear(mean, std, weights.detach())


def _with_ones(features: Tensor) -> Tensor:
    """With a feature more, for the bias."""
    return torch.cat([features, torch.ones(len(features), 1, dtype=features.dtype)], dim=1)


def _features(
    vit: ViT, pictures: PictureSet, config: FinetuneConfig, device: torch.device, precision: Precision
) -> tuple[Tensor, Tensor]:
    """What the classifier sees of pictures, (N, F) float32, and their labels (N,), on the CPU."""
    pre = preprocessing(vit.model, config.image_size)
    normalize = Normalize(pre, device)
    transform = eval_transform(pre.size, pre.interpolation, pre.crop_pct)
    pin = device.type == "cuda"
    loader = eval_loader(pictures, transform, batch_size=config.batch_size, workers=config.workers, pin_memory=pin)
    features, labels = [], []
    for images, truth in batches(loader):
        with autocast(device, precision):
            seen = vit.features(vit.tokens(normalize(images.to(device))))
        features.append(seen.float().flatten(1).cpu())
        labels.append(truth)
    return torch.cat(features), torch.cat(labels)
