"""What `snello codecs` lists: every codec, its options and source, and its exact bytes for a model, batch and cut."""

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from snello.codecs import codec_class
from snello.codecs.base import Codec
from snello.config import CodecsConfig, FinetuneConfig, SplitConfig
from snello.config.codec_text import parse_codec
from snello.config.registry import CODECS, GOALS
from snello.data.loaders import Batch, eval_transform
from snello.data.shipped import Shipped
from snello.errors import ConfigError, ModelError
from snello.models import create_model, preprocessing
from snello.split.learner import make_split_learner
from snello.split.traffic import Exchange, exchange_bytes, uncompressed_bytes
from snello.train.learner import MicroStep
from snello.train.place import Setup
from snello.train.schedule import Schedule
from snello.train.scoring import Normalize
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
    texts = config.codecs or (*(example(name) for name in CODECS), *GOALS)
    return [_row(text, shape, config) for text in texts]


def example(name: str) -> str:
    """A codec's text with the arguments that it is shown with."""
    arguments = codec_class(name).example
    return f"{name}({arguments})" if arguments else name


def _row(text: str, shape: Exchange, config: CodecsConfig) -> dict[str, Any]:
    codec = Codec(text, embed_dim=shape.embed_dim, flag="CODECS")
    up, down = measured_bytes(config, text) if codec.varies else exchange_bytes(codec, shape)
    uncompressed = uncompressed_bytes(shape)
    return {
        "codec": text,
        "stands_for": GOALS.get(text, text),
        "measured": codec.varies,
        "parts": [_part(part.name) for part in parse_codec(text)],
        "uplink_bytes": up,
        "downlink_bytes": down,
        "ratio": (up + down) / uncompressed,
        "times_fewer": uncompressed / (up + down),
    }


def measured_bytes(config: CodecsConfig, text: str) -> tuple[int, int]:
    """Bytes up and down of an exchange of pictures that ship with snello, on average over those that share a basis.

    The model has its pretrained weights where they can be had.
    """
    split = SplitConfig(cut=config.cut, codec=text, labels=config.labels)
    run = FinetuneConfig(model=config.model, method="full", image_size=config.image_size, split=split)
    run = replace(run, batch_size=config.batch_size, compare=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = create_model(config.model, "pretrained", config.num_classes, config.image_size)
        except ModelError:
            model = create_model(config.model, "none", config.num_classes, config.image_size)
        schedule = Schedule(config.batch_size, config.batch_size, 1, 2)
        setup = Setup(run, config.num_classes, torch.device("cpu"), "fp32", schedule, text)
        learner = make_split_learner(ViT(model), setup)
        batch = _pictures(model, config)
        up, down = [0], [0]
        for step in range(2):
            learner.begin(step, 0.0, 1)
            learner.backward(MicroStep([batch], step, 0, config.batch_size, step))
            learner.clip(1.0)
            learner.update(0.0)
            up.append(learner.ledger.counters.total("uplink"))
            down.append(learner.ledger.counters.total("downlink"))
    every = learner.codec.format.every
    return _average(up, every), _average(down, every)


def _average(totals: list[int], every: int) -> int:
    """Bytes of an exchange, of `every` of which one is as the first: by totals after none, one and two."""
    none, one, two = totals
    return round((one - none + (every - 1) * (two - one)) / every)


def _pictures(model: nn.Module, config: CodecsConfig) -> Batch:
    """Pictures that ship with snello as a batch for `model`."""
    pre, pictures = preprocessing(model, config.image_size), Shipped().read("train")
    transform = eval_transform(pre.size, pre.interpolation, pre.crop_pct)
    chosen = [index % len(pictures) for index in range(config.batch_size)]
    images = torch.stack([transform(pictures.open(index)) for index in chosen])
    labels = torch.tensor([pictures.labels[index] % config.num_classes for index in chosen])
    return Normalize(pre, torch.device("cpu"))(images), labels


def _part(name: str) -> dict[str, str]:
    cls = codec_class(name)
    parameters = [p for p in inspect.signature(cls).parameters.values() if p.name not in NOT_OPTIONS]
    options = [p.name if p.default in (p.empty, None) else f"{p.name}={p.default}" for p in parameters]
    what = (inspect.getdoc(cls) or "").split("\n")[0]
    return {"name": name, "what": what, "options": ", ".join(options), "source": cls.source}
