"""Copies among the pictures of a run, and the machine."""

import shutil
import time

import numpy as np
import pytest
from conftest import write_pictures

from snello.data import ArrayPictures, FilePictures
from snello.explain.data import copies, machine


def in_folder(folder, classes):
    paths = sorted(folder.glob("*/*"))
    return FilePictures(paths, [classes.index(path.parent.name) for path in paths], classes)


@pytest.fixture
def parts(tmp_path):
    classes = ("blue", "red")
    for part, seed in (("train", 0), ("val", 1)):
        write_pictures(tmp_path / part, {"blue": 4, "red": 3}, seed)
    return tmp_path, lambda: tuple(in_folder(tmp_path / part, classes) for part in ("train", "val"))


def test_copies_are_counted_by_where_they_are(parts):
    folder, read = parts
    assert copies(*read()) == {"groups": 0, "leaked": 0, "mixed": 0, "examples": [], "read": 14}
    shutil.copy(folder / "train/blue/000.png", folder / "train/blue/copy.png")
    shutil.copy(folder / "train/blue/001.png", folder / "val/red/copy.png")
    shutil.copy(folder / "train/red/000.png", folder / "train/blue/other.png")
    found = copies(*read())
    assert {name: found[name] for name in ("groups", "leaked", "mixed", "read")} == {
        "groups": 3, "leaked": 1, "mixed": 2, "read": 17,
    }  # fmt: skip
    assert [name.removeprefix(str(folder)) for name in found["examples"][0]] == [
        "/val/red/copy.png", "/train/blue/001.png",
    ]  # fmt: skip


def test_pictures_without_files_are_compared_by_their_pixels():
    images = np.random.default_rng(0).integers(0, 255, (6, 4, 4), dtype=np.uint8)
    images[5] = images[1]
    train = ArrayPictures(images[:4], np.array([0, 1, 0, 1]), ("a", "b"), "made up")
    held_out = ArrayPictures(images[4:], np.array([0, 1]), ("a", "b"), "held out")
    found = copies(train, held_out)
    assert found["read"] == 6 and found["leaked"] == 1 and found["mixed"] == 0
    assert found["examples"] == [["held out 1", "made up 1"]]


def test_files_that_are_gone_are_like_no_other(parts):
    folder, read = parts
    train, held_out = read()
    for name in ("000", "001"):
        (folder / f"train/blue/{name}.png").unlink()
    assert copies(train, held_out)["groups"] == 0


def test_what_is_not_compared_in_time_is_not_counted(parts, monkeypatch):
    _, read = parts
    assert copies(*read(), seconds=-1) is None
    now = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    assert copies(*read(), seconds=3)["read"] <= 3


def test_the_machine_says_what_it_is():
    found = machine()
    assert found["cores"] >= 1 and found["memory"] > 1 << 28 and found["cpu"] and found["os"] and found["python"]
