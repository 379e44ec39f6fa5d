"""`snello check-data`, and the line about unbalanced classes."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import QUIET, finetune, write_pictures
from helpers.whole_runs import save
from PIL import Image

from snello import cli
from snello.config import CheckDataConfig, FinetuneConfig
from snello.data import ArrayPictures, imbalance, splits_of
from snello.data.examining import check_data


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    write_pictures(folder / "train", {"cat": 5, "dog": 4})
    write_pictures(folder / "val", {"cat": 2, "dog": 2}, seed=1)
    write_pictures(folder / "test", {"cat": 1, "dog": 1}, seed=2)
    return folder


def test_all_good(photos, capsys):
    save(photos / "test" / "cat" / "large.png", 0, 3, size=40)
    assert cli.main(["check-data", str(photos)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "train: 9 pictures in 2 classes",
        "val: 4 pictures in 2 classes",
        "test: 3 pictures in 2 classes",
        "classes: cat 9, dog 7",
        "size: 16x16 to 40x40 pixels (width, height)",
        "broken: 0 of 16",
    ]


def test_every_broken_picture_is_listed(photos, capsys):
    jpeg = photos / "val" / "dog" / "cut.jpg"
    values = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(values).save(jpeg)
    jpeg.write_bytes(jpeg.read_bytes()[:-4000])
    (photos / "train" / "cat" / "empty.png").write_bytes(b"")
    assert cli.main(["check-data", str(photos)]) == 1
    told = capsys.readouterr().out.splitlines()[-3:]
    assert told[0] == "broken: 2 of 17"
    assert told[1] == f"  {photos / 'train' / 'cat' / 'empty.png'}: the file is empty"
    assert told[2].startswith(f"  {jpeg}: ") and "truncated" in told[2]
    assert cli.main(["check-data", str(photos), "--format", "json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert [row["part"] for row in result["broken"]] == ["train", "val"]
    assert result["num_pictures"] == 17 and result["pictures"]["train"] == {"cat": 6, "dog": 4}


def test_copies_are_told_by_their_pixels(photos, capsys):
    with Image.open(photos / "train" / "cat" / "000.png") as image:
        image.save(photos / "val" / "cat" / "leak.bmp")  # other bytes, same pixels
    shutil.copy(photos / "train" / "dog" / "001.png", photos / "train" / "cat" / "mixed.png")
    shutil.copy(photos / "train" / "dog" / "002.png", photos / "train" / "dog" / "twice.png")
    assert cli.main(["check-data", str(photos)]) == 0
    lines = capsys.readouterr().out.splitlines()
    leak = lines.index("same pictures in more than one part: what is held out was seen in training: 1")
    assert lines[leak + 1].endswith("leak.bmp") and "train" in lines[leak + 1]
    assert "same pictures in more than one class: 1" in lines and "same pictures within a class and part: 1" in lines
    findings = check_data(CheckDataConfig(str(photos)), QUIET)
    assert len(findings.copies) == 3
    values = findings.to_dict()
    assert (values["num_leaked"], values["num_mixed"]) == (1, 1)
    assert values["copies"][0]["parts"] == ["train", "val"] and values["copies"][0]["classes"] == ["cat"]


def test_pictures_of_other_shape_are_no_copies(tmp_path):
    for name, size in (("a", (4, 9)), ("b", (9, 4))):
        (tmp_path / name).mkdir()
        Image.new("RGB", size, "red").save(tmp_path / name / "x.png")
    findings = check_data(CheckDataConfig(str(tmp_path)), QUIET)
    assert findings.copies == [] and (findings.smallest, findings.largest) == ([4, 4], [9, 9])
    assert list(findings.pictures) == ["all"]


def test_unusable_source(tmp_path, capsys):
    assert cli.main(["check-data", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith(f"snello: error: --data {tmp_path / 'none'}: no such folder or file")
    assert cli.main(["check-data"]) == 2


def test_many_classes_are_cut_short(tmp_path, capsys):
    write_pictures(tmp_path, {f"class{i:02}": 1 for i in range(25)})
    assert cli.main(["check-data", str(tmp_path)]) == 0
    assert "class19 1, ... and 5 classes with fewer" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- imbalance


def of_counts(*counts: int) -> ArrayPictures:
    labels = np.repeat(np.arange(len(counts)), counts)
    names = [f"class {i}" for i in range(len(counts))]
    return ArrayPictures(np.zeros((len(labels), 2, 2), np.uint8), labels, names, "x")


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ((4, 8), None),
        ((5, 5, 5), None),
        ((4, 9, 6), "9 pictures of class 1, 4 of class 0;"),
        ((3, 0), "3 pictures of class 0, 0 of class 1;"),
        ((0, 3, 0), "3 pictures of class 1, 2 without any;"),
    ],
)
def test_imbalance(counts, told):
    line = imbalance(of_counts(*counts))
    assert line is None if told is None else line is not None and told in line and "balanced accuracy" in line


def test_a_run_says_so_and_reports_each_class(small, tmp_path, capsys):
    write_pictures(tmp_path / "photos", {"blue": 20, "green": 8})
    summary = finetune(replace(small, data=tmp_path / "photos"))
    err = capsys.readouterr().err
    assert err.count("unbalanced classes: 16 pictures of blue, 6 of green;") == 1
    rows = summary["per_class"]
    assert [(row["class"], row["pictures"]) for row in rows] == [("blue", 4), ("green", 2)]
    assert summary["balanced_accuracy"] == pytest.approx((rows[0]["accuracy"] + rows[1]["accuracy"]) / 2)
    assert summary["accuracy"] == pytest.approx((rows[0]["accuracy"] * 4 + rows[1]["accuracy"] * 2) / 6)
    assert f"balanced {summary['balanced_accuracy']:.2%} (epoch" in err


def test_copies_on_both_sides_of_what_a_run_holds_out_are_told(tmp_path, capsys):
    """Of a folder without parts: the same pictures that a run with default settings holds out."""
    folder = write_pictures(tmp_path / "photos", {"cat": 10, "dog": 10})
    splits = splits_of(FinetuneConfig(data=folder))
    trained, held_out = splits.train.paths[0], splits.val.paths[0]
    shutil.copy(trained, held_out)  # the number of pictures stays, and so does what is held out
    assert held_out in splits_of(FinetuneConfig(data=folder)).val.paths
    assert cli.main(["check-data", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    leak = lines.index("same pictures in more than one part: what is held out was seen in training: 1")
    assert held_out.name in lines[leak + 1] and trained.name in lines[leak + 1]


def test_a_class_with_one_picture_has_nothing_to_hold_out(tmp_path):
    folder = write_pictures(tmp_path / "photos", {"cat": 1, "dog": 3})
    assert check_data(CheckDataConfig(str(folder)), QUIET).copies == []
