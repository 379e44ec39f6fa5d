"""`snello report`, `snello.report`, and the report at the end of a run, which cannot fail it."""

import io
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import finetune, small_config
from rich.console import Console

import snello
from snello import cli
from snello.errors import CheckpointError, ConfigError
from snello.explain import report as module
from snello.runs.folder import RunFolder

pytestmark = pytest.mark.report


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A run without a report."""
    path = tmp_path_factory.mktemp("runs") / "run"
    finetune(replace(small_config(pictures), out=path))
    return path


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a run of the command line; in tests gRPC may be there, beside which nothing forks."""
    monkeypatch.setattr(module, "_may_fork", lambda: True)


def said(run: Path) -> str:
    console = Console(file=io.StringIO(), width=200)
    module.report_after(RunFolder(run), console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return " ".join(text.split())


def test_it_is_drawn_into_the_run_folder_and_shown_in_a_notebook(run: Path) -> None:
    shown = snello.report(run)
    assert shown.path == run / "report.html" and (run / "report" / "data.json").is_file()
    html = shown._repr_html_()
    assert html.startswith("<iframe") and "<!doctype" not in html and 'sandbox="allow-scripts"' in html


def test_the_verb_prints_the_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"


def test_several_runs_go_into_a_file_of_their_own(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert snello.report(run, run).path == Path("comparison.html")
    assert snello.report(run, run, out="other.html").path == Path("other.html")
    assert snello.report(run, run).path.is_file()  # its own report is replaced


def test_a_file_that_is_no_report_is_not_replaced(run: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<title>mine</title>")
    with pytest.raises(ConfigError, match=r"page.html is there already and is no report"):
        snello.report(run, out=tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == "<title>mine</title>"


def test_what_is_no_run_is_refused_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a run folder"):
        snello.report(run, tmp_path, out=tmp_path / "both.html")
    assert not (tmp_path / "both.html").exists()


def test_runs_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.usefixtures("forked")
def test_after_a_run_it_says_where_it_is(run: Path) -> None:
    (run / "report.html").unlink(missing_ok=True)
    assert said(run) == f"report: {run / 'report.html'}"
    assert (run / "report.html").is_file()


def test_after_a_run_in_a_new_process_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_may_fork", lambda: False)
    (run / "report.html").unlink(missing_ok=True)
    assert said(run) == f"report: {run / 'report.html'}"


def fails(path: Path, **options: Any) -> None:
    raise RuntimeError("no luck")


def dies(path: Path, **options: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(("draw", "problem"), [(fails, "RuntimeError: no luck"), (dies, "its process ended with -9")])
def test_what_goes_wrong_is_a_line_and_not_the_end_of_a_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, draw: Any, problem: str
) -> None:
    monkeypatch.setattr(module, "report", draw)
    text = said(run)
    assert text == f"no report ({problem}); the run is complete, and snello report {run} tries again"


@pytest.mark.usefixtures("forked")
def test_it_is_given_up_after_a_while(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr(module, "report", lambda path, **options: time.sleep(60))
    monkeypatch.setattr(module, "SECONDS", 0.2)
    assert "no report (it took more than 0 s)" in said(run)


@pytest.mark.usefixtures("forked")
def test_ctrl_c_skips_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal came too late")

    monkeypatch.setattr(module, "_in_fork", interrupted)
    assert said(run) == f"report skipped; snello report {run} draws it"


def test_a_run_draws_it_unless_told_not_to(pictures: Path, tmp_path: Path) -> None:
    config = replace(small_config(pictures), epochs=1)
    finetune(replace(config, out=tmp_path / "with"), report=True)
    finetune(replace(config, out=tmp_path / "without"), report=False)
    assert (tmp_path / "with" / "report.html").is_file()
    assert not re.findall("report", " ".join(path.name for path in (tmp_path / "without").iterdir()))


def test_pictures_on_both_sides_are_told_at_the_end_of_a_run(tmp_path: Path, pictures: Path) -> None:
    data = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    shutil.copy(data / "train" / "red" / "000.png", data / "val" / "red" / "000.png")
    console = Console(file=io.StringIO(), width=200)
    finetune(replace(small_config(data), epochs=1, out=tmp_path / "run"), console, report=True)
    told = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "warning: a picture is both trained on and held out (snello check-data lists them)" in told
