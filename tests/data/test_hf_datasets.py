"""Hugging Face datasets: from folders, and from the cache."""

import io
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import run_python, write_pictures
from helpers.whole_runs import assert_whole_run, coloured, error_of, load
from PIL import Image

from snello import cli
from snello.config import ColumnsConfig

datasets = pytest.importorskip("datasets")

NAMES = ["blue", "green", "red"]


def rows(per_class: int, seed: int = 0) -> dict[str, list]:
    found = [(coloured(2 - label, seed + 10 * label + i), label) for i in range(per_class) for label in range(3)]
    return {"image": [image for image, _ in found], "label": [label for _, label in found]}


def dataset(columns: dict[str, list], **features):
    named = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES), **features}
    return datasets.Dataset.from_dict(columns, features=datasets.Features({name: named[name] for name in columns}))


def of_bytes(contents: list[bytes | None], labels: list[int]):
    """A dataset of encoded pictures, good or bad."""
    values = [None if content is None else {"bytes": content, "path": None} for content in contents]
    return dataset({"image": values, "label": labels})


def png(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.slow
def test_run_on_a_dataset_on_disk(small, tmp_path):
    dataset(rows(6)).save_to_disk(tmp_path / "set")
    summary = assert_whole_run(replace(small, data=f"hf:{tmp_path}/set/"), tmp_path / "runs")
    assert [row["class"] for row in summary["per_class"]] == NAMES
    splits = load(f"hf:{tmp_path}/set")
    assert len(splits.train) + len(splits.val) == 18 and splits.source.endswith("set, 25% of each class held out")


@pytest.mark.slow
def test_run_on_parts_on_disk(small, tmp_path):
    parts = {"train": dataset(rows(4)), "validation": dataset(rows(2, seed=50)), "test": dataset(rows(1, seed=90))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    assert_whole_run(replace(small, data=f"hf:{tmp_path}/set"), tmp_path / "runs")
    splits = load(f"hf:{tmp_path}/set")
    assert (len(splits.train), len(splits.val)) == (12, 6) and splits.source.endswith("set, train and val")


@pytest.mark.slow
def test_folders_that_load_dataset_understands(small, tmp_path):
    write_pictures(tmp_path / "images" / "train", {"blue": 4, "green": 4})
    write_pictures(tmp_path / "images" / "test", {"blue": 2, "green": 2}, seed=1)
    splits = load(f"hf:{tmp_path}/images")
    assert (len(splits.train), len(splits.val), splits.train.classes) == (8, 4, ("blue", "green"))
    assert_whole_run(replace(small, data=f"hf:{tmp_path}/images"), tmp_path / "runs")
    (tmp_path / "parquet").mkdir()
    dataset(rows(4)).to_parquet(tmp_path / "parquet" / "train.parquet")
    splits = load(f"hf:{tmp_path}/parquet")
    assert len(splits.train) == 9 and splits.train.classes == tuple(NAMES)
    assert splits.train.labels == [splits.train.classes.index(_colour(splits.train.open(i))) for i in range(9)]


def _colour(image: Image.Image) -> str:
    return NAMES[2 - max(range(3), key=lambda channel: image.getpixel((0, 0))[channel])]


@pytest.mark.slow
def test_cached_under_its_name(tmp_path):
    """In a process of its own, as the cache lies after `load_dataset` on a machine with a connection."""
    dataset(rows(3)).save_to_disk(tmp_path / "set")
    folder = tmp_path / "home" / "datasets" / "someone___colours" / "plain" / "0.0.0" / "0123abcd"
    folder.mkdir(parents=True)
    (arrow,) = (tmp_path / "set").glob("*.arrow")
    shutil.copy(arrow, folder / "colours-train.arrow")
    info = json.loads((tmp_path / "set" / "dataset_info.json").read_text())
    info |= {"dataset_name": "colours", "config_name": "plain", "version": {"version_str": "0.0.0"}}
    info |= {"builder_name": "parquet", "splits": {"train": {"name": "train", "num_bytes": 1, "num_examples": 9}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    code = (
        "from snello import FinetuneConfig\nfrom snello.data import splits_of\n"
        "for name in ('hf:someone/colours', 'hf:someone/colours:plain'):\n"
        "    s = splits_of(FinetuneConfig(data=name, val_share=0.3))\n"
        "    print(len(s.train), len(s.val), *s.train.classes)\n"
    )
    result = run_python("-c", code, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0")
    assert (result.stdout, result.returncode) == ("6 3 blue green red\n" * 2, 0), result.stderr
    assert result.stderr == ""


def test_neither_folder_nor_cached(tmp_path):
    text = error_of("hf:someone/nothing:big")
    assert text.startswith("--data hf:someone/nothing:big: no such folder, and not in the local cache (")
    assert 'load_dataset("someone/nothing", "big").save_to_disk("FOLDER")' in text
    assert text.endswith("copy FOLDER here and use --data hf:FOLDER")
    assert error_of(f"hf:{tmp_path}/none") == f"--data hf:{tmp_path}/none: no such folder"
    assert error_of("hf:") == "--data hf:: a folder or a name is missing"
    (tmp_path / "empty").mkdir()
    assert error_of(f"hf:{tmp_path}/empty").startswith(f"--data hf:{tmp_path}/empty: cannot be loaded: ")


def test_settings_of_the_package_are_put_back(tmp_path):
    before = datasets.config.HF_HUB_OFFLINE, datasets.utils.logging.get_verbosity()
    error_of("hf:someone/nothing")
    assert before == (datasets.config.HF_HUB_OFFLINE, datasets.utils.logging.get_verbosity())
    assert not datasets.utils.are_progress_bars_disabled()


def test_pictures_are_read_as_files_are(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    left_blue = Image.new("RGB", (64, 32), "red")
    left_blue.paste((0, 0, 255), (0, 0, 32, 32))
    turned = io.BytesIO()
    left_blue.save(turned, "JPEG", exif=exif)
    deep = png(Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)))
    contents = [turned.getvalue(), deep, png(Image.new("RGBA", (2, 2), (9, 9, 9, 0))), png(Image.new("1", (2, 2), 1))]
    of_bytes(contents, [0, 0, 1, 1]).save_to_disk(tmp_path / "set")
    splits = load(f"hf:{tmp_path}/set", val_share=0.5)
    images = {pictures.name(i)[-1]: pictures.open(i) for pictures in (splits.train, splits.val) for i in range(2)}
    assert images["0"].size == (32, 64) and images["0"].getpixel((16, 0))[2] > 200
    assert images["1"].getpixel((0, 0)) == (128, 128, 128)
    assert images["2"].getpixel((0, 0)) == images["3"].getpixel((0, 0)) == (255, 255, 255)


def test_bad_pictures(tmp_path, capsys):
    good = [png(coloured(i % 3, i)) for i in range(6)]
    of_bytes([*good, b"no picture", None], [0, 1, 0, 1, 0, 1, 0, 1]).save_to_disk(tmp_path / "set")
    source = f"hf:{tmp_path}/set"
    assert error_of(source).startswith(
        f"{source} row 6: cannot be read as a picture: not a known picture format (2 of 8"
    )
    splits = load(source, skip_bad=True)
    assert splits.num_skipped == 2 and len(splits.train) + len(splits.val) == 6
    assert cli.main(["check-data", source, "--format", "json"]) == 1
    broken = json.loads(capsys.readouterr().out)["broken"]
    assert broken[1] == {"path": f"{source} row 7", "reason": "there is none in this row", "part": "all"}


def test_columns_are_found_by_their_type(tmp_path):
    columns = rows(4)
    columns = {"id": list(range(12)), "mask": columns["image"], **columns, "coarse": [0] * 12}
    made = dataset(columns, id=datasets.Value("int64"), mask=datasets.Image(), coarse=datasets.ClassLabel(names=["x"]))
    made.save_to_disk(tmp_path / "set")
    source = f"hf:{tmp_path}/set"
    assert load(source).train.classes == tuple(NAMES)
    assert "class 0 has only one picture" in error_of(source, columns=ColumnsConfig(label="id", image="mask"))
    assert "no column 'nose' (--columns.image); there are mask, image" in error_of(
        source, columns=ColumnsConfig(image="nose")
    )
    made.rename_columns({"label": "fine", "image": "front"}).save_to_disk(tmp_path / "other")
    assert "no column is known to be the image" in error_of(f"hf:{tmp_path}/other")
    text = error_of(f"hf:{tmp_path}/other", columns=ColumnsConfig(image="front"))
    assert "no column is known to be the label" in text and "there are fine, coarse: name it with" in text
    named = ColumnsConfig(image="front", label="fine")
    assert load(f"hf:{tmp_path}/other", columns=named).train.classes == tuple(NAMES)
    made.remove_columns(["mask", "image"]).save_to_disk(tmp_path / "none")
    assert "no column holds pictures; there are id (Value), label (ClassLabel)" in error_of(f"hf:{tmp_path}/none")


def test_labels_that_are_no_class_labels(tmp_path):
    columns = rows(4)
    columns["label"] = [f"n{label}" for label in columns["label"]]
    dataset(columns, label=datasets.Value("string")).save_to_disk(tmp_path / "set")
    assert load(f"hf:{tmp_path}/set").train.classes == ("n0", "n1", "n2")
    columns["label"][5] = ""
    dataset(columns, label=datasets.Value("string")).save_to_disk(tmp_path / "gap")
    assert "gap, row 5: no label in column label" in error_of(f"hf:{tmp_path}/gap")


def test_labels_that_are_missing(tmp_path):
    columns = rows(2)
    columns["label"][4] = -1
    dataset(columns).save_to_disk(tmp_path / "set")
    assert "set, row 4: no label in column label (-1)" in error_of(f"hf:{tmp_path}/set")


def test_parts_of_other_names(tmp_path):
    two = datasets.DatasetDict({"first": dataset(rows(2)), "second": dataset(rows(2))})
    two.save_to_disk(tmp_path / "two")
    assert "no split is called train, val or test; there are first, second" in error_of(f"hf:{tmp_path}/two")
    datasets.DatasetDict({"full": dataset(rows(4))}).save_to_disk(tmp_path / "one")
    assert len(load(f"hf:{tmp_path}/one").train) == 9
    datasets.DatasetDict({"test": dataset(rows(4))}).save_to_disk(tmp_path / "test")
    assert "nothing to train on: only test and no train" in error_of(f"hf:{tmp_path}/test")


def test_splits_that_are_left_out_are_named(tmp_path):
    names = ("train", "Test", "extra", "unsupervised")
    datasets.DatasetDict({name: dataset(rows(2)) for name in names}).save_to_disk(tmp_path / "set")
    assert load(f"hf:{tmp_path}/set").notes == ("left out: splits extra, unsupervised: beside train, Test",)
    datasets.DatasetDict({name: dataset(rows(2)) for name in ("train", "val", "dev")}).save_to_disk(tmp_path / "two")
    assert error_of(f"hf:{tmp_path}/two") == f"--data hf:{tmp_path}/two: val and dev both mean val; keep one of them"


def test_without_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert error_of("hf:x") == "--data hf:x: needs the package datasets: pip install 'snello[hf]'"


def test_class_without_pictures(tmp_path):
    """A class label may name more classes than there are pictures of."""
    columns = rows(4)
    keep = [i for i, label in enumerate(columns["label"]) if label != 1]
    dataset({name: [values[i] for i in keep] for name, values in columns.items()}).save_to_disk(tmp_path / "set")
    splits = load(f"hf:{tmp_path}/set")
    assert splits.train.classes == tuple(NAMES) and set(splits.train.labels) == {0, 2}
