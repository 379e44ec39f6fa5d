"""Folders as they are found: whatever parts are called, whatever lies beside them, whatever files are in them."""

import io
import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import QUIET, run_python, write_pictures
from helpers.whole_runs import error_of, load
from PIL import Image, features

from snello import cli
from snello.config import CheckDataConfig, FinetuneConfig
from snello.data import find_pictures, load_pictures, open_picture
from snello.data.examining import check_data
from snello.data.reading import EXTENSIONS
from snello.errors import DataError
from snello.finetuning import finetune

PETS = {"cat": 4, "dog": 4}
HEIC = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(64)


def encoded(format: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (9, 7), 0).save(file, format)
    return file.getvalue()


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# ------------------------------------------------------------------------------------------------------------ parts


@pytest.mark.parametrize(
    ("train", "held_out"),
    [("Train", "Val"), ("train", "valid"), ("TRAIN", "validation"), ("Training", "Testing"), ("training", "dev")],
)
def test_names_of_parts(tmp_path, train, held_out):
    write_pictures(tmp_path / train, PETS)
    write_pictures(tmp_path / held_out, {"cat": 1, "dog": 2}, seed=1)
    splits = load(tmp_path)
    assert splits.train.classes == ("cat", "dog") and (len(splits.train), len(splits.val)) == (8, 3)
    assert splits.source.endswith(f", {train}/ and {held_out}/") and splits.notes == ()


def test_valid_comes_before_test(tmp_path):
    for i, name in enumerate(("test", "train", "valid")):
        write_pictures(tmp_path / name, {"cat": 2 + i, "dog": 2}, seed=i)
    splits = load(tmp_path)
    assert splits.source.endswith("train/ and valid/") and len(splits.val) == 6
    assert len(load_pictures(tmp_path, ("cat", "dog"), skip_bad=False, check=False, part="test")[0]) == 4
    assert list(check_data(CheckDataConfig(str(tmp_path)), QUIET).pictures) == ["train", "val", "test"]


@pytest.mark.parametrize(("one", "other", "part"), [("val", "valid", "val"), ("Train", "train", "train")])
def test_two_folders_for_one_part(tmp_path, one, other, part):
    for name in {"train", one, other}:
        write_pictures(tmp_path / name, PETS)
    if len(list(tmp_path.iterdir())) < len({"train", one, other}):
        pytest.skip("the file system does not tell upper from lower case")
    assert error_of(tmp_path) == f"--data {tmp_path}: {one} and {other} both mean {part}; keep one of them"


def test_folders_beside_the_parts_are_named(tmp_path, small):
    write_pictures(tmp_path / "Train", PETS)
    write_pictures(tmp_path / "Test", PETS, seed=1)
    write_pictures(tmp_path, {"bird": 2, "extra": 1})
    for name in ("__MACOSX", ".git", ".ipynb_checkpoints"):
        write_pictures(tmp_path / name, PETS)
    write_pictures(tmp_path / "Train", {"__MACOSX": 1, ".x": 1})
    Image.new("RGB", (4, 4)).save(tmp_path / "loose.png")
    told = ("left out: folders bird, extra: beside Train, Test", "left out: 1 .png: in no class folder")
    splits = load(tmp_path)
    assert splits.train.classes == ("cat", "dog") and splits.notes == told
    result = check_data(CheckDataConfig(str(tmp_path)), QUIET)
    assert result.notes == list(told) and result.num_pictures == 16


def test_junk_is_no_class(tmp_path):
    write_pictures(tmp_path, {**PETS, "__MACOSX": 2, "@eaDir": 1})
    write_pictures(tmp_path / "cat", {"__MACOSX": 2})
    put(tmp_path / "cat" / "Thumbs.db", b"x")
    splits = load(tmp_path)
    assert splits.train.classes == ("cat", "dog") and len(splits.train) + len(splits.val) == 8 and splits.notes == ()


def test_parts_of_unknown_names_are_told(tmp_path):
    """As in Kaggle's seg_train/ and seg_test/: two classes to look at, but hardly to mean."""
    for name in ("seg_test", "seg_train"):
        write_pictures(tmp_path / name, PETS)
    assert load(tmp_path).notes == (
        "class folders seg_test, seg_train all hold cat, dog: if they are parts, name them train and val",
    )


