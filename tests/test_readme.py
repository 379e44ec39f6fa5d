"""What README.md and docs say is tried: its commands run, its code runs, its tables are the results."""

import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_vit, write_pictures

import snello
from snello.codecs import CODECS, codec_class
from snello.config import AlastConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCS = (ROOT / "docs" / "alast.md").read_text()
ADC_DOCS = (ROOT / "docs" / "adc.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks(README, "bash") for line in block.splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def test_the_first_code_stands_within_25_lines() -> None:
    assert "```" in "\n".join(README.splitlines()[:25])


def test_the_two_commands_are_there() -> None:
    assert commands()[:2] == ["pip install .", "snello finetune"]
    assert commands()[-2:] == ["pip install '.[test]'", "pytest"]


def test_the_snello_commands_run_as_they_stand(tmp_path: Path) -> None:
    """In order, in one folder; only shorter, and with the shipped model where weights would have to be downloaded."""
    write_pictures(tmp_path / "photos", {"cat": 8, "dog": 8}, size=32)
    write_pictures(tmp_path / "some", {"x": 1}, size=32)
    (tmp_path / "some" / "x" / "000.png").rename(tmp_path / "some" / "picture.jpg")
    run = [command for command in commands() if command.startswith("snello ")]
    assert len(run) == 6
    for command in run:
        args = shlex.split(command.replace("deit_small_patch16_224", "vit_micro_patch4_32"))[1:]
        if args[0] == "finetune":
            args += ["--epochs", "1", "--no-compare", "--workers", "0"]
        done = subprocess.run(
            [sys.executable, "-m", "snello.cli", *args], cwd=tmp_path, capture_output=True, text=True, env=os.environ
        )
        assert done.returncode == 0, (command, done.stderr)


def test_the_python_code_of_split_learning_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks(ADC_DOCS, "python")
    exec(block.replace("steps=10", "steps=1"), {"snello": snello, "folder": tmp_path / "run"})
    assert "'uplink_bytes': " in capsys.readouterr().out


@pytest.mark.parametrize("text", [README, DOCS], ids=["README", "docs/alast.md"])
def test_the_python_code_runs(text: str) -> None:
    model = tiny_vit()
    loader = [(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))] * 2
    for block in blocks(text, "python"):
        names = {"snello": snello, "torch": torch, "model": model, "loader": loader}
        exec(block.replace("blocks=9", "blocks=3"), names)
    assert all("forward" not in vars(block) for block in model.blocks)


def test_the_docs_name_every_option_of_alast() -> None:
    for name in AlastConfig.__dataclass_fields__:
        assert f"`{name}`" in DOCS or f"`{name.removesuffix('s')}" in DOCS, name


def test_the_docs_name_every_codec_and_every_option_of_adc() -> None:
    for name in CODECS:
        assert re.search(rf"`{name}[`(]", ADC_DOCS), name
    for name in ("adc", "int4"):
        for option in inspect.signature(codec_class(name)).parameters:
            assert f"`{option}`" in ADC_DOCS, option


def test_the_tables_are_what_the_results_say() -> None:
    script = ROOT / "benchmarks" / "tables.py"
    assert subprocess.run([sys.executable, str(script), "--check"]).returncode == 0
