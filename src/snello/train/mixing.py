"""Pictures of a batch mixed with one another, and their labels with them: Mixup and CutMix, by torchvision."""

from typing import Any

from torch import Tensor
from torch.nn.functional import one_hot
from torchvision.transforms import v2

from snello.config import AugmentConfig


class Mixing:
    """Mixes every picture of a batch with the one before it; lambda, drawn for the batch, is its own share.

    Lambda follows Beta(alpha, alpha). Mixup (arXiv:1710.09412) adds up the two pictures, weighted with lambda and
    1 - lambda; CutMix (arXiv:1905.04899) puts a rectangle of the other picture, of the share 1 - lambda of the area,
    where it stood, and lambda becomes the share that is left, since an edge may cut the rectangle off. Where both are
    on, each batch takes one of them, with probability one half.

    All draws are from torch's global CPU generator, the same for every device.

    Args:
        augment: with an alpha above 0 for at least one of the two.
        num_classes: C, at least 1.
    """

    def __init__(self, augment: AugmentConfig, num_classes: int) -> None:
        self.num_classes = num_classes
        kinds: list[tuple[float, Any]] = [(augment.mixup, v2.MixUp), (augment.cutmix, v2.CutMix)]
        self._mix = v2.RandomChoice([kind(alpha=alpha, num_classes=num_classes) for alpha, kind in kinds if alpha > 0])

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes a batch, which stays as it was; where there is no other picture, there is nothing to mix.

        Args:
            images: (B, 3, H, W) floating point, in a random order; with no labels, one that keeps step with other
                ranks.
            labels: (B,) int64 in 0..C-1, or (0,).

        Returns:
            The pictures, in their shape, and the probabilities of the classes (B, C) or (0, C) float32 in [0, 1], which
            add up to 1.
        """
        if len(labels) < 2:
            return images, one_hot(labels, self.num_classes).float()
        mixed: tuple[Tensor, Tensor] = self._mix(images, labels)
        return mixed