def test_train_may_be_a_class(tmp_path):
    write_pictures(tmp_path, {"car": 3, "bus": 3, "train": 3})
    splits = load(tmp_path)
    assert splits.train.classes == ("bus", "car", "train")
    assert splits.notes == ("train/ is taken for a class: it holds pictures, not class folders, as bus, car do",)


def test_train_and_another_folder_of_pictures_are_no_classes(tmp_path):
    """As in Kaggle's cats and dogs, where train/ and test1/ hold pictures."""
    write_pictures(tmp_path, {"train": 3, "test1": 3})
    assert error_of(tmp_path).startswith(f"--data {tmp_path / 'train'}: pictures but no class folders; put")
    write_pictures(tmp_path, {"test": 3, "more": 3})
    assert error_of(tmp_path).startswith(f"--data {tmp_path / 'train'}: pictures but no class folders; put")


@pytest.mark.parametrize("inside", ["", "cat"])
def test_class_folders_beside_a_held_out_part(tmp_path, inside):
    write_pictures(tmp_path, PETS)
    write_pictures(tmp_path / "Test" / inside, {"x": 2} if inside else {".": 2})
    assert error_of(tmp_path) == (
        f"--data {tmp_path}: nothing to train on: only Test/ and no train/; put the class folders (cat, dog) into "
        "train/, or rename Test/ if it is a class"
    )


def test_only_held_out_parts(tmp_path):
    write_pictures(tmp_path / "val", PETS)
    write_pictures(tmp_path / "test", PETS)
    text = f"--data {tmp_path}: nothing to train on: only val/, test/ and no train/"
    assert error_of(tmp_path) == text
    assert len(load_pictures(tmp_path, ("cat", "dog"), skip_bad=False, check=False)[0]) == 8


def test_evaluating_on_a_source_that_has_train_only(tmp_path):
    write_pictures(tmp_path / "train", PETS)
    assert len(load_pictures(tmp_path, ("cat", "dog"), skip_bad=False, check=False)[0]) == 8


# ------------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("a.jfif", "JPEG"),
        ("a.JPE", "JPEG"),
        ("a.pbm", "PPM"),
        ("a", "PNG"),
        ("IMG.001", "JPEG"),
        ("a.heic", "JPEG"),  # as some phones export them
        ("a.bin", "WEBP"),
        ("a", "TIFF"),
        pytest.param("a.avif", "AVIF", marks=pytest.mark.skipif(not features.check("avif"), reason="no AVIF")),
        pytest.param("a", "AVIF", marks=pytest.mark.skipif(not features.check("avif"), reason="no AVIF")),
        pytest.param("a.jp2", "JPEG2000", marks=pytest.mark.skipif(not features.check("jpg_2000"), reason="no JP2")),
        pytest.param("a.j2k", "JPEG2000", marks=pytest.mark.skipif(not features.check("jpg_2000"), reason="no JP2")),
    ],
)
def test_pictures_go_by_content(tmp_path, name, format):
    write_pictures(tmp_path, PETS)
    path = put(tmp_path / "cat" / name, encoded(format, "1" if name.endswith("pbm") else "RGB"))
    splits = load(tmp_path)
    assert path in splits.train.paths + splits.val.paths and splits.notes == ()
    assert open_picture(path).size == (9, 7)
    assert path in find_pictures([tmp_path])[0]


