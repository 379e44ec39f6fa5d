"""A method against full fine-tuning, in processes of their own."""

import io
import itertools
import json
import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import finetune, flags, with_method
from rich.console import Console

from snello import cli
from snello.config import AlastConfig, FinetuneConfig, LoraConfig
from snello.config.values import from_dict
from snello.errors import SnelloError
from snello.measure import comparison
from snello.measure.comparison import SAVING, Comparison, TimedCosts, compare, compared_with, not_measured
from snello.measure.process import OutOfMemoryError
from snello.reports import terminal as report
from snello.vit.times import Times

SUMMARY = SimpleNamespace(num_classes=3, device="cpu", precision="fp32", attention="explicit")


# ------------------------------------------------------------------------------------------------------- for real


def test_a_complete_run_is_not_measured_again(small, monkeypatch):
    config = replace(small, epochs=1, compare=True)
    calls = []
    one = dict.fromkeys(not_measured(config), 1)
    measured = SimpleNamespace(summary=lambda: one)
    monkeypatch.setattr(comparison, "compare", lambda *args: calls.append(args) or measured)
    monkeypatch.setattr("snello.reports.terminal.print_costs", lambda *args: None)
    first = finetune(config)
    assert finetune(replace(config, resume=True)) == first and first.items() >= one.items() and len(calls) == 1


@pytest.mark.slow
def test_run_with_comparison(small, capsys):
    """From the training to the summary and the table that is printed."""
    config = with_method(small, method="alast", alast=AlastConfig(blocks=3, alpha=5.0), epochs=1, compare=True)
    threads = torch.get_num_threads()
    summary = finetune(config)
    assert summary == json.loads((config.out / "summary.json").read_text())
    names = not_measured(config)
    assert summary.keys() >= names.keys() and threads == torch.get_num_threads()
    # The peak of so small a model may be lost in the heap.
    peaks = {name for name in names if name.endswith("peak_memory_bytes")}
    assert all(summary[name] > 0 for name in set(names) - peaks - {"full_fits"})
    assert all(summary[name] >= 0 for name in peaks)
    assert summary["full_fits"] is True and summary["compared_batch_size"] == 4
    assert summary["flops_per_sample"] < summary["full_flops_per_sample"]
    assert summary["saved_bytes_per_sample"] < summary["full_saved_bytes_per_sample"]
    assert summary["trainable_parameters"] < summary["full_trainable_parameters"]
    assert summary["optimizer_bytes"] <= summary["full_optimizer_bytes"]
    assert summary["step_time_s"] > 0 and summary["full_step_time_s"] > 0
    assert 2**20 < summary["full_peak_memory_bytes"] < 2**33
    model = 0.37e6  # parameters of test_vit, roughly
    assert 0.5 * model < summary["full_trainable_parameters"] < 2 * model
    assert summary["full_optimizer_bytes"] == pytest.approx(8 * summary["full_trainable_parameters"], rel=0.01)
    err = capsys.readouterr().err
    assert f"the model is saved in {config.out}; measuring a linear probe, and a step of alast against full" in err
    assert "one training step of test_vit, batch 4, fp32,\n" in err
    for text in ("full, saving", "step time, ms", "peak, MiB"):
        assert text in err
    assert 0 < summary["probe_accuracy"] <= 1 and summary["probe_pictures"] == 26
    verdict = f"accuracy {summary['accuracy']:.2%} on 9 held-out pictures (linear probe of the model before training: "
    share = summary["step_time_s"] / summary["full_step_time_s"]
    memory = summary["saved_bytes"] / summary["full_saved_bytes"]
    assert f"{verdict}{summary['probe_accuracy']:.2%}); a step took {share:.2f} of the time and {memory:.2f} of" in err


# --------------------------------------------------------------------------------------- where full does not fit


