"""The interface of everything that may stand at the cut, and the chain that composes it.

On the way up, reducers make the activations smaller, one after the other, and the format writes the numbers that are
left. On the way down, the format writes the gradient with respect to those same numbers, and autograd carries it
back through the reducers of either side: on the server through decoding, on the client through encoding.

B: samples, N: tokens including prefix tokens, D: embed dim, R: rows that are left (B, or fewer where samples merge).
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from snello.codecs import build, codec_class
from snello.config.codec_text import parse_codec
from snello.errors import ConfigError, ProtocolError, TrainingError, require
from snello.seeds import mix, seeded
from snello.vit import Score

Arrays = dict[str, Tensor]
"""Arrays for the wire; a name is a kind of `snello.split.wire.frames.ARRAY_KINDS`, or `kind.detail`."""
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Context:
    """What a codec may know of an exchange besides the activations."""

    num_prefix_tokens: int = 1
    attention: Tensor | None = None
    """(B, N) float32: how much attention each token received, for codecs that ask for it."""
    positions: Tensor | None = None
    """(B, N) int64: where each token stood before some were dropped on the client; None where none were."""
    num_positions: int = 0
    """Tokens before any were dropped."""
    seed: int = 0
    """What everything random in this exchange begins with."""

    def generator(self, device: torch.device) -> torch.Generator:
        """A fresh generator on `device`."""
        return torch.Generator(device).manual_seed(self.seed % 2**63)


@dataclass(frozen=True)
class Reduced:
    """What a reducer leaves."""

    values: Tensor
    """The numbers that are left, with the graph that leads to them."""
    side: Arrays = field(default_factory=dict)
    """What decoding needs besides, without gradient; named by kind."""
    groups: Tensor | None = None
    """(B,) int64: the row that each sample went into; None where every sample is a row of its own."""


class Reducer(nn.Module, ABC):
    """Leaves fewer numbers. Parameters of `encoder` train on the client, those of `decoder` on the server."""

    source = ""
    """Where the idea comes from."""
    example = ""
    """Arguments to show it with, as `0.1`."""
    score: Score | None = None
    """Which attention `encode` needs in its context; None: none."""
    buffer = 1
    """Forward passes that are reduced together."""
    last = False
    """Whether what it leaves are no tokens, so that no other reducer can follow."""
    in_model = False
    """Whether the model is trained around it, so that it stays in place in eval mode."""
    merges_tokens = False
    """Whether a token that it leaves may stand for several: then `sizes` says for how many."""
    weighting: Literal["rows", "sizes"] = "rows"
    """How the loss weighs merged rows: all alike, or by the number of samples in them."""

    @abstractmethod
    def encode(self, z: Tensor, context: Context) -> Reduced:
        """Makes z (B, N, D) smaller."""

    def decode(self, values: Tensor, side: Arrays) -> Tensor:
        """Tokens for the server's blocks, (R, K, D), differentiable in `values`."""
        return values

    def decoded_shape(self, shape: Shape, side: Arrays) -> Shape:
        """The shape of what `decode` makes of values of this `shape`; it is asked for before memory is taken.

        Raises:
            ProtocolError: where values and `side` do not fit each other.
        """
        return shape

    def sizes(self, side: Arrays) -> Tensor | None:
        """How many tokens each of the decoded ones stands for, (R, K) float32; None: one each.

        Asked after `decoded_shape`, which refuses what does not fit.
        """
        return None

    def metrics(self) -> dict[str, Any]:
        """What is logged of the exchanges since the last call."""
        return {}


