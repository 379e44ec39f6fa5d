"""Bytes on the wire: what is written is read, without copies; what nobody writes is refused, and all of it counted."""

import json
import random
import struct
import tracemalloc

import pytest
import safetensors.torch
import torch

from snello.errors import ProtocolError
from snello.split.wire import frames
from snello.split.wire.frames import (
    ARRAY_KINDS,
    BYTE_KINDS,
    DTYPES,
    EXCHANGE_KINDS,
    HEADER,
    MAX_JSON_BYTES,
    NOTHING,
    UPLINK_KINDS,
    Counters,
    Flags,
    Frame,
    Kind,
    parse_header,
    read,
    sizes,
    write,
)

SHAPES = [(), (0,), (3, 0, 5), (1,), (7,), (2, 3, 5), (1, 1, 1, 1, 1, 1, 1), (300, 1000)]
LAYOUT = "<4sBBHQIQ"  # as documented, apart from the code


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Every bit pattern may come up, NaNs too: they travel as they are."""
    generator = torch.Generator().manual_seed(seed)
    num = torch.empty(shape, dtype=dtype, device="meta").numel() * dtype.itemsize
    raw = torch.randint(256, (num,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


def bits(x: torch.Tensor) -> bytes:
    return bytes(x.contiguous().view(-1).view(torch.uint8).numpy())


def joined(frame: Frame) -> bytes:
    return b"".join(write(frame))


def sample(kind: Kind = Kind.ACTIVATIONS) -> Frame:
    """Elements of four sizes, two kinds twice, an empty array and a number."""
    arrays = {
        "labels": values((5,), torch.uint8),
        "activations": values((2, 3, 4), torch.bfloat16),
        "scales": values((2, 3, 2), torch.float32, 1),
        "scales.0": values((), torch.float32, 2),
        "indices.kept": values((4,), torch.int64),
        "indices.0": values((0, 3), torch.int64),
        "gradients": values((3,), torch.int8),
    }
    return Frame(kind, 12, 3, arrays, Flags.FORWARD_ONLY)


def assert_same(one: Frame, other: Frame) -> None:
    assert (one.kind, one.step, one.micro, one.flags) == (other.kind, other.step, other.micro, other.flags)
    assert one.arrays.keys() == other.arrays.keys()
    for name, value in one.arrays.items():
        assert (value.dtype, value.shape) == (other.arrays[name].dtype, other.arrays[name].shape), name
        assert bits(value) == bits(other.arrays[name]), name


# ------------------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("join", [False, True], ids=["buffers", "joined"])
@pytest.mark.parametrize("kind", Kind)
def test_every_kind_comes_back(kind, join):
    frame = sample(kind)
    assert_same(read([joined(frame)] if join else write(frame)), frame)


@pytest.mark.parametrize("join", [False, True], ids=["buffers", "joined"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_comes_back(dtype, shape, join):
    frame = Frame(Kind.GRADIENTS, 0, 0, {"gradients": values(shape, DTYPES[dtype])})
    assert_same(read([joined(frame)] if join else write(frame)), frame)


@pytest.mark.parametrize("arrays", [{}, {"labels": torch.zeros(0, dtype=torch.uint8)}], ids=["none", "empty"])
def test_frames_without_data_come_back(arrays):
    frame = Frame(Kind.GRADIENTS, 1, 2, arrays, Flags.OVERFLOW)
    assert_same(read(write(frame)), frame)
    assert_same(read([joined(frame)]), frame)


@pytest.mark.parametrize("flags", [NOTHING, Flags.FORWARD_ONLY, Flags.OVERFLOW, Flags.FORWARD_ONLY | Flags.OVERFLOW])
@pytest.mark.parametrize("step, micro", [(0, 0), (1, 0), (0, 1), (2**32, 77), (2**64 - 1, 2**32 - 1)])
def test_flags_step_and_micro_come_back(flags, step, micro):
    frame = read([joined(Frame(Kind.FEATURES, step, micro, {}, flags))])
    assert (frame.step, frame.micro, frame.flags) == (step, micro, flags)


def test_arrays_that_are_not_contiguous_or_need_gradient_come_back():
    x = torch.randn(4, 6, requires_grad=True)
    frame = read([joined(Frame(Kind.GRADIENTS, 0, 0, {"gradients": x.T[1:], "gradients.loss": x[:, 2]}))])
    assert torch.equal(frame.arrays["gradients"], x.T[1:]) and torch.equal(frame.arrays["gradients.loss"], x[:, 2])
    assert not any(value.requires_grad for value in frame.arrays.values())


# ------------------------------------------------------------------------------------------------------- zero copy


def test_buffers_share_memory_with_the_tensors():
    x, y = torch.zeros(3, dtype=torch.int32), torch.zeros(5, dtype=torch.uint8)
    buffers = write(Frame(Kind.ACTIVATIONS, 0, 0, {"labels": y, "activations": x}))
    x[1], y[4] = 0x01020304, 9
    assert [bytes(buffer) for buffer in buffers[1:]] == [bytes(4) + b"\4\3\2\1" + bytes(4), bytes(4) + b"\x09"]


def test_what_is_read_shares_memory_with_writable_buffers():
    frame = sample()
    data = bytearray(joined(frame))
    arrays = read([memoryview(data)]).arrays
    data[-len(joined(frame)) + HEADER.size + 8 :] = bytes(len(data) - HEADER.size - 8)
    assert all(bits(value) == bytes(value.numel() * value.element_size()) for value in arrays.values())
    assert any(bits(value).strip(b"\0") for value in frame.arrays.values())


def test_between_buffers_nothing_is_copied_at_all():
    x = torch.zeros(2, 3)
    (y,) = read(write(Frame(Kind.ACTIVATIONS, 0, 0, {"activations": x}))).arrays.values()
    x[1, 2] = 7.0
    assert y.data_ptr() == x.data_ptr() and y[1, 2] == 7.0


def test_what_is_read_from_memory_that_cannot_be_written_to_is_a_copy():
    data = joined(Frame(Kind.ACTIVATIONS, 0, 0, {"activations": torch.zeros(2)}))
    before = bytes(bytearray(data))
    read([data]).arrays["activations"].add_(1)
    assert data == before


# ----------------------------------------------------------------------------------------------- layout and sizes


def test_header_is_laid_out_as_documented():
    data = joined(Frame(Kind.FEATURE_GRADIENTS, 2**40 + 5, 2**31 + 6, {"gradients": torch.zeros(3)}, Flags.OVERFLOW))
    size = struct.calcsize(LAYOUT)
    assert HEADER.size == size
    assert struct.unpack(LAYOUT, data[:size]) == (b"snlo", 2, 4, 2, 2**40 + 5, 2**31 + 6, len(data) - size)
    assert parse_header(data) == (Kind.FEATURE_GRADIENTS, Flags.OVERFLOW, 2**40 + 5, 2**31 + 6, len(data) - size)


def test_numbers_of_kinds_and_flags_are_those_of_the_protocol():
    assert {kind.name: kind.value for kind in Kind} == {
        "ACTIVATIONS": 1,
        "GRADIENTS": 2,
        "FEATURES": 3,
        "FEATURE_GRADIENTS": 4,
        "EVALUATION": 5,
        "EVALUATED": 6,
        "HELLO": 16,
        "WELCOME": 17,
        "SAVE": 18,
        "SAVED": 19,
        "FINISH": 20,
        "FINISHED": 21,
        "GET_WEIGHTS": 22,
        "SET_WEIGHTS": 23,
        "WEIGHTS": 24,
        "WAIT": 25,
        "WAITED": 26,
    }
    assert {flag.name: flag.value for flag in Flags} == {"FORWARD_ONLY": 1, "OVERFLOW": 2, "SKIPPED": 4}


@pytest.mark.parametrize("arrays", [{}, sample().arrays], ids=["none", "sample"])
def test_body_is_safetensors(arrays):
    loaded = safetensors.torch.load(joined(Frame(Kind.ACTIVATIONS, 1, 2, arrays))[HEADER.size :])
    assert_same(Frame(Kind.ACTIVATIONS, 1, 2, loaded), Frame(Kind.ACTIVATIONS, 1, 2, arrays))


@pytest.mark.parametrize("dtype", DTYPES)
def test_body_of_every_dtype_is_safetensors(dtype):
    x = values((3, 5), DTYPES[dtype])
    loaded = safetensors.torch.load(joined(Frame(Kind.ACTIVATIONS, 0, 0, {"scales.x": x}))[HEADER.size :])
    assert loaded["scales.x"].dtype == x.dtype and bits(loaded["scales.x"]) == bits(x)


@pytest.mark.parametrize("extra", range(9))
def test_every_array_is_aligned_in_the_joined_frame(extra):
    frame = sample()
    frame.arrays["labels." + "x" * extra] = values((3,), torch.uint8)
    data = joined(frame)
    start = HEADER.size + 8 + int.from_bytes(data[HEADER.size : HEADER.size + 8], "little")
    table = json.loads(data[HEADER.size + 8 : start])
    assert table.keys() == frame.arrays.keys()
    for name, value in frame.arrays.items():
        assert (start + table[name]["data_offsets"][0]) % value.element_size() == 0, name


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", Kind)
def test_sizes_are_those_of_what_is_written(kind, device):
    frame = sample(kind)
    expected = {"labels": 5, "activations": 48, "scales": 48 + 4, "indices": 32, "gradients": 3}
    expected["headers"] = len(write(frame)[0])
    arrays = {name: value.to(device) for name, value in frame.arrays.items()}
    assert sizes(Frame(kind, 12, 3, arrays, frame.flags)) == expected
    assert sum(expected.values()) == len(joined(frame)) == sum(len(buffer) for buffer in write(frame))


def test_sizes_of_tensors_too_large_to_be_written():
    frame = Frame(Kind.FEATURES, 0, 0, {"activations": torch.empty(2**20, 2**20, dtype=torch.bfloat16, device="meta")})
    assert sizes(frame)["activations"] == 2**41


@pytest.mark.parametrize("name", ["pictures", "", ".labels", "headers", "evaluation", "Labels"])
@pytest.mark.parametrize("function", [write, sizes])
def test_arrays_of_unknown_kind_are_not_written(function, name):
    with pytest.raises(ProtocolError, match="unknown kind of array"):
        function(Frame(Kind.ACTIVATIONS, 0, 0, {name: torch.zeros(1)}))


# -------------------------------------------------------------------------------------------------------- counters


def test_counters_keep_directions_kinds_and_evaluation_apart():
    counters = Counters()
    for kind in Kind:
        size = {name: 10**kind * weight for weight, name in enumerate((*ARRAY_KINDS, "headers"), 1)}
        counters.add(sample(kind), size)
    ups, downs = (1, 4), (2, 3)  # kinds of training: activations, feature gradients; gradients, features
    for counter, kinds, evaluation in ((counters.uplink, ups, 5), (counters.downlink, downs, 6)):
        expected = {
            name: weight * sum(10**k for k in kinds) for weight, name in enumerate((*ARRAY_KINDS, "headers"), 1)
        }
        assert counter == {**expected, "evaluation": 36 * 10**evaluation}
        assert set(counter) == set(BYTE_KINDS)
    assert counters.total("uplink") == 36 * (10 + 10**4)
    assert counters.total("downlink") == 36 * (100 + 1000)
    assert counters.training == 36 * 11110
    assert counters.evaluation == 36 * 1_100_000


@pytest.mark.parametrize("kind", EXCHANGE_KINDS)
def test_counters_count_a_frame_once_and_one_way(kind):
    counters, frame = Counters(), sample(kind)
    for _ in range(3):
        counters.add(frame, sizes(frame))
    up = kind in (Kind.ACTIVATIONS, Kind.FEATURE_GRADIENTS, Kind.EVALUATION)
    assert up == (kind in UPLINK_KINDS)
    training = 0 if kind in (Kind.EVALUATION, Kind.EVALUATED) else 3 * len(joined(frame))
    assert (counters.total("uplink"), counters.total("downlink")) == ((training, 0) if up else (0, training))
    assert counters.training + counters.evaluation == 3 * len(joined(frame))
    assert counters.evaluation == 0 or training == 0


def test_counters_come_back_through_json_and_go_on():
    counters = Counters()
    assert (counters.training, counters.evaluation) == (0, 0)
    for kind in Kind:
        counters.add(sample(kind), sizes(sample(kind)))
    state = json.loads(json.dumps(counters.state_dict()))
    other = Counters()
    other.add(sample(), sizes(sample()))  # what was counted before is forgotten
    other.load_state_dict(state)
    assert other == counters
    other.add(sample(), sizes(sample()))
    assert other.training == counters.training + len(joined(sample()))
    assert counters.state_dict() == state


# --------------------------------------------------------------------------------------------------------- refusal


def refused(*buffers: bytes, match: str | None = None, **limits: int) -> None:
    """The buffers are refused, without memory for more than they hold."""
    room = 2**16 + 64 * sum(map(len, buffers))
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match=match):
            read(buffers, **limits)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < room


def raw(table: object, data: bytes = b"", *, length: int | None = None, body: int | None = None) -> bytes:
    """A frame with any table, as its text, or as an object that is put as `write` would."""
    text = table if isinstance(table, bytes) else json.dumps(table, separators=(",", ":")).encode()
    text += b"" if isinstance(table, bytes) else b" " * (-(HEADER.size + 8 + len(text)) % 8)
    content = struct.pack("<Q", len(text) if length is None else length) + text + data
    return struct.pack(LAYOUT, b"snlo", 2, 1, 0, 0, 0, len(content) if body is None else body) + content


def row(shape: object = (4,), offsets: object = (0, 4), dtype: object = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def header(data: bytes, **changes: object) -> bytes:
    """`data` with fields of its header changed."""
    names = ("magic", "version", "kind", "flags", "step", "micro", "body")
    fields = dict(zip(names, struct.unpack(LAYOUT, data[: HEADER.size]), strict=True)) | changes
    return struct.pack(LAYOUT, *fields.values()) + data[HEADER.size :]


def test_frames_made_by_hand_are_read():
    """Else what follows would be refused for another reason than the one under test."""
    frame = read([raw({"indices": row((2,), (0, 2)), "labels": row((4,), (2, 6))}, b"abcdef")])
    assert {name: bits(value) for name, value in frame.arrays.items()} == {"indices": b"ab", "labels": b"cdef"}
    assert_same(read([header(joined(sample()))]), sample())


def test_every_truncation_is_refused():
    data = joined(sample())
    for size in range(len(data)):
        refused(data[:size])
    assert_same(read([data]), sample())


def test_every_truncation_of_the_buffers_is_refused():
    buffers = [bytes(buffer) for buffer in write(sample())]
    for index, buffer in enumerate(buffers):
        for size in range(len(buffer)):
            refused(*buffers[:index], buffer[:size], *buffers[index + 1 :])
        if index:
            refused(*buffers[:index], *buffers[index + 1 :])  # the empty one is missed too
    assert_same(read(buffers), sample())


def test_buffers_that_do_not_fit_the_table_are_refused():
    head, *arrays = (bytes(buffer) for buffer in write(Frame(Kind.FEATURES, 0, 0, {"scales.0": torch.zeros(2)})))
    refused(head, arrays[0][:4], arrays[0][4:], match="do not fit")
    refused(head, arrays[0], b"", match="do not fit")
    refused(head + arrays[0][:4], arrays[0][4:], match="do not fit")
    refused(head[:-8], head[-8:] + arrays[0])
    refused(head[:20], head[20:], arrays[0])
    assert read([head, arrays[0]]).arrays["scales.0"].shape == (2,)


@pytest.mark.parametrize("extra", [b"\0", b" " * 8, joined(sample())], ids=["byte", "spaces", "frame"])
def test_trailing_bytes_are_refused(extra):
    data = joined(sample())
    refused(data + extra, match="announced")
    refused(data, extra)
    refused(*map(bytes, write(sample())), extra)
    refused(header(data + extra, body=len(data) - HEADER.size + len(extra)), match="do not fill")


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"magic": b"snla"}, "no frame"),
        ({"magic": b"\x80\x04\x95\x00"}, "no frame"),  # how a pickle begins
        ({"version": 0}, "version 0"),
        ({"version": 3}, "version 3"),
        ({"kind": 0}, "unknown kind of frame: 0"),
        ({"kind": 7}, "unknown kind of frame: 7"),
        ({"kind": 255}, "unknown kind of frame: 255"),
        ({"flags": 8}, "unknown flags"),
        ({"flags": 0x8003}, "unknown flags"),
        ({"body": 2**60}, "larger than the limit"),
        ({"body": 2**64 - 1}, "larger than the limit"),
    ],
    ids=str,
)
def test_wrong_headers_are_refused_before_anything_else_is_read(changes, match):
    data = header(joined(sample()), **changes)
    refused(data, match=match)
    with pytest.raises(ProtocolError, match=match) as error:
        parse_header(data[: HEADER.size])
    assert error.value.code == {"version": "version", "body": "too-large"}.get(*changes, "malformed")


def test_the_words_of_a_peer_do_not_choose_the_code_of_a_refusal():
    for name in ("protocol version", "larger than the limit"):
        ours = "control".ljust(len(name), ".")
        data = joined(Frame(Kind.SAVE, 0, 0, {ours: torch.zeros(4)})).replace(ours.encode(), name.encode())
        with pytest.raises(ProtocolError, match=f"unknown kind of array: '{name}'") as error:
            read([data])
        assert error.value.code == "malformed"


@pytest.mark.parametrize("body", [0, 1, 7, 8, 100, 2**31])
def test_other_bodies_than_announced_are_refused(body):
    refused(header(joined(sample()), body=body), match="announced")


def test_limit_on_the_body_holds_to_the_byte():
    data = joined(sample())
    body = len(data) - HEADER.size
    assert_same(read([data], max_body_bytes=body), sample())
    assert parse_header(data[: HEADER.size], body).body_bytes == body
    refused(data, max_body_bytes=body - 1, match="larger than the limit")
    with pytest.raises(ProtocolError, match="larger than the limit"):
        parse_header(data[: HEADER.size], body - 1)


@pytest.mark.parametrize("size", range(0, 28, 9))
def test_short_headers_are_refused(size):
    with pytest.raises(ProtocolError, match=f"28 bytes, got {size}"):
        parse_header(joined(sample())[:size])


@pytest.mark.parametrize("size", range(8))
def test_bodies_without_room_for_a_table_are_refused(size):
    refused(header(joined(sample())[: HEADER.size + size], body=size), match="cut off")


@pytest.mark.parametrize("shift", [-(2**9), -8, -1, 1, 8, 2**20, 2**32, 2**63])
def test_lies_about_the_table_are_refused(shift):
    table = json.dumps({"labels": row()}).encode() + b" " * 600
    refused(raw(table, b"abcd", length=(len(table) + shift) % 2**64))


def test_tables_are_limited():
    table = json.dumps({"labels": row()}).encode()
    data = raw(table + b" " * (MAX_JSON_BYTES + 1 - len(table)), b"abcd")
    refused(data, match="cannot have 1048577 bytes")
    assert len(table) < MAX_JSON_BYTES  # so that the size is all that is wrong with it


@pytest.mark.parametrize(
    "table",
    [
        b"",
        b" ",
        b"{",
        b'{"labels"',
        b'{"labels":}',
        b"{}{}",
        b"{'labels': 1}",
        b'{"labels": \xff}',
        b"\xff\xfe\xfd",
        b"\0" * 16,
        b"[]",
        b"[[]]",
        b"1",
        b"null",
        b"true",
        b"NaN",
        b'"labels"',
        b'{"labels": null}',
        b'{"labels": 1}',
        b'{"labels": []}',
        b'{"labels": "U8"}',
        b'{"labels": {}}',
        b'{"__metadata__": {"format": "pt"}}',
        b"[" * 100_000,
        b'{"labels":' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"labels":{"dtype":"U8","data_offsets":[0,0],"shape":' + b"[" * 50_000 + b"]" * 50_000 + b"}}",
        b'{"labels":{"dtype":"U8","data_offsets":[0,0],"shape":[' + b"9" * 100_000 + b"]}}",
    ],
    ids=lambda table: table[:24].decode("latin1"),
)
def test_tables_that_are_none_are_refused(table):
    refused(raw(table), match="cannot be read")


@pytest.mark.parametrize("missing", ["dtype", "shape", "data_offsets"])
def test_incomplete_rows_are_refused(missing):
    table = row()
    del table[missing]
    refused(raw({"labels": table}, b"abcd"), match="cannot be read")


@pytest.mark.parametrize("dtype", ["F64", "BOOL", "U16", "F8_E4M3", "u8", "", "torch.uint8", None, 1, True, ["U8"], {}])
def test_unknown_dtypes_are_refused(dtype):
    refused(raw({"labels": row(dtype=dtype)}, b"abcd"), match="cannot be read")


@pytest.mark.parametrize("name", ["pictures", "", ".labels", "Labels", "headers", "labels/0", "x" * 10_000])
def test_unknown_kinds_of_array_are_refused(name):
    refused(raw({name: row()}, b"abcd"), match="unknown kind of array")


SHAPES_THAT_ARE_NONE = [
    (-4,),
    (-2, -2),
    (True, 4),
    (4.0,),
    (4, 1e0),
    ("4",),
    (None,),
    ((4,),),
    (3,),
    (5,),
    (4, 2),
    (2**63,),
    (2**200, 4),
    (2**32, 2**32, 4),
    (0,),
    4,
    None,
    "4",
]


@pytest.mark.parametrize("shape", SHAPES_THAT_ARE_NONE, ids=str)
def test_shapes_that_are_none_are_refused(shape):
    refused(raw({"labels": row(shape)}, b"abcd"), match="cannot be read")


@pytest.mark.parametrize("shape", [(False,), (-0.0,), (0, -1), (0, True), (0, 1.5)], ids=str)
def test_empty_shapes_that_are_none_are_refused(shape):
    refused(raw({"labels": row(shape, (0, 0))}), match="cannot be read")


@pytest.mark.parametrize(
    "shape", [(0, 2**63), (2**64, 0), (0, 2**200), (0, 2**62, 2**62), (2**40, 0, 2**40, 2**40)], ids=str
)
def test_empty_shapes_too_large_for_a_tensor_are_refused(shape):
    refused(raw({"labels": row(shape, (0, 0))}))


def test_shapes_of_very_many_dimensions_are_refused_before_they_are_multiplied(monkeypatch):
    """The product of these has 143 000 digits; that of as many as fit into a table takes ten seconds."""
    data = raw({"labels": row([9] * 150_000)}, b"abcd")
    multiplied = []
    monkeypatch.setattr(frames.math, "prod", multiplied.append)
    with pytest.raises(ProtocolError):
        read([data])
    assert multiplied == []


@pytest.mark.parametrize(
    "offsets",
    [
        (-4, 0),
        (0, -4),
        (4, 0),
        (4, 8),
        (1, 5),
        (0, 3),
        (0, 5),
        (False, 4),
        (0, 4.0),
        (0.0, 4),
        ("0", "4"),
        (None, None),
        (2**64, 2**64 + 4),
        (2**200, 2**200 + 4),
        (0, 2**63),
        (0,),
        (),
        (0, 4, 8),
        "04",
        4,
        None,
        {"0": 0, "1": 4},
    ],
    ids=str,
)
def test_offsets_that_are_none_are_refused(offsets):
    refused(raw({"labels": row(offsets=offsets)}, b"abcd"))


@pytest.mark.parametrize(
    "one, other, size",
    [
        ((0, 4), (0, 4), 4),
        ((0, 4), (0, 4), 8),
        ((0, 4), (2, 6), 6),
        ((0, 4), (2, 6), 8),
        ((0, 4), (5, 9), 9),
        ((0, 4), (5, 9), 8),
        ((1, 5), (5, 9), 9),
        ((0, 4), (4, 8), 7),
        ((0, 4), (4, 8), 9),
        ((0, 4), (8, 12), 12),
    ],
    ids=str,
)
def test_overlaps_and_gaps_are_refused(one, other, size):
    for first, second in ((one, other), (other, one)):
        refused(raw({"labels": row(offsets=first), "indices": row(offsets=second)}, bytes(size)))


def test_empty_arrays_in_the_midst_of_another_are_refused():
    refused(raw({"labels": row(), "indices": row((0,), (2, 2))}, b"abcd"))
    refused(raw({"labels": row(), "indices": row((0,), (5, 5))}, b"abcd"))


@pytest.mark.parametrize(
    "table",
    [
        b'{"labels":ROW,"labels":ROW}',
        b'{"labels":1,"labels":ROW}',
        b'{"labels":ROW,"labe\\u006cs":ROW}',
        b'{"labels":{"dtype":"I8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        b'{"labels":{"dtype":"U8","shape":[5],"shape":[4],"data_offsets":[0,4]}}',
        b'{"labels":{"dtype":"U8","shape":[4],"data_offsets":[0,5],"data_offsets":[0,4]}}',
    ],
    ids=str,
)
def test_what_a_table_says_twice_is_refused(table):
    refused(raw(table.replace(b"ROW", json.dumps(row()).encode()), b"abcd"))


@pytest.mark.parametrize("shape", ["", {}], ids=repr)
def test_other_things_than_lists_are_no_shape_of_a_number(shape):
    refused(raw({"labels": row(shape, (0, 1))}, b"a"))


def test_arrays_out_of_alignment_are_refused():
    """`write` puts large elements first: what comes otherwise lies at addresses where not every CPU reads them."""
    refused(raw({"labels": row((1,), (0, 1)), "activations": row((1,), (1, 5), "F32")}, b"abcde"))


def test_tables_that_write_does_not_make_are_refused():
    refused(raw({"labels": {**row(), "strides": [1]}}, b"abcd"))
    refused(raw(json.dumps({"labels": row()}).encode("utf-16"), b"abcd"))


def test_single_bit_flips_are_read_or_refused():
    data = joined(sample())
    chosen = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(3000):
        at = chosen.randrange(len(data) * 8)
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        try:
            frame = read([bytes(flipped)])
        except ProtocolError:
            outcomes["refused"] += 1
            continue
        assert isinstance(frame, Frame) and frame.kind in Kind
        assert joined(frame) != data  # no flip goes unseen
        outcomes["read"] += 1
    assert min(outcomes.values()) > 300, outcomes
