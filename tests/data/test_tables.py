"""Tables of pictures: CSV, TSV and Parquet."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import finetune
from helpers.whole_runs import assert_whole_run, error_of, load, save

from snello import cli
from snello.config import ColumnsConfig, EvaluateConfig
from snello.data import load_pictures
from snello.errors import DataError
from snello.inference import evaluate

NAMES = ("blue", "green", "red")


def pictures(folder: Path, per_class: int = 6) -> list[tuple[str, str]]:
    """Paths, relative to the folder, and names of classes."""
    rows = []
    for channel, name in enumerate(NAMES):
        for i in range(per_class):
            path = save(folder / "images" / f"{name}{i}.png", 2 - channel, seed=10 * channel + i)
            rows.append((path.relative_to(folder).as_posix(), name))
    return rows


def write(path: Path, header: str, rows: list[tuple[Any, ...]], encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [header, *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write(tmp_path / "photos" / "photos.csv", "path,label", pictures(tmp_path / "photos"))


@pytest.mark.slow
def test_run_on_a_table(small, table, tmp_path):
    summary = assert_whole_run(replace(small, data=table), tmp_path / "runs")
    assert [row["class"] for row in summary["per_class"]] == list(NAMES)


@pytest.mark.slow
def test_run_on_parquet_with_parts(small, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = pictures(tmp_path)
    parts = ["validation" if i % 3 == 0 else "train" for i in range(len(rows))]
    columns = {"image_path": [path for path, _ in rows], "class": [NAMES.index(name) for _, name in rows]}
    parquet.write_table(pyarrow.table({**columns, "split": parts}), tmp_path / "photos.parquet")
    splits = load(tmp_path / "photos.parquet")
    assert (len(splits.train), len(splits.val), splits.train.classes) == (12, 6, ("0", "1", "2"))
    assert splits.source.endswith("photos.parquet, train and val")
    assert_whole_run(replace(small, data=tmp_path / "photos.parquet"), tmp_path / "runs")


def test_share_is_held_out_of_each_class(table):
    splits = load(table, val_share=1 / 3)
    assert [splits.val.labels.count(i) for i in range(3)] == [2, 2, 2] and len(splits.train) == 12
    again = load(table, val_share=1 / 3)
    assert splits.val.paths == again.val.paths != load(table, val_share=1 / 3, seed=1).val.paths
    assert splits.train.name(0).startswith(str(table.parent / "images" / "blue"))
    assert splits.train.open(0).getpixel((0, 0))[2] > 140


def test_parts_test_is_used_where_there_is_no_val(tmp_path):
    rows = [(path, name, "Test" if i % 3 == 0 else "train") for i, (path, name) in enumerate(pictures(tmp_path))]
    splits = load(write(tmp_path / "t.csv", "path,label,Split", rows))
    assert (len(splits.train), len(splits.val)) == (12, 6) and splits.source.endswith("t.csv, train and test")


def test_usual_names_delimiters_and_marks(tmp_path):
    rows = pictures(tmp_path, 2)
    for name, header, separator in (
        ("a.csv", "File Name;x;Target", ";"),
        ("b.tsv", "IMAGE\tx\tclass", "\t"),
        ("c.csv", '"filename","x","label"', ","),
    ):
        lines = [header.replace("File Name", "FileName"), *(separator.join((p, "1", c)) for p, c in rows), "", ""]
        (tmp_path / name).write_text("\r\n".join(lines), encoding="utf-8-sig")
        assert load(tmp_path / name).train.classes == NAMES


def test_columns_may_be_named(small, tmp_path):
    rows = [(path, name, "x") for path, name in pictures(tmp_path)]
    table = write(tmp_path / "t.csv", "where,what,label", rows)
    text = error_of(table)
    assert text.startswith(f"--data {table}: no column is known to be the image (looked for path, file, ")
    assert text.endswith("there are where, what, label: name it with --columns.image")
    assert load(table, columns=ColumnsConfig(image="where", label="what")).train.classes == NAMES
    assert "no column 'who' (--columns.label); there are where, what, label" in error_of(
        table, columns=ColumnsConfig(image="where", label="who")
    )
    args = ["--data", str(table), "--columns.image", "where", "--columns.label", "what", "--out", str(tmp_path / "r")]
    args += ["--model", "test_vit", "--weights", "none", "--image-size", "48", "--workers", "0", "--no-compare"]
    assert cli.main(["finetune", *args, "--epochs", "1", "--device", "cpu"]) == 0
    result = evaluate(EvaluateConfig(tmp_path / "r", device="cpu", workers=0))
    assert result["pictures"] == 3  # the run knows its columns


def test_labels_are_text_or_numbers(tmp_path):
    paths = [path for path, _ in pictures(tmp_path, 8)]
    table = write(tmp_path / "t.csv", "path,label", [(path, i % 12) for i, path in enumerate(paths)])
    assert load(table).train.classes == tuple(str(i) for i in range(12))  # 2 before 10
    table = write(tmp_path / "t.csv", "path,label", [(path, f"c{i % 12}") for i, path in enumerate(paths)])
    assert load(table).train.classes[:3] == ("c0", "c1", "c10")


def test_absolute_paths(tmp_path):
    rows = [(tmp_path / path, name) for path, name in pictures(tmp_path)]
    assert len(load(write(tmp_path / "elsewhere" / "t.csv", "path,label", rows)).train) == 12


def test_bad_pictures(table):
    with table.open("a") as file:
        file.write("images/none.png,red\n")
    text = error_of(table)
    assert text.startswith(f"{table.parent / 'images' / 'none.png'}: cannot be read as a picture: No such file")
    assert "1 of 19 pictures" in text and "--skip-bad" in text
    splits = load(table, skip_bad=True)
    assert splits.num_skipped == 1 and len(splits.train) + len(splits.val) == 18


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no column is known to be the image (looked for path, file,"),
        ("path,label\n", "no rows in it"),
        ("path,label\na.png,\n", "row 2: no label in column label"),
        ("path,label\na.png,x\n  ,y\n", "row 3: no path in column path"),
        ("path,label\na.png\n", "row 2: no label in column label"),
        ("path,label,split\na.png,x,train\na.png,y,x\n", "row 3: unknown split 'x' in column split; known: train,"),
        ("path,label,split\na.png,x,val\n", "nothing to train on: only val and no train"),
        (
            "path,label,split\na.png,x,train\na.png,y,train\na.png,z,val\n",
            "train and val differ in classes, only in val",
        ),
        ("path,label\na.png,x\n", "only one class (x); two or more are needed"),
        ("path,label\na.png,x\nb.png,y\n", "class x has only one picture"),
        ('path,label\n"a.png,x\n', "unexpected end of data"),
        (b"path,label\n\xff\xfe,x\n", "is not UTF-8 text"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, told):
    table = tmp_path / "t.csv"
    table.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert told in error_of(table, check=False)


def test_no_file_and_no_parquet(tmp_path):
    assert error_of(tmp_path / "none.csv") == f"--data {tmp_path / 'none.csv'}: no such file"
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    assert "x.parquet: cannot be read as Parquet: " in error_of(tmp_path / "x.parquet")


def test_parquet_with_labels_missing_or_broken(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def table(labels) -> Path:
        parquet.write_table(pyarrow.table({"path": ["a", "b"], "label": labels}), tmp_path / "t.parquet")
        return tmp_path / "t.parquet"

    assert "row 2: no label in column label" in error_of(table([1.0, None]))
    assert "row 2: no label in column label" in error_of(table([1.0, float("nan")]))
    assert "row 1: label 1.5 in column label" in error_of(table([1.5, 2.0]))
    assert "class 1 has only one" in error_of(table([1.0, 2.0]), check=False)


def test_parquet_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    assert error_of(tmp_path / "t.parquet").endswith("reading Parquet needs pyarrow: pip install 'snello[hf]'")


def test_evaluate_on_a_table(small, pictures, tmp_path):
    """Classes go by name, and a part can be chosen."""
    from conftest import QUIET

    finetune(replace(small, epochs=4, lr=2e-3), QUIET)
    rows = [
        (path, name, "test" if i < 3 else "val")
        for i, path in enumerate(sorted((pictures / "val").rglob("*.png")))
        for name in [path.parent.name]
    ]
    table = write(tmp_path / "t.csv", "path,label,split", rows)
    of = {
        part: evaluate(EvaluateConfig(small.out, data=table, part=part, device="cpu", workers=0))
        for part in ("auto", "test")
    }
    assert (of["auto"]["pictures"], of["test"]["pictures"]) == (6, 3)
    assert [row["pictures"] for row in of["test"]["per_class"]] == [3, 0, 0]
    assert of["test"]["per_class"][1]["accuracy"] is None and of["auto"]["accuracy"] > 0.6
    with pytest.raises(DataError, match="there is no train part; there is val, test"):
        evaluate(EvaluateConfig(small.out, data=table, part="train", device="cpu", workers=0))
    write(table, "path,label", [(path, "violet") for path, *_ in rows])
    with pytest.raises(DataError, match="classes unknown to the model: violet; known: blue, green, red"):
        load_pictures(table, NAMES, skip_bad=False, check=False)
    on_train = evaluate(EvaluateConfig(small.out, part="train", device="cpu", workers=0))
    assert on_train["pictures"] == 26


@pytest.mark.parametrize("odd", ["\u2028", "\x85", "\x0b", "\x1c"])
def test_a_row_ends_at_the_end_of_a_line_alone(tmp_path, odd):
    """str.splitlines would end it at others too."""
    rows = [(f"{number}{odd}y.png", label) for number, label in enumerate((f"a{odd}b", f"a{odd}b", "c", "c"))]
    for number, (name, _) in enumerate(rows):
        save(tmp_path / name, 0, seed=number)
    table = write(tmp_path / "photos.csv", "path,label", rows)
    assert load(table, val_share=0.5).train.classes == (f"a{odd}b", "c")
