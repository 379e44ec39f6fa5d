"""What steps cost: as counted where nothing is reckoned, and as aimed at where a run has a target."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import QUIET, finetune, small_config
from helpers.budgets import DROPPING
from torch.utils.flop_counter import FlopCounterMode

from snello.config import AlastConfig, LoraConfig, SplitConfig
from snello.explain.flops import _evenly, flops
from snello.explain.run import Run
from snello.measure.step import TrainingStep
from snello.runs.folder import RunFolder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pictures):
    def train(**settings):
        config = replace(small_config(pictures), epochs=1, out=tmp_path_factory.mktemp("flops") / "run", **settings)
        finetune(config, QUIET)
        return config.out

    return train


def found(run: Path):
    part = flops(Run(run))
    assert part is not None
    return part.values


def counted(run: Path, method: str | None = None, **settings):
    """A picture in a step of the run's method, as torch's counter finds it with data."""
    config = replace(RunFolder(run).read()[0], **({"method": method} if method else {}), **settings)
    step = TrainingStep(config, num_classes=3, batch_size=2, device=CPU, precision="fp32", attention="explicit")
    step.begin()
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(step.loss())
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "full"},
        {"method": "full", "exact_savings": False},
        {"method": "full", "grad_checkpointing": True, "exact_savings": False},
        {"method": "head"},
        {"method": "last-k", "last_k": 2},
        {"method": "lora"},
    ],
)
def test_methods_without_budgets_cost_the_same_at_every_step(trained, settings):
    if settings["method"] == "lora":
        pytest.importorskip("peft")
    run = trained(**settings)
    values = found(run)
    assert values["steps"] == list(range(1, 8)) and len(set(values["share"])) == 1
    assert values["full"] == counted(run, "full", exact_savings=False, grad_checkpointing=False, last_k=3)
    expected = counted(run, grad_checkpointing=False) / values["full"]
    assert values["share"][0] == pytest.approx(expected, abs=1e-5)
    if settings == {"method": "full", "exact_savings": False}:
        assert values["share"][0] == 1.0


def test_budgets_cost_what_they_leave(trained):
    run = trained(method="alast", alast=AlastConfig(**DROPPING, alpha=5.0))
    values, rows = found(run), list(RunFolder(run).rows("step"))
    assert len(set(values["share"])) > 3
    config = RunFolder(run).read()[0]
    step = TrainingStep(config, num_classes=3, batch_size=2, device=CPU, precision="fp32", attention="explicit")
    for share, row in list(zip(values["share"], rows, strict=True))[::3]:
        step.method.load_state_dict(step.method.state_dict() | {name: row[name] for name in ("budgets", "trained")})
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward(step.loss())
        assert share == pytest.approx(counter.get_total_flops() / 2 / values["full"], rel=1e-3)


def test_a_target_is_met_until_the_tail(trained):
    run = trained(method="alast", alast=AlastConfig(flops=0.5, full_tail=0.5, token_multiple=1))
    shares = found(run)["share"]
    assert sum(shares[:4]) / 4 == pytest.approx(0.5, abs=0.05)
    assert all(share > 0.85 for share in shares[4:]) and len(set(shares[4:])) == 1


def test_adapters_count(trained, tmp_path):
    pytest.importorskip("peft")
    run = trained(method="alast+lora", alast=AlastConfig(token_multiple=1))
    adapted = found(run)["share"][0]
    assert adapted < found(trained(method="alast", alast=AlastConfig(token_multiple=1)))["share"][0]
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    started = trained(
        method="alast+lora", alast=AlastConfig(token_multiple=1), lora=LoraConfig(start=tmp_path / "adapter")
    )
    assert found(started)["share"][0] == adapted


def test_across_a_cut_both_sides_count(trained):
    run = trained(split=SplitConfig(cut=3, codec="none"))
    summary = json.loads((run / "summary.json").read_text())
    values = found(run)
    both = summary["client_flops_per_sample"] + summary["server_flops_per_sample"]
    assert set(values["share"]) == {round(both / values["full"], 5)} and 0.8 < values["share"][0] <= 1


def test_long_runs_are_thinned_out():
    assert _evenly(400, 400) == list(range(400))
    for num in (401, 799, 5000):
        kept = _evenly(num, 400)
        assert len(set(kept)) == 400 and kept[0] == 0 and kept[-1] == num - 1
        gaps = {b - a for a, b in itertools.pairwise(kept)}
        assert max(gaps) - min(gaps) <= 1


def test_before_the_first_step_there_is_nothing_to_say(trained):
    run = trained(method="full")
    (run / "metrics.jsonl").unlink()
    assert flops(Run(run)) is None
