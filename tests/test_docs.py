"""Every flag that README.md and docs mention exists, and is one of the verb that a command gives it to."""

import re
from pathlib import Path

import pytest

from snello import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*\w")
COMMAND = re.compile(r"(?:^|&& |-m )snello ([a-z-]+)(.*?)(?:&&|#|$)", flags=re.M)
OF_OTHERS = {
    "torchrun": {"--standalone", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"},
    "accelerate launch": {"--cpu", "--multi_gpu", "--num_processes"},
    "hf download": {"--local-dir"},
    "tensorboard": {"--logdir"},
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
