"""The shell completes verbs, flags and values, as when a user presses the tabulator."""

import shutil
import subprocess

import pytest

from snello import cli


@pytest.fixture
def script(capsys, tmp_path):
    def call(shell: str):
        assert cli.main(["--print-completion", shell]) == 0
        file = tmp_path / f"completion.{shell}"
        file.write_text(capsys.readouterr().out)
        return file

    return call


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("snello fi", ["finetune"]),
        ("snello --ver", ["--version"]),
        ("snello finetune --learn", []),
        ("snello finetune --alast.min", ["--alast.min-budget"]),
        ("snello finetune --lr 1 --no-com", ["--no-compare"]),
        ("snello finetune --help-", ["--help-all"]),
        ("snello predict --alast.", []),
        ("snello finetune --method la", ["last-k"]),
        ("snello finetune --method = la", ["last-k"]),
        ("snello finetune --method =", ["auto", "alast", "full", "head", "last-k", "lora", "alast+lora"]),
        ("snello finetune --help al", ["alast"]),
        ("snello finetune --data pho", []),
        ("snello help ev", ["evaluate"]),
        ("snello --print-completion b", ["bash"]),
    ],
)
def test_bash(script, words, expected):
    program = f"""set -u; source {script("bash")}; COMP_WORDS=({words}); COMP_CWORD=$(({len(words.split())} - 1))
    complete -p snello >&2; _snello; echo "${{COMPREPLY[*]-}}" """
    done = subprocess.run(["bash", "--norc", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "-F _snello snello" in done.stderr, done.stderr
    assert done.stdout.split() == expected


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_every_flag_is_completed(script):
    from snello.commandline.settings import settings_of

    file = script("bash")
    for verb, run in cli.VERBS.items():
        flags = {one for setting in settings_of(run.__annotations__["config"]) for one in setting.flags}
        program = f'source {file}; COMP_WORDS=(snello {verb} --); COMP_CWORD=2; _snello; echo "${{COMPREPLY[*]}}"'
        done = subprocess.run(["bash", "--norc", "-c", program], capture_output=True, text=True)
        assert set(done.stdout.split()) == flags | {"--help", "--help-all"}, verb


def test_zsh_takes_the_script_of_bash(script):
    assert script("zsh").read_text().partition("_snello()")[2] == script("bash").read_text().partition("_snello()")[2]
    assert "bashcompinit" in script("zsh").read_text() and "bashcompinit" not in script("bash").read_text()


def test_other_shells_are_refused(capsys):
    for args, told in ((["bsh"], "got bsh; nearest: bash"), ([], "got nothing")):
        assert cli.main(["--print-completion", *args]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("snello: error: --print-completion must be one of bash, zsh, ")
        assert told in err and err.count("\n") == 1
