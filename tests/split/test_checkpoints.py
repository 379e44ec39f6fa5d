"""The last two checkpoints of a session: whole or not there."""

import errno
import json
import os

import pytest
import torch
from torch import nn

from snello import files
from snello.errors import CheckpointError, SnelloWarning
from snello.split.checkpoints import Checkpoints, steps_in


class Session:
    """Something to save."""

    def __init__(self, folder) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.checkpoints = Checkpoints(folder / "checkpoints", {"model": self.model}, {"own": self.optimizer})
        self.step = 0

    def train(self) -> None:
        self.model(torch.ones(2, 4)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def save(self) -> None:
        self.checkpoints.save(self.step, {"at": self.step, "list": [1, 2.5, None, "x"]})

    def state(self) -> list[torch.Tensor]:
        moments = [entry[name] for entry in self.optimizer.state_dict()["state"].values() for name in sorted(entry)]
        return [value.clone() for value in (*self.model.state_dict().values(), *moments)]


@pytest.fixture
def session(tmp_path) -> Session:
    return Session(tmp_path)


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_keeps_two(session):
    assert session.checkpoints.steps() == []
    for steps in ([0], [0, 1], [1, 2], [2, 3]):
        session.save()
        assert session.checkpoints.steps() == steps
        session.train()
    assert sorted(path.name for path in session.checkpoints.folder.iterdir()) == [
        "step-000000002.safetensors",
        "step-000000003.safetensors",
    ]


def test_goes_back_and_drops_what_came_later(session):
    session.train()
    session.save()
    before = session.state()
    session.train()
    session.save()
    later = session.state()
    assert session.checkpoints.load(2) == {"version": files.VERSION, "at": 2, "list": [1, 2.5, None, "x"]}
    assert session.checkpoints.steps() == [1, 2] and same(session.state(), later)
    assert session.checkpoints.load(1)["at"] == 1
    assert session.checkpoints.steps() == [1] and same(session.state(), before)
    session.train()
    assert same(session.state(), later)  # the moments are those of the step too


def test_large_steps_are_in_order(session):
    for session.step in (999_999_999, 1_000_000_000):
        session.save()
    assert session.checkpoints.steps() == [999_999_999, 1_000_000_000]


def test_other_files_are_none(session):
    session.save()
    folder = session.checkpoints.folder
    half = session.checkpoints.path(0).read_bytes()[:100]
    for name in (".step-000000007.safetensors.tmp", "step-7.safetensors.tmp", "step-x.safetensors", "notes.txt"):
        (folder / name).write_bytes(half)
    assert session.checkpoints.steps() == [0] == steps_in(folder)
    session.train()
    session.save()
    assert session.checkpoints.steps() == [0, 1] and session.checkpoints.load(0)["at"] == 0
    assert steps_in(folder / "nothing") == []


def test_one_that_is_not_there(session):
    session.save()
    with pytest.raises(CheckpointError, match=r"step-000000005\.safetensors"):
        session.checkpoints.load(5)
    assert session.checkpoints.steps() == [0]


def cut_short(data: bytes) -> bytes:
    return data[:-10]


DAMAGE = {
    "empty": lambda data: b"",
    "cut short": cut_short,
    "half": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + b"more",
    "no header": lambda data: bytes(8) + data[8:],
    "a huge header": lambda data: b"\xff" * 8 + data[8:],
    "zeros": lambda data: bytes(len(data)),
    "no json": lambda data: data.replace(b'{\\"version', b'!\\"version'),
    "another version": lambda data: data.replace(b'version\\": 2', b'version\\": 9'),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_one_is_named_and_the_others_stay(session, name):
    session.save()
    session.train()
    session.save()
    path = session.checkpoints.path(1)
    data = path.read_bytes()
    damaged = DAMAGE[name](data)
    assert damaged != data
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="step-000000001"):
        session.checkpoints.load(1)
    if name in ("no json", "another version"):  # seen only when it is loaded
        return
    with pytest.warns(SnelloWarning, match=r"step-000000001\.safetensors is damaged and left out"):
        assert session.checkpoints.steps() == [0] and session.checkpoints.load(0)["at"] == 0


def test_one_of_another_model(session, tmp_path):
    session.save()
    other = Checkpoints(session.checkpoints.folder, {"model": nn.Linear(5, 3)}, {})
    with pytest.raises(CheckpointError, match="does not fit the model"):
        other.load(0)


class TestFullDisk:
    def test_the_others_stay(self, session, monkeypatch):
        for _ in range(2):
            session.save()
            session.train()
        kept = {path.name: path.read_bytes() for path in session.checkpoints.folder.iterdir()}

        def half(values, path, metadata) -> None:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(files, "save_file", half)
        with pytest.raises(CheckpointError, match="No space left on device"):
            session.save()
        assert {path.name: path.read_bytes() for path in session.checkpoints.folder.iterdir()} == kept
        monkeypatch.undo()
        session.save()
        assert session.checkpoints.steps() == [1, 2]

    def test_the_same_step_again(self, session, monkeypatch):
        session.save()
        before = session.checkpoints.path(0).read_bytes()
        monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(CheckpointError, match="untouched"):
            session.save()
        assert session.checkpoints.path(0).read_bytes() == before

    def test_a_folder_that_cannot_be_made(self, session):
        session.checkpoints.folder.parent.joinpath("checkpoints").write_text("a file")
        with pytest.raises(CheckpointError, match="cannot be created"):
            session.save()


def test_no_pickle(session):
    session.save()
    data = session.checkpoints.path(0).read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert json.loads(data[8 : 8 + length])["__metadata__"]["format"] == "pt"