class Format(ABC):
    """Writes numbers as arrays, and gradients with respect to them; straight-through where it rounds."""

    source = ""
    example = ""
    needs_tokens = False
    """Whether it writes tokens only, (B, N, D)."""
    varies = False
    """Whether the bytes that it writes depend on the numbers, not on their shape alone."""
    every = 1
    """Packed arrays that share what the first of them says."""

    @abstractmethod
    def pack(self, x: Tensor, context: Context) -> Arrays:
        """Arrays that describe x, of any shape; the one named `values` is the payload."""

    @abstractmethod
    def unpack(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """What `pack` was given, up to its error."""

    def is_key(self, arrays: Mapping[str, Tensor]) -> bool:
        """Whether later arrays can only be unpacked when these have been."""
        return False

    def forget(self) -> None:
        """Packs the next arrays so that they can be unpacked by themselves."""

    def snapshot(self) -> Any:
        """What it remembers of what was packed and unpacked; None at the start."""
        return None

    def restore(self, state: Any) -> None:
        """Remembers what it did at a `snapshot()`."""

    def keep_all(self) -> None:
        """Unpacks arrays of any age from now on, whatever came since."""

    def for_evaluation(self) -> None:
        """Packs all arrays so that they can be unpacked by themselves."""

    def unpacked_shape(self, arrays: Mapping[str, Tensor]) -> Shape:
        """The shape of what `unpack` makes of the arrays; it is asked for before memory is taken.

        Raises:
            ProtocolError: where the arrays do not fit each other.
        """
        return tuple(arrays["values"].shape)

    def pack_gradient(self, x: Tensor, context: Context) -> Arrays:
        """The same for the gradient on its way down."""
        return self.pack(x, context)

    def unpack_gradient(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """What `pack_gradient` was given, up to its error."""
        return self.unpack(arrays)

    def gradient_shape(self, arrays: Mapping[str, Tensor]) -> Shape:
        """The shape of what `unpack_gradient` makes of the arrays, as `unpacked_shape`."""
        return self.unpacked_shape(arrays)

    def correct(self, gradient: Tensor, sent: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        """The gradient that the client uses, of what it `sent` as `arrays`."""
        return gradient


@dataclass(frozen=True)
class Message:
    """Activations on their way up, as the client holds them."""

    arrays: Arrays
    """What crosses the wire."""
    sent: Tensor
    """The numbers that the arrays describe, with the client's graph behind them: the gradient comes back to these."""
    groups: Tensor | None
    """(B,) int64: the row that each sample went into; None where every sample is a row of its own."""
    num_rows: int
    """R."""


@dataclass(frozen=True)
class Decoded:
    """Activations as the server sees them."""

    z: Tensor
    """(R, K, D): the tokens its blocks see."""
    leaf: Tensor
    """What z was computed from; its `.grad` is what goes down."""
    sizes: Tensor | None = None
    """(R, K) float32: how many tokens each of z stands for; None: one each."""


class Codec(nn.Module):
    """A chain of reducers and a format, for either side of the cut.

    In eval mode nothing is merged or dropped: activations travel in the format `eval_text`, through those reducers only
    around which the model is trained.

    Args:
        text: as `adc(0.2)+int8`, see `snello.config.codec_text`.
        embed_dim: D.
        eval_text: the format of evaluation, e.g. `int8`.
        seed: of fixed random keys and of starting weights, equal on both sides.
        flag: what the user typed the text after, for messages; `eval_flag` the same for `eval_text`.

    Raises:
        ConfigError: where the text does not parse or an option is out of range.
    """

    def __init__(
        self,
        text: str,
        *,
        embed_dim: int,
        eval_text: str = "int8",
        seed: int = 0,
        flag: str = "codec",
        eval_flag: str = "eval codec",
    ) -> None:
        super().__init__()
        self.text = text
        with seeded(mix(seed, 0xC0DEC)):  # a codec's starting weights are its own affair
            reducers = [build(part, flag, embed_dim=embed_dim, seed=seed) for part in parse_codec(text, flag)]
            # In a tuple, as it remembers nothing that a checkpoint would have to keep.
            self._evaluation = (_one_format(eval_text, eval_flag, embed_dim, seed),)
        self.format: Format = reducers.pop() if isinstance(reducers[-1], Format) else codec_class("none")()
        _check_order(reducers, self.format, f"{flag} {text!r}")
        self._all: list[Reducer] = reducers
        self.reducers = nn.ModuleList(reducers)
        self.buffer = max([1, *(part.buffer for part in self._all)])
        self.score: Score | None = next((part.score for part in self._all if part.score is not None), None)
        self.weighting = next((part.weighting for part in self._all if part.weighting != "rows"), "rows")
        self.merges_tokens = any(part.merges_tokens for part in self._all)

    @property
    def feature_dtype(self) -> torch.dtype:
        """How head features travel in U-shape: as they are where nothing is rounded, else in 16 bits."""
        return torch.float32 if isinstance(self.format, codec_class("none")) else torch.bfloat16

    @property
    def _active(self) -> list[Reducer]:
        return [part for part in self._all if self.training or part.in_model]

    @property
    def _format(self) -> Format:
        return self.format if self.training else self._evaluation[0]

    @property
    def varies(self) -> bool:
        """Whether the bytes of an exchange depend on what is in it, not on its shape alone."""
        return self.format.varies

    def client_parameters(self) -> Iterator[nn.Parameter]:
        """What trains on the client."""
        return (p for name, p in self.named_parameters() if ".encoder." in name)

    def server_parameters(self) -> Iterator[nn.Parameter]:
        """What trains on the server."""
        return (p for name, p in self.named_parameters() if ".decoder." in name)

    def encode(self, z: Tensor, context: Context) -> Message:
        """Activations z (B, N, D) as arrays for the wire; a TrainingError where they are not finite."""
        _require_finite(z, "activations", self.text)
        arrays: Arrays = {}
        sent, groups, num_rows = z, None, len(z)
        with torch.autocast(z.device.type, enabled=False):  # sums and distances keep the precision they come in
            for index, part in enumerate(self._active):
                reduced = part.encode(sent, context)
                sent = reduced.values
                if reduced.groups is not None:
                    groups, num_rows = reduced.groups, len(sent)
                arrays |= {f"{name}.{index}": value for name, value in reduced.side.items()}
            packed = self._format.pack(sent.detach(), context)
        arrays["activations"] = packed.pop("values")
        return Message(arrays | packed, sent, groups, num_rows)

    def decode(self, arrays: Mapping[str, Tensor], *, with_gradient: bool = True) -> Decoded:
        """The tokens that the server computes with; without gradient nothing is to go down."""
        with torch.autocast(arrays["activations"].device.type, enabled=False):
            leaf = z = self._format.unpack({**arrays, "values": arrays["activations"]})
            leaf.requires_grad_(self.training and with_gradient)
            for part, side in self._backwards(arrays):
                z = part.decode(z, side)
        return Decoded(z, leaf, self.sizes(arrays))

    def decoded_shape(self, arrays: Mapping[str, Tensor]) -> Shape:
        """The shape (R, K, D) of the tokens that `decode` makes, before memory is taken for them.

        Raises:
            ProtocolError: where the arrays do not fit each other.
        """
        shape = self._format.unpacked_shape({**arrays, "values": arrays["activations"]})
        for part, side in self._backwards(arrays):
            shape = part.decoded_shape(shape, side)
        return shape

    def sizes(self, arrays: Mapping[str, Tensor]) -> Tensor | None:
        """How many tokens each that `decode` makes stands for, (R, K) float32; None: one each.

        Ask `decoded_shape` first, which refuses what does not fit.
        """
        found = (part.sizes(side) for part, side in self._backwards(arrays))
        return next((sizes for sizes in found if sizes is not None), None)

    def _backwards(self, arrays: Mapping[str, Tensor]) -> Iterator[tuple[Reducer, Arrays]]:
        """The reducers from the last to the first, each with its arrays."""
        for index, part in reversed(list(enumerate(self._active))):
            end = f".{index}"
            yield part, {name[: -len(end)]: value for name, value in arrays.items() if name.endswith(end)}

    def encode_gradient(self, gradient: Tensor, context: Context) -> Arrays:
        """The leaf's gradient as arrays for the way down; a TrainingError where it is not finite."""
        _require_finite(gradient, "gradients", self.text)
        with torch.autocast(gradient.device.type, enabled=False):
            packed = self.format.pack_gradient(gradient, context)
        return {"gradients": packed.pop("values")} | packed

    def gradient_shape(self, arrays: Mapping[str, Tensor]) -> Shape:
        """The shape of what `decode_gradient` makes of the arrays, before memory is taken for it."""
        return self.format.gradient_shape({**arrays, "values": arrays["gradients"]})

    def decode_gradient(self, message: Message, arrays: Mapping[str, Tensor]) -> Tensor:
        """The gradient with respect to `message.sent`, of its shape and dtype."""
        with torch.autocast(message.sent.device.type, enabled=False):
            gradient = self.format.unpack_gradient({**arrays, "values": arrays["gradients"]})
        return self.format.correct(gradient, message.sent, message.arrays).to(message.sent.dtype)

    def is_key(self, arrays: Mapping[str, Tensor]) -> bool:
        """Whether later frames can only be decoded when these arrays have been."""
        return self.format.is_key(arrays)

    def forget(self) -> None:
        """Encodes the next frame of either way so that it can be decoded by itself."""
        self.format.forget()

    def archive(self) -> "Codec":
        """A copy that decodes frames of training in any order, once it has seen those that are keys."""
        codec = copy.deepcopy(self).train()
        codec.format.keep_all()
        return codec

    def metrics(self) -> dict[str, Any]:
        """What the reducers have to say of the exchanges since the last call."""
        return {name: value for part in self._all for name, value in part.metrics().items()}


def _check_order(reducers: list[Reducer | Format], number_format: Format, where: str) -> None:
    for index, part in enumerate(reducers):
        if isinstance(part, Format):
            raise ConfigError(f"{where}: a number format must come last, and there can be one only")
        if part.score is not None and index > 0:
            raise ConfigError(f"{where}: adc looks at the tokens that leave the client, so it must come first")
        if part.last and number_format.needs_tokens:
            raise ConfigError(f"{where}: pca codes tokens, which topk and c3sl do not leave")
        if part.last and index + 1 < len(reducers):
            raise ConfigError(f"{where}: only a number format can follow a codec that leaves no tokens (topk, c3sl)")


def _one_format(text: str, flag: str, embed_dim: int, seed: int) -> Format:
    made = [build(part, flag, embed_dim=embed_dim, seed=seed) for part in parse_codec(text, flag)]
    if len(made) != 1 or not isinstance(made[0], Format):
        raise ConfigError(f"{flag} {text!r}: activations are evaluated in one number format, as pca(0.5), int8, none")
    made[0].for_evaluation()
    return made[0]


def _require_finite(x: Tensor, what: str, codec: str) -> None:
    smallest, largest = torch.aminmax(x.detach())  # NaN comes through; asking every number takes ten times as long
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        raise TrainingError(f"the {what} at the cut hold NaN or infinite values, which the codec {codec} cannot encode")


def announced_shape(arrays: Mapping[str, Tensor], num: int) -> Shape:
    """The `num` dimensions, each at least 1, that `indices.shape` holds; a ProtocolError where it holds others."""
    shape = arrays["indices.shape"]
    if shape.shape != (num,) or shape.dtype != torch.int32 or bool((shape < 1).any()):
        raise ProtocolError(f"the shape of activations must be {num} whole numbers from 1 on")
    return tuple(shape.tolist())


def number_type(largest: int) -> torch.dtype:
    """The smallest type for whole numbers from 0 to `largest`."""
    return torch.uint8 if largest < 2**8 else torch.int16 if largest < 2**15 else torch.int32


def number(value: object, name: str) -> float:
    """`value` as it is, where it is a finite number; else a ConfigError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a number, got {value!r}")
    return value


def integer(value: object, name: str, least: int) -> int:
    """`value` as it is, where it is a whole number from `least` on; else a ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be a whole number from {least} on, got {value!r}")
    return value


def in_0_1(value: object, name: str) -> float:
    """`value` as it is, where it is a number in (0, 1]; else a ConfigError."""
    value = number(value, name)
    require(0 < value <= 1, name, "in (0, 1]", value)
    return value
