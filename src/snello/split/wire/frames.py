"""Bytes on the wire: a fixed header and a safetensors body of typed arrays. All bytes are counted here.

    magic "snlo" | version u8 | kind u8 | flags u16 | step u64 | micro-step u32 | body bytes u64      little-endian
    body: safetensors (u64 length, JSON of names, dtypes, shapes and offsets, then the arrays' bytes)

A frame is a list of buffers that share memory with the tensors they come from; who sends them may join them. What is
received is checked against limits before memory is taken. No pickle.
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from snello.errors import ProtocolError

MAGIC, VERSION = b"snlo", 2
HEADER = struct.Struct("<4sBBHQIQ")
MAX_JSON_BYTES = 1 << 20
MAX_BODY_BYTES = 1 << 31
MAX_DIMENSIONS = 8
ARRAY_KINDS = ("activations", "gradients", "labels", "scales", "indices", "weights", "control")
"""What an array on the wire is, for the counters; its name is its kind, or `kind.detail`."""
BYTE_KINDS = (*ARRAY_KINDS, "headers", "evaluation")
MAX_CONTROL_BYTES = 1 << 16
DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Direction = Literal["uplink", "downlink"]
Buffer = bytes | bytearray | memoryview


class Kind(IntEnum):
    """What a frame carries."""

    ACTIVATIONS = 1  # up: the codec's arrays, with labels where the server has the loss
    GRADIENTS = 2  # down: the gradient of what the activations described
    FEATURES = 3  # down, in U-shape: what the classifier sees
    FEATURE_GRADIENTS = 4  # up, in U-shape
    EVALUATION = 5  # up: activations of held-out pictures
    EVALUATED = 6  # down: what the server made of them, logits or in U-shape features
    HELLO = 16  # up, first on every connection: who the client is, what it wants, where it stands
    WELCOME = 17  # down: where both go on, and what the client needs for it
    SAVE = 18  # up, between steps: write a checkpoint; these weights are the best so far, or not
    SAVED = 19  # down: it is written
    FINISH = 20  # up: the run is complete
    FINISHED = 21  # down: the server's count of what crossed the cut
    GET_WEIGHTS = 22  # up: asks for the server half's weights
    SET_WEIGHTS = 23  # up: weights that the server's half continues with
    WEIGHTS = 24  # down: weights, or the word that they were taken
    WAIT = 25  # up, when all is sent: asks how far the server is with the steps that it takes by itself
    WAITED = 26  # down: how many are left


class Flags(IntFlag):
    """What else a frame says."""

    FORWARD_ONLY = 1  # up: the client trains nothing below the cut and wants no gradient
    OVERFLOW = 2  # the gradient overflowed in half precision: both sides skip this step
    SKIPPED = 4  # up: the client's own gradient overflowed at the end of the step before, which both sides skip


NOTHING = Flags(0)
EVALUATION_KINDS = (Kind.EVALUATION, Kind.EVALUATED)
UPLINK_KINDS = (Kind.ACTIVATIONS, Kind.FEATURE_GRADIENTS, Kind.EVALUATION)
DOWNLINK_KINDS = (Kind.GRADIENTS, Kind.FEATURES, Kind.EVALUATED)
EXCHANGE_KINDS = (*UPLINK_KINDS, *DOWNLINK_KINDS)
"""What is counted: training and evaluation. What opens, saves and ends a session is not part of any exchange."""


@dataclass(frozen=True)
class Frame:
    """One message of an exchange."""

    kind: Kind
    step: int
    micro: int
    arrays: dict[str, Tensor]
    """Named by kind, or `kind.detail`; the kinds are ARRAY_KINDS."""
    flags: Flags = NOTHING


def control(kind: Kind, values: Mapping[str, Any], arrays: Mapping[str, Tensor] | None = None) -> Frame:
    """A frame that carries JSON values, and arrays beside them."""
    text = torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
    return Frame(kind, 0, 0, {"control": text, **(arrays or {})})


def control_values(frame: Frame) -> dict[str, Any]:
    """The JSON values of a frame.

    Raises:
        ProtocolError: where it carries none.
    """
    text = frame.arrays.get("control")
    if text is None or text.dtype != torch.uint8 or text.ndim != 1 or len(text) > MAX_CONTROL_BYTES:
        raise ProtocolError(f"a frame of kind {frame.kind.name} came without its values")
    try:
        values = json.loads(bytes(text.numpy()))
    except (ValueError, RecursionError):
        raise ProtocolError(f"the values of a frame of kind {frame.kind.name} are no JSON") from None
    if not isinstance(values, dict):
        raise ProtocolError(f"the values of a frame of kind {frame.kind.name} are no JSON object")
    return values


def weights_frame(kind: Kind, weights: Mapping[str, Tensor], values: Mapping[str, Any] | None = None) -> Frame:
    """A frame that carries weights, and JSON values beside them."""
    return control(kind, values or {}, {f"weights.{name}": value.detach().cpu() for name, value in weights.items()})


def weights_of(frame: Frame) -> dict[str, Tensor]:
    """The weights that a frame carries, by name."""
    return {name[8:]: value for name, value in frame.arrays.items() if name.startswith("weights.")}


@dataclass
class Counters:
    """Bytes by direction and kind: what was written, headers included."""

    uplink: Counter[str] = field(default_factory=Counter)
    downlink: Counter[str] = field(default_factory=Counter)

    def add(self, frame: Frame, sizes: Mapping[str, int]) -> None:
        """Counts a frame of these sizes by kind; its kind says which way it goes, and whether it counts."""
        if frame.kind not in EXCHANGE_KINDS:
            return
        counter = self.uplink if frame.kind in UPLINK_KINDS else self.downlink
        if frame.kind in EVALUATION_KINDS:
            counter["evaluation"] += sum(sizes.values())
        else:
            counter.update(sizes)

    def total(self, direction: Direction) -> int:
        """Training bytes of one way: all but evaluation."""
        return sum(size for kind, size in getattr(self, direction).items() if kind != "evaluation")

    @property
    def training(self) -> int:
        """Training bytes of both ways."""
        return self.total("uplink") + self.total("downlink")

    @property
    def evaluation(self) -> int:
        """Bytes of evaluation, both ways."""
        return self.uplink["evaluation"] + self.downlink["evaluation"]

    def state_dict(self) -> dict[str, dict[str, int]]:
        """As plain numbers."""
        return {"uplink": dict(self.uplink), "downlink": dict(self.downlink)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Goes on from a `state_dict()`."""
        self.uplink, self.downlink = Counter(state["uplink"]), Counter(state["downlink"])


