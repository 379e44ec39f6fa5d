"""Every command and all code of README.md and docs/ is typed as it stands, but shorter; what is not says why."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_vit, write_pictures
from helpers.pages import NOT_RUN, PAGES, TOY, Reader, blocks, commands, reason_not_to_run

from snello import cli

RAN = ("python", "bash", "sh", "console")
SHOWN = {"", "css", "json", "text", "toml", "yaml"}
"""Languages of blocks that show what is printed or what lies in a file."""
EXTRAS = {
    "docs/data.md": ("datasets", "pandas"),
    "docs/export.md": ("onnx", "onnxruntime", "onnxscript"),
    "docs/integrations.md": ("transformers", "lightning"),
    "docs/lora.md": ("peft",),
    "docs/trainer.md": ("transformers",),
}
"""Pages that need more than what snello always has."""
SMALLER = {
    "docs/cut.md": {"steps=10": "steps=1"},
    "docs/index.md": {"snello finetune\n": "snello finetune --data photos/\n"},
    "docs/install.md": {"snello finetune": "snello finetune --data photos/"},
    "docs/lora.md": {"deit_small_patch16_224": TOY},
    "docs/trainer.md": {"RandomResizedCrop(224)": "RandomResizedCrop(16)"},
    "docs/split.md": {"ward-3-1f2e...": "ward-3-*"},
}
ALTERNATIVES = {"docs/scale.md"}


def photos(folder: Path) -> None:
    """What most pages take for granted: ten classes, and a picture of none of them."""
    write_pictures(folder / "photos", {f"class{i}": 5 for i in range(10)}, size=32)
    write_pictures(folder, {"some": 1, "new": 1}, size=32)
    (folder / "some" / "000.png").rename(folder / "some" / "picture.jpg")


def trained(folder: Path) -> None:
    """A run that the page goes on from."""
    photos(folder)
    args = ["--data", "photos", "--model", TOY, "--epochs", "1", "--no-compare", "--workers", "0"]
    assert cli.main(["finetune", *args, "--out", "runs/photos"]) == 0


def parts(folder: Path) -> None:
    """Pictures in photos/train/, and the hub's folder of a small ViT."""
    from transformers import ViTConfig, ViTModel

    write_pictures(folder / "photos" / "train", {"blue": 9, "green": 9, "red": 8}, size=32)
    shape = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 64}
    small = ViTModel(ViTConfig(**shape, image_size=16, patch_size=4))
    small.save_pretrained(folder / "google" / "vit-base-patch16-224-in21k")


def adapters(folder: Path) -> None:
    """Three classes, and the weights that adapters are trained beside."""
    import timm
    from safetensors.torch import save_file

    write_pictures(folder / "photos", {"blue": 9, "green": 9, "red": 8}, size=32)
    model = timm.create_model(TOY, pretrained=True, num_classes=3)
    save_file(model.state_dict(), folder / "base.safetensors")


def sources(folder: Path) -> None:
    """The same pictures as folders, tables, a dataset and a set of torchvision."""
    import datasets
    import pandas

    write_pictures(folder / "photos", {"cat": 5, "dog": 5})
    write_pictures(folder / "sets/eurosat/2750", {"Forest": 5, "River": 5})
    paths = sorted(Path("photos").rglob("*.png"))
    table = pandas.DataFrame({"path": map(str, paths), "label": [path.parent.name for path in paths]})
    table["split"] = ["train", "train", "train", "val", "test"] * 2
    table.to_csv("photos.csv", index=False)
    table.to_parquet("photos.parquet")
    table.rename(columns={"path": "where", "label": "what"}).to_csv("other.tsv", sep="\t", index=False)
    datasets.load_dataset("photos", split="train", cache_dir=str(folder / "cache")).save_to_disk("saved")


PREPARED: dict[str, Callable[[Path], None]] = {
    "docs/data.md": sources,
    "docs/export.md": trained,
    "docs/integrations.md": parts,
    "docs/lora.md": adapters,
    "docs/trainer.md": parts,
}


def names_of(page: str) -> dict[str, Any]:
    """What a page's code has from the reader's program."""
    if page != "docs/alast.md":
        return {}
    return {"model": tiny_vit(), "loader": [(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))] * 2}


def read(page: str, folder: Path) -> Reader:
    reader = Reader(folder, names_of(page), SMALLER.get(page, {}), page in ALTERNATIVES)
    reader.read(page)
    return reader


def no_failures(reader: Reader) -> None:
    if reader.failures:
        pytest.fail("\n".join(reader.failures), pytrace=False)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


with_code = [page for page in PAGES if any(block.language in RAN for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in with_code if page not in EXTRAS])
def test_a_page_runs(page: str, place: Path) -> None:
    PREPARED.get(page, photos)(place)
    no_failures(read(page, place))


@pytest.mark.slow
@pytest.mark.parametrize("page", EXTRAS)
def test_a_page_of_extras_runs(page: str, place: Path) -> None:
    for package in EXTRAS[page]:
        pytest.importorskip(package)
    PREPARED[page](place)
    no_failures(read(page, place))


def test_every_block_is_code_that_runs_or_shown_for_what_it_is() -> None:
    languages = {block.language for page in PAGES for block in blocks(page)}
    assert languages - set(RAN) <= SHOWN
    typed = [
        line for page in PAGES for block in blocks(page) if block.language in SHOWN for line in commands(block.text)
    ]
    assert [line for line in typed if line.split()[0] in ("snello", "python", "pip", "torchrun", "$")] == []


def test_every_command_is_one_of_snello_or_says_why_it_is_not_run() -> None:
    shells = [block for page in PAGES for block in blocks(page) if block.language in RAN[1:]]
    all_commands = [command for block in shells for command in commands(block.text)]
    others = [command for command in all_commands if not command.startswith("snello ")]
    assert [command for command in others if reason_not_to_run(command) is None] == []
    reasons = {reason_not_to_run(command) for command in all_commands} - {None}
    assert set(NOT_RUN.values()) - reasons == set(), "what is listed is nowhere typed"


def test_a_reader_says_what_fails(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "```python\n1 / 0\n```\n```bash\nsnello evaluate nowhere\nfrobnicate --all\n```\n"
    monkeypatch.setitem(PAGES, "docs/wrong.md", text)
    failures = read("docs/wrong.md", place).failures
    assert [failure.split("\n")[0] for failure in failures] == [
        "docs/wrong.md:2",
        "docs/wrong.md:5: snello evaluate nowhere",
        "docs/wrong.md:5: frobnicate --all",
    ]
    assert "ZeroDivisionError" in failures[0] and "exit code 2" in failures[1] and "NOT_RUN" in failures[2]


def test_what_a_page_says_is_printed_is_printed(place: Path) -> None:
    """In `print(error)  # text` of docs/api.md the text is true."""
    write_pictures(place / "photos", {"cat": 10, "dog": 10})
    reader = read("docs/api.md", place)
    (message,) = re.findall(r"print\(error\)  # (.*)", PAGES["docs/api.md"])
    assert reader.failures == [] and reader.printed.splitlines()[-1] == message
