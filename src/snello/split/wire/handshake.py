"""The messages before the first step, checked value by value: what both have, want, and agree on."""

import hashlib
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args

from torch import nn

from snello.config import Recipe
from snello.config.values import from_dict, to_dict
from snello.errors import ConfigError, ProtocolError
from snello.models import preprocessing
from snello.split.wire.frames import VERSION
from snello.split.wire.refusals import Code, Refused

Mode = Literal["describe", "train", "inference"]
T = TypeVar("T")
MAX_CHECKPOINTS = 16
MAX_STEPS = 2**48


@dataclass(frozen=True)
class Terms:
    """What both sides must agree on."""

    protocol: int
    model: str
    cut: int
    codec: str
    labels: str
    num_classes: int
    image_size: int
    precision: str
    fingerprint: str
    """A hash of the architecture: names and shapes of all weights. The last: a difference above says more."""

    def require(self, other: "Terms") -> None:
        """Compares what a client has with what this server has.

        Raises:
            Refused: naming the first difference with both values.
        """
        for name, ours in asdict(self).items():
            theirs = getattr(other, name)
            if ours != theirs:
                code = Code.VERSION if name == "protocol" else Code.MISMATCH
                raise Refused(code, f"{name.replace('_', ' ')}: the server has {ours}, the client {theirs}")


@dataclass(frozen=True)
class RunShape:
    """How much the client trains and on what: its side of the schedule."""

    num_train: int
    """Pictures in an epoch."""
    total_steps: int
    classes: str
    """A hash of the class names in their order: clients that share a server half must have the same."""

    def __post_init__(self) -> None:
        if not (1 <= self.num_train < MAX_STEPS and 1 <= self.total_steps < MAX_STEPS):
            raise ProtocolError("a plan without pictures or steps")


@dataclass(frozen=True)
class Hello:
    """A client's first message."""

    mode: Mode
    """`describe` asks for the settings, `train` trains, `inference` evaluates with the trained halves."""
    session: str = ""
    """32 hexadecimal digits, drawn by the client for each of its runs."""
    terms: Terms | None = None
    plan: RunShape | None = None
    step: int | None = None
    """Steps done by a client that still has them in memory; None where it has to load a checkpoint."""
    incarnation: str = ""
    """What the server called the state that the client trained with; empty at first."""
    checkpoints: list[int] = field(default_factory=list)
    """Steps of which the client has a checkpoint."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ProtocolError("a client asked for an unknown mode")
        if self.mode != "describe" and not re.fullmatch("[0-9a-f]{32}", self.session):
            raise ProtocolError("a session must be named by 32 hexadecimal digits")
        if self.step is not None and not 0 <= self.step < MAX_STEPS:
            raise ProtocolError("a client is at an impossible step")
        if len(self.checkpoints) > MAX_CHECKPOINTS or not all(
            type(step) is int and 0 <= step < MAX_STEPS for step in self.checkpoints
        ):
            raise ProtocolError("a client has impossible checkpoints")


@dataclass(frozen=True)
class Welcome:
    """The server's answer."""

    time: float
    """Seconds since 1970 on the server's clock."""
    version: str
    """Which snello the server runs."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The settings, in answer to `describe`."""
    num_classes: int | None = None
    """Classes that the server wants; None where it takes what the client has."""
    incarnation: str = ""
    """A name for the server's state; another one after a restart."""
    step: int = 0
    """Where both resume."""
    back: bool = False
    """Whether the client has to load its checkpoint of `step`."""
    fresh: bool = False
    """Whether the session begins: the starting weights come with it."""
    lost_steps: int = 0
    """In shared sessions: steps of this client that are in the server half, but not in the client's checkpoint."""
    shared: bool = False
    """Whether other clients train the same server half."""
    architecture: dict[str, Any] | None = None
    """What a transformers model is made of, since a client need not have its folder; in answer to `describe`."""


def parse(cls: type[T], values: dict[str, Any]) -> T:
    """A message of class `cls` from its JSON values.

    Raises:
        ProtocolError: for unknown fields or values of other types.
    """
    try:
        return from_dict(cls, values, cls.__name__.lower())
    except (ConfigError, TypeError) as error:
        raise ProtocolError(" ".join(str(error).split())[:200]) from None


def make_terms(model: nn.Module, recipe: Recipe, codec: str, num_classes: int, precision: str) -> Terms:
    """The terms of a model, which may be on the device `meta`."""
    weights = "\n".join(f"{name} {tuple(value.shape)}" for name, value in model.state_dict().items())
    return Terms(
        protocol=VERSION,
        model=recipe.model,
        cut=recipe.split.cut,
        codec=codec,
        labels=recipe.split.labels,
        num_classes=num_classes,
        image_size=preprocessing(model, recipe.image_size).size,
        precision=precision,
        fingerprint=hashlib.sha256(weights.encode()).hexdigest()[:16],
    )


def hash_of(names: list[str]) -> str:
    """A hash that tells lists of class names apart without giving them away."""
    return hashlib.sha256("\0".join(names).encode()).hexdigest()[:16]


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """The settings that a client needs of a server's, without those that are the server's own affair."""
    own = ("config", "out", "resume", "device", "attention", "weights")
    shared = [f.name for f in fields(Recipe) if f.name not in own]
    return {name: value for name, value in to_dict(recipe).items() if name in shared}
