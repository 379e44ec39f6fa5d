"""report.html: everything in it comes from the run folder, and nothing in it is anything but text and pictures."""

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import finetune, small_config, with_method, write_pictures

from snello.config import AlastConfig
from snello.errors import CheckpointError
from snello.reports.facts import Facts
from snello.reports.page import page_of, write_page
from snello.reports.side_by_side import side_by_side

EVIL = "<script>alert(1)"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ALaST on pictures of which one class has the name of a script."""
    folder = tmp_path_factory.mktemp("report")
    data = write_pictures(folder / "photos", {EVIL: 8, "a & b": 8, "c": 8})
    config = with_method(small_config(data), "alast", out=folder / "run", val_share=0.5)
    finetune(config, report=True)
    return folder / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def page(run: Path) -> str:
    return write_page(run).read_text(encoding="utf-8")


def sections(text: str) -> list[str]:
    return re.findall(r'<section id="(\w+)"', text)


def test_the_sections_stand_in_order(run: Path) -> None:
    assert sections(page(run)) == ["result", "pictures", "curves", "mistakes", "data"]


def test_names_of_the_user_are_text(run: Path) -> None:
    text = page(run)
    assert text.count("<script>") == 1 and "&lt;script&gt;alert(1)" in text and "a &amp; b" in text


def test_only_our_script_may_run_and_nothing_is_fetched(run: Path) -> None:
    text = page(run)
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.S)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'" in text
    text = re.sub(r"<meta http-equiv.*?>", "", text)
    addresses = re.findall(r"""(?:src|href|xlink:href|action|url\()\s*=?\s*["']?([^"'\s>)]+)""", text)
    assert addresses and all(one.startswith(("#", "data:image/")) for one in addresses)


def test_every_figure_names_files_that_are_there(run: Path) -> None:
    named = re.findall(r'<p class="source">from (.*?)</p>', page(run))
    files = {file for one in named for file in one.split(", ")}
    assert {"summary.json", "metrics.jsonl", "config.yaml", "report/predictions.jsonl"} <= files
    assert all((run / file).exists() for file in files)


def test_it_can_be_drawn_again_and_is_the_same(run: Path) -> None:
    assert page(run) == page(run)


def test_the_result_and_its_mistakes_are_the_summarys(run: Path) -> None:
    text, summary = page(run), json.loads((run / "summary.json").read_text())
    assert f"{100 * summary['accuracy']:.1f}\N{NO-BREAK SPACE}% on 12 held-out pictures" in text
    wrong = round(12 * (1 - summary["accuracy"]))
    assert re.search(rf"{wrong} of 12 held-out pictures (is|are) taken for another class", text)


def test_an_old_run_has_a_shorter_report(run: Path) -> None:
    shutil.rmtree(run / "report")
    assert sections(page(run)) == ["result", "curves", "data"]


def test_a_run_that_has_not_ended_has_one(run: Path) -> None:
    (run / "summary.json").unlink()
    assert "Not finished: 6 steps are done." in page(run)


def test_damaged_parts_are_left_out(run: Path) -> None:
    (run / "report" / "pictures.json").write_text("{")
    (run / "report" / "data.json").write_text("[]")
    assert sections(page(run)) == ["result", "curves", "mistakes", "data"]


def test_predictions_of_other_classes_are_refused(run: Path) -> None:
    row = {"index": 0, "name": "x", "label": 3, "predicted": 0, "p": 0.1, "top": [[0, 0.9]]}
    (run / "report" / "predictions.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(CheckpointError, match="other classes than the run"):
        Facts.read(run)


def test_only_pictures_of_the_report_get_into_it(run: Path) -> None:
    facts = Facts.read(run)
    (run / "secret.jpg").write_bytes(b"x")
    assert facts.image("../secret.jpg") is None and facts.image("/etc/passwd") is None
    assert facts.image("predictions.jsonl") is None


def test_problems_are_told(run: Path) -> None:
    assert "<p class=\"problem\">no &lt;luck&gt;</p>" in page_of(Facts.read(run, ["no <luck>"]))  # fmt: skip


def test_runs_stand_side_by_side(run: Path, made: Path, tmp_path: Path) -> None:
    config, _ = _read(made)
    other = tmp_path / "other"
    finetune(replace(config, out=other, method="full", alast=AlastConfig(), epochs=1))
    text = side_by_side([Facts.read(one) for one in (run, other)])
    assert sections(text) == ["runs", "curves", "mistakes", "data"]
    differ = re.findall(r'<th scope="row">([\w.]+)</th><td>', text[text.index('id="data"') :])
    assert differ[0] == "method" and differ[-1] == "epochs"
    assert "cannot be compared" not in text


def _read(run: Path):  # type: ignore[no-untyped-def]
    from snello.runs.folder import RunFolder

    return RunFolder(run).read()
