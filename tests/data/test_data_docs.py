"""What docs/data.md says is tried: its commands run, its names are all there are."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import write_pictures

from snello import cli
from snello.data import EXTENSIONS
from snello.data.source import PART_NAMES
from snello.data.tables import IMAGE_COLUMNS, LABEL_COLUMNS
from snello.data.torchvision_sets import SETS

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()


def test_names():
    for name in (*SETS, *IMAGE_COLUMNS, *LABEL_COLUMNS):
        assert f"`{name}`" in DOCS, name
    assert " ".join(EXTENSIONS) in " ".join(DOCS.split())


def test_names_of_parts():
    text = re.search(r"Parts go by these names, in any case: (.*?)\. ", DOCS, flags=re.S).group(1)
    assert re.findall(r"`(\w+)`", text) == list(PART_NAMES)


def test_sets_with_val_and_without_parts_are_named():
    held_out = re.search(r"Sets that come with a `val` part \((.*?)\)", DOCS, flags=re.S).group(1)
    assert set(re.findall(r"`(\w+)`", held_out)) == {name for name, spec in SETS.items() if "val" in spec.parts}
    whole = {name for name, spec in SETS.items() if "all" in spec.parts}
    assert whole == {"caltech101", "caltech256", "eurosat", "sun397"}


@pytest.mark.slow
def test_commands_run(tmp_path, monkeypatch, capsys):
    """In order, in one folder; only shorter, with a model of the tests."""
    datasets = pytest.importorskip("datasets")
    pandas = pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_pictures(Path("photos"), {"cat": 5, "dog": 5})
    write_pictures(Path("sets/eurosat/2750"), {"Forest": 5, "River": 5})
    paths = sorted(Path("photos").rglob("*.png"))
    table = pandas.DataFrame({"path": map(str, paths), "label": [path.parent.name for path in paths]})
    table["split"] = ["train", "train", "train", "val", "test"] * 2
    table.to_csv("photos.csv", index=False)
    table.to_parquet("photos.parquet")
    table.rename(columns={"path": "where", "label": "what"}).to_csv("other.tsv", sep="\t", index=False)
    datasets.load_dataset("photos", split="train").save_to_disk("saved")
    shorter = ["--model", "test_vit", "--weights", "none", "--image-size", "48", "--epochs", "1", "--no-compare"]
    commands = [line for block in re.findall(r"```bash\n(.*?)```", DOCS, flags=re.S) for line in block.splitlines()]
    assert len(commands) == 10
    for command in commands:
        verb, *args = shlex.split(command)[1:]
        more = {"finetune": [*shorter, "--workers", "0"], "evaluate": ["--workers", "0"]}.get(verb, [])
        assert cli.main([verb, *args, *more]) == 0, (command, capsys.readouterr().err)
