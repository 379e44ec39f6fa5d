"""Reading, finding, checking, splitting, augmenting and batching pictures."""

import gc
import multiprocessing
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from snello import data
from snello.config import AugmentConfig, FinetuneConfig
from snello.data import loaders as loading
from snello.data.checking import failures
from snello.errors import DataError
from snello.seeds import mix

BLUE, RED = (0, 0, 255), (255, 0, 0)


def save(path: Path, color=RED, size=(12, 8), mode="RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return path


def spoil(path: Path, content: bytes = b"no picture") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def noise(path: Path, size=(64, 48), seed=0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def make_classes(folder: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        for i in range(count):
            save(folder / name / f"{i:03}.png", color=(i, 0, 0))
    return folder


def load(root, check=True, **settings):
    return data.splits_of(FinetuneConfig(data=root, check_pictures=check, **settings))


def names(pictures, root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in pictures.paths]


def error_of(call, *args, **settings) -> str:
    with pytest.raises(DataError) as caught:
        call(*args, **settings)
    text = str(caught.value)
    assert "\n" not in text
    return text


# ----------------------------------------------------------------------------------------------- reading a picture


def test_open_grey_and_rgb(tmp_path):
    for path, expected in ((save(tmp_path / "g.png", 70, mode="L"), (70, 70, 70)), (save(tmp_path / "c.png"), RED)):
        image = data.open_picture(path)
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (12, 8), expected)


def test_open_black_and_white(tmp_path):
    assert data.open_picture(save(tmp_path / "b.png", 1, mode="1")).getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize(("mode", "color"), [("RGBA", (255, 0, 0, 255)), ("LA", (40, 255))])
def test_open_transparent_is_on_white(tmp_path, mode, color):
    image = Image.new(mode, (4, 2), (0,) * len(color))  # black, and not to be seen
    image.paste(color, (0, 0, 2, 2))
    image.save(tmp_path / "a.png")
    opened = data.open_picture(tmp_path / "a.png")
    assert opened.getpixel((3, 0)) == (255, 255, 255)
    assert opened.getpixel((0, 0)) == (RED if mode == "RGBA" else (40, 40, 40))


def test_open_half_transparent_is_blended(tmp_path):
    red, green, _ = data.open_picture(save(tmp_path / "a.png", (255, 0, 0, 128), mode="RGBA")).getpixel((0, 0))
    assert red == 255 and green == pytest.approx(127, abs=1)


@pytest.mark.parametrize("suffix", ["png", "gif"])
@pytest.mark.parametrize("transparent", [False, True])
def test_open_palette(tmp_path, suffix, transparent):
    image = Image.new("P", (4, 2), 0)
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.paste(1, (0, 0, 2, 2))
    image.save(tmp_path / f"p.{suffix}", **({"transparency": 0} if transparent else {}))
    opened = data.open_picture(tmp_path / f"p.{suffix}")
    assert opened.mode == "RGB" and opened.getpixel((0, 0)) == RED
    assert opened.getpixel((3, 0)) == ((255, 255, 255) if transparent else BLUE)


def test_open_palette_with_transparency_per_color(tmp_path):
    image = Image.new("P", (4, 2), 0)
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.paste(1, (0, 0, 2, 2))
    image.save(tmp_path / "p.png", transparency=bytes([0, 255]))
    opened = data.open_picture(tmp_path / "p.png")
    assert (opened.getpixel((0, 0)), opened.getpixel((3, 0))) == (RED, (255, 255, 255))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_open_16_bit_grey_is_scaled(tmp_path, suffix):
    values = np.array([[0, 128, 129, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    opened = data.open_picture(tmp_path / f"deep.{suffix}")
    assert opened.mode == "RGB"
    assert np.asarray(opened)[0, :, 1].tolist() == [0, 0, 1, 128, 255]


def test_open_32_bit_grey(tmp_path):
    Image.fromarray(np.array([[0, 65535]], dtype=np.int32)).save(tmp_path / "ok.tif")
    assert np.asarray(data.open_picture(tmp_path / "ok.tif"))[0, :, 0].tolist() == [0, 255]
    Image.fromarray(np.array([[0, 70000]], dtype=np.int32)).save(tmp_path / "far.tif")
    assert "32-bit pixels outside 0..65535" in error_of(data.open_picture, tmp_path / "far.tif")
    Image.fromarray(np.array([[0.0, 1.0]], dtype=np.float32)).save(tmp_path / "float.tif")
    assert "floating-point pixels have no fixed range" in error_of(data.open_picture, tmp_path / "float.tif")


def test_open_cmyk(tmp_path):
    red, green, blue = data.open_picture(save(tmp_path / "c.jpg", (0, 255, 255, 0), mode="CMYK")).getpixel((4, 4))
    assert red > 200 and green < 60 and blue < 60


@pytest.mark.parametrize("draft", [False, True])
def test_open_applies_exif_orientation(tmp_path, draft):
    image = Image.new("RGB", (64, 32), RED)
    image.paste(BLUE, (0, 0, 32, 32))  # blue on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the left side comes to the top
    image.save(tmp_path / "r.jpg", exif=exif, quality=95)
    opened = data.open_picture(tmp_path / "r.jpg", draft=draft)
    assert opened.size == ((4, 8) if draft else (32, 64))
    width, height = opened.size
    top, bottom = opened.getpixel((width // 2, 0)), opened.getpixel((width // 2, height - 1))
    assert top[2] > 200 > 60 > top[0] and bottom[0] > 200 > 60 > bottom[2]


def test_open_goes_by_contents_not_by_name(tmp_path):
    Image.new("RGB", (4, 4), RED).save(tmp_path / "x", format="PNG")
    assert data.open_picture((tmp_path / "x").rename(tmp_path / "x.jpg")).getpixel((0, 0)) == RED


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "the file is empty"), (b"hello", "not a known picture format")], ids=["empty", "text"]
)
def test_open_no_picture(tmp_path, content, reason):
    path = spoil(tmp_path / "x.jpg", content)
    assert error_of(data.open_picture, path) == f"{path}: cannot be read as a picture: {reason}"


@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp", "gif"])
def test_open_truncated(tmp_path, suffix, draft):
    path = noise(tmp_path / f"x.{suffix}")
    data.open_picture(path, draft=draft)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert error_of(data.open_picture, path, draft=draft).startswith(f"{path}: cannot be read as a picture: ")


def test_open_any_damage_is_a_data_error(tmp_path):
    """Random bytes changed anywhere: a picture or a DataError, nothing else."""
    rng = random.Random(0)
    for suffix in ("jpg", "png", "tif", "webp", "gif", "bmp"):
        good = noise(tmp_path / f"x.{suffix}", (16, 16)).read_bytes()
        for _ in range(40):
            bad = bytearray(good)
            for _ in range(5):
                bad[rng.randrange(min(len(bad), 200))] = rng.randrange(256)
            path = spoil(tmp_path / f"bad.{suffix}", bytes(bad))
            try:
                assert data.open_picture(path).mode == "RGB"
            except DataError as error:
                assert str(path) in str(error) and "\n" not in str(error)


def test_open_missing_file_and_folder(tmp_path):
    assert error_of(data.open_picture, tmp_path / "no.png").endswith(": No such file or directory")
    assert str(tmp_path) in error_of(data.open_picture, tmp_path)


def test_open_decompression_bomb(tmp_path, monkeypatch):
    path = save(tmp_path / "big.png", size=(20, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "decompression bomb" in error_of(data.open_picture, path)


def test_names_that_cannot_be_printed(tmp_path):
    path = tmp_path / os.fsdecode(b"a\nb\xff.png")
    assert "a?b?.png: cannot be read" in error_of(data.open_picture, path)


# ------------------------------------------------------------------------------------------------- finding pictures


def test_shipped_pictures():
    splits = load(None)
    assert (len(splits.train), len(splits.val), splits.num_skipped) == (2000, 500, 0)
    assert splits.train.classes == splits.val.classes == data.FASHION_CLASSES
    assert len(data.FASHION_CLASSES) == 10 and data.FASHION_CLASSES[9] == "Ankle boot"
    assert [splits.train.labels.count(i) for i in range(10)] == [200] * 10
    assert [splits.val.labels.count(i) for i in range(10)] == [50] * 10
    assert splits.train.labels[:10] == list(range(10)) and isinstance(splits.train.labels[0], int)
    image = splits.val.open(499)
    assert (image.mode, image.size) == ("RGB", (28, 28)) and np.asarray(image).max() > 100
    assert splits.val.name(3) == "Fashion-MNIST test 3" and "2500" in splits.source
    # Trousers are narrow and bags wide: the pictures belong to the labels.
    width = {1: 0.0, 8: 0.0}
    for i, label in enumerate(splits.train.labels):
        if label in width:
            width[label] += float((np.asarray(splits.train.open(i))[14, :, 0] > 30).mean()) / 200
    assert width[1] < 0.6 < 0.7 < width[8]


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_train_and_held_out_folder(tmp_path, held_out):
    make_classes(tmp_path / "train", {"dog": 3, "cat": 2})
    make_classes(tmp_path / held_out, {"cat": 1, "dog": 1})
    splits = load(tmp_path)
    assert splits.train.classes == splits.val.classes == ("cat", "dog")
    assert names(splits.train, tmp_path / "train") == ["cat/000.png", "cat/001.png"] + [
        f"dog/00{i}.png" for i in range(3)
    ]
    assert splits.train.labels == [0, 0, 1, 1, 1] and splits.val.labels == [0, 1]
    assert names(splits.val, tmp_path) == [f"{held_out}/cat/000.png", f"{held_out}/dog/000.png"]
    assert f"{held_out}/" in splits.source and splits.num_skipped == 0
    assert splits.train.name(0) == str(tmp_path / "train" / "cat" / "000.png")


def test_val_is_preferred_to_test(tmp_path):
    for part in ("train", "test", "val"):
        make_classes(tmp_path / part, {"a": 1, "b": 1})
    assert names(load(tmp_path).val, tmp_path) == ["val/a/000.png", "val/b/000.png"]


@pytest.mark.parametrize("part", ["", "train"])
def test_held_out_share(tmp_path, part):
    make_classes(tmp_path / part, {"a": 10, "b": 5, "c": 2})
    splits = load(tmp_path, val_share=0.3)
    assert [splits.val.labels.count(i) for i in range(3)] == [3, 2, 1]
    assert [splits.train.labels.count(i) for i in range(3)] == [7, 3, 1]
    everything = [str(path) for path in sorted(tmp_path.rglob("*.png"))]
    assert sorted(str(path) for path in splits.train.paths + splits.val.paths) == everything
    assert "30%" in splits.source
    for pictures in (splits.train, splits.val):
        assert all(
            p.parent.name == pictures.classes[label] for p, label in zip(pictures.paths, pictures.labels, strict=True)
        )


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_held_out_share_leaves_a_picture_on_either_side(tmp_path, share):
    splits = load(make_classes(tmp_path, {"a": 2, "b": 6}), val_share=share)
    for pictures in (splits.train, splits.val):
        assert set(pictures.labels) == {0, 1}


def test_held_out_share_is_seeded(tmp_path):
    make_classes(tmp_path, {"a": 20, "b": 20})
    first, again, other = (load(tmp_path, seed=seed, check=False).val for seed in (1, 1, 2))
    assert first.paths == again.paths != other.paths
    per_class = [[p.name for p, label in zip(first.paths, first.labels, strict=True) if label == i] for i in (0, 1)]
    assert per_class[0] != per_class[1]  # the classes are drawn apart


def test_files_are_found_by_extension_recursively_and_sorted(tmp_path):
    wanted = ["10.JPG", "2.jpeg", "a.bmp", "deep/er/x.Tiff", "deep/y.webp", "z.pgm"]
    for name in reversed(wanted):
        spoil(tmp_path / "a" / name)
    for name in ("notes.txt", ".hidden.png", ".git/x.png", "noextension", "png"):
        spoil(tmp_path / "a" / name)
    make_classes(tmp_path, {"b": 2, ".cache": 2})
    spoil(tmp_path / "README.md")
    splits = load(tmp_path, check=False, val_share=0.5)
    found = [name for side in (splits.train, splits.val) for name in names(side, tmp_path)]
    assert sorted(found) == sorted([f"a/{name}" for name in wanted] + ["b/000.png", "b/001.png"])
    assert splits.train.classes == ("a", "b")
    assert [p.relative_to(tmp_path / "a").as_posix() for p in data.find_pictures([tmp_path / "a"])[0]] == wanted


def test_linked_class_folder(tmp_path):
    make_classes(tmp_path / "elsewhere", {"a": 2})
    make_classes(tmp_path / "data", {"b": 2})
    (tmp_path / "data" / "a").symlink_to(tmp_path / "elsewhere" / "a")
    assert load(tmp_path / "data").train.classes == ("a", "b")


def test_folder_errors(tmp_path):
    def error(name):
        return error_of(load, tmp_path / name)

    assert error("none").startswith(
        f"--data {tmp_path / 'none'}: no such folder or file; a source is a folder, a table"
    )
    save(tmp_path / "file.png")
    assert (
        error("file.png")
        == f"--data {tmp_path / 'file.png'}: is a file; a folder or a table (.csv .tsv .parquet) is needed"
    )
    (tmp_path / "empty").mkdir()
    assert "empty: empty; put the pictures of each class in a folder of its own" in error("empty")
    spoil(tmp_path / "text" / "readme.txt")
    assert "text: no class folders; put the pictures" in error("text")
    save(tmp_path / "flat" / "1.png")
    assert "flat: pictures but no class folders; put the pictures" in error("flat")
    save(tmp_path / "flat_train" / "train" / "1.png")
    assert "flat_train/train: pictures but no class folders" in error("flat_train")
    make_classes(tmp_path / "one", {"cat": 3})
    assert "one: only one class (cat); two or more are needed" in error("one")
    make_classes(tmp_path / "single", {"cat": 3, "dog": 1})
    assert "single: class dog has only one picture" in error("single")


def test_classes_without_pictures(tmp_path):
    make_classes(tmp_path, {"cat": 3, "cow": 3})
    spoil(tmp_path / "dog" / "x.txt")
    assert "no pictures in class folder dog (left out: 1 .txt: not pictures)" in error_of(load, tmp_path)
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    assert "no pictures in its class folders (left out: 1 .txt: not pictures)" in error_of(load, tmp_path)


def test_classes_that_differ(tmp_path):
    make_classes(tmp_path / "train", {"a": 1, "b": 1, "c": 1})
    make_classes(tmp_path / "val", {"b": 1, "c": 1, "d": 1})
    text = error_of(load, tmp_path)
    assert text.endswith("train/ and val/ differ in classes, only in train/: a; only in val/: d")
    (tmp_path / "val" / "d").rename(tmp_path / "val" / "a")
    load(tmp_path)
    make_classes(tmp_path / "train", {f"x{i}": 1 for i in range(20)})
    text = error_of(load, tmp_path)
    assert "only in train/: x0" in text and "and 12 more" in text and "only in val/" not in text


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_folder_without_permission(tmp_path):
    make_classes(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "a").chmod(0)
    try:
        assert error_of(load, tmp_path) == f"{tmp_path / 'a'}: Permission denied"
    finally:
        (tmp_path / "a").chmod(0o755)


def test_load_pictures(tmp_path):
    known = ("ant", "bee", "cat")
    make_classes(tmp_path, {"cat": 2, "ant": 1})
    pictures, num_skipped, _ = data.load_pictures(tmp_path, known, skip_bad=False, check=True)
    assert (pictures.labels, pictures.classes, num_skipped) == ([0, 2, 2], known, 0)
    make_classes(tmp_path, {"dog": 1})
    text = error_of(data.load_pictures, tmp_path, known, skip_bad=False, check=True)
    assert "class folders unknown to the model: dog; known: ant, bee, cat" in text
    for part, label in (("test", 1), ("val", 2)):
        make_classes(tmp_path / part, {known[label]: 1})
        pictures, *_ = data.load_pictures(tmp_path, known, skip_bad=False, check=True)
        assert pictures.labels == [label]
    spoil(tmp_path / "val" / "bee" / "bad.png")
    assert "bad.png" in error_of(data.load_pictures, tmp_path, known, skip_bad=False, check=True)
    assert "no such folder" in error_of(data.load_pictures, tmp_path / "x", known, skip_bad=False, check=True)


def test_find_pictures(tmp_path):
    make_classes(tmp_path / "f", {"b": 1, "a": 2})
    odd = spoil(tmp_path / "odd.bin")
    found, notes = data.find_pictures([odd, tmp_path / "f"])
    assert notes == ()
    assert found == [odd] + [tmp_path / "f" / name for name in ("a/000.png", "a/001.png", "b/000.png")]
    missing = tmp_path / "nothing.png"
    assert error_of(data.find_pictures, [odd, missing]) == f"{missing}: no such file or folder"
    (tmp_path / "void").mkdir()
    assert error_of(data.find_pictures, [tmp_path / "void"]).startswith(f"{tmp_path / 'void'}: no pictures in it")


# --------------------------------------------------------------------------------------------------------- checking


def test_check_names_the_first_bad_picture(tmp_path):
    make_classes(tmp_path, {"a": 4, "b": 4})
    bad = [spoil(tmp_path / "b" / "001.png", b""), spoil(tmp_path / "a" / "003.png")]
    text = error_of(load, tmp_path)
    assert text.startswith(f"{bad[1]}: cannot be read as a picture: not a known picture format (2 of 8 pictures")
    assert "--skip-bad" in text
    assert len(load(tmp_path, check=False).train) == 6  # nobody looked


@pytest.mark.parametrize("check", [True, False])
def test_skip_bad_leaves_out_and_counts(tmp_path, check):
    make_classes(tmp_path / "train", {"a": 4, "b": 4})
    make_classes(tmp_path / "val", {"a": 2, "b": 2})
    bad = {spoil(tmp_path / "train" / "a" / "001.png"), spoil(tmp_path / "val" / "b" / "000.png")}
    splits = load(tmp_path, skip_bad=True, check=check)
    assert (len(splits.train), len(splits.val), splits.num_skipped) == (7, 3, 2)
    assert not bad & set(splits.train.paths + splits.val.paths)
    assert splits.train.labels == [0, 0, 0, 1, 1, 1, 1] and splits.val.labels == [0, 0, 1]
    pictures, num_skipped, _ = data.load_pictures(tmp_path / "val", ("a", "b"), skip_bad=True, check=check)
    assert (len(pictures), num_skipped) == (3, 1)


def test_skip_bad_before_the_split(tmp_path):
    make_classes(tmp_path, {"a": 3, "b": 3})
    spoil(tmp_path / "a" / "000.png")
    splits = load(tmp_path, skip_bad=True)
    assert splits.num_skipped == 1 and splits.val.labels == [0, 1] and splits.train.labels == [0, 1, 1]
    spoil(tmp_path / "a" / "001.png")
    assert "class a has only one picture" in error_of(load, tmp_path, skip_bad=True)
    spoil(tmp_path / "a" / "002.png")
    text = error_of(load, tmp_path, skip_bad=True)
    assert text.startswith("no picture of class a can be read (3 bad ones in all, first") and "000.png" in text


def test_check_goes_beyond_one_part(tmp_path):
    good, bad = save(tmp_path / "good.png", size=(1, 1)), spoil(tmp_path / "bad.png")
    pictures = data.FilePictures([good] * 1500 + [bad], [0] * 1501, ["a"])
    assert failures(pictures) == {1500: f"{bad}: cannot be read as a picture: not a known picture format"}


# ------------------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("settings", [{}, {"crop_scale": 1.0}, {"flip": False, "rand_ops": 0}, {"rand_magnitude": 30}])
@pytest.mark.parametrize("size", [(12, 8), (40, 90), (16, 16)])
def test_train_transform_shape(settings, size):
    tensor = loading.train_transform(16, "bicubic", AugmentConfig(**settings))(Image.new("RGB", size, RED))
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.uint8 and type(tensor) is torch.Tensor


def test_train_transform_off_is_the_center_crop():
    image = Image.fromarray(np.arange(24 * 16 * 3, dtype=np.uint8).reshape(16, 24, 3))
    off = loading.train_transform(16, "bilinear", AugmentConfig(flip=False, crop_scale=1.0, rand_ops=0))
    expected = torch.from_numpy(np.asarray(image)[:, 4:20].copy()).permute(2, 0, 1)
    assert torch.equal(off(image), expected)
    assert torch.equal(loading.eval_transform(16, "bilinear", 1.0)(image), expected)


def test_train_transform_flips_and_crops():
    values = np.zeros((16, 16, 3), dtype=np.uint8)
    values[:, :8] = 255
    flip = loading.train_transform(16, "nearest", AugmentConfig(crop_scale=1.0, rand_ops=0))
    left = [int(flip(Image.fromarray(values))[0, 0, 0]) for _ in range(64)]
    assert set(left) == {0, 255}
    crop = loading.train_transform(16, "nearest", AugmentConfig(flip=False, crop_scale=0.3, rand_ops=0))
    assert len({int(crop(Image.fromarray(values)).sum()) for _ in range(32)}) > 5


def test_eval_transform_crops_the_centre():
    values = np.zeros((32, 64, 3), dtype=np.uint8)
    values[4:28, 20:44] = 200  # the middle three quarters of the short side
    image = Image.fromarray(values)
    assert (loading.eval_transform(24, "nearest", 0.75)(image) == 200).all()
    assert not (loading.eval_transform(24, "nearest", 1.0)(image) == 200).all()


def test_transforms_draw_from_torch_alone(monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("drawn from another generator")

    before = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
    for name in ("random", "uniform", "randint", "choice", "choices", "sample", "gauss"):
        monkeypatch.setattr(random, name, forbidden)
    transform = loading.train_transform(16, "bicubic", AugmentConfig(rand_ops=4))
    for seed in range(50):
        torch.default_generator.manual_seed(seed)
        transform(Image.new("RGB", (24, 24), RED))
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2])


# ---------------------------------------------------------------------------------------------------------- batches


def training(seed=0, count=6, **settings) -> loading.TrainingPictures:
    pictures = load(None).train
    small = data.ArrayPictures(pictures.images[:count], np.array(pictures.labels[:count]), pictures.classes, "x")
    return loading.TrainingPictures(small, loading.train_transform(16, "bilinear", AugmentConfig(**settings)), seed)


def test_mix():
    assert mix(1, 2) == mix(1, 2)
    values = [mix(*key) for key in ((0,), (1,), (0, 0), (0, 1), (1, 0), (2, 1), (1, 2), (0, 0, 0), (2**70, -1))]
    assert len(set(values)) == len(values) and all(0 <= value < 2**63 for value in values)
    keys = [mix(0, epoch, index) for epoch in range(50) for index in range(200)]
    assert len(set(keys)) == len(keys) and len({key % 2**32 for key in keys}) > len(keys) - 3
    for bit in range(63):
        assert 0.45 < sum(key >> bit & 1 for key in keys) / len(keys) < 0.55


def test_mix_never_changes():
    """A run that goes on with another version must get the same batches: splitmix64 from seed 0, halved."""
    assert mix(0) == 0xE220A8397B1DCDAF >> 1


@pytest.mark.slow
def test_augmentation_depends_on_seed_epoch_and_index_alone():
    keys = [(epoch, index) for epoch in range(3) for index in range(6)]
    dataset, other = training(), training(seed=1)
    first = {key: dataset[key][0] for key in keys}
    torch.rand(7)
    random.seed(5)
    np.random.seed(5)
    for key in reversed(keys):
        assert torch.equal(training()[key][0], first[key])
    assert any(not torch.equal(other[key][0], first[key]) for key in keys)
    assert any(not torch.equal(first[0, index], first[1, index]) for index in range(6))
    assert dataset[2, 3][1] == dataset.pictures.labels[3]


def test_augmentation_leaves_the_global_generator_alone():
    dataset = training(rand_ops=3)
    torch.manual_seed(3)
    torch.randn(1)  # leaves half of a pair of normal numbers behind, which has to survive too
    state = torch.get_rng_state()
    for index in range(6):
        dataset[0, index]
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_restores_the_generator_after_an_error():
    dataset = training()

    def fail(_):
        torch.rand(1)
        raise RuntimeError("broken")

    dataset.transform = fail
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken"):
        dataset[0, 0]
    assert torch.equal(torch.get_rng_state(), state)


def test_epoch_batches_cover_every_epoch_in_a_new_order():
    sampler = loading.EpochBatches(10, 4, 3, seed=5)
    everything = list(sampler)
    assert len(sampler) == len(everything) == 9 and sampler.batches_per_epoch == 3
    assert [len(batch) for batch in everything] == [4, 4, 2] * 3
    orders = []
    for epoch in range(3):
        keys = [key for batch in everything[3 * epoch : 3 * epoch + 3] for key in batch]
        assert {e for e, _ in keys} == {epoch} and sorted(i for _, i in keys) == list(range(10))
        orders.append([i for _, i in keys])
    assert len({tuple(order) for order in orders}) == 3
    torch.rand(3)
    assert list(sampler) == everything == list(loading.EpochBatches(10, 4, 3, seed=5))
    assert list(loading.EpochBatches(10, 4, 3, seed=6)) != everything
    assert list(loading.EpochBatches(10, 4, 9, seed=5))[:9] == everything  # more epochs do not change the first ones


@pytest.mark.parametrize(("num", "size"), [(10, 4), (8, 4), (3, 8), (5, 1)])
def test_epoch_batches_go_on_from_any_start(num, size):
    everything = list(loading.EpochBatches(num, size, 3, seed=1))
    for start in range(len(everything) + 1):
        rest = loading.EpochBatches(num, size, 3, seed=1, start=start)
        assert list(rest) == everything[start:] and len(rest) == len(everything) - start


def loaded(workers, start=0):
    dataset = training(count=10)
    settings = {"batch_size": 4, "epochs": 2, "seed": 0, "start": start, "workers": workers}
    return list(loading.batches(loading.train_loader(dataset.pictures, dataset.transform, **settings)))


@pytest.mark.slow
def test_train_loader_is_the_same_with_workers_and_after_a_cut():
    state = torch.get_rng_state()
    alone, together, later = loaded(0), loaded(2), loaded(2, start=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(labels) for _, labels in alone] == [4, 4, 2] * 2
    assert alone[0][0].shape == (4, 3, 16, 16) and alone[0][0].dtype == torch.uint8
    assert alone[0][1].dtype == torch.int64
    for expected, got in ((alone, together), (alone[2:], later)):
        assert len(expected) == len(got)
        for one, other in zip(expected, got, strict=True):
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.slow
def test_eval_loader_keeps_the_order(workers):
    pictures = training(count=10).pictures
    state = torch.get_rng_state()
    loader = loading.eval_loader(pictures, loading.eval_transform(28, "bilinear", 1.0), batch_size=4, workers=workers)
    for _ in range(2):
        images, labels = (torch.cat(parts) for parts in zip(*loading.batches(loader), strict=True))
        assert labels.tolist() == pictures.labels
        assert torch.equal(images[:, 2], torch.from_numpy(pictures.images))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["train", "eval"])
def test_unreadable_picture_is_one_line_from_a_worker_too(tmp_path, kind, workers):
    make_classes(tmp_path, {"a": 3, "b": 3})
    splits = load(tmp_path)
    bad = spoil(splits.train.paths[1], struct.pack("<4I", 1, 2, 3, 4))
    transform = loading.eval_transform(8, "bilinear", 1.0)
    if kind == "train":
        loader = loading.train_loader(splits.train, transform, batch_size=2, epochs=1, seed=0, workers=workers)
    else:
        loader = loading.eval_loader(splits.train, transform, batch_size=2, workers=workers)
    text = ""
    try:
        list(loading.batches(loader))
    except DataError as error:
        text = str(error)
    assert text == f"{bad}: cannot be read as a picture: not a known picture format"
    gc.disable()  # torch waits 5 s for workers that the garbage collector finds as part of a cycle
    try:
        del loader
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()


def test_errors_of_the_one_who_iterates_pass_through():
    pictures = training().pictures
    loader = loading.eval_loader(pictures, loading.eval_transform(8, "bilinear", 1.0), batch_size=2)
    with pytest.raises(DataError, match=r"^a\nb$"):
        for _ in loading.batches(loader):
            raise DataError("a\nb")


def test_the_typical_size_is_that_of_a_picture_in_the_middle(tmp_path):
    """By the shorter side; what cannot be opened does not count."""
    for number, size in enumerate([(10, 10), (90, 40), (40, 60), (400, 300), (20, 20)]):
        for name in "ab":
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", size).save(tmp_path / name / f"{number}.png")
    paths = sorted((tmp_path / "a").iterdir())
    assert data.typical_size(data.FilePictures(paths, [0] * 5, ("a",))) == (90, 40)
    paths[1].write_bytes(b"no picture")
    assert data.typical_size(data.FilePictures(paths, [0] * 5, ("a",))) in ((40, 60), (20, 20))
    assert data.typical_size(data.FilePictures(paths[1:2], [0], ("a",))) is None
    assert data.typical_size(data.FilePictures(paths[:1], [0], ("a",))) == (10, 10)
