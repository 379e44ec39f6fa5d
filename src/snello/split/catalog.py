"""What `snello codecs` lists: every codec, its options and source, and its exact bytes for a model, batch and cut."""

import inspect
from typing import Any

import torch

from snello.codecs import codec_class
from snello.codecs.base import Codec
from snello.config import CodecsConfig
from snello.config.codec_text import parse_codec
from snello.config.registry import AUTO, CODECS
from snello.errors import ConfigError
from snello.models import create_model
from snello.split.traffic import Exchange, exchange_bytes, uncompressed_bytes
from snello.vit import ViT

NOT_OPTIONS = ("embed_dim", "seed")  # given by the model and the run


def list_codecs(config: CodecsConfig) -> list[dict[str, Any]]:
    """One row per codec: name, what it does, options, source, and the bytes of one exchange.

    Raises:
        ModelError: for a model that is not supported.
        ConfigError: for a cut outside the model, or a codec that cannot be made.
    """
    with torch.device("meta"):
        vit = ViT(create_model(config.model, "none", config.num_classes, config.image_size))
        try:
            vit.cut(config.cut)
        except ConfigError as error:
            raise ConfigError(f"--{error}") from None  # the name as the user typed it
    shape = Exchange.of(vit, config.batch_size, config.num_classes, config.labels)
    texts = config.codecs or (*(example(name) for name in CODECS), AUTO)
    return [_row(text, shape) for text in texts]


def example(name: str) -> str:
    """A codec's text with the arguments that it is shown with."""
    arguments = codec_class(name).example
    return f"{name}({arguments})" if arguments else name


def _row(text: str, shape: Exchange) -> dict[str, Any]:
    codec = Codec(text, embed_dim=shape.embed_dim, flag="CODECS")
    up, down = exchange_bytes(codec, shape)
    uncompressed = uncompressed_bytes(shape)
    return {
        "codec": text,
        "parts": [_part(part.name) for part in parse_codec(text)],
        "uplink_bytes": up,
        "downlink_bytes": down,
        "ratio": (up + down) / uncompressed,
        "times_fewer": uncompressed / (up + down),
    }


def _part(name: str) -> dict[str, str]:
    cls = codec_class(name)
    parameters = [p for p in inspect.signature(cls).parameters.values() if p.name not in NOT_OPTIONS]
    options = [p.name if p.default in (p.empty, None) else f"{p.name}={p.default}" for p in parameters]
    what = (inspect.getdoc(cls) or "").split("\n")[0]
    return {"name": name, "what": what, "options": ", ".join(options), "source": cls.source}
