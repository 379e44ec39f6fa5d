"""Files that are whole or not there, and checkpoints that give everything back."""

import errno
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from snello import files
from snello.errors import CheckpointError
from snello.files import load_tensors, replacing, save_json, save_tensors
from snello.runs.checkpoint import load_checkpoint, save_checkpoint


def trained_model(steps: int = 3, freeze: bool = False) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    if freeze:
        model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def nothing_else(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


# ------------------------------------------------------------------------------------------------ whole or not there


def test_replacing_leaves_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old" and temporary.parent == path.parent and temporary != path
    assert path.read_text() == "half" and nothing_else(tmp_path, "a.txt")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error")])
@pytest.mark.parametrize("before", [True, False])
def test_failing_write_keeps_the_old_file(tmp_path, error, before):
    path = tmp_path / "a.txt"
    if before:
        path.write_bytes(b"old")
    with pytest.raises(CheckpointError) as caught, replacing(path) as temporary:
        temporary.write_bytes(b"half of it")
        raise error
    text = str(caught.value)
    assert str(path) in text and str(error) in text and "\n" not in text
    assert ("the one before is untouched" in text) is before
    if before:
        assert path.read_bytes() == b"old" and nothing_else(tmp_path, "a.txt")
    else:
        assert nothing_else(tmp_path)


def test_other_errors_pass_and_leave_nothing(tmp_path):
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), replacing(tmp_path / "a"):
            raise error
    assert nothing_else(tmp_path)


def test_folder_that_is_gone(tmp_path):
    with pytest.raises(CheckpointError, match="could not save"):
        save_json(tmp_path / "none" / "a.json", {})


def test_a_temporary_file_left_by_a_killed_process_is_no_obstacle(tmp_path):
    path = tmp_path / "a.json"
    with replacing(path) as temporary:
        name = temporary.name
        temporary.write_text("{}")
    (tmp_path / name).write_bytes(b"\0" * 1000)
    save_json(path, [1])
    assert path.read_text() == "[\n  1\n]\n" and nothing_else(tmp_path, "a.json")


def test_files_are_as_readable_as_any_other(tmp_path):
    (tmp_path / "plain").touch()
    save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


# -------------------------------------------------------------------------------------------------------- tensors


def test_tensors_come_back_bit_for_bit(tmp_path):
    tensors = {
        "nan": torch.tensor([float("nan"), -0.0, 1e-45]),
        "half": torch.randn(3, 2).bfloat16(),
        "whole": torch.arange(4),
        "turned": torch.randn(3, 4).t(),
        "nothing": torch.zeros(0, 3),
        "number": torch.tensor(7.0),
        "grad": torch.randn(2, requires_grad=True),
    }
    save_tensors(tmp_path / "a", tensors, {"step": 3, "list": [0.1, None]})
    loaded, state = load_tensors(tmp_path / "a")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(*(value.detach().reshape(-1).view(torch.uint8) for value in (loaded[name], tensor)))
    assert state == {"version": files.VERSION, "step": 3, "list": [0.1, None]}
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata()["format"] == "pt"  # what other tools look for


def test_without_state(tmp_path):
    save_tensors(tmp_path / "a", {"x": torch.ones(1)})
    assert load_tensors(tmp_path / "a")[1] == {}


def test_numbers_in_the_state_are_exact(tmp_path):
    values = torch.rand(1000).tolist() + torch.rand(1000, dtype=torch.float64).tolist()
    save_tensors(tmp_path / "a", {}, {"values": values})
    assert load_tensors(tmp_path / "a")[1]["values"] == values


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match=r"could not read .*a\.safetensors"):
        load_tensors(path)
    save_tensors(path, {"x": torch.ones(100)}, {"step": 1})
    whole = path.read_bytes()
    for content in (b"", whole[:50], whole[:-1], b"\0" * len(whole)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"could not read .*a\.safetensors"):
            load_tensors(path)


def test_other_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "VERSION", 99)
    save_tensors(tmp_path / "a", {}, {"step": 1})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="checkpoint version 99"):
        load_tensors(tmp_path / "a")


# ----------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("text", ["no JSON", "[1]", '{"step": 1}'])
def test_metadata_of_others_is_refused_in_one_line(tmp_path, text):
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"snello": text})
    with pytest.raises(CheckpointError, match=r"a\.safetensors was not written by snello"):
        load_tensors(tmp_path / "a.safetensors")


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match="could not save"):
        save_json(tmp_path / "run" / "summary.json", {})


@pytest.mark.parametrize("freeze", [False, True])
def test_model_and_optimizer_come_back(tmp_path, freeze):
    path = tmp_path / "last.safetensors"
    model, optimizer = trained_model(freeze=freeze)
    save_checkpoint(path, {"model": model}, {"optimizer": optimizer}, {"step": 3})
    other, other_optimizer = trained_model(steps=0)
    other_optimizer.param_groups[0]["lr"] = 0.5  # a function of the step, not of the checkpoint
    assert load_checkpoint(path, {"model": other}, {"optimizer": other_optimizer}) == {
        "version": files.VERSION,
        "step": 3,
    }
    assert other_optimizer.param_groups[0]["lr"] == 0.5
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    states = [o.state_dict()["state"] for o in (optimizer, other_optimizer)]
    assert states[0].keys() == states[1].keys() and len(states[0]) == (4 if freeze else 6)
    for index, entry in states[0].items():
        assert entry.keys() == states[1][index].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in entry.items():
            assert torch.equal(value, states[1][index][key]) and value.dtype == states[1][index][key].dtype
    save_checkpoint(tmp_path / "again", {"model": other}, {"optimizer": other_optimizer}, {"step": 3})
    (tensors, state), (again, again_state) = load_tensors(path), load_tensors(tmp_path / "again")
    assert tensors.keys() == again.keys() and state == again_state
    assert all(torch.equal(value, again[name]) for name, value in tensors.items())


def test_checkpoint_of_another_model_is_refused_in_one_line(tmp_path):
    model, optimizer = trained_model()
    save_checkpoint(tmp_path / "a", {"model": model}, {"optimizer": optimizer}, {})
    other = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 2))
    with pytest.raises(CheckpointError, match="does not fit the model") as caught:
        load_checkpoint(tmp_path / "a", {"model": other}, {"optimizer": torch.optim.AdamW(other.parameters())})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("os error 28")])
def test_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch, error):
    path = tmp_path / "last.safetensors"
    model, optimizer = trained_model()
    save_checkpoint(path, {"model": model}, {"optimizer": optimizer}, {"step": 3})
    before = path.read_bytes()

    def full(tensors, filename, metadata):
        Path(filename).write_bytes(b"as far as it went")
        raise error

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(CheckpointError, match="the one before is untouched"):
        save_checkpoint(path, {"model": model}, {"optimizer": optimizer}, {"step": 4})
    assert path.read_bytes() == before and nothing_else(tmp_path, "last.safetensors")


def test_file_system_that_takes_no_more(tmp_path):
    """Not a mock: the kernel refuses to let the file grow, after part of it has been written."""
    resource = pytest.importorskip("resource")  # POSIX
    path = tmp_path / "last.safetensors"
    save_tensors(path, {"x": torch.ones(10)}, {"step": 1})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="the one before is untouched") as caught:
            save_tensors(path, {"x": torch.ones(100_000)}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before and nothing_else(tmp_path, "last.safetensors")


def test_pickle_is_nowhere(tmp_path):
    path = tmp_path / "a"
    torch.save({"x": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="could not read"):
        load_tensors(path)
