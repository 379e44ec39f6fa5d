"""What the pictures of a run draw."""

from dataclasses import replace

import pytest

from snello.config import SplitConfig
from snello.finetuning import finetune
from snello.reports import pictures
from snello.reports.pictures import traffic_figure
from snello.runs.folder import RunFolder


@pytest.fixture
def cut(small):
    return replace(small, epochs=5, eval_epochs=2, split=SplitConfig(cut=3, codec="none"))


def test_epochs_are_true_where_not_every_epoch_is_evaluated(cut, monkeypatch):
    monkeypatch.setattr(pictures, "plot_traffic", lambda run: None)
    finetune(cut)
    run = RunFolder(cut.out)
    by_epoch, by_bytes, by_time = traffic_figure(list(run.rows("step")), list(run.rows("eval"))).axes
    assert list(by_epoch.lines[0].get_xdata()) == [2, 4, 5]
    sent = [row["training_bytes"] for row in run.rows("eval")]
    assert list(by_bytes.lines[0].get_xdata()) == [size / 1e6 for size in sent]
    seconds = [row["client_seconds"] + row["server_seconds"] for row in run.rows("step")]
    assert by_time.lines[0].get_xdata()[-1] == pytest.approx(sum(seconds))


def test_an_epoch_that_traffic_cut_short_counts_as_its_part():
    """Seven steps of an epoch, then three more."""
    times = {"client_seconds": 1.0, "server_seconds": 2.0}
    steps = [{"step": step + 1, "epoch": step // 7, **times} for step in range(10)]
    evaluations = [{"step": step, "epoch": 1, "accuracy": 0.5, "training_bytes": step} for step in (7, 10)]
    axes = traffic_figure(steps, evaluations).axes[0]
    assert list(axes.lines[0].get_xdata()) == [1, 10 / 7]
    assert all(tick == round(tick) for tick in axes.get_xticks())


def test_a_run_without_budgets_has_no_picture_of_them(small):
    finetune(replace(small, epochs=1))
    run = RunFolder(small.out)
    pictures.plot_budgets(run)
    assert not run.plot_file.exists()
    run.metrics_file.write_text("")
    pictures.plot_budgets(run)
    assert not run.plot_file.exists()
