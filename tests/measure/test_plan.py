"""What fits into a memory: estimates, the order of measuring, and the command of each."""

import json
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import tyro

from snello import cli
from snello.config import AlastConfig, FinetuneConfig, PlanConfig
from snello.config.values import from_dict
from snello.errors import ConfigError
from snello.measure import plan
from snello.measure.plan import NotRanked, PlanRow, command, make_plan, methods_of
from snello.measure.process import OutOfMemoryError
from snello.measure.step import Memory

MIB = 2**20
BASE = 100 * MIB
"""What the pretended process has before the model."""


def memory_of(config: FinetuneConfig, batch_size: int) -> Memory:
    """What a step is pretended to need; checkpointing saves three quarters of what grows with the batch."""
    saved = batch_size * MIB // (4 if config.grad_checkpointing else 1)
    return Memory(weight_bytes=MIB, gradient_bytes=MIB, optimizer_bytes=2 * MIB, saved_bytes=saved, working_bytes=0)


class FakeProcess:
    """Steps whose time grows with the batch; half precision is twice as fast, alast three times as fast as full."""

    now = 0.0
    """Of the pretended clock, on which an estimate and a start take what is set here."""
    estimate_seconds = start_seconds = 0.0
    slow_step = 0.0
    """What a step of `full` takes longer."""
    started: list[FinetuneConfig]
    estimated: list[FinetuneConfig]
    refuses: set[str]
    more = 0

    def __init__(self, request, seconds=None):
        self.config = from_dict(FinetuneConfig, request["config"])
        assert request["batch_size"] == self.config.batch_size and request["precision"] == self.config.precision
        FakeProcess.started.append(self.config)
        self.end = self.now + seconds
        self.pass_time(self.start_seconds)
        if self.config.method in self.refuses:
            raise OutOfMemoryError

    def pass_time(self, seconds):
        """The real process is killed when its time is up."""
        FakeProcess.now = min(self.now + seconds, self.end)
        if self.now == self.end:
            raise TimeoutError

    def ask(self, line):
        if line == "step":
            self.pass_time(self.slow_step if self.config.method == "full" else 0.0)
            speed = {"full": 1, "alast": 3}.get(self.config.method, 2) * (2 if self.config.precision == "bf16" else 1)
            return {"seconds": self.config.batch_size / (100 * speed)}
        counted = vars(memory_of(self.config, self.config.batch_size))
        return counted | {"peak_memory_bytes": sum(counted.values()) + self.more, "process_bytes": BASE}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def fake(monkeypatch):
    FakeProcess.started, FakeProcess.estimated, FakeProcess.refuses, FakeProcess.more = [], [], set(), 0
    FakeProcess.now = FakeProcess.estimate_seconds = FakeProcess.start_seconds = FakeProcess.slow_step = 0.0

    def estimate(self, config, sizes):
        FakeProcess.estimated.append(config)
        FakeProcess.now = min(FakeProcess.now + FakeProcess.estimate_seconds, self.deadline)
        self._require_time()
        return [memory_of(config, size) for size in sizes]

    monkeypatch.setattr(plan, "Process", FakeProcess)
    monkeypatch.setattr(plan, "time", SimpleNamespace(monotonic=lambda: FakeProcess.now))
    monkeypatch.setattr(plan._Planner, "_estimate", estimate)
    monkeypatch.setattr(plan, "resident_memory", lambda device: BASE)
    monkeypatch.setattr(plan, "faster_attention", lambda *args: "explicit")
    found = plan.importlib.util.find_spec  # adapters are planned whether peft is here or not: nothing is trained
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name, *more: name == "peft" or found(name, *more))
    return FakeProcess


def settings(memory: str = "4GB", **changes) -> PlanConfig:
    values = {
        "model": "test_vit",
        "image_size": 48,
        "methods": ("full", "alast"),
        "batch_sizes": (8, 32),
        "device": "cpu",
    }
    return PlanConfig(memory=memory, **{**values, **changes})


def tried(fake) -> list[tuple[str, int, str]]:
    return [(config.method, config.batch_size, config.precision) for config in fake.started]


def test_fastest_first_and_everything_measured(fake):
    found = make_plan(settings())
    assert (found.candidates, found.too_large, found.refused, found.left_out) == (12, 0, 0, 0)
    rates = [row.pictures_per_second for row in found.rows]
    assert len(rates) == 12 and rates == sorted(rates, reverse=True)
    assert (found.rows[0].config.method, found.rows[0].config.precision) == ("alast", "bf16")
    assert {row.config.alast.draw for row in found.rows if row.config.method == "alast"} == {
        "lowest-first",
        None,
    }
    row = found.rows[0]
    assert row.need_bytes == BASE + row.memory.total_bytes


