"""Frames as chunks and back: what `chunks` makes is put together, and anything else refused before memory is taken."""

import random
import tracemalloc
from itertools import pairwise

import pytest
import torch

from snello.errors import ProtocolError
from snello.split.wire.chunks import CHUNK_BYTES, MAX_CHUNK_BYTES, Assembler, chunk_size, chunks
from snello.split.wire.frames import HEADER, MAGIC, VERSION, Frame, Kind, read, write

SIZE = 64


def header(body: int, kind: int = Kind.SAVE) -> bytes:
    return HEADER.pack(MAGIC, VERSION, kind, 0, 3, 4, body)


def frame_of(size: int) -> bytes:
    """The bytes of a frame, `size` in all; what is in it does not matter here."""
    return header(size - HEADER.size) + random.Random(size).randbytes(size - HEADER.size)


def put(assembler: Assembler, parts: list[bytes]) -> bytearray | None:
    *first, last = parts
    assert all(assembler.add(part) is None for part in first)
    return assembler.add(last)


@pytest.mark.parametrize("size", [28, 29, 63, 64, 65, 127, 128, 129, 191, 192, 193, 1000])
@pytest.mark.parametrize("cuts", [(), (28,), (1, 2, 3), (64,), (63, 65), (27, 28, 29)])
def test_round_trip(size, cuts):
    data = frame_of(size)
    at = [0, *(cut for cut in cuts if cut < size), size]
    buffers = [data[begin:end] for begin, end in pairwise(at)]
    made = list(chunks(buffers, SIZE))
    lengths = [len(chunk) for chunk in made]
    assert len(set(lengths[:-1])) <= 1 and 0 < lengths[-1] <= lengths[0] <= SIZE * 3 // 2
    assert lengths[0] == chunk_size(size, SIZE) and lengths[0] - lengths[-1] < len(made)
    assert b"".join(made) == data and all(type(chunk) is bytes for chunk in made)
    assert put(Assembler(1 << 20, SIZE), made) == data


@pytest.mark.parametrize("more", [-1, 0, 1, CHUNK_BYTES // 2])
def test_a_real_frame_at_the_real_size(more):
    size = (
        2 * CHUNK_BYTES
        + more
        - len(write(Frame(Kind.GRADIENTS, 7, 1, {"labels": torch.zeros(10**6, dtype=torch.uint8)}))[0])
    )
    frame = Frame(Kind.GRADIENTS, 7, 1, {"labels": torch.arange(size, dtype=torch.int64).to(torch.uint8)})
    made = list(chunks(write(frame)))
    assert len(made) == 2 and max(map(len, made)) <= MAX_CHUNK_BYTES
    back = read([put(Assembler(1 << 30), made)])  # type: ignore[list-item]
    assert (back.step, back.micro) == (7, 1) and torch.equal(back.arrays["labels"], frame.arrays["labels"])


def test_empty_buffers_make_no_chunks():
    assert list(chunks([], SIZE)) == []
    assert list(chunks([b"", b"a" * SIZE, b"", b"", b"b"], SIZE)) == [b"a" * SIZE + b"b"]
    assert list(chunks([b"", b"a" * SIZE, b"", b"b" * SIZE, b""], SIZE)) == [b"a" * SIZE, b"b" * SIZE]


def test_what_was_put_together_is_not_touched_again():
    assembler = Assembler(1 << 20, SIZE)
    first = put(assembler, list(chunks([frame_of(200)], SIZE)))
    assert assembler.header is None
    second = put(assembler, list(chunks([frame_of(201)], SIZE)))
    assert first == frame_of(200) and second == frame_of(201)


def test_the_header_is_known_once_it_is_there():
    assembler = Assembler(1 << 20, SIZE)
    assembler.add(next(chunks([frame_of(200)], SIZE)))
    assert assembler.header is not None and assembler.header.body_bytes == 172
    assert (assembler.header.kind, assembler.header.step, assembler.header.micro) == (Kind.SAVE, 3, 4)


@pytest.mark.parametrize("body", [1 << 40, 2**64 - 1, (1 << 20) + 1])
def test_nothing_is_taken_for_what_is_too_large(body):
    assembler = Assembler(1 << 20, SIZE)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="larger than the limit of 1048576"):
            assembler.add(header(body) + bytes(SIZE - HEADER.size))
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()
    assert assembler.header is None


def test_the_limit_itself_is_allowed():
    assembler = Assembler(100, SIZE)
    assert put(assembler, list(chunks([frame_of(128)], SIZE))) == frame_of(128)
    with pytest.raises(ProtocolError, match="of 101 bytes is larger than the limit of 100"):
        assembler.add(frame_of(129)[:SIZE])


def test_the_limit_changes_between_frames():
    assembler = Assembler(50, SIZE)
    with pytest.raises(ProtocolError):
        assembler.add(frame_of(128)[:SIZE])
    assembler.max_body_bytes = 100
    parts = list(chunks([frame_of(128)], SIZE))
    assembler.add(parts[0])
    assembler.max_body_bytes = 10  # for the next
    assert assembler.add(parts[1]) == frame_of(128)
    with pytest.raises(ProtocolError):
        assembler.add(frame_of(64))


DATA = frame_of(200)
FIRST, SECOND, LAST = chunks([DATA], SIZE)
WRONG = {
    "empty": [b""],
    "a short header": [DATA[:27]],
    "the header alone": [DATA[:28]],
    "the first too short": [FIRST[:-1]],
    "the first too long": [DATA[: len(FIRST) + 1]],
    "all in one": [DATA],
    "empty in between": [FIRST, b""],
    "the second too short": [FIRST, SECOND[:-1]],
    "the second too long": [FIRST, SECOND + LAST[:1]],
    "the last too short": [FIRST, SECOND, LAST[:-1]],
    "the last too long": [FIRST, SECOND, LAST + b"x"],
    "the next frame in the last": [FIRST, SECOND, LAST + frame_of(56)],
    "two frames in one": [frame_of(30) + frame_of(30)],
    "no frame": [b"x" * 64],
}


@pytest.mark.parametrize("name", WRONG)
def test_chunks_that_are_none(name):
    assembler = Assembler(1 << 20, SIZE)
    *good, bad = WRONG[name]
    for chunk in good:
        assert assembler.add(chunk) is None
    with pytest.raises(ProtocolError):
        assembler.add(bad)


def test_the_error_says_what_was_due():
    assembler = Assembler(1 << 20, SIZE)
    assembler.add(FIRST)
    with pytest.raises(ProtocolError, match="a chunk of 3 bytes came where 67 were due"):
        assembler.add(b"abc")