def sizes(frame: Frame) -> dict[str, int]:
    """Bytes that `write` makes of a frame, by kind, without writing it; of tensors on any device, `meta` too."""
    counted: Counter[str] = Counter(headers=HEADER.size + len(_json(frame.arrays)))
    for name, value in frame.arrays.items():
        counted[_kind(name)] += value.numel() * value.element_size()
    return dict(counted)


def write(frame: Frame) -> list[Buffer]:
    """The frame as buffers, in order; those of arrays on the CPU share their memory."""
    head = _json(frame.arrays)
    body = len(head) + sum(value.numel() * value.element_size() for value in frame.arrays.values())
    header = HEADER.pack(MAGIC, VERSION, frame.kind, frame.flags, frame.step, frame.micro, body)
    return [header + head, *(_bytes(frame.arrays[name]) for name in _order(frame.arrays))]


def read(buffers: Sequence[Buffer], max_body_bytes: int = MAX_BODY_BYTES) -> Frame:
    """The frame that `write` made, from its buffers or from all of them joined in one.

    The arrays share memory with the buffers: they are to be read, not written.

    Raises:
        ProtocolError: for anything that `write` does not make, or a body larger than `max_body_bytes`.
    """
    first = memoryview(buffers[0] if buffers else b"")
    head = parse_header(first, max_body_bytes)
    body = head.body_bytes
    if sum(len(buffer) for buffer in buffers) != HEADER.size + body:
        raise ProtocolError(f"a frame of {HEADER.size + body} bytes was announced, {sum(map(len, buffers))} came")
    table, start = _parse_table(first[HEADER.size :], body)
    rest = first[HEADER.size + start :]
    if len(buffers) == 1:
        parts = [rest[entry.begin : entry.end] for entry in table]
    else:
        parts = [memoryview(buffer) for buffer in buffers[1:]]
        if len(rest) or [len(part) for part in parts] != [entry.end - entry.begin for entry in table]:
            raise ProtocolError("the buffers of a frame do not fit its table")
    arrays = {entry.name: _tensor(entry, part) for entry, part in zip(table, parts, strict=True)}
    return Frame(head.kind, head.step, head.micro, arrays, head.flags)


class Header(NamedTuple):
    """What the first HEADER.size bytes of a frame say."""

    kind: Kind
    flags: Flags
    step: int
    micro: int
    body_bytes: int