def test_order_of_measuring(fake):
    """Each method once, then larger batches of the faster ones, then the other precision."""
    make_plan(settings())
    first = [("alast", 8, "bf16"), ("full", 8, "bf16"), ("alast", 8, "bf16")]
    second = [("alast", 32, "bf16"), ("alast", 32, "bf16"), ("full", 32, "bf16")]
    assert tried(fake)[:6] == first + second
    assert {precision for *_, precision in tried(fake)[6:]} == {"fp32"}


def test_what_cannot_fit_is_not_run_and_checkpointing_is_tried(fake):
    everything = make_plan(settings(methods=("full",), precisions=("fp32",))).rows
    plain = {row.config.batch_size: row.need_bytes for row in everything}
    fake.started.clear()
    between = (plain[8] + plain[32]) // 2
    found = make_plan(settings(f"{between}b", methods=("full",), precisions=("fp32",)))
    assert (found.candidates, found.too_large) == (3, 1)
    assert [(one.batch_size, one.grad_checkpointing) for one in fake.started] == [(8, False), (32, True)]
    assert all(row.need_bytes <= between for row in found.rows)


def test_what_is_found_not_to_fit_is_left_out(fake):
    fake.refuses = {"full"}
    found = make_plan(settings(precisions=("fp32",)))
    assert {row.config.method for row in found.rows} == {"alast"} and found.refused == 2
    assert found.not_ranked == [NotRanked("full", False, "does not fit")]
    fake.more = 2**40
    with pytest.raises(ConfigError, match=r"--memory 4GB: nothing that was tried fits; the least, 10\d+ MiB, of which"):
        make_plan(settings(precisions=("fp32",)))


EVERY = ["alast", "full", "alast+lora", "lora", "last-k", "head"]


def test_every_method_is_measured_once_before_any_is_again(fake):
    found = make_plan(settings(methods=()))
    assert [method for method, *_ in tried(fake)][:6] == EVERY
    assert not found.not_ranked


def test_estimates_count_against_the_time(fake):
    """Half a minute for each estimate: what is estimated in time is measured in time."""
    fake.estimate_seconds, fake.start_seconds = 30.0, 5.0
    found = make_plan(settings(methods=(), seconds=120.0))
    assert fake.now <= 120
    assert [config.method for config in fake.estimated] == EVERY[:4], "the fourth is stopped"
    assert {row.config.method for row in found.rows} == set(EVERY[:3])
    missing = [NotRanked(method, False, "no time") for method in EVERY[3:]]
    assert found.not_ranked == [*missing, NotRanked("alast", True, "no time")]
    assert found.candidates == 28 == len(found.rows) + found.left_out


def test_an_estimate_is_stopped_when_the_time_is_up(monkeypatch):
    """Not a mock: in the middle of the step without data."""
    planner = plan._Planner(settings(methods=("full",), precisions=("fp32",)), torch.device("cpu"), 2**32, print)
    planner._faster("fp32")
    asked = []

    def now() -> float:
        asked.append(None)
        return planner.deadline if len(asked) > 50 else 0.0

    monkeypatch.setattr(plan, "time", SimpleNamespace(monotonic=now))
    with pytest.raises(TimeoutError):
        planner._estimates(planner.variants[0].smallest, [8])
    assert len(asked) == 51


def test_checkpointing_is_estimated_only_where_it_is_needed(fake):
    make_plan(settings(methods=("full",)))
    assert not any(config.grad_checkpointing for config in fake.estimated)
    make_plan(settings("130MiB", methods=("full",)))
    assert any(config.grad_checkpointing for config in fake.estimated)


def test_a_measuring_process_is_stopped_when_the_time_is_up(fake):
    fake.slow_step = 1000.0
    found = make_plan(settings(precisions=("fp32",), seconds=120.0))
    assert fake.now == 120
    assert found.not_ranked == [NotRanked("full", False, "no time"), NotRanked("alast", True, "no time")]
    assert [row.config.method for row in found.rows] == ["alast"] and found.left_out == 5


@pytest.mark.parametrize("seconds", [0.0, 120.0])
def test_no_time_for_anything_is_one_clear_line(fake, seconds):
    fake.slow_step = 1000.0
    with pytest.raises(ConfigError, match=rf"--seconds {seconds:g}: over before anything that fits was measured \(2 "):
        make_plan(settings(methods=("full",), precisions=("fp32",), seconds=seconds))
    assert fake.now == seconds


