"""What is read from the dataclasses is what tyro takes."""

import re
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from snello import cli
from snello.commandline.settings import settings_of
from snello.config import FinetuneConfig, JoinConfig, ServeConfig

CONFIGS = {verb: run.__annotations__["config"] for verb, run in cli.VERBS.items()}
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*\w")


@pytest.mark.parametrize("verb", CONFIGS)
def test_flags_are_those_that_tyro_takes(verb, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "250")
    with pytest.raises(SystemExit):
        tyro.cli(CONFIGS[verb], args=["--help"])
    settings = settings_of(CONFIGS[verb])
    in_texts = {flag for setting in settings for flag in FLAG.findall(setting.text)}  # of other settings, or verbs
    assert {flag for s in settings for flag in s.flags} | in_texts == set(FLAG.findall(capsys.readouterr().out)) - {
        "--help"
    }


@pytest.mark.parametrize("verb", CONFIGS)
def test_everything_is_explained(verb):
    assert [setting.name for setting in settings_of(CONFIGS[verb]) if not setting.text] == []


@dataclass(frozen=True)
class Inner:
    """A group."""

    flip: bool = True
    """Whether."""
    size: float | None = None
    """Of two
    lines."""


@dataclass(frozen=True)
class Base:
    """What is inherited."""

    kind: Literal["a", "b"] | None = None
    """Of the base."""


@dataclass(frozen=True, kw_only=True)
class Example(Base):
    """Fields of all kinds."""

    where: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WHERE")]
    """Which place."""
    kinds: tuple[Literal["a", "b"], ...] = ("a",)
    """Several."""
    inner: Inner = field(default_factory=lambda: Inner(size=2.0))
    path: Path = Path("x")
    """A file."""
    untold: int = 1


def test_settings_of_a_dataclass():
    found = {setting.name: setting for setting in settings_of(Example)}
    assert list(found) == ["kind", "where", "kinds", "inner.flip", "inner.size", "path", "untold"]
    assert {name: setting.text for name, setting in found.items()} == {
        "kind": "Of the base.",
        "where": "Which place.",
        "kinds": "Several.",
        "inner.flip": "Whether.",
        "inner.size": "Of two lines.",
        "path": "A file.",
        "untold": "",
    }
    where, kind, kinds, size = found["where"], found["kind"], found["kinds"], found["inner.size"]
    assert (where.flags, where.metavar, where.default, where.is_required) == ((), "WHERE", MISSING, True)
    assert (kind.flags, kind.choices, kind.metavar, kind.takes_none) == (("--kind",), ("a", "b"), "{a,b}", True)
    assert (kinds.choices, kinds.is_many, kinds.default, kinds.takes_none) == (("a", "b"), True, ("a",), False)
    assert (size.default, size.metavar, size.flags) == (2.0, "FLOAT", ("--inner.size",))
    assert found["inner.flip"].flags == ("--inner.flip", "--inner.no-flip") and found["inner.flip"].is_switch
    assert found["path"].metavar == "PATH" and found["untold"].metavar == "INT"


def test_defaults_are_those_of_the_config():
    """`serve` has its own for the cut."""
    cuts = [s.default for cls in (FinetuneConfig, ServeConfig) for s in settings_of(cls) if s.name == "split.cut"]
    assert cuts == [0, 3]
    assert [s.name for s in settings_of(JoinConfig) if s.is_required] == ["address"]
