"""The pages of README.md and docs/, and a reader who types everything that stands on them, from top to bottom.

What is typed is only made shorter: one epoch, the toy model, ports that are free, and no measuring afterwards.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.processes import Child
from snello import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
TOY = "vit_micro_patch4_32"
NOT_RUN = {
    r"python -m venv |\. \.venv": "an environment of one's own",
    r"pip install ": ".ci/run does it, in an environment of its own",
    r"pytest|ruff |mypy|lint-imports|\.ci/": "what runs this test",
    r"torchrun |accelerate launch |OMP_NUM_THREADS=\d+ torchrun ": "several processes: tests/train/test_ranks.py",
    r"snello .*--device cuda": "needs a GPU",
    r"snello .*--track": "trackers are in no extra: tests/train/test_tracking.py",
    r"eval ": "changes a shell; what it evaluates is tested in tests/commandline",
    r"tensorboard ": "serves until it is stopped",
    r"python -c '.*(load_dataset|download=True)": "downloads",
    r"mkdocs ": "tests/test_site.py builds the site",
    r"python benchmarks/|python tools/": "takes long; tests/test_readme.py checks the tables",
}
"""Commands that are not typed, by how they begin, and why."""


@dataclass(frozen=True)
class Block:
    """Code between two fences."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """Every fenced block of a page, of whatever language."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", PAGES[page], flags=re.S | re.M)
    return [Block(page, PAGES[page][: match.start()].count("\n") + 2, match[1], match[2]) for match in found]


def commands(text: str) -> list[str]:
    """The commands of a block, without comments: one a line, or several with && between them."""
    lines = [re.sub(r"(^|\s)#.*", "", line) for line in text.replace("\\\n", " ").splitlines()]
    return [" ".join(part.split()) for line in lines for part in line.split("&&") if part.strip()]


def reason_not_to_run(command: str) -> str | None:
    """Why a command is not typed here, if it is not."""
    return next((reason for start, reason in NOT_RUN.items() if re.match(start, command)), None)


class Reader:
    """Types what stands on a page, in a folder, and notes what went wrong.

    Args:
        folder: where everything happens; the working directory has to be it.
        names: what Python code finds that does not make it itself.
        smaller: what stands on the page, and what is typed instead.
        alternatives: whether commands with the same --out are different ways to do one thing.
    """

    def __init__(
        self,
        folder: Path,
        names: Mapping[str, Any],
        smaller: Mapping[str, str],
        alternatives: bool = False,
    ) -> None:
        self.folder, self.smaller, self.alternatives = folder, smaller, alternatives
        self.names: dict[str, Any] = {"__name__": "page", **names}
        self.failures: list[str] = []
        self.printed = ""
        self.skipped: set[str] = set()
        self._servers: list[Child] = []
        self._port = ""

    def read(self, page: str) -> None:
        """Types the page's blocks of Python and of the shell."""
        environment = dict(os.environ)
        try:
            for block in blocks(page):
                text = block.text
                for said, typed in self.smaller.items():
                    text = text.replace(said, typed)
                if block.language == "python":
                    self._note(str(block), lambda text=text: exec(text, self.names))
                elif block.language in ("bash", "sh", "console"):
                    for command in commands(text):
                        self._note(f"{block}: {command}", lambda command=command: self._type(command))
        finally:
            os.environ.clear()
            os.environ.update(environment)
            self._stop_servers()

    def _note(self, what: str, action: Any) -> None:
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                action()
        except Exception as error:  # all that is wrong with a page is said at once
            self.failures.append(f"{what}\n    {type(error).__name__}: {error}\n    {err.getvalue()[-500:]}")
        self.printed += out.getvalue()

    def _type(self, command: str) -> None:
        reason = reason_not_to_run(command)
        if reason is not None:
            self.skipped.add(command)
            return
        program, verb, *args = shlex.split(command)
        assert program == "snello", f"neither run nor listed in NOT_RUN: {command}"
        if verb == "serve":
            self._serve(shorter(verb, args))
            return
        args = [re.sub(r"^\S+:7443$", f"127.0.0.1:{self._port}", arg) for arg in args]
        args = [str(next(Path().glob(arg))) if "*" in arg else arg for arg in args]
        if verb == "export":  # formats, one after the other
            for made in Path(args[0]).glob("export*"):
                shutil.rmtree(made) if made.is_dir() else made.unlink()
        if self.alternatives and "--out" in args:
            shutil.rmtree(args[args.index("--out") + 1], ignore_errors=True)
        code = cli.main([verb, *shorter(verb, args)])
        assert code == 0, f"exit code {code}"

    def _serve(self, args: Sequence[str]) -> None:
        places = ("--certs", "--out")
        given = [
            str(self.folder / arg) if before in places else arg for before, arg in zip(["", *args], args, strict=False)
        ]
        if "--out" not in given:
            given += ["--out", str(self.folder / f"runs/server-{len(self._servers)}")]
        server = Child(["serve", *given], self.folder / f"server-{len(self._servers)}.log")
        self._servers.append(server)
        server.wait_for("listening on")
        self._port = server.said.split("listening on ")[1].split()[0].rpartition(":")[2]

    def _stop_servers(self) -> None:
        for server in self._servers:
            with contextlib.suppress(ProcessLookupError):  # it has ended, which its exit code tells
                server.send(15)
        codes = [server.wait() for server in self._servers]
        if any(codes):
            self.failures.append(f"servers ended with {codes}: {[server.said[-500:] for server in self._servers]}")


def shorter(verb: str, args: Sequence[str]) -> list[str]:
    """The same command with as little work as it can have."""
    args = [TOY if arg == "deit_small_patch16_224" else arg for arg in args]
    if verb in ("finetune", "serve"):
        sent = "--split.send-epochs" in args
        args = _without(args, "--epochs", "--split.send-epochs")
        args += ["--epochs", "2", "--split.send-epochs", "1"] if sent else ["--epochs", "1"]
        if "--data" in args and "--model" not in args:
            args += ["--model", TOY]
    if verb == "finetune":
        args += ["--no-compare", "--batch-size", "8"] if "--data" in args else ["--no-compare"]
    if verb == "serve":
        args = [*_without(args, "--listen"), "--listen", "127.0.0.1:0", "--batch-size", "8"]
    if verb == "join" and "--data" not in args:  # as many as are needed, not all that ship
        args += ["--data", "photos/"]
    if verb in ("finetune", "join", "evaluate"):
        args = [*_without(args, "--workers"), "--workers", "0"]
    if verb == "plan":
        args += ["--methods", "head", "--batch-sizes", "8", "--precisions", "fp32", "--seconds", "60"]
    return args


def _without(args: Sequence[str], *flags: str) -> list[str]:
    """Without flags and the value of each."""
    left_out = {i + more for i, arg in enumerate(args) if arg in flags for more in (0, 1)}
    return [arg for i, arg in enumerate(args) if i not in left_out]