@pytest.mark.parametrize("memory", ["1MB", "105MiB"])
def test_nothing_fits(fake, memory):
    with pytest.raises(
        ConfigError, match=r"the least, 106 MiB, of which 100 MiB are the process .* --grad-checkpointing"
    ):
        make_plan(settings(memory))
    assert not fake.started


@pytest.mark.slow
def test_estimates_lie_on_a_line():
    """Estimated at the ends; a batch between them is what it would be alone."""
    planner = plan._Planner(settings(methods=("alast",), precisions=("fp32",)), torch.device("cpu"), 2**32, print)
    config = replace(planner.variants[0].smallest, alast=AlastConfig(draw="lowest-first"))
    line = planner._estimates(config, [8, 16, 32])
    (alone,) = planner._estimates(config, [16])
    assert line[1].config == alone.config
    assert line[1].memory.total_bytes == pytest.approx(alone.memory.total_bytes, rel=0.001)


def test_commands_mean_what_was_measured(fake):
    for row in make_plan(settings("130MiB", batch_sizes=(8, 64), methods=())).rows:
        words = shlex.split(command(row.config))
        assert words[:2] == ["snello", "finetune"]
        assert tyro.cli(FinetuneConfig, args=words[2:]) == row.config
        assert row.config in fake.started


def test_command_with_checkpointing_and_a_folder_with_a_space():
    config = FinetuneConfig(model="my models/vit", method="lora", grad_checkpointing=True, image_size=48)
    text = command(config)
    assert "'my models/vit'" in text and "--grad-checkpointing" in text
    assert tyro.cli(FinetuneConfig, args=shlex.split(text)[2:]) == config


def test_need_on_a_gpu_is_the_real_peak():
    row = PlanRow(FinetuneConfig(), 0.5, Memory(1, 1, 1, 1, 1), peak_bytes=3, process_bytes=0)
    assert row.need_bytes == 3 and row.pictures_per_second == 128
    assert (
        replace(row, process_bytes=10).need_bytes == 15
        and replace(row, process_bytes=10, peak_bytes=9).need_bytes == 19
    )


def test_methods_without_peft(monkeypatch):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    assert not [method for method in methods_of(settings(methods=())) if "lora" in method]
    assert methods_of(settings(methods=("lora",))) == ["lora"]


@pytest.mark.slow
def test_for_real(capsys):
    """One candidate in a process of its own, through the command line."""
    args = ["--model", "test_vit", "--image-size", "48", "--methods", "head", "--batch-sizes", "4", "--device", "cpu"]
    assert cli.main(["plan", "--memory", "auto", *args, "--precisions", "fp32", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert row["method"] == "head" and row["pictures_per_second"] > 0
    assert 50 * 2**20 < row["process_bytes"] < row["need_bytes"] <= found["memory_bytes"]
    assert "--method head" in row["command"] and "--batch-size 4" in row["command"]


def test_printed(fake, capsys):
    args = ["--model", "test_vit", "--image-size", "48", "--methods", "alast", "--batch-sizes", "8", "--device", "cpu"]
    assert cli.main(["plan", "--memory", "4GB", *args, "--precisions", "fp32"]) == 0
    out = capsys.readouterr().out
    assert " 1. alast  " in out and " 2. alast, lowest-first" in out  # as fast: in the order in which they are tried
    assert "\n 2. snello finetune --model test_vit --method alast" in out
    assert "Of 2 settings 0 do not fit by estimate" in out and "not ranked" not in out


def test_what_is_not_ranked_is_printed(fake, capsys):
    fake.slow_step = 1000.0
    args = ["--model", "test_vit", "--image-size", "48", "--batch-sizes", "8", "--device", "cpu"]
    args = ["plan", "--memory", "4GB", *args, "--methods", "alast", "full", "--precisions", "fp32"]
    assert cli.main(args) == 0
    assert f" -. {'full':27} not ranked: no time\n" in capsys.readouterr().out
    assert cli.main([*args, "--format", "json"]) == 0
    missing = json.loads(capsys.readouterr().out)["not_ranked"]
    assert missing[0] == {"method": "full", "lowest_first": False, "reason": "no time"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--memory", "much"], "--memory must be an amount as 500MB or 2GiB, got 'much'"),
        (["--memory", "4GB", "--model", "vit_smal"], "unknown model 'vit_smal'"),
        (["--memory", "4GB", "--batch-sizes", "0"], "--batch-sizes must be at least 1, got 0"),
        (["--memory", "4GB", "--seconds", "-1"], "--seconds must be 0 or more, got -1"),
        ([], "--memory"),
    ],
)
def test_bad_input_is_one_line(args, message, capsys):
    assert cli.main(["plan", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("snello: error: ") and message in line
