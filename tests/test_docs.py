"""Every flag that README.md and docs mention exists, and is one of the verb that a command gives it to."""

import re

import pytest
from helpers.pages import PAGES, ROOT

from snello import cli

FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*\w")
COMMAND = re.compile(r"(?:^|&& |-m )snello ([a-z-]+)(.*?)(?:&&|#|$)", flags=re.M)
PAGE = re.compile(r"docs/[\w-]+\.md")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
OF_OTHERS = {
    "torchrun": {"--standalone", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"},
    "accelerate launch": {"--cpu", "--multi_gpu", "--num_processes"},
    "hf download": {"--local-dir"},
    "tensorboard": {"--logdir"},
    "pip": {"--no-deps"},
    "ruff format": {"--check"},
    "mkdocs build": {"--strict"},
}


def flags_of(text: str) -> set[str]:
    return set(FLAG.findall(text))


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, set[str]]:
    """The flags of each verb, as its help prints them, and those of help."""
    result: dict[str, set[str]] = {word: {word} for word in ("--version", "--print-completion")}
    for verb in cli.VERBS:
        assert cli.main([verb, "--help-all"]) == 0
        result[verb] = flags_of(capsys.readouterr().out) | {"--help", "--help-all"}
    assert {"--alast.blocks", "--no-compare", "--alast.no-train-embeddings", "--resume"} <= result["finetune"]
    return result


def test_every_flag_exists(known: dict[str, set[str]]) -> None:
    ours, others = set.union(*known.values()), set.union(*OF_OTHERS.values())
    missing = {page: flags_of(re.sub(r"--[a-z]+\.NAME", "", text)) - ours - others for page, text in PAGES.items()}
    assert {page: flags for page, flags in missing.items() if flags} == {}


def test_every_flag_of_a_command_is_one_of_its_verb(known: dict[str, set[str]]) -> None:
    commands = []
    for page, text in PAGES.items():
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.S):
            commands += [(page, *found) for found in COMMAND.findall(block.replace("\\\n", " "))]
    assert len(commands) > 40
    wrong = [(page, verb, flags_of(rest) - known[verb]) for page, verb, rest in commands]
    assert [row for row in wrong if row[2]] == []


def test_flags_of_other_programs_are_mentioned_and_not_ours(known: dict[str, set[str]]) -> None:
    everything = "\n".join(PAGES.values())
    for program, flags in OF_OTHERS.items():
        assert program in everything and flags <= flags_of(everything), program
        assert not flags & set.union(*known.values()), program


def test_every_page_that_source_and_tests_name_exists() -> None:
    files = [path for folder in ("src", "tests", "benchmarks", "tools") for path in (ROOT / folder).rglob("*.py")]
    named = {(str(path.relative_to(ROOT)), page) for path in files for page in PAGE.findall(path.read_text())}
    assert len(named) > 10
    assert [row for row in named if not (ROOT / row[1]).is_file() and row[1] != "docs/wrong.md"] == []


def test_every_link_to_a_file_leads_to_one() -> None:
    """Also where GitHub shows the pages; the site's own are checked as it is built."""
    links = [(page, link) for page, text in PAGES.items() for link in LINK.findall(text)]
    assert len(links) > 60
    missing = [(page, link) for page, link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert missing == []