class FakeProcess:
    """Fits up to a batch size, per method; `full_saving` is full fine-tuning with exact savings."""

    fits: dict[str, int]
    started: list[tuple[str, int]]
    open = 0

    def __init__(self, request):
        config = from_dict(FinetuneConfig, request["config"])  # what the process does first
        self.method, self.batch_size = config.method, request["batch_size"]
        if config.method == "full" and config.exact_savings:
            self.method = SAVING
        FakeProcess.started.append((self.method, self.batch_size))
        if self.batch_size > 4 * FakeProcess.fits[self.method]:
            raise OutOfMemoryError  # as early as when the batch is made
        FakeProcess.open += 1

    def ask(self, line):
        if self.batch_size > FakeProcess.fits[self.method]:
            raise OutOfMemoryError
        if line == "step":
            return {"seconds": {"full": 0.5, SAVING: 0.375}.get(self.method, 0.25)}
        return {
            "flops_per_sample": 1e9,
            "saved_bytes_per_sample": 1e6,
            "saved_bytes": 64,
            "weight_bytes": 32,
            "gradient_bytes": 16,
            "optimizer_bytes": 8,
            "peak_memory_bytes": 2**20 * self.batch_size,
            "trainable_parameters": 10,
        }

    def __enter__(self):
        return self

    def __exit__(self, *_):
        FakeProcess.open -= 1


@pytest.fixture
def fake(monkeypatch):
    def set_up(**fits: int):
        FakeProcess.fits, FakeProcess.started, FakeProcess.open = fits, [], 0
        monkeypatch.setattr(comparison, "Process", FakeProcess)
        return FakeProcess

    return set_up


def compared(batch_size: int = 64, method: str = "alast", **settings) -> Comparison:
    return compare(FinetuneConfig(method=method, batch_size=batch_size, **settings), SUMMARY, {})


def test_both_fit(fake):
    fake(alast=64, full_saving=64, full=64)
    costs = compared()
    assert costs.full_fits and costs.compared_batch_size == 64 and costs.own.step_time_s == 0.25
    assert {name: other.step_time_s for name, other in costs.others.items()} == {SAVING: 0.375, "full": 0.5}
    assert FakeProcess.started == [("alast", 64), (SAVING, 64), ("full", 64)] and FakeProcess.open == 0


@pytest.mark.parametrize(
    ("settings", "beside"),
    [
        ({"method": "alast"}, [SAVING, "full"]),
        ({"method": "last-k"}, [SAVING, "full"]),
        ({"method": "full"}, ["full"]),  # the run itself is full fine-tuning with exact savings
        ({"method": "alast", "exact_savings": False}, ["full"]),
        ({"method": "alast+lora"}, ["lora", SAVING, "full"]),
        ({"method": "alast+lora", "exact_savings": False}, ["lora", "full"]),
    ],
)
def test_what_is_measured_beside_a_run(fake, settings, beside):
    fake(**dict.fromkeys(("alast", "last-k", "lora", "alast+lora", SAVING, "full"), 64))
    config = FinetuneConfig(**settings)
    assert compared_with(config) == beside == list(compare(config, SUMMARY, {}).others)
    own = SAVING if config.method == "full" else config.method
    assert [method for method, _ in FakeProcess.started] == [own, *beside]


def test_the_presets_settings_are_left_out_for_full_fine_tuning(fake):
    fake(alast=64, full_saving=64, full=64)
    assert compared(preset="published", alast=AlastConfig(alpha=0.1)).full_fits


def test_the_times_of_the_run_are_those_that_its_step_is_measured_with(fake, monkeypatch):
    fake(alast=64, full_saving=64, full=64)
    asked = []
    monkeypatch.setattr(comparison, "Process", lambda request: asked.append(request) or FakeProcess(request))
    times = Times((1, 2), *[(0.5, 1.0)] * 6, 1.0, 0.0, 0.0)
    config = FinetuneConfig(method="alast", batch_size=64, alast=AlastConfig(time=0.5))
    compare(config, SUMMARY, {"budgets": []}, times)
    assert [request["times"] and from_dict(Times, request["times"]) for request in asked] == [times, None, None]
    assert [request["state"] for request in asked] == [{"budgets": []}, None, None]


