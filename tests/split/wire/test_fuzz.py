"""At least 20 000 broken frames: none makes anything but an error of snello, takes much memory, or leaves a trace."""

import json
import random
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.clients import Client, Largest, ended, picture, registry_in, to_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from snello.errors import ProtocolError, SnelloError
from snello.split.server.sessions import TrainingSession
from snello.split.wire import chunks as wire
from snello.split.wire import frames
from snello.split.wire.frames import ARRAY_KINDS, DTYPES, HEADER, MAGIC, VERSION, Frame, Kind, control
from snello.split.wire.refusals import Code, Refused

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("known_models")]

COUNTED: Counter[str] = Counter()
LIMIT = 1 << 16
"""Bytes of a body, of frames that go to no session."""
CHUNK = 64
BATCH = 10
"""Frames of one example of hypothesis."""
QUICK = {"deadline": None, "derandomize": True, "database": None}
seeds = st.integers(0, 2**32 - 1).map(random.Random)


# ------------------------------------------------------------------------------------------- bytes, headers and tables


def random_json(rng: random.Random, depth: int = 0) -> object:
    """What a table may hold in place of what it should."""
    choices: list[Callable[[], object]] = [
        lambda: rng.choice([None, True, False, "", "F32", "U8", "a" * 50, float("nan"), float("inf"), -0.0, 1e308]),
        lambda: rng.choice([0, 1, -1, 2**31, 2**62, 2**63, 2**64, 10**30, -(2**63)]),
        lambda: rng.randint(0, 300),
    ]
    if depth < 3:
        choices += [
            lambda: [random_json(rng, depth + 1) for _ in range(rng.randint(0, 4))],
            lambda: {str(random_json(rng, 3))[:20]: random_json(rng, depth + 1) for _ in range(rng.randint(0, 3))},
        ]
    return rng.choice(choices)()


def random_table(rng: random.Random) -> tuple[bytes, int]:
    """A table that is almost one, and the bytes that its arrays would have."""
    table: dict[str, object] = {}
    at = 0
    for _ in range(rng.randint(0, 4)):
        dtype = rng.choice(list(DTYPES))
        shape = [rng.choice([0, 1, 2, 3, 7]) for _ in range(rng.randint(0, 4))]
        size = DTYPES[dtype].itemsize
        for n in shape:
            size *= n
        row: dict[str, object] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
        if rng.random() < 0.3:
            row[rng.choice([*row, "more"])] = random_json(rng)
        if rng.random() < 0.1:
            del row[rng.choice(list(row))]
        name = rng.choice([*ARRAY_KINDS, "labels.share", "weights.a.b", "strange", ""])
        table[name] = row if rng.random() < 0.95 else random_json(rng)
    value = table if rng.random() < 0.95 else random_json(rng)
    text = json.dumps(value, separators=rng.choice([(",", ":"), (", ", ": ")])).encode()
    if rng.random() < 0.1:
        text = b"[" * rng.randint(1, 3000)
    if rng.random() < 0.8:
        text += b" " * (-(8 + len(text) + HEADER.size) % 8)
    return text, at


def random_frame(rng: random.Random) -> bytes:
    """Bytes that begin like a frame, more or less."""
    if rng.random() < 0.15:
        return rng.randbytes(rng.randint(0, 200))
    text, size = random_table(rng)
    length = len(text) if rng.random() < 0.9 else rng.choice([0, 1, len(text) + 1, 2**20, 2**40, 2**64 - 1])
    body = struct.pack("<Q", length) + text + rng.randbytes(max(0, size + rng.choice([0, 0, 0, 0, -1, 1, 8])))
    announced = len(body) if rng.random() < 0.9 else rng.choice([0, 7, 8, len(body) + 1, LIMIT + 1, 2**40, 2**64 - 1])
    header = HEADER.pack(
        MAGIC if rng.random() < 0.98 else rng.randbytes(4),
        VERSION if rng.random() < 0.98 else rng.randint(0, 255),
        rng.choice(list(Kind)) if rng.random() < 0.95 else rng.randint(0, 255),
        rng.choice([0, 0, 0, 1, 2, 3]) if rng.random() < 0.95 else rng.randint(0, 2**16 - 1),
        rng.choice([0, 1, 2**63, 2**64 - 1]),
        rng.choice([0, 1, 2**32 - 1]),
        announced,
    )
    return header + body


