"""BottleNet++: a small encoder trained on the client, a decoder trained on the server.

Source: BottleNet++: An End-to-End Approach for Feature Compression in Device-Edge Co-Inference Systems,
arXiv:1910.14315. There the layers are convolutions over the maps of a CNN; here they are linear over the embed
dimension of a token, and the decoder ends without ReLU, since tokens have both signs.
"""

from torch import Tensor, nn
from typing_extensions import override

from snello.codecs.base import Arrays, Context, Reduced, Reducer, Shape, in_0_1


class BottleNet(Reducer):
    """Every token as fewer numbers, by a trained layer; the model is trained around it, so it stays in eval mode.

    Args:
        ratio: numbers per token over the embed dim, in (0, 1].
    """

    source = "https://arxiv.org/abs/1910.14315"
    example = "0.1"
    in_model = True

    def __init__(self, ratio: float, embed_dim: int = 0) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        width = max(1, round(in_0_1(ratio, "ratio") * embed_dim))
        self.encoder = nn.Sequential(nn.Linear(embed_dim, width), nn.BatchNorm1d(width), nn.Sigmoid())
        self.decoder = nn.Sequential(nn.Linear(width, embed_dim), nn.BatchNorm1d(embed_dim))

    @override
    def encode(self, z: Tensor, context: Context) -> Reduced:
        return Reduced(_by_token(self.encoder, z.float()))  # (B, N, width), in (0, 1)

    @override
    def decode(self, values: Tensor, side: Arrays) -> Tensor:
        return _by_token(self.decoder, values)

    @override
    def decoded_shape(self, shape: Shape, side: Arrays) -> Shape:
        return (*shape[:-1], self.embed_dim)


def _by_token(layers: nn.Module, z: Tensor) -> Tensor:
    """`layers` on every token of z (B, N, D): normalisation is over all tokens of the batch."""
    training = layers.training
    if z.shape[0] * z.shape[1] == 1:  # a single token has no spread to normalise by: as in eval mode
        layers.eval()
    try:
        y: Tensor = layers(z.flatten(0, 1)).view(*z.shape[:2], -1)
        return y
    finally:
        layers.train(training)
