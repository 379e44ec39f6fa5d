"""Methods that train the same parameters at every step."""

from collections.abc import Iterable

from torch import nn
from typing_extensions import override

from snello.config import Recipe
from snello.errors import require
from snello.methods import Method
from snello.vit import ViT
from snello.vit.times import Times


class Full(Method):
    """Trains everything."""

    def __init__(self, vit: ViT, config: Recipe, times: Times | None = None) -> None:
        super().__init__(vit, config, times)
        trained = {id(p) for p in self.trained(config)}
        self._frozen = [p for p in vit.model.parameters() if id(p) not in trained and p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def trained(self, config: Recipe) -> Iterable[nn.Parameter]:
        """What trains, of what did when the method found it."""
        return self.vit.model.parameters()

    @override
    def detach(self) -> None:
        super().detach()
        for parameter in self._frozen:
            parameter.requires_grad_(True)


class Head(Full):
    """Trains the classifier."""

    @override
    def trained(self, config: Recipe) -> Iterable[nn.Parameter]:
        return self.vit.head_parameters()


class LastK(Full):
    """Trains the last blocks, and the norm and classifier above them."""

    @override
    def trained(self, config: Recipe) -> Iterable[nn.Parameter]:
        depth = self.vit.top_layer - 1
        require(config.last_k <= depth, "--last-k", f"in 1..{depth} (the model's depth)", config.last_k)
        first = depth - config.last_k + 1
        return (p for name, p in self.vit.model.named_parameters() if self.vit.layer_of(name) >= first)