def through(data: bytes, rng: random.Random) -> Frame | None:
    """In chunks, now and then wrong ones, to the frame that they make."""
    assembler = wire.Assembler(LIMIT, CHUNK)
    due = wire.chunk_size(max(1, len(data)), CHUNK)
    size = due if rng.random() < 0.9 else rng.randint(1, 2 * CHUNK)
    chunks = [data[at : at + size] for at in range(0, len(data), size)] or [b""]
    for chunk in chunks:
        whole = assembler.add(chunk)
        if whole is not None:
            return frames.read([whole], LIMIT)
    return None


@settings(max_examples=1100, **QUICK)
@given(rng=seeds)
def test_made_up_frames(rng):
    for _ in range(BATCH):
        data = random_frame(rng)
        COUNTED["made up"] += 1
        try:
            frame = through(data, rng)
        except ProtocolError as error:
            COUNTED["made up, refused"] += 1
            assert len(str(error)) < 2000
            continue
        if frame is not None:
            COUNTED["made up, read"] += 1
            assert bytes(to_bytes(frame)) == data  # there is one way only to write what was read


@settings(max_examples=200, **QUICK)
@given(data=st.binary(max_size=200))
def test_any_bytes(data):
    COUNTED["any"] += 1
    with pytest.raises(ProtocolError):
        frames.read([data], LIMIT)
    with pytest.raises(ProtocolError):
        if wire.Assembler(LIMIT, CHUNK).add(data[:CHUNK]) is None:
            raise ProtocolError("not yet a frame")


def test_made_up_frames_take_no_memory():
    rng = random.Random(5)
    made = [random_frame(rng) for _ in range(500)]
    tracemalloc.start()
    try:
        for data in made:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with suppress(ProtocolError):
                through(data, rng)
            assert tracemalloc.get_traced_memory()[1] - before < 2 * LIMIT + (1 << 18)
    finally:
        tracemalloc.stop()
    COUNTED["made up, watched"] += len(made)


# ------------------------------------------------------------------------------------------------------- live sessions


def traces(session: TrainingSession) -> dict[str, Any]:
    """What a refused frame must not change; saves that were taken may have told an accuracy."""
    state = picture(session)
    del state["rows"]
    return {**state, "place": state["place"][:3]}


class Target:
    """A session in the middle of its run, the frames that are due, and how to get it back there."""

    def __init__(self, client: Client, labels: str) -> None:
        self.client, self.labels = client, labels
        client.train(2)
        client.carry(client.save())
        conversation = client.step()
        self.frames = [next(conversation)]
        self.resets = 0
        if labels == "client":
            self.frames.append(conversation.send(client.carry(self.frames[0])))
        else:
            self.frames += [
                client.evaluation(),
                client.save(accuracy=0.5),
                client.request(control(Kind.GET_WEIGHTS, {})),
                client.request(control(Kind.FINISH, {})),
            ]
        self.corpus = [bytes(to_bytes(frame)) for frame in self.frames]
        self.conversation = conversation
        self.reset()
        self.before = traces(client.session)

    def reset(self) -> None:
        """Where it was: before the third step, or in U-shape in the middle of it."""
        self.resets += 1
        session = self.client.session
        session.go_back(2)
        session.finished = False
        if self.labels == "client":
            session.take(bytearray(self.corpus[0]))

    def take(self, data: bytes, check: bool = False) -> bool:
        """Whether it was taken; anything but an error of snello's goes up. A refused one has left nothing (`check`)."""
        session = self.client.session
        try:
            answer = session.take(bytearray(data))
        except SnelloError as error:
            # Two bugs that test_sessions.py shows leave something behind: gradients that are not finite, and in
            # U-shape an exchange that is forgotten.
            polluted = isinstance(error, Refused) and error.code == Code.NOT_FINITE
            if polluted or (self.labels == "client" and session.model.half._pending is None):
                self.reset()
                COUNTED["refused, reset"] += 1
            elif check:
                COUNTED["refused, compared"] += 1
                assert traces(session) == self.before
            return False
        if not answer.repeated:
            if answer.after is not None:
                answer.after()
            self.reset()
        return True

    def finish(self) -> None:
        """The rest of the run, with the frames that were due all along."""
        frame = self.frames[-1 if self.labels == "client" else 0]
        with pytest.raises(StopIteration):
            while True:
                frame = self.conversation.send(self.client.carry(frame))
        self.client.train()


SESSIONS = {
    "none": {"codec": "none"},
    "adc": {"codec": "adc(0.5)+int8"},
    "adc, u-shape": {"codec": "adc(0.5)+int8", "labels": "client"},
    "adc, merging tokens": {"codec": "adc(0.5, rule=merge)+int8"},
    "topk": {"codec": "topk(0.2)"},
    "c3sl": {"codec": "c3sl(2)"},
    "fedlite": {"codec": "fedlite(8)"},
    "pca, a frame with a basis": {"codec": "pca(0.5, basis=2)"},
    "pca, a frame without": {"codec": "pca(1, down=0.5)"},
    "pca, u-shape": {"codec": "pca(0.5, basis=1)", "labels": "client"},
}


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory, known_models: None) -> Iterator[dict[str, Target]]:
    result = {}
    for name, options in SESSIONS.items():
        client = Client(registry_in(tmp_path_factory.mktemp("fuzz"), **options))
        client.open()
        result[name] = Target(client, options.get("labels", "server"))
    yield result


