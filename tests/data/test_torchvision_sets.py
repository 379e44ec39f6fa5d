"""torchvision's sets by name, from files written as torchvision reads them; nothing is downloaded."""

import gzip
import hashlib
import json
import pickle
import shlex
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.whole_runs import assert_whole_run, coloured, error_of, load, save
from torchvision import datasets

from snello.data import load_pictures
from snello.data.torchvision_sets import SETS, spec_of


def write_idx(folder: Path, per_class: int = 3, classes: int = 10) -> None:
    """Files of the MNIST family: grey pictures of 28 x 28, brighter with the class."""
    folder.mkdir(parents=True)
    for part, num in (("train", per_class), ("t10k", 1)):
        labels = np.repeat(np.arange(classes, dtype=np.uint8), num)
        images = np.random.default_rng(num).integers(0, 20, (len(labels), 28, 28), dtype=np.uint8)
        images += (labels * 20)[:, None, None]
        header = struct.pack(">IIII", 0x803, len(labels), 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(labels)) + labels.tobytes())


@pytest.mark.slow
def test_run_on_idx_files(small, tmp_path):
    write_idx(tmp_path / "FashionMNIST" / "raw")
    config = replace(small, data="Fashion-MNIST", data_root=tmp_path, batch_size=8)
    summary = assert_whole_run(config, tmp_path / "runs")
    assert summary["per_class"][0]["class"] == "T-shirt/top" and summary["num_classes"] == 10
    splits = load("fashion_mnist", data_root=tmp_path)
    assert (len(splits.train), len(splits.val)) == (30, 10)
    assert splits.source == f"FashionMNIST in {tmp_path}, train and test"
    assert splits.val.open(9).getpixel((0, 0))[0] >= 180 and splits.val.name(9) == "FashionMNIST test 9"


@pytest.mark.slow
def test_run_on_a_folder_without_parts(small, tmp_path):
    for channel, name in enumerate(("Forest", "River", "Pasture")):
        for i in range(6):
            save(tmp_path / "eurosat" / "2750" / name / f"{name}_{i}.png", channel, seed=i + 10 * channel)
    assert_whole_run(replace(small, data="eurosat", data_root=tmp_path), tmp_path / "runs")
    splits = load("eurosat", data_root=tmp_path)
    assert len(splits.val) == 6 and splits.train.classes == ("Forest", "Pasture", "River")


def lines(path: Path, *rows: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row + "\n" for row in rows))


def write_food101(root: Path) -> None:
    for part, num in (("train", 3), ("test", 1)):
        names = {name: [f"{name}/{part}{i}" for i in range(num)] for name in ("pizza", "ramen")}
        lines(root / "food-101" / "meta" / f"{part}.json", json.dumps(names))
        for channel, name in enumerate(names):
            for file in names[name]:
                save(root / "food-101" / "images" / f"{file}.jpg", channel, 0)


def write_dtd(root: Path) -> None:
    for part, num in (("train", 3), ("val", 1), ("test", 1)):
        files = [f"{name}/{part}{i}.jpg" for name in ("banded", "dotted") for i in range(num)]
        lines(root / "dtd" / "dtd" / "labels" / f"{part}1.txt", *files)
        for file in files:
            save(root / "dtd" / "dtd" / "images" / file, file < "c", 0)


def write_pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    for part, num in (("trainval", 3), ("test", 1)):
        ids = [(f"{name}_{part}{i}", label) for label, name in enumerate(("Birman", "pug"), 1) for i in range(num)]
        lines(base / "annotations" / f"{part}.txt", *(f"{name} {label} 1 1" for name, label in ids))
        for name, label in ids:
            save(base / "images" / f"{name}.jpg", label, 0)


def write_gtsrb(root: Path) -> None:
    base = root / "gtsrb"
    for label in range(2):
        for i in range(3):
            save(base / "GTSRB" / "Training" / f"{label:05}" / f"{i}.ppm", label, i)
    lines(base / "GT-final_test.csv", "Filename;ClassId", "0.ppm;0", "1.ppm;1")
    for label in range(2):
        save(base / "GTSRB" / "Final_Test" / "Images" / f"{label}.ppm", label, 9)


def write_country211(root: Path) -> None:
    for part, num in (("train", 3), ("valid", 1), ("test", 1)):
        for channel, name in enumerate(("AD", "AE")):
            for i in range(num):
                save(root / "country211" / part / name / f"{i}.jpg", channel, i)


def write_aircraft(root: Path) -> None:
    base = root / "fgvc-aircraft-2013b" / "data"
    lines(base / "variants.txt", "707-320", "A300 B4")
    for part, num in (("train", 3), ("val", 1), ("test", 1)):
        rows = [(f"{part}{label}{i}", name) for label, name in enumerate(("707-320", "A300 B4")) for i in range(num)]
        lines(base / f"images_variant_{part}.txt", *(" ".join(row) for row in rows))
        for file, name in rows:
            save(base / "images" / f"{file}.jpg", name < "A", 0)


