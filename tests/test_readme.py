"""README.md is short and begins and ends with what works; the docs name all there is; tables are the results."""

import inspect
import re
import subprocess
import sys

from helpers.pages import PAGES, ROOT, blocks, commands

from snello.codecs import codec_class
from snello.config import AlastConfig
from snello.config.registry import CODECS, FROZEN_GOALS, GOALS
from snello.split.wire.frames import Kind
from snello.split.wire.refusals import Code

README, DOCS, CODEC_DOCS, PROTOCOL_DOCS, TROUBLESHOOTING = (
    PAGES[page]
    for page in ("README.md", *(f"docs/{name}.md" for name in ("alast", "codecs", "protocol", "troubleshooting")))
)


def test_the_first_code_stands_within_25_lines() -> None:
    assert "```" in "\n".join(README.splitlines()[:25])


def test_the_two_commands_are_there() -> None:
    typed = [command for block in blocks("README.md") if block.language == "bash" for command in commands(block.text)]
    assert typed[:2] == ["pip install .", "snello finetune"]
    assert typed[-2:] == ["pip install '.[test]'", "pytest"]


def test_it_is_read_in_a_few_minutes() -> None:
    assert len(README.split()) <= 900


def test_the_docs_name_every_code_of_refusal_and_every_kind_of_frame() -> None:
    for code in Code:
        assert f"`{code.value}`" in PROTOCOL_DOCS and f"({code.value})" in TROUBLESHOOTING, code
    for kind in Kind:
        assert re.search(rf"\| {kind.value} \| {kind.name} \|", PROTOCOL_DOCS), kind


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