@pytest.mark.parametrize("most", [40, 3])
def test_full_fits_at_a_smaller_batch(fake, most):
    fake(alast=64, full_saving=64, full=most)
    costs = compared()
    expected = 32 if most == 40 else 2
    assert (costs.full_fits, costs.compared_batch_size, costs.batch_size) == (False, expected, 64)
    assert costs.own.peak_memory_bytes == costs.others["full"].peak_memory_bytes == 2**20 * expected
    assert FakeProcess.open == 0, "every process is ended, also where the other one failed"
    summary = costs.summary()
    assert summary["full_fits"] is False and summary["full_step_time_s"] == 0.5


def test_full_never_fits(fake):
    fake(alast=64, full_saving=64, full=0)
    costs = compared()
    assert costs.others["full"] is None and not costs.full_fits
    assert costs.others[SAVING].peak_memory_bytes == 2**20 * 64
    assert (costs.compared_batch_size, costs.own.peak_memory_bytes) == (64, 2**20 * 64)
    summary = costs.summary()
    assert summary.keys() == not_measured(FinetuneConfig(method="alast")).keys()
    of_full = {name for name in summary if name.startswith("full_") and not name.startswith(f"{SAVING}_")}
    of_full.remove("full_fits")
    assert len(of_full) > 5 and all(summary[name] is None for name in of_full)
    assert all(summary[name] is not None for name in summary if name.startswith(f"{SAVING}_"))
    assert FakeProcess.open == 0


def test_not_even_the_method_fits(fake):
    fake(alast=0, full_saving=0, full=0)
    with pytest.raises(SnelloError, match="too little memory"):
        compared(8)
    assert FakeProcess.open == 0


def test_progress_counts_every_question_to_its_end(fake):
    fake(alast=64, full_saving=64, full=32)
    told: list[tuple[str, int, int]] = []
    compare(FinetuneConfig(method="alast", batch_size=64), SUMMARY, {}, None, lambda *values: told.append(values))
    refused = [values for values in told if values[0] == "batch 64"]
    assert refused == [("batch 64", done, 36) for done in range(3)], "full did not take its first step"
    assert told[3:] == [("batch 32", done, 36) for done in range(37)]


def test_odd_batch_sizes_end_at_one(fake):
    fake(alast=64, full_saving=64, full=1)
    assert compared(13).compared_batch_size == 1
    assert [size for method, size in FakeProcess.started if method == "alast"] == [13, 6, 3, 1]


def test_not_measured_names_what_is_measured():
    measured = TimedCosts(*range(1, 10))
    for method, savings in itertools.product(("full", "alast", "lora", "alast+lora"), (True, False)):
        config = FinetuneConfig(method=method, exact_savings=savings)
        summary = Comparison(method, 8, 8, measured, dict.fromkeys(compared_with(config), measured)).summary()
        assert summary.keys() == not_measured(config).keys() >= asdict(measured).keys()


def test_alast_with_lora_is_measured_beside_lora_alone(fake):
    fake(**{"alast+lora": 64, "lora": 64, SAVING: 64, "full": 64})
    costs = compared(method="alast+lora", lora=LoraConfig(r=4))
    assert [method for method, _ in FakeProcess.started] == ["alast+lora", "lora", SAVING, "full"]
    assert list(costs.others) == ["lora", SAVING, "full"] and costs.full_fits
    fake(**{"alast+lora": 64, "lora": 64, SAVING: 64, "full": 0})
    costs = compared(method="alast+lora")
    assert costs.others["full"] is None and costs.others["lora"].peak_memory_bytes == 2**20 * 64
    fake(**{"alast+lora": 64, "lora": 0, SAVING: 0, "full": 0})
    costs = compared(method="alast+lora")
    assert costs.others == {"lora": None, SAVING: None, "full": None} and costs.compared_batch_size == 64
    assert FakeProcess.open == 0


# ------------------------------------------------------------------------------------------------------ the table


def printed(costs: Comparison) -> str:
    console = Console(record=True, width=80, file=io.StringIO())
    report.print_costs(console, costs, RUN)
    return console.export_text()


