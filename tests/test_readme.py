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
from snello.codecs import codec_class
from snello.config import AlastConfig
from snello.config.registry import CODECS, FROZEN_GOALS, GOALS
from snello.split.wire.frames import Kind
from snello.split.wire.refusals import Code

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCS = (ROOT / "docs" / "alast.md").read_text()
CUT_DOCS = (ROOT / "docs" / "cut.md").read_text()
CODEC_DOCS = (ROOT / "docs" / "codecs.md").read_text()
PROTOCOL_DOCS = (ROOT / "docs" / "protocol.md").read_text()
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text()


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


def start(args: list[str], folder: Path) -> tuple[subprocess.Popen[str], str]:
    """A server, and the port that it says it listens on."""
    server = subprocess.Popen(
        [sys.executable, "-m", "snello.cli", *args], cwd=folder, stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    for line in server.stderr:
        if "listening on" in line:
            return server, line.split("listening on ")[1].split()[0].rpartition(":")[2]
    raise AssertionError(f"the server did not start: {args}")


@pytest.mark.slow
def test_the_snello_commands_run_as_they_stand(tmp_path: Path) -> None:
    """In order, in one folder; only shorter, on free ports, and with the shipped model: nothing is downloaded."""
    write_pictures(tmp_path / "photos", {f"class{i}": 5 for i in range(10)}, size=32)
    write_pictures(tmp_path / "some", {"x": 1}, size=32)
    (tmp_path / "some" / "x" / "000.png").rename(tmp_path / "some" / "picture.jpg")
    run = [command for command in commands() if command.startswith("snello ")]
    assert len(run) == 13
    servers: list[subprocess.Popen[str]] = []
    port = ""
    try:
        for command in run:
            text = command.replace("deit_small_patch16_224", "vit_micro_patch4_32").replace(
                " 0.0.0.0:7443", " 127.0.0.1:0"
            )
            args = shlex.split(re.sub(r"\S+:7443", f"127.0.0.1:{port}", text))[1:]
            if args[0] == "finetune":
                args += ["--epochs", "1", "--no-compare", "--workers", "0"]
                args += [] if "--model" in args else ["--model", "vit_micro_patch4_32"]
            if args[0] == "join":
                args += ["--workers", "0"]
            if args[0] == "serve":
                args += ["--epochs", "1"] + ([] if "--listen" in args else ["--listen", "127.0.0.1:0"])
                server, port = start(args, tmp_path)
                servers.append(server)
                continue
            done = subprocess.run(
                [sys.executable, "-m", "snello.cli", *args],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                env=os.environ,
            )
            assert done.returncode == 0, (command, done.stderr)
    finally:
        for server in servers:
            server.terminate()
        assert [server.wait(60) for server in servers] == [0, 0]


def test_the_docs_name_every_code_of_refusal_and_every_kind_of_frame() -> None:
    for code in Code:
        assert f"`{code.value}`" in PROTOCOL_DOCS and f"({code.value})" in TROUBLESHOOTING, code
    for kind in Kind:
        assert re.search(rf"\| {kind.value} \| {kind.name} \|", PROTOCOL_DOCS), kind


def test_the_python_code_of_split_learning_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks(CUT_DOCS, "python")
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


def test_the_docs_name_every_codec_and_the_options_of_those_with_many() -> None:
    for name in CODECS:
        assert re.search(rf"`{name}[`(]", CODEC_DOCS), name
    for name in ("adc", "int4", "pca"):
        for option in inspect.signature(codec_class(name)).parameters:
            assert f"`{option}`" in CODEC_DOCS, option
    for goals in (GOALS, FROZEN_GOALS):
        for name, text in goals.items():
            assert re.search(rf"\| `{name}` \|.*`{re.escape(text)}`", CODEC_DOCS), text


def test_the_tables_are_what_the_results_say() -> None:
    script = ROOT / "benchmarks" / "tables.py"
    assert subprocess.run([sys.executable, str(script), "--check"]).returncode == 0
