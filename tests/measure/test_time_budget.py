"""--time-budget: as many epochs as take the time of so many of plain full fine-tuning."""

from dataclasses import replace

import pytest
import yaml
from conftest import finetune

from snello.config import AlastConfig, FinetuneConfig, SplitConfig
from snello.errors import ConfigError, SnelloError
from snello.measure import comparison
from snello.measure.process import OutOfMemoryError


def test_the_epochs_are_those_that_fit(small, monkeypatch):
    monkeypatch.setattr(comparison, "relative_time", lambda config, num_classes: 0.4)
    config = replace(small, epochs=9, time_budget=1.0)
    summary = finetune(config)
    values = yaml.safe_load((small.out / "config.yaml").read_text())
    assert (summary["epochs"], values["epochs"], values["time_budget"]) == (2, 2, 1.0)


def test_there_is_at_least_one(small, monkeypatch):
    monkeypatch.setattr(comparison, "relative_time", lambda config, num_classes: 0.9)
    assert finetune(replace(small, time_budget=0.1))["epochs"] == 1


def test_a_run_that_is_resumed_does_not_measure_again(small, monkeypatch):
    monkeypatch.setattr(comparison, "relative_time", lambda config, num_classes: 0.5)
    finetune(replace(small, time_budget=1.0))

    def again(config, num_classes):
        raise AssertionError

    monkeypatch.setattr(comparison, "relative_time", again)
    resumed = replace(small, time_budget=1.0, epochs=2, resume=True)
    assert finetune(resumed)["epochs"] == 2


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan"), float("inf")])
def test_no_time_is_refused(budget):
    with pytest.raises(ConfigError, match="--time-budget must be above 0 and finite"):
        FinetuneConfig(time_budget=budget)


def test_a_cut_is_refused():
    with pytest.raises(ConfigError, match="--time-budget has no effect with"):
        FinetuneConfig(time_budget=1.0, split=SplitConfig(cut=2))


def test_a_time_target_is_what_a_step_takes():
    config = FinetuneConfig(alast=AlastConfig(time=0.4, full_tail=0.5))
    assert comparison.relative_time(config, 3) == pytest.approx(0.7)  # the tail takes all of it


class Fake:
    """A measuring process whose steps take a second, or a quarter of one."""

    def __init__(self, request):
        self.seconds = 1.0 if request["config"]["method"] == "full" else 0.25
        assert request["config"].get("exact_savings", True) is not (self.seconds == 1.0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, line):
        return {"seconds": self.seconds}


def test_steps_of_both_are_taken_in_turn(monkeypatch):
    monkeypatch.setattr(comparison, "Process", Fake)
    config = FinetuneConfig(method="alast", attention="explicit", device="cpu")
    assert comparison.relative_time(config, 3) == 0.25


def test_where_full_fine_tuning_does_not_fit_the_reason_is_said(monkeypatch):
    def fails(request):
        raise OutOfMemoryError

    monkeypatch.setattr(comparison, "Process", fails)
    with pytest.raises(SnelloError, match=r"--time-budget: full fine-tuning does not fit .*: say --epochs"):
        comparison.relative_time(FinetuneConfig(attention="explicit", device="cpu"), 3)