def write_caltech101(root: Path) -> None:
    for name in ("BACKGROUND_Google", "ant", "bass"):
        for i in range(1, 5):
            save(root / "caltech101" / "101_ObjectCategories" / name / f"image_{i:04}.jpg", name == "ant", i)


def write_caltech256(root: Path) -> None:
    for label, name in enumerate(("001.ak47", "002.flag"), 1):
        for i in range(1, 5):
            save(root / "caltech256" / "256_ObjectCategories" / name / f"{label:03}_{i:04}.jpg", label, i)


def write_sun397(root: Path) -> None:
    lines(root / "SUN397" / "ClassName.txt", "/a/abbey", "/b/bar")
    for channel, name in enumerate(("a/abbey", "b/bar")):
        for i in range(4):
            save(root / "SUN397" / name / f"sun_{i}.jpg", channel, i)


def write_flowers(root: Path) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    (root / "flowers-102").mkdir()
    savemat(root / "flowers-102" / "imagelabels.mat", {"labels": np.array([1, 1, 1, 2, 2, 2, 1, 2, 1, 2])})
    ids = {"trnid": np.arange(1, 7), "valid": np.array([7, 8]), "tstid": np.array([9, 10])}
    savemat(root / "flowers-102" / "setid.mat", ids)
    for i in range(1, 11):
        save(root / "flowers-102" / "jpg" / f"image_{i:05}.jpg", i % 3, i)


def write_cars(root: Path) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    (root / "stanford_cars" / "devkit").mkdir(parents=True)
    base, kind = root / "stanford_cars", [("fname", "O"), ("class", "O")]
    for part, num in (("train", 3), ("test", 1)):
        rows = [(f"{i}{label}.jpg", label) for label in (1, 2) for i in range(num)]
        name = "devkit/cars_train_annos.mat" if part == "train" else "cars_test_annos_withlabels.mat"
        savemat(base / name, {"annotations": np.array(rows, dtype=kind)})
        for file, label in rows:
            save(base / f"cars_{part}" / file, label, 0)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(["Acura", "BMW"], dtype=object)})


@pytest.mark.parametrize(
    ("name", "write", "train", "val", "classes"),
    [
        ("food101", write_food101, 6, 2, ("pizza", "ramen")),
        ("dtd", write_dtd, 6, 2, ("banded", "dotted")),
        ("oxford_iiit_pet", write_pets, 6, 2, ("Birman", "Pug")),
        ("gtsrb", write_gtsrb, 6, 2, tuple(str(i) for i in range(43))),
        ("country211", write_country211, 6, 2, ("AD", "AE")),
        ("fgvc_aircraft", write_aircraft, 6, 2, ("707-320", "A300 B4")),
        ("caltech101", write_caltech101, 6, 2, ("ant", "bass")),
        ("caltech256", write_caltech256, 6, 2, ("001.ak47", "002.flag")),
        ("sun397", write_sun397, 6, 2, ("abbey", "bar")),
        ("stanford_cars", write_cars, 6, 2, ("Acura", "BMW")),
    ],
)
def test_sets_of_files(tmp_path, name, write, train, val, classes):
    write(tmp_path)
    splits = load(name, data_root=tmp_path)
    assert (len(splits.train), len(splits.val), splits.train.classes) == (train, val, classes)
    assert [splits.train.labels.count(i) for i in range(2)] == [3, 3] and sorted(splits.val.labels) == [0, 1]
    colours = {label: set() for label in range(2)}
    for pictures in (splits.train, splits.val):
        assert pictures.paths == sorted(pictures.paths)
        for i, label in enumerate(pictures.labels):
            pixel = pictures.open(i).resize((1, 1)).getpixel((0, 0))
            colours[label].add(max(range(3), key=pixel.__getitem__))
    assert len(colours[0]) == len(colours[1]) == 1 and colours[0] != colours[1], "each label has its own colour"
    if "test" in SETS[name].parts:
        test, *_ = load_pictures(name, classes, part="test", data_root=tmp_path, skip_bad=False, check=True)
        assert sorted(test.labels) == [0, 1]


def checksums(monkeypatch, cls, folder: Path) -> None:
    """torchvision compares checksums; these are those of the files written here."""

    def own(path: Path) -> str:
        return hashlib.md5(path.read_bytes()).hexdigest()

    for name in ("train_list", "test_list"):
        monkeypatch.setattr(cls, name, [[file, own(folder / file)] for file, _ in getattr(cls, name)])
    if hasattr(cls, "meta"):
        monkeypatch.setattr(cls, "meta", cls.meta | {"md5": own(folder / cls.meta["filename"])})


