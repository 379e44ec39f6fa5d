"""Help is one screen of what matters first, and the rest where one asks for it."""

import re

import pytest

from snello import cli
from snello.commandline.groups import FIRST, GROUPS
from snello.commandline.help import asked
from snello.commandline.settings import settings_of

SMALL = [verb for verb in cli.VERBS if verb not in FIRST]


@pytest.fixture
def shown(capsys, monkeypatch):
    """What a command prints that is no error, in a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*args: str) -> str:
        assert cli.main(args) == 0
        out, err = capsys.readouterr()
        assert err == "" and max(map(len, out.splitlines())) <= 80
        return out

    return call


def flags_in(text: str) -> list[str]:
    """The flags at the left of a line, where settings are listed."""
    return [flag for line in re.findall(r"^  (--.*)", text, flags=re.M) for flag in re.findall(r"^--[\w.-]+", line)]


def settings(verb: str) -> list[str]:
    return [s.flags[0] for s in settings_of(cli.VERBS[verb].__annotations__["config"]) if s.flags]


def test_help_says_how_to_see_more(shown):
    text = shown("--help")
    assert all(re.search(rf"^  {verb} +[A-Z]", text, flags=re.M) for verb in cli.VERBS)
    assert "snello VERB --help " in text and "--help-all" in text and "--print-completion bash" in text


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb_fits_a_screen(shown, verb):
    text = shown(verb, "--help")
    assert text.startswith(f"usage: snello {verb} ") and len(text.splitlines()) <= 45
    assert shown(verb, "-h") == text == shown("help", verb) == shown(verb, "--epochs", "3", "--help")


def test_what_matters_first_is_first(shown):
    text = shown("finetune", "--help")
    assert flags_in(text) == [
        "--data", "--model", "--method", "--preset", "--epochs", "--time-budget", "--batch-size", "--lr",
        "--image-size", "--out", "--resume",
    ]  # fmt: skip
    everything = shown("finetune", "--help-all")
    assert flags_in(everything)[: len(flags_in(text))] == flags_in(text)
    for name in ("data", "training", "augment", "alast", "lora", "split", "device", "run"):
        assert re.search(rf"^  {name} +[A-Z]", text, flags=re.M), name
        assert re.search(rf"^{name}: ", everything, flags=re.M), name
    assert "snello finetune --help GROUP" in text and "--help-all everything" in text
    assert "network" not in text


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_all_has_every_setting_once(shown, verb):
    text = shown(verb, "--help-all")
    assert sorted(flags_in(text)) == sorted(settings(verb))
    if verb in SMALL:
        assert text == shown(verb, "--help")


@pytest.mark.parametrize("verb", FIRST)
def test_help_of_each_group(shown, verb):
    """All groups together are all settings, and each is shown whole though some of it is first."""
    names = re.findall(r"^  (\w+) +[A-Z]", shown(verb, "--help").partition("By purpose")[2], flags=re.M)
    assert names == [group.name for group in GROUPS if group.name in names]
    groups = [shown(verb, "--help", name) for name in names]
    assert sorted(flag for text in groups for flag in flags_in(text)) == sorted(settings(verb))
    assert all(text.startswith(f"{name}: ") for name, text in zip(names, groups, strict=True))


def test_help_of_a_group_or_setting(shown):
    alast = shown("finetune", "--help", "alast")
    assert "arXiv:2408.08670" in alast and {"--alast.min-budget", "--preset"} <= set(flags_in(alast))
    assert alast == shown("finetune", "--help-all", "alast") == shown("finetune", "--help=alast")
    assert alast == shown("help", "finetune", "alast")
    for name in ("lr", "learning-rate", "learning_rate"):
        assert flags_in(shown("finetune", "--help", name)) == ["--lr"]
    assert flags_in(shown("finetune", "--help", "alast.rule")) == ["--alast.rule"]
    assert flags_in(shown("finetune", "--help", "alpha")) == ["--alast.alpha", "--lora.alpha"]
    assert flags_in(shown("evaluate", "--help", "part")) == ["--part"]


def test_unknown_topic(capsys):
    assert cli.main(["finetune", "--help", "alst"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(
        "snello: error: no settings of snello finetune are called 'alst'; nearest: alast; groups: data, model, "
    )


def test_a_word_behind_help_may_be_one_of_the_command(shown):
    """Where there are no groups to choose from, all is shown anyway."""
    assert shown("evaluate", "--help", "runs/photos") == shown("evaluate", "--help")


def test_defaults_are_shown_once(shown):
    text = " ".join(shown("finetune", "--help-all").split())
    assert "Passes over the training pictures; default: 5 or," in text
    assert "None" not in text
    assert "--compare, --no-compare" in text and "(default: on)" in text
    assert "Side of the pictures in pixels; default: the model's own." in text
    first = " ".join(shown("finetune", "--help").split())
    assert "Side of the pictures in pixels (default: the model's own)" in first
    assert "--resume Resume the run in --out where it was cut off By purpose" in first
    assert "Pictures in one pass of one process (default: 64)" in first and "a step has this times" not in first
    assert "--split.cut INT Blocks in the client's half, in 1..depth-1 (default: 3)" in " ".join(
        shown("serve", "--help").split()
    )


def test_what_must_be_given_is_in_the_usage(shown):
    assert shown("plan", "--help").startswith("usage: snello plan --memory MEMORY [options]\n")
    assert shown("predict", "--help").startswith("usage: snello predict RUN [PATHS ...] [options]\n")
    assert shown("join", "--help").startswith("usage: snello join ADDRESS [options]\n")


def test_a_narrow_terminal_keeps_flags_whole(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    assert cli.main(["serve", "--help-all"]) == 0
    text = capsys.readouterr().out
    assert sorted(flags_in(text)) == sorted(settings("serve")) and "--insecure-plaintext-for-everyone" in text


def test_who_asks():
    assert asked(["--lr", "3"]) is None
    assert asked(["--lr", "3", "--help"]) == ("--help", None)
    assert asked(["-h", "--lr", "3"]) == ("-h", None)
    assert asked(["--help-all", "lora"]) == ("--help-all", "lora")
    assert asked(["--help=lora", "x"]) == ("--help", "lora")
