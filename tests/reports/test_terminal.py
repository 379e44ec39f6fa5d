"""The end of a run: the verdict in a line, and what to do next in commands that run."""

import io
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import QUIET, finetune, flags
from rich.console import Console

from snello import cli, finetuning
from snello.config import FinetuneConfig, SplitConfig
from snello.measure import comparison
from snello.measure.comparison import Comparison, TimedCosts, not_measured
from snello.reports import terminal
from snello.runs.folder import RunFolder
from snello.runs.summary import Summary


def summary(**values) -> Summary:
    known = {name: None for name in Summary.__dataclass_fields__ if name not in ("costs", "version", "traffic")}
    rows = [{"class": "a", "pictures": 300, "accuracy": 1.0}, {"class": "b", "pictures": 200, "accuracy": 0.5}]
    return Summary(**known | {"accuracy": 0.8125, "per_class": rows} | values)


def verdict(made: Summary, num_train: int = 2000) -> list[str]:
    console = Console(file=io.StringIO(), record=True, width=80)
    terminal.print_verdict(console, made, num_train)
    return console.export_text().splitlines()


def test_with_all_that_is_measured():
    costs = {"step_time_s": 0.1, "full_step_time_s": 0.4, "saved_bytes": 10, "full_saved_bytes": 50}
    assert verdict(summary(probe_accuracy=0.7, probe_pictures=500, costs=costs)) == [
        "accuracy 81.25% on 500 held-out pictures (linear probe of the model before training: 70.00%, on a sample of "
        "500 of 2000 training pictures); a step took 0.25 of the time and 0.20 of the activation memory of full "
        "fine-tuning"
    ]
    assert "sample" not in verdict(summary(probe_accuracy=0.7, probe_pictures=2000))[0]


def test_with_nothing_measured():
    usual = not_measured(FinetuneConfig(method="alast"))
    assert verdict(summary(costs=usual)) == ["accuracy 81.25% on 500 held-out pictures"]
    assert verdict(summary(per_class=None)) == ["accuracy 81.25%"], "of a run that an older version began"


@pytest.mark.parametrize(("probe", "advised"), [(0.81, False), (0.8125, True), (0.9, True)])
def test_below_the_probe_it_says_what_may_help(probe, advised):
    lines = verdict(summary(probe_accuracy=probe, probe_pictures=2000))
    assert lines[1:] == (["that is not above the linear probe: train longer, or with another --lr"] if advised else [])
    assert len(verdict(summary(accuracy=1.0, probe_accuracy=1.0, probe_pictures=9))) == 1


def test_with_few_pictures_it_says_how_coarse_that_is():
    few = [{"class": "a", "pictures": 20, "accuracy": 0.95}]
    lines = verdict(summary(accuracy=0.95, probe_accuracy=0.95, probe_pictures=9, per_class=few))
    assert lines[1].startswith("that is not above the linear probe (of 20 pictures, one is 5.0%): train longer")


def commands(err: str) -> list[list[str]]:
    """The commands below the run folder, without `snello`."""
    _, _, after = err.partition("run folder: ")
    found = [line.split(": ", 1)[1].strip() for line in after.splitlines()[1:]]
    return [shlex.split(line)[1:] for line in found if line.startswith("snello ")]


@pytest.mark.parametrize("cut", [0, 2])
def test_the_commands_run_as_they_stand(small, tmp_path, monkeypatch, capfd, cut):
    """Whatever the folder is called."""
    monkeypatch.chdir(tmp_path)
    config = replace(small, out=small.out.with_name("a run"), epochs=1, split=SplitConfig(cut=cut))
    assert cli.main(["finetune", *flags(config)]) == 0
    evaluate, predict, export, longer = commands(capfd.readouterr().err)
    assert (evaluate[0], predict[0], export[0], longer[0]) == ("evaluate", "predict", "export", "finetune")
    picture = min(Path(config.data).rglob("*.png"))
    assert cli.main([*evaluate, "--workers", "0", "--device", "cpu"]) == 0
    assert cli.main([*(str(picture) if word == "PICTURE" else word for word in predict), "--device", "cpu"]) == 0
    assert cli.main(export) == 0
    assert cli.main(longer) == 0
    other = RunFolder(config.out.with_name("a run-2"))
    assert replace(other.read()[0], out=None, epochs=1) == replace(RunFolder(config.out).read()[0], out=None)
    assert Summary.read(other.summary_file).epochs == 2


def test_a_run_by_a_time_budget_is_made_longer_by_it(small, monkeypatch, capfd):
    monkeypatch.setattr(comparison, "relative_time", lambda config, num_classes: 0.5)
    finetune(replace(small, method="alast", time_budget=1.0))
    (longer,) = [words for words in commands(capfd.readouterr().err) if words[0] == "finetune"]
    assert longer[3:5] == ["--time-budget", "2"] and longer[-1] == f"{small.out}-2"


def test_a_budget_of_bytes_names_no_longer_run(small, capfd):
    finetune(replace(small, epochs=1, split=SplitConfig(cut=2, codec="none", max_bytes="1MB")))
    assert [words[0] for words in commands(capfd.readouterr().err)] == ["evaluate", "predict", "export"]


def test_the_probe_is_kept_and_not_measured_again(small, monkeypatch):
    own = TimedCosts(*range(1, 10))
    calls = []
    monkeypatch.setattr(comparison, "compare", lambda *args: Comparison("full", 4, 4, own, {"full": own}))
    probe = finetuning.probe
    monkeypatch.setattr(finetuning, "probe", lambda *args: calls.append(args) or probe(*args))
    first = finetuning.finetune(replace(small, epochs=1, compare=True), QUIET)
    assert 0 < first.probe_accuracy <= 1 and first.probe_pictures == 26 and len(calls) == 1
    assert finetuning.finetune(replace(small, epochs=1, compare=True, resume=True), QUIET) == first and len(calls) == 1
    assert finetuning.finetune(replace(small, epochs=1, resume=True), QUIET) == first


def test_without_comparison_there_is_no_probe(small):
    assert finetune(replace(small, epochs=1))["probe_accuracy"] is None