@pytest.mark.parametrize(("name", "cls"), [("cifar10", datasets.CIFAR10), ("CIFAR100", datasets.CIFAR100)])
def test_cifar(tmp_path, monkeypatch, name, cls):
    folder = tmp_path / cls.base_folder
    folder.mkdir()
    key = "labels" if cls is datasets.CIFAR10 else "fine_labels"
    for number, (file, _) in enumerate(cls.train_list + cls.test_list):
        images = np.stack([np.asarray(coloured(label, number, 32)).transpose(2, 0, 1).ravel() for label in range(3)])
        (folder / file).write_bytes(pickle.dumps({"data": images, key: [0, 1, 2]}))
    (folder / cls.meta["filename"]).write_bytes(pickle.dumps({cls.meta["key"]: ["red", "green", "blue"]}))
    assert "incomplete or damaged (Dataset not found or corrupted" in error_of(name, data_root=tmp_path)
    checksums(monkeypatch, cls, folder)
    splits = load(name, data_root=tmp_path)
    assert (len(splits.train), len(splits.val)) == (3 * len(cls.train_list), 3)
    assert splits.train.classes == ("red", "green", "blue")
    assert splits.val.open(2).size == (32, 32) and np.asarray(splits.val.open(2)).mean((0, 1)).argmax() == 2


def test_stl10(tmp_path, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for part in ("train", "test"):
        images = [np.asarray(coloured(label, 0, 96)).transpose(2, 1, 0) for label in range(3)]
        (folder / f"{part}_X.bin").write_bytes(np.stack(images).tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes([1, 2, 3]))
    (folder / "unlabeled_X.bin").write_bytes(b"")
    lines(folder / "class_names.txt", "airplane", "bird", "car")
    checksums(monkeypatch, datasets.STL10, folder)
    splits = load("stl10", data_root=tmp_path)
    assert splits.train.labels == [0, 1, 2] and splits.train.classes == ("airplane", "bird", "car")
    assert np.array_equal(np.asarray(splits.val.open(1)), np.asarray(coloured(1, 0, 96)))


def test_sets_in_mat_files(tmp_path, monkeypatch):
    savemat = pytest.importorskip("scipy.io").savemat
    lists = {}
    for part, (url, file, _) in list(datasets.SVHN.split_list.items())[:2]:
        images = np.stack([np.asarray(coloured(label, 0, 32)) for label in range(3)], axis=-1)
        savemat(tmp_path / file, {"X": images, "y": np.array([[10], [1], [2]])})
        lists[part] = [url, file, hashlib.md5((tmp_path / file).read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", lists)
    splits = load("svhn", data_root=tmp_path)
    assert splits.train.labels == [0, 1, 2] and splits.train.classes == tuple("0123456789")
    assert np.array_equal(np.asarray(splits.val.open(2)), np.asarray(coloured(2, 0, 32)))

    write_flowers(tmp_path)
    files = {}
    for key, (file, md5) in datasets.Flowers102._file_dict.items():
        path = tmp_path / "flowers-102" / file
        files[key] = (file, hashlib.md5(path.read_bytes()).hexdigest() if path.exists() else md5)
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", files)
    splits = load("flowers102", data_root=tmp_path)
    assert (splits.train.labels, splits.val.labels, len(splits.train.classes)) == ([0, 0, 0, 1, 1, 1], [0, 1], 102)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    text = error_of("flowers102", data_root=tmp_path)
    assert text == "--data flowers102: needs the package scipy: pip install scipy"


# ------------------------------------------------------------------------------------------------- files missing


@pytest.mark.parametrize("name", SETS)
def test_missing_files_leave_nothing_behind_and_say_how_to_fetch(tmp_path, name):
    """What it says is Python, and calls torchvision with arguments that it takes."""
    text = error_of(name, data_root=tmp_path / "data sets")
    assert not list(tmp_path.iterdir())
    assert text.startswith(f"--data {name}: there is no {SETS[name].files} in {tmp_path / 'data sets'}; ")
    assert "--data-root" in text
    if name == "stanford_cars":
        assert "no longer answers" in text
        return
    command = text.partition("fetch it with ")[2].rpartition(", or name")[0]
    python, flag, code = shlex.split(command)
    assert (python, flag) == ("python", "-c") and code.count("download=True") == len(SETS[name].parts)
    called = []

    def pretend(root, **options):
        called.append(options)
        assert root == str(tmp_path / "data sets")

    namespace = {SETS[name].cls: pretend}
    exec(code.partition("; ")[2], namespace)
    assert [{**options, "download": True} for options in SETS[name].parts.values()] == called
    assert hasattr(datasets, SETS[name].cls)


def test_default_root_is_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"in {tmp_path / '.cache' / 'snello' / 'torchvision'};" in error_of("mnist")


def test_files_that_are_damaged(tmp_path):
    write_idx(tmp_path / "MNIST" / "raw")
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(gzip.compress(b"no"))
    text = error_of("mnist", data_root=tmp_path)
    assert "are incomplete or damaged (" in text and "download=True" in text


def test_a_folder_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "there is no cifar-10-batches-py" in error_of("cifar10", data_root=tmp_path)
    for i in range(4):
        save(tmp_path / "cifar10" / ("a" if i < 2 else "b") / f"{i}.png", 0, i)
    assert load("cifar10").train.classes == ("a", "b")


def test_names():
    assert spec_of("Oxford-IIIT-Pet") is SETS["oxford_iiit_pet"] and spec_of("imagenet") is None
    text = error_of("imagenet22")
    assert all(name in text for name in SETS) and "hf:PATH_OR_NAME" in text