def broken(data: bytes, rng: random.Random) -> bytes:
    """A frame with 1 to 3 bits flipped, most of them where the structure is, or a part of it cut out or doubled."""
    way = rng.random()
    structure = min(len(data), HEADER.size + 8 + struct.unpack_from("<Q", data, HEADER.size)[0])
    if way < 0.7:
        result = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(structure if rng.random() < 0.97 else len(data))
            result[at] ^= 1 << rng.randrange(8)
        return bytes(result)
    begin = rng.randrange(structure if rng.random() < 0.7 else len(data))
    end = min(len(data), begin + rng.choice([1, 2, 8, 100]))
    if way < 0.8:
        return data[:begin]
    if way < 0.9:
        return data[:begin] + data[end:]
    return data[:end] + data[begin:]


@settings(max_examples=1000, **QUICK)
@given(rng=seeds)
def test_broken_frames(targets, rng):
    for index in range(BATCH):
        target = targets[rng.choice(list(targets))]
        original = rng.choice(target.corpus)
        data = broken(original, rng)
        if data == original:
            continue
        COUNTED["broken"] += 1
        if index:
            COUNTED["broken, taken"] += target.take(data)
            continue
        with Largest() as largest:
            target.take(data, check=True)
        assert largest.bytes <= 16 * max(target.client.session.max_body, 1 << 20)


def changed_arrays(frame: Frame, rng: random.Random, floats: bool) -> Frame:
    """A well-formed frame with another array in it, or one less, or one of another type, shape or content."""
    arrays = dict(frame.arrays)
    name = rng.choice([*arrays, "indices.0", "indices.sizes.0", "scales", "labels.sizes", "indices.shape.0"])
    x = arrays.get(name, torch.zeros(3))
    types = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32]
    types += [torch.float16, torch.bfloat16] if floats else []
    value = rng.choice([0, 1, -1, 127, 2**31 - 1, -(2**31), 2**62, 1e38])
    way = rng.randrange(7)
    if way == 0:
        arrays.pop(name, None)
    elif way == 1:
        arrays[name] = x.to(rng.choice(types))
    elif way == 2:
        arrays[name] = torch.full(x.shape, float(value)).to(rng.choice(types))
    elif way == 3:
        arrays[name] = x.reshape(-1)[: rng.choice([0, 1, 2, 5])]
    elif way == 4:
        arrays[name] = x.unsqueeze(rng.choice([0, -1]))
    elif way == 5:
        arrays[name] = torch.cat([x.reshape(-1), x.reshape(-1)])
    else:
        shape = [rng.choice([0, 1, 2, 4, 10, 11, 64]) for _ in range(rng.randint(0, 4))]
        arrays[name] = torch.zeros(shape, dtype=rng.choice(types))
    return replace(frame, arrays=arrays)


@pytest.mark.parametrize("floats", [False, pytest.param(True)], ids=["types of codecs", "all types"])
def test_frames_of_other_arrays(targets, floats):
    rng = random.Random(7)
    for _ in range(600):
        target = targets[rng.choice(list(targets))]
        frame = changed_arrays(rng.choice(target.frames), rng, floats)
        data = bytes(to_bytes(frame))
        COUNTED["other arrays"] += 1
        with Largest() as largest:
            COUNTED["other arrays, taken"] += target.take(data, check=True)
        assert largest.bytes <= 16 * max(target.client.session.max_body, 1 << 20), frame


def test_the_sessions_train_on_as_if_nothing_had_come(targets, undisturbed):
    for name, target in targets.items():
        assert traces(target.client.session) == target.before, name
        target.finish()
        assert ended(target.client) == undisturbed(**SESSIONS[name]), name


def test_that_was_enough():
    num = sum(count for name, count in COUNTED.items() if "," not in name or name.endswith("watched"))
    assert num >= 20_000, COUNTED
    assert COUNTED["made up, read"] > 500 and COUNTED["made up, refused"] > 5000
    assert COUNTED["refused, compared"] > 1000 > COUNTED["refused, reset"]
    assert COUNTED["broken, taken"] < COUNTED["broken"] / 2 and COUNTED["other arrays, taken"] > 20