def parse_header(data: Buffer, max_body_bytes: int = MAX_BODY_BYTES) -> Header:
    """The header of a frame, from its first HEADER.size bytes.

    Raises:
        ProtocolError: for anything that is no header of this version, or a body larger than `max_body_bytes`.
    """
    if len(data) < HEADER.size:
        raise ProtocolError(f"a frame's header has {HEADER.size} bytes, got {len(data)}")
    magic, version, kind, flags, step, micro, body = HEADER.unpack(bytes(data[: HEADER.size]))
    if magic != MAGIC:
        raise ProtocolError("this is no frame of snello's protocol")
    if version != VERSION:
        text = f"a frame of protocol version {version}; this snello speaks version {VERSION}"
        raise ProtocolError(text, code="version")
    if flags & ~sum(Flags):
        raise ProtocolError(f"unknown flags in a frame: {flags:#x}")
    if kind not in Kind._value2member_map_:
        raise ProtocolError(f"unknown kind of frame: {kind}")
    if body > max_body_bytes:
        raise ProtocolError(f"a frame of {body} bytes is larger than the limit of {max_body_bytes}", code="too-large")
    return Header(Kind(kind), Flags(flags), step, micro, body)


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _json(arrays: Mapping[str, Tensor]) -> bytes:
    """The length-prefixed table of a safetensors body, padded to 8 bytes."""
    return _table(tuple((name, value.dtype, tuple(value.shape)) for name, value in arrays.items()))


def _order(arrays: Mapping[str, Tensor]) -> list[str]:
    """Large elements first, as safetensors does, so that every array is aligned."""
    return sorted(arrays, key=lambda name: (-arrays[name].element_size(), name))


@lru_cache(maxsize=256)  # the frames of a run are of a few shapes
def _table(signature: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]) -> bytes:
    table: dict[str, Any] = {}
    at = 0
    for name, dtype, shape in sorted(signature, key=lambda row: (-row[1].itemsize, row[0])):
        _kind(name)
        end = at + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text) + HEADER.size) % 8)
    return struct.pack("<Q", len(text)) + text


def _parse_table(data: memoryview, body: int) -> tuple[tuple[_Entry, ...], int]:
    """The entries of a body's table in the order of their bytes, and where those bytes begin."""
    if len(data) < 8:
        raise ProtocolError("the body of a frame is cut off")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(MAX_JSON_BYTES, body - 8) or length > len(data) - 8:
        raise ProtocolError(f"the table of a frame cannot have {length} bytes")
    parse = _entries_seen if length <= MAX_SEEN_BYTES else _entries
    return parse(bytes(data[: 8 + length]), body - 8 - length), 8 + length


def _entries(table: bytes, num_bytes: int) -> tuple[_Entry, ...]:
    """The entries of a length-prefixed table of arrays that fill `num_bytes`, in their order."""
    try:
        entries = [_entry(name, row) for name, row in json.loads(table[8:]).items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ProtocolError(f"the table of a frame cannot be read: {type(error).__name__}") from None
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    at = 0
    for entry in entries:
        if entry.begin != at:
            raise ProtocolError(f"the array {entry.name!r} of a frame does not begin where the one before ends")
        at = entry.end
    if at != num_bytes:
        raise ProtocolError("the arrays of a frame do not fill its body")
    make = _table if len(table) <= MAX_SEEN_BYTES else _table.__wrapped__
    if make(tuple((entry.name, entry.dtype, entry.shape) for entry in entries)) != table:
        raise ProtocolError("the table of a frame is not written as this protocol writes it")
    return tuple(entries)


MAX_SEEN_BYTES = 4096
_entries_seen = lru_cache(maxsize=256)(_entries)  # small ones only: a peer must not fill the memory with them


def _entry(name: str, row: Mapping[str, Any]) -> _Entry:
    dtype, shape, (begin, end) = DTYPES[row["dtype"]], tuple(row["shape"]), row["data_offsets"]
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)):
        raise ValueError
    too_large = math.prod(max(n, 1) for n in shape) >= 2**63  # of no bytes, but of a size that torch cannot hold
    if too_large or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError
    _kind(name)
    return _Entry(name, dtype, shape, begin, end)


def _kind(name: str) -> str:
    kind = name.split(".")[0]
    if kind not in ARRAY_KINDS:
        raise ProtocolError(f"unknown kind of array: {name[:40]!r}")
    return kind


def _bytes(value: Tensor) -> memoryview:
    # One element is contiguous to torch whatever its stride, and yet cannot be seen as bytes.
    flat = value.detach().contiguous().cpu().as_strided((value.numel(),), (1,))
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _tensor(entry: _Entry, data: memoryview) -> Tensor:
    if not len(data):
        return torch.empty(entry.shape, dtype=entry.dtype)
    if data.readonly:  # torch has no tensors that cannot be written to
        data = memoryview(bytearray(data))
    return torch.frombuffer(data, dtype=entry.dtype).view(entry.shape)
