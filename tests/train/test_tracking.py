"""Trackers: what they show, and that a resumed run goes on in the same place."""

import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import QUIET, finetune, resumed, rows_of, with_method
from rich.console import Console

from snello import cli
from snello.config import FinetuneConfig, SplitConfig
from snello.config.registry import TRACKERS
from snello.config.values import from_dict
from snello.errors import ConfigError, SnelloError
from snello.runs.folder import RunFolder
from snello.train import tracking
from snello.train.loop import Trainer
from snello.train.tracking import scalars


class Killed(BaseException):
    """Stands for the end of the process."""


def shown(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: every scalar by step."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    events = accumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def cut_off(config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Runs until the `call`-th micro-batch."""
    backward, count = Trainer._backward, iter(range(1, call + 1))

    def dying(self, work):
        if next(count) == call:
            raise Killed
        return backward(self, work)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "_backward", dying)
        finetune(config, QUIET)


def expected(run: Path, kind: str, name: str) -> list[tuple[int, float]]:
    return [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows_of(run, kind)]


def test_tensorboard_shows_the_run_and_goes_on_in_it(small, monkeypatch):
    """Cut off in the second epoch after step 10, with the last checkpoint after step 9: step 10 is done twice."""
    pytest.importorskip("tensorboard")
    config = with_method(small, method="alast", checkpoint_steps=3, track=("tensorboard",))
    cut_off(config, monkeypatch, 11)
    assert [step for step, _ in shown(config.out)["train/loss"]] == list(range(1, 11))
    finetune(resumed(config), QUIET)
    values = shown(config.out)
    assert len(list((config.out / "tensorboard").iterdir())) == 2
    for name in ("loss", "lr", "grad_norm"):
        assert values[f"train/{name}"] == expected(config.out, "step", name)
    for name in ("accuracy", "loss"):
        assert values[f"eval/{name}"] == expected(config.out, "eval", name)
    budgets = [row["budgets"] for row in rows_of(config.out, "step")]
    for block in range(6):
        column = [(step, pytest.approx(row[block], rel=1e-6)) for step, row in enumerate(budgets, 1)]
        assert values[f"budget/{block}"] == column
    speeds = [value for _, value in values["train/pictures_per_second"]]
    assert len(speeds) == 14 and all(value > 0 for value in speeds)
    assert not RunFolder(config.out).tracking_file.exists()


def test_a_cut_run_shows_its_bytes(small):
    pytest.importorskip("tensorboard")
    config = replace(small, epochs=1, split=SplitConfig(cut=2, codec="int8"), track=("tensorboard",))
    finetune(config, QUIET)
    values = shown(config.out)
    assert values["eval/training_bytes"] == expected(config.out, "eval", "training_bytes")
    assert values["train/grad_norm_client"] == expected(config.out, "step", "grad_norm_client")


def test_scalars_leaves_out_what_is_no_number():
    row = {"kind": "step", "step": 3, "loss": float("nan"), "lr": 1, "codec": "none", "flag": True, "trained": [0, 2]}
    assert scalars(row | {"budgets": [0.5, 1.0], "seconds": 0.5}, 8) == {
        "train/lr": 1,
        "budget/0": 0.5,
        "budget/1": 1.0,
        "train/pictures_per_second": 16.0,
    }


class Wandb(types.ModuleType):
    """Stands for wandb: writes down with what it is called."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.rows, self.settings = [], [], []
        self.config = types.SimpleNamespace(update=lambda values, **options: self.settings.append(values))

    def init(self, **options):
        self.started.append(options)
        log = lambda values, step: self.rows.append((step, values))  # noqa: E731
        return types.SimpleNamespace(log=log, finish=lambda: None)


class Mlflow(types.ModuleType):
    """Stands for MLflow."""

    def __init__(self):
        super().__init__("mlflow")
        self.started, self.rows, self.settings = [], [], {}
        limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
        self.utils = types.SimpleNamespace(validation=limits)
        self.log_params, self.end_run = self.settings.update, lambda: None

    def search_experiments(self, filter_string):
        return [types.SimpleNamespace(experiment_id="7")]

    def start_run(self, **options):
        self.started.append(options)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))

    def log_metrics(self, metrics, step):
        self.rows.append((step, metrics))


def test_wandb_and_mlflow_keep_the_run_they_began(small, monkeypatch):
    """With stand-ins for both packages: what they would be called with."""
    wandb, mlflow = Wandb(), Mlflow()
    for module in (wandb, mlflow):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(tracking, "find_spec", lambda name: True)
    config = replace(small, checkpoint_steps=3, track=("wandb", "mlflow"))
    cut_off(config, monkeypatch, 11)
    finetune(resumed(config), QUIET)
    first, second = wandb.started
    assert first == second and first["resume"] == "allow" and len(first["id"]) == 32
    assert first["project"] == "snello" and first["name"] == "run"
    assert [options["run_id"] for options in mlflow.started] == [None, "abc"]
    assert len(wandb.settings) == 1 and wandb.settings[0]["lr"] == mlflow.settings["lr"] == config.lr
    for rows in (wandb.rows, mlflow.rows):
        assert [step for step, values in rows if "train/loss" in values] == [*range(1, 11), *range(10, 15)]
        assert rows[-1][1]["eval/accuracy"] == rows_of(config.out, "eval")[-1]["accuracy"]


def test_a_tracker_that_fails_on_the_way_is_left_out(small, monkeypatch, capfd):
    """The run does not depend on it: metrics.jsonl and the other trackers have everything."""
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(tracking, "find_spec", lambda name: True)

    class Full(list):
        def append(self, row):
            if len(self) == 3:
                raise OSError("no connection\nand more")
            super().append(row)

    wandb.rows = Full()
    finetune(replace(small, track=("wandb", "tensorboard")), Console(stderr=True))
    said = "warning: --track wandb failed at step 4, the run continues without it: no connection\n"
    assert capfd.readouterr().err.count(said) == 1
    assert shown(small.out)["train/loss"] == expected(small.out, "step", "loss")
    assert len(wandb.rows) == 3


def test_a_tracker_that_cannot_start_is_one_line(small, monkeypatch):
    mlflow = Mlflow()
    mlflow.search_experiments = lambda filter_string: (_ for _ in ()).throw(OSError("no server there\nand more"))
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setattr(tracking, "find_spec", lambda name: True)
    with pytest.raises(SnelloError) as error:
        finetune(replace(small, track=("mlflow",)), QUIET)
    assert str(error.value) == "--track mlflow cannot be started: no server there"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_before_anything_is_written(small, monkeypatch, name):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        finetune(replace(small, track=("tensorboard", name)[1:]), QUIET)
    assert str(error.value) == f"--track {name} needs a package that is not installed: pip install {name}"
    assert not small.out.exists()


def test_an_unknown_tracker_is_answered_with_the_known_ones(tmp_path, capfd):
    assert cli.main(["finetune", "--track", "tensorboard", "neptune", "--out", str(tmp_path / "run")]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and f"--track must be one of {', '.join(TRACKERS)}, got 'neptune'" in err


def test_one_tracker_needs_no_list_in_a_file():
    values = yaml.safe_load("track: tensorboard")
    assert from_dict(FinetuneConfig, values).track == ("tensorboard",)
