"""The server's half of a fresh model, and what can be said of one from shapes alone."""

import torch
from torch import Tensor

from snello.config import ServeConfig
from snello.config.units import parse_bytes
from snello.devices import Precision
from snello.models import create_model
from snello.seeds import mix
from snello.split.build import cut_model, make_codec, meta_vit
from snello.split.halves import ServerHalf
from snello.split.ledger import Ledger
from snello.split.steps import ServerModel
from snello.split.store import FRAMES_EACH
from snello.split.traffic import Exchange, exchange_bytes
from snello.split.wire.handshake import make_terms
from snello.train.schedule import Schedule
from snello.vit import AttentionPath, ViT


def make_server_model(
    config: ServeConfig, num_classes: int, device: torch.device, precision: Precision, attention: AttentionPath
) -> ServerModel:
    """The server's half as every session of this seed begins with.

    Raises:
        SnelloError: where model, weights, cut, codec or method do not fit each other.
    """
    vit = make_vit(config, num_classes)
    codec = make_codec(config, str(config.split.codec_text), vit.embed_dim).to(device)
    _, upper = cut_model(vit, config)
    upper.set_attention_paths([attention] * upper.depth)
    upper.model.to(device)
    return ServerModel(ServerHalf(upper, config, codec, num_classes, device, precision))


class Sizes:
    """What can be said of a session from shapes alone, on the device `meta`."""

    def __init__(self, config: ServeConfig, num_classes: int, precision: Precision) -> None:
        self.vit = meta_vit(config, num_classes)
        codec = make_codec(config, str(config.split.codec_text), self.vit.embed_dim)
        self.terms = make_terms(self.vit.model, config, codec.text, num_classes, precision)
        self.max_frame: int = Ledger(self.vit, config, codec, num_classes).largest_frame(config.batch_size)
        _, upper = cut_model(self.vit, config)
        weights = sum(p.numel() * p.element_size() for p in upper.model.parameters())
        self.messages: int = 2 * self.max_frame
        """Bytes of a session's messages: the one that comes in, and the last answer."""
        self.state: int = 4 * weights
        """Bytes of weights, gradients and AdamW's moments."""
        decoded = config.batch_size * codec.buffer * self.vit.embed_dim * 2
        decoded *= self.vit.num_prefix_tokens + self.vit.num_patches
        share = parse_bytes(config.max_memory, "--max-memory") // (2 * config.max_sessions)
        self.stored_memory: int = max(FRAMES_EACH * decoded, share) if config.split.stores else 0
        """Bytes of decoded samples that a session keeps."""
        self._exchange_up = exchange_bytes(codec, Exchange.of(self.vit, config.batch_size, num_classes, "server"))[0]

    def stored_disk(self, schedule: Schedule) -> int:
        """Bytes that the frames of a run take at most: those of numbers without any order, and a quarter more, as the
        number of merged rows depends on the values.
        """
        assert schedule.replay is not None
        epochs = (schedule.total_steps - schedule.replay.first) // schedule.steps_per_epoch
        return epochs * schedule.batches_per_epoch * self._exchange_up * 5 // 4


def make_vit(config: ServeConfig, num_classes: int) -> ViT:
    """The whole model as every run of this seed begins with."""
    torch.manual_seed(mix(config.seed))  # the head's random start
    return ViT(create_model(config.model, config.weights, num_classes, config.image_size))


def starting_weights(config: ServeConfig, num_classes: int) -> dict[str, Tensor]:
    """What the client's half begins with, by names in the whole model."""
    lower, _ = cut_model(make_vit(config, num_classes), config)
    return dict(lower.model.state_dict())