def test_what_is_left_out_is_named_with_the_reason(tmp_path, capsys):
    if "HEIF" in Image.OPEN:
        pytest.skip("pillow-heif is installed")
    write_pictures(tmp_path, PETS)
    for i in range(3):
        put(tmp_path / "cat" / f"{i}.HEIC", HEIC)
        put(tmp_path / "dog" / f"{i}.txt", encoded("PNG"))  # by its name: nobody looks into it
    put(tmp_path / "dog" / "notes", b"BMW, P5, II*")
    put(tmp_path / "dog" / "raw.nef", encoded("TIFF"))
    put(tmp_path / "dog" / "drawing.svg", b"<svg/>")
    put(tmp_path / "cat" / "sheet.psd", b"8BPS" + bytes(60))
    told = {
        "left out: 3 .heic: pip install pillow-heif",
        "left out: 3 .txt: not pictures",
        "left out: 1 without extension: not pictures",
        "left out: 1 .nef: camera raw or another kind of TIFF; convert them, or name them .tif",
        "left out: 1 .svg: not read; save them as PNG or JPEG",
        "left out: 1 .psd: not read; save them as PNG or JPEG",
    }
    splits = load(tmp_path)
    assert set(splits.notes) == told and len(splits.notes) == len(told)
    assert len(splits.train) + len(splits.val) == 8
    assert cli.main(["check-data", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert told <= set(lines) and lines[-1] == "broken: 0 of 8"
    assert cli.main(["check-data", str(tmp_path), "--format", "json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["notes"]) == told


def test_many_kinds_are_cut_short(tmp_path):
    write_pictures(tmp_path, PETS)
    for i in range(30):
        put(tmp_path / "cat" / f"x.k{i}", b"x")
        put(tmp_path / "cat" / f"x.{i}", b"x")
    notes = load(tmp_path).notes
    assert notes[0] == "left out: 30 without extension: not pictures" and len(notes) == 9
    assert notes[-1] == "left out: 23 more of other kinds"


def test_heic_under_the_name_of_a_picture_says_what_to_do(tmp_path):
    if "HEIF" in Image.OPEN:
        pytest.skip("pillow-heif is installed")
    path = put(tmp_path / "x.jpg", HEIC)
    with pytest.raises(
        DataError, match=r"x\.jpg: cannot be read as a picture: its format is not read here: pip install pillow-heif$"
    ):
        open_picture(path)


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    write_pictures(tmp_path, PETS)
    pillow_heif.from_pillow(Image.new("RGB", (9, 7))).save(tmp_path / "cat" / "x.heic")
    code = "import sys, pathlib, snello.data as data; print(data.open_picture(pathlib.Path(sys.argv[1])).size)"
    assert run_python("-c", code, str(tmp_path / "cat" / "x.heic")).stdout == "(9, 7)\n"
    assert tmp_path / "cat" / "x.heic" in find_pictures([tmp_path])[0]


def test_known_names_are_not_opened(tmp_path, monkeypatch):
    write_pictures(tmp_path, PETS)
    put(tmp_path / "cat" / "x.json", b"{}")
    for name in (".jpg", ".jfif", ".png", ".webp", ".tif"):
        put(tmp_path / "cat" / f"x{name}", b"no picture")
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    monkeypatch.setattr(Path, "open", lambda *_, **__: pytest.fail("opened"))
    splits = load(tmp_path, check=False)
    assert len(splits.train) + len(splits.val) == 13


def test_extensions_are_ones_that_pillow_knows():
    Image.init()
    assert set(EXTENSIONS) - set(Image.registered_extensions()) <= {".heic", ".heif", ".avif"}


def test_reasons_are_in_the_error_for_a_class_without_pictures(tmp_path):
    write_pictures(tmp_path, PETS)
    put(tmp_path / "cow" / "x.txt", b"x")
    assert error_of(tmp_path) == f"--data {tmp_path}: no pictures in class folder cow (left out: 1 .txt: not pictures)"
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"cow: no pictures in it .left out: 1 .txt: not pictures.$"):
        find_pictures([tmp_path / "cow"])
    with pytest.raises(DataError, match=r"none: no pictures in it$"):
        find_pictures([tmp_path / "none"])


def test_tables_read_what_they_list_whatever_its_name(tmp_path):
    rows = ["path,label"]
    for i, name in enumerate(("a", "b.txt", "c.dat", "d.jfif")):
        put(tmp_path / name, encoded("PNG"))
        rows.append(f"{name},{'xy'[i % 2]}")
    put(tmp_path / "t.csv", "\n".join(rows).encode())
    splits = load(tmp_path / "t.csv")
    assert len(splits.train) + len(splits.val) == 4 and splits.notes == ()


# ------------------------------------------------------------------------------------------------- regular files


def odd_files(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jpg")
    (folder / "broken.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "device.jpg").symlink_to("/dev/null")
    here = os.open(".", os.O_RDONLY)
    os.chdir(folder)  # a socket's path must be short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket.jpg")
    finally:
        os.fchdir(here)
        os.close(here)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_only_regular_files_are_pictures(tmp_path):
    write_pictures(tmp_path / "photos", PETS)
    cat = tmp_path / "photos" / "cat"
    odd_files(cat)
    (cat / "link.png").symlink_to(cat / "000.png")
    (tmp_path / "elsewhere").mkdir()
    (cat / "more").symlink_to(tmp_path / "elsewhere")
    write_pictures(cat, {"deep.jpg": 1})  # a folder
    splits = load(tmp_path / "photos")
    found = {path.relative_to(cat).as_posix() for path in splits.train.paths + splits.val.paths if cat in path.parents}
    assert found == {"000.png", "001.png", "002.png", "003.png", "link.png", "deep.jpg/000.png"}
    assert splits.notes == (
        "left out: 5 .jpg: not regular files (pipes, sockets, devices, broken links)",
        "left out: 1 linked folders: not followed",
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.slow
def test_a_pipe_is_refused_in_a_table_and_as_an_argument(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    put(tmp_path / "a.png", encoded("PNG"))
    put(tmp_path / "t.csv", b"path,label\npipe.jpg,x\na.png,x\na.png,y\na.png,y\n")
    result = run_python("-m", "snello", "check-data", str(tmp_path / "t.csv"))
    assert result.returncode == 1 and f"  {tmp_path / 'pipe.jpg'}: not a regular file" in result.stdout
    os.mkfifo(tmp_path / "t.tsv")
    assert error_of(tmp_path / "t.tsv") == f"--data {tmp_path / 't.tsv'}: is not a regular file"
    (tmp_path / "x.csv").mkdir()
    write_pictures(tmp_path / "x.csv", PETS)
    assert load(tmp_path / "x.csv").train.classes == ("cat", "dog")


# ------------------------------------------------------------------------------------------------ runs and verbs


@pytest.fixture
def run(small: FinetuneConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run on pictures among which some are left out."""
    write_pictures(tmp_path / "photos", {"blue": 8, "green\nish": 8})
    put(tmp_path / "photos" / "blue" / "x.txt", b"x")
    capsys.readouterr()
    finetune(replace(small, data=tmp_path / "photos", epochs=1))
    assert capsys.readouterr().err.count("left out: 1 .txt: not pictures\n") == 1
    return small.out


def test_predict_and_evaluate_on_folders(run, tmp_path, capsys):
    other = tmp_path / "other"
    write_pictures(other, {"blue": 2, "green\nish": 1})
    name = other / "blue" / "a\nb.png"
    (other / "blue" / "000.png").rename(name)
    put(other / "blue" / "y.json", b"{}")
    os.mkfifo(other / "blue" / "pipe.png")
    told = [
        "left out: 1 .png: not regular files (pipes, sockets, devices, broken links)",
        "left out: 1 .json: not pictures",
    ]

    assert cli.main(["predict", str(run), str(other), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3 and f"{other}/blue/a?b.png: " in out and "green?ish" in out
    assert err.splitlines() == told
    assert cli.main(["predict", str(run), str(other), "--device", "cpu", "--format", "json"]) == 0
    *rows, last = json.loads(capsys.readouterr().out)
    assert str(name) in [row["path"] for row in rows] and last == {"notes": told}
    assert cli.main(["predict", str(run), str(other / "blue" / "pipe.png"), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.endswith(
        "pipe.png: cannot be read as a picture: not a regular file (--skip-bad leaves it out)\n"
    )

    args = ["evaluate", str(run), "--data", str(other), "--device", "cpu", "--workers", "0"]
    assert cli.main(args) == 0
    out, err = capsys.readouterr()
    assert " on 3 pictures" in out and err.splitlines() == told
    assert cli.main([*args, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == told


def test_check_data_prints_a_name_on_one_line(tmp_path, capsys):
    write_pictures(tmp_path, {"a\nb": 2, "c": 2})
    assert cli.main(["check-data", str(tmp_path)]) == 0
    assert "classes: a?b 2, c 2" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("verb", [["finetune", "--data"], ["check-data"]])
@pytest.mark.parametrize("address", ["https://x/y", "s3://bucket/a//b/"])
def test_addresses_are_refused_as_they_were_typed(verb, address, capsys):
    assert cli.main([*verb, address]) == 2
    assert capsys.readouterr().err == (
        f"snello: error: --data {address}: is an address, and nothing is downloaded: fetch the pictures, and name "
        "their folder or table\n"
    )