def cells(text: str, row: str) -> list[str]:
    """Of the row that begins with this name, split where numbers or two spaces are."""
    (line,) = [line for line in text.splitlines() if line.startswith(row)]
    return re.split(r"  +|(?<=\d) (?=\d)", line.strip())


RUN = SimpleNamespace(model="deit_small_patch16_224", precision="bf16", device="cpu")


def test_table():
    own = TimedCosts(2e9, 2**21, 2**27, 2**21, 2**20, 2**20, 1_500_000, 0.010, 2**25)
    full = TimedCosts(5e9, 2**23, 2**29, 2**21, 2**21, 2**22, 3_000_000, 0.025, 2**26)
    text = printed(Comparison("alast", 64, 32, own, {"full": full}))
    assert text.startswith("one training step of deit_small_patch16_224, batch 32, bf16,\non ")
    assert "2.00x is twice that of alast" in text and "does not fit\n" not in text
    assert cells(text, "step time") == ["step time, ms", "10.0", "25.0", "2.50x"]
    assert cells(text, "saved MiB") == ["saved MiB/picture", "2.00", "8.00", "4.00x"]
    assert cells(text, "sum") == ["sum, MiB", "132", "520", "3.94x"]
    text = printed(Comparison("alast", 64, 64, own, {SAVING: own, "full": full}))
    assert [line.split() for line in text.splitlines() if "saving" in line] == [["alast", "full,", "saving", "full"]]
    assert cells(text, "step time") == ["step time, ms", "10.0", "10.0", "1.00x", "25.0", "2.50x"]


def test_the_table_fits_a_terminal_of_80_columns():
    """The widest: four methods, the longest name, and numbers of a large model."""
    own = TimedCosts(0.6e12, 2**30, 2**36, 2**31, 2**30, 2**30, 300_000_000, 12.3456, 2**36)
    full = TimedCosts(9.9e12, 2**34, 2**39, 2**31, 2**33, 2**33, 300_000_000, 123.456, 2**39)
    text = printed(Comparison("alast+lora", 64, 64, own, {"lora": full, SAVING: full, "full": full}))
    head, last = next(line for line in text.splitlines() if "saving" in line), text.splitlines()[-1]
    assert head.split() == ["alast+lora", "lora", "full,", "saving", "full"] and last.startswith("peak, MiB")
    assert len(text.splitlines()) == len(report.COST_ROWS) + 4, "no row is broken over lines"
    assert "…" not in text and max(map(len, text.splitlines())) <= 80


def test_table_where_full_does_not_fit():
    own = TimedCosts(2e9, 2**21, 2**27, 2**21, 2**20, 0, 1_500_000, 0.010, 2**25)
    text = printed(Comparison("last-k", 64, 16, own, {"full": own}))
    assert "batch 16" in text and "does not fit into memory at the run's batch of 64; last-k does" in text
    text = printed(Comparison("last-k", 64, 64, own, {"full": None}))
    assert text.count("does not fit") == len(report.COST_ROWS) + 1


def test_failing_comparison_keeps_the_result_of_the_run(small, monkeypatch, capfd):
    def fail(*args, **kwargs):
        raise SnelloError("the measuring process failed with exit code 1; --no-compare leaves it out")

    monkeypatch.setattr(comparison, "compare", fail)
    assert cli.main(["finetune", *flags(replace(small, epochs=1, compare=True)), "--compare"]) == 2
    assert "measuring process failed" in capfd.readouterr().err.splitlines()[-1]
    assert json.loads((small.out / "summary.json").read_text())["accuracy"] > 0


def test_plain_full_fine_tuning_spares_nothing_of_what_the_run_does():
    """Else a run that recomputes activations would seem to save little, beside a `full` that nobody else means."""
    own = comparison.make_request(FinetuneConfig(grad_checkpointing=True, epochs=1), 3, "cpu", "fp32", "explicit")
    told = {name: comparison._with_method(own, name)["config"] for name in ("full", SAVING)}
    settings = {name: (one.get("grad_checkpointing"), one.get("exact_savings")) for name, one in told.items()}
    assert settings == {"full": (False, False), SAVING: (True, True)}
