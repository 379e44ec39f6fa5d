"""`snello report`, and the report at the end of a run: what is missing is found out, then the page is drawn."""

import html
import multiprocessing
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from rich.console import Console

from snello.config import ReportConfig
from snello.errors import ConfigError, SnelloError, one_line
from snello.explain import explain
from snello.files import replacing
from snello.reports.facts import Facts
from snello.reports.page import write_page
from snello.reports.side_by_side import side_by_side
from snello.runs.folder import RunFolder
from snello.train.display import say
from snello.train.signals import interruptible

MARK = "snello report</title>"
"""In every report: another file is not replaced."""
SECONDS = 600.0
"""After which the report of a run that has just ended is given up."""


@dataclass(frozen=True)
class Report:
    """A report that has been drawn; a notebook shows it."""

    path: Path

    def _repr_html_(self) -> str:
        """The whole report in a frame of its own, so that its style stays there."""
        text = html.escape(self.path.read_text(encoding="utf-8"))
        frame = 'style="width:100%;height:80vh;border:1px solid #8888" sandbox="allow-scripts"'
        return f'<iframe title="snello report" srcdoc="{text}" {frame}></iframe>'


def report(run: Path | str, *others: Path | str, out: Path | str | None = None, refresh: bool = False) -> Report:
    """Draws the report of a run into its folder, or of several runs side by side into one file.

    Args:
        run: run folder.
        others: more of them, to stand beside it.
        out: the file to write; default: report.html in the folder of the run, or comparison.html for several.
        refresh: look at the pictures again, even where the folder knows what there is to see.

    Raises:
        SnelloError: where a folder is not that of a run, or the file is another's or cannot be written.
    """
    paths = [Path(run), *map(Path, others)]
    file = Path(out) if out is not None else paths[0] / "report.html" if not others else Path("comparison.html")
    if file.is_file() and MARK not in file.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(f"--out {file} is there already and is no report: name another")
    for path in paths:
        RunFolder(path).read()  # all of them, before anything is written
    problems = [_look(path, refresh) for path in paths]
    if len(paths) == 1:
        return Report(write_page(paths[0], problems[0], file))
    with replacing(file) as temporary:
        runs = [Facts.read(path, found) for path, found in zip(paths, problems, strict=True)]
        temporary.write_text(side_by_side(runs), encoding="utf-8")
    return Report(file)


def run_report(config: ReportConfig) -> Report:
    """`snello report`."""
    return report(*config.runs, out=config.out, refresh=config.refresh)


def _look(path: Path, refresh: bool) -> list[str]:
    """Finds out what the folder does not know yet; returns what could not be found out."""
    run = RunFolder(path)
    if not run.model_file.is_file() or ((run.report_folder / "data.json").is_file() and not refresh):
        return []
    return explain(path)


def report_after(run: RunFolder, console: Console) -> None:
    """Draws the report of a run that has just ended, in a process of its own: nothing there can fail the run."""
    later = f"snello report {run.path}"
    try:
        with interruptible():
            problem = _in_fork(run.path) if _may_fork() else _in_process(run.path)
    except KeyboardInterrupt:
        say(console, f"report skipped; {later} draws it")
        return
    if problem is None:
        leaked = leaks(run)
        if leaked:
            several = f"{leaked} pictures are" if leaked > 1 else "a picture is"
            say(console, f"warning: {several} both trained on and held out (snello check-data lists them)")
        say(console, f"report: {run.report_file}")
    else:
        say(console, f"no report ({problem}); the run is complete, and {later} tries again")


def leaks(run: RunFolder) -> int:
    """Pictures that were found to be both trained on and held out."""
    data = Facts.read(run.path).parts["data"] or {}
    return int((data.get("copies") or {}).get("leaked", 0))


def _may_fork() -> bool:
    """Whether a fork, which spares the seconds that importing torch takes, is safe.

    It is where PyTorch's own loaders fork: with neither gRPC's threads, nor a GPU's context, nor macOS's frameworks.
    """
    return sys.platform == "linux" and "grpc" not in sys.modules and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


def _in_fork(path: Path) -> str | None:
    """Draws in a copy of this process; returns what went wrong."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_draw, args=(path, there), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads; the copy uses none of them
        process.start()
    there.close()
    try:
        if not here.poll(SECONDS):
            return f"it took more than {SECONDS:.0f} s"
        problem: str | None = here.recv()
        return problem
    except EOFError:
        process.join()
        return f"its process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _draw(path: Path, answer: "Connection[str | None, None]") -> None:
    torch.set_num_threads(1)  # OpenMP's threads are not copied by a fork, and waiting for them would never end
    answer.send(_problem(path))


def _problem(path: Path) -> str | None:
    try:
        with _quietly():
            report(path, refresh=True)
    except SnelloError as error:
        return str(error)
    except Exception as error:  # a report is never worth a run
        return f"{type(error).__name__}: {one_line(error)}"
    return None


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _in_process(path: Path) -> str | None:
    """The same in a new process."""
    command = [sys.executable, "-m", "snello.explain.report", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"it took more than {SECONDS:.0f} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"its process ended with {done.returncode}"


if __name__ == "__main__":
    found = _problem(Path(sys.argv[1]))
    sys.exit(found)  # a text goes to stderr, and makes the exit code 1
