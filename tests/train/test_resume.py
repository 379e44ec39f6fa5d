"""A run that is cut off and resumed ends as one that never was, bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import QUIET, assert_same_run, finetune, flags, resumed, rows_of, with_method, write_pictures
from helpers.budgets import DROPPING, LINEAR
from helpers.resuming import cut_off, whole
from timm.layers import DropPath
from torch import nn

from snello import cli, files, finetuning
from snello.config import AlastConfig, AugmentConfig, FinetuneConfig
from snello.errors import CheckpointError, ConfigError
from snello.measure import comparison
from snello.models import create_model
from snello.runs.folder import RunFolder
from snello.train import loop, place
from snello.train.loop import Trainer
from snello.train.signals import stopping
from snello.vit.times import Times, measure_times

# A run of `small` has 7 micro-batches in each of 2 epochs; with accumulate=3 its windows are of 3, 3 and 1.
CASES = {
    "full": {"checkpoint_steps": 3},
    "full, bf16": {"checkpoint_steps": 3, "precision": "bf16"},
    "full, accumulating": {"accumulate": 3, "checkpoint_steps": 1},
    "full, layer decay": {"layer_decay": 0.7, "checkpoint_steps": 3, "clip_norm": 0.0},
    "head": {"method": "head", "checkpoint_steps": 3},
    "last-k": {"method": "last-k", "last_k": 2, "accumulate": 3, "checkpoint_steps": 1},
    "alast": {"method": "alast", "checkpoint_steps": 3},
    "alast, bf16": {"method": "alast", "checkpoint_steps": 3, "precision": "bf16"},
    "alast, accumulating": {"method": "alast", "accumulate": 3, "checkpoint_steps": 1},
    "alast, accumulating, bf16": {"method": "alast", "accumulate": 3, "checkpoint_steps": 1, "precision": "bf16"},
    "alast, block-end": {
        "method": "alast",
        "alast": AlastConfig(**DROPPING, alpha=5.0, drop_at="block-end", draw="softmax"),
    },
    "alast, released": {
        "method": "alast",
        "checkpoint_steps": 3,
        "alast": AlastConfig(**DROPPING | {"blocks": 2}, optimizer_state="release"),
    },
    "alast, tail": {
        "method": "alast",
        "checkpoint_steps": 3,
        "alast": AlastConfig(**DROPPING, alpha=5.0, full_tail=0.4),
    },
    "alast, flops": {"method": "alast", "checkpoint_steps": 3, "alast": AlastConfig(**DROPPING, alpha=5.0, flops=0.5)},
    "alast, merge": {
        "method": "alast",
        "checkpoint_steps": 3,
        "alast": AlastConfig(**DROPPING | {"rule": "merge"}, alpha=5.0),
    },
    "alast, embeddings": {"method": "alast", "alast": AlastConfig(**DROPPING, alpha=5.0, train_embeddings=False)},
    "alast, by default": {"method": "alast", "checkpoint_steps": 3, "alast": AlastConfig(alpha=0.3)},
    "alast, few blocks": {
        "method": "alast",
        "accumulate": 3,
        "checkpoint_steps": 1,
        "alast": AlastConfig(rule="merge-even", blocks=3, alpha=0.3, merge_blocks=(1, 3), drop_at="start"),
    },
    "alast, published": {"method": "alast", "preset": "published", "alast": AlastConfig(alpha=5.0)},
    "rare evaluation": {"eval_epochs": 2},  # the checkpoint after the first epoch is one without an evaluation
    "fused attention": {"method": "alast", "attention": "fused", "checkpoint_steps": 3},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_cut_off_within_an_epoch(small, tmp_path, monkeypatch, name):
    """The eleventh micro-batch: within the second epoch, and within a window where gradients accumulate."""
    config = with_method(small, **CASES[name])
    other = whole(config, tmp_path / "whole")
    cut_off(config, monkeypatch, Trainer, "_backward", 11)
    had = len(rows_of(config.out, "step"))
    finetune(resumed(config), QUIET)
    assert_same_run(config.out, other)
    assert 0 < had < len(rows_of(config.out, "step"))
    if config.method == "alast" and config.alast.alpha == 5.0:
        budgets = [row["budgets"] for row in rows_of(config.out, "step")]
        assert len({tuple(row) for row in budgets}) > len(budgets) / 2, "budgets must move, or nothing is tested"
        assert len({tuple(row["trained"]) for row in rows_of(config.out, "step")}) > 2


TIMED = replace(LINEAR, tokens=(1, 3, 7, 10))
"""Of a block of test_vit, as if it had been measured; what is measured differs from run to run."""


def no_stopwatch(*args) -> None:
    raise AssertionError("a resumed run knows its times")


@pytest.mark.parametrize(
    "options", [{}, {"rule": "merge-even", "drop_at": "start", "token_multiple": 1}, {"rule": "drop", "blocks": 0.5}]
)
def test_a_time_target_goes_on_by_the_times_that_were_measured(small, tmp_path, monkeypatch, options):
    share = 0.45 if "blocks" in options else 0.6
    config = with_method(small, "alast", checkpoint_steps=3, alast=AlastConfig(alpha=0.3, time=share, **options))
    monkeypatch.setattr(loop, "measure_times", lambda *args: TIMED)
    other = whole(config, tmp_path / "whole")
    cut_off(config, monkeypatch, Trainer, "_backward", 11)
    assert RunFolder(config.out).read()[1].times == RunFolder(other).read()[1].times == TIMED
    had = len(rows_of(config.out, "step"))
    monkeypatch.setattr(loop, "measure_times", no_stopwatch)
    finetune(resumed(config), QUIET)
    assert_same_run(config.out, other)
    rows = rows_of(other, "step")
    assert 0 < had < len(rows) and len({tuple(row["step_budgets"]) for row in rows}) > 7


def test_a_time_target_before_the_first_checkpoint(small, tmp_path, monkeypatch):
    """The run begins anew, with its times."""
    config = with_method(small, "alast", alast=AlastConfig(alpha=0.3, time=0.6))
    monkeypatch.setattr(loop, "measure_times", lambda *args: TIMED)
    other = whole(config, tmp_path / "whole")
    cut_off(config, monkeypatch, Trainer, "_backward", 4)
    monkeypatch.setattr(loop, "measure_times", no_stopwatch)
    finetune(resumed(config), QUIET)
    assert_same_run(config.out, other)


def test_a_run_with_a_time_target_measures_once(small, monkeypatch):
    config = with_method(small, "alast", epochs=1, alast=AlastConfig(time=0.6))
    made: list[Times] = []
    given: list[Times] = []

    def measured(*args):
        made.append(measure_times(*args))
        return TIMED  # what is within reach of times that are real hangs on the machine

    monkeypatch.setattr(loop, "measure_times", measured)
    costs = SimpleNamespace(summary=lambda: {})
    monkeypatch.setattr(comparison, "compare", lambda *args: given.append(args[3]) or costs)
    monkeypatch.setattr("snello.reports.terminal.print_costs", lambda *args: None)
    finetune(replace(config, compare=True), QUIET)
    assert len(made) == 1 and made[0].tokens[-1] == 10 and given == [TIMED]
    finetune(resumed(config), QUIET)
    assert len(made) == 1
    untimed = replace(config, out=config.out.with_name("untimed"), alast=AlastConfig(flops=0.7))
    finetune(untimed, QUIET)
    assert len(made) == 1 and RunFolder(untimed.out).read()[1].times is None


@pytest.mark.parametrize("method", ["full", "alast"])
@pytest.mark.slow
def test_cut_off_after_every_step(small, tmp_path, monkeypatch, method):
    config = with_method(small, method=method, accumulate=3, checkpoint_steps=1)
    other = whole(config, tmp_path / "whole")
    for attempt in range(6):  # as many as there are steps: every process lives for one
        torch.manual_seed(attempt)  # whatever the random state of the process is
        if attempt < 5:
            cut_off(resumed(config) if attempt else config, monkeypatch, Trainer, "_step", 2)
            assert len(rows_of(config.out, "step")) == attempt + 1
        else:
            finetune(resumed(config), QUIET)
    assert_same_run(config.out, other)


def with_noise(*args, **kwargs) -> nn.Module:
    """test_vit with dropout and drop path, which no setting reaches."""
    model = create_model(*args, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    for block in model.blocks:
        block.drop_path1, block.drop_path2 = DropPath(0.3), DropPath(0.3)
        block.attn.attn_drop.p = 0.1
    return model


@pytest.mark.parametrize("method", ["full", "alast"])
@pytest.mark.slow
def test_noise_of_the_model_goes_on(small, tmp_path, monkeypatch, method):
    monkeypatch.setattr(place, "create_model", with_noise)
    config = with_method(small, method=method, accumulate=3, checkpoint_steps=1)
    other = whole(config, tmp_path / "whole")
    cut_off(config, monkeypatch, Trainer, "_backward", 11)
    torch.manual_seed(99)
    finetune(resumed(config), QUIET)
    assert_same_run(config.out, other)
    monkeypatch.undo()
    without = whole(config, tmp_path / "without")
    assert rows_of(without) != rows_of(other), "there was no noise, so nothing was tested"


def test_early_stop_is_remembered(small, tmp_path, monkeypatch):
    """The accuracy is 1 after the first epoch or so: patience ends the run, cut off or not."""
    config = replace(small, epochs=8, patience=2, lr=1e-3)
    other = whole(config, tmp_path / "whole")
    steps = len(rows_of(other, "step"))
    assert 21 <= steps < 56
    cut_off(config, monkeypatch, Trainer, "_backward", steps - 2)
    finetune(resumed(config), QUIET)
    assert_same_run(config.out, other)


@pytest.mark.slow
def test_workers_and_checkpoints_may_change(small, tmp_path, monkeypatch):
    config = with_method(small, method="alast", checkpoint_steps=3)
    other = whole(config, tmp_path / "whole")
    cut_off(config, monkeypatch, Trainer, "_backward", 11)
    finetune(replace(resumed(config), workers=2, checkpoint_steps=1, check_pictures=False), QUIET)
    assert_same_run(config.out, other)


# ----------------------------------------------------------------------------------- cut off at an awkward moment


def test_before_the_first_checkpoint(small, tmp_path, monkeypatch):
    config = with_method(small, method="alast")
    other = whole(config, tmp_path / "whole")
    cut_off(config, monkeypatch, Trainer, "_backward", 4)
    assert len(rows_of(config.out)) == 3 and not RunFolder(config.out).checkpoint_file.exists()
    finetune(resumed(config), QUIET)
    assert_same_run(config.out, other)


def test_between_model_and_checkpoint(small, tmp_path, monkeypatch):
    """The first epoch's model.safetensors is there, the checkpoint after that epoch is not."""
    config = replace(small, checkpoint_steps=3)
    other = whole(config, tmp_path / "whole")
    cut_off(config, monkeypatch, Trainer, "_save", 3)
    assert RunFolder(config.out).model_file.exists() and rows_of(config.out, "eval")
    finetune(resumed(config), QUIET)
    assert_same_run(config.out, other)


def test_before_the_model_is_saved(small, tmp_path, monkeypatch):
    config = replace(small, checkpoint_steps=3)
    other = whole(config, tmp_path / "whole")
    cut_off(config, monkeypatch, files, "save_tensors", 1)
    assert not RunFolder(config.out).model_file.exists()
    finetune(resumed(config), QUIET)
    assert_same_run(config.out, other)


@pytest.mark.slow
def test_after_the_last_checkpoint(small, tmp_path, monkeypatch):
    """Trained to the end, but without a summary: resuming writes it and trains no further."""
    config = with_method(small, method="alast")
    other = whole(config, tmp_path / "whole")
    cut_off(config, monkeypatch, Trainer, "_summary", 1)
    monkeypatch.setattr(Trainer, "_step", None)
    finetune(resumed(config), QUIET)
    assert_same_run(config.out, other)
    finetune(resumed(config), QUIET)  # and a complete run can be resumed, to the same effect
    assert_same_run(config.out, other)


def test_line_cut_off_in_the_metrics(small, tmp_path, monkeypatch):
    config = replace(small, checkpoint_steps=3)
    other = whole(config, tmp_path / "whole")
    cut_off(config, monkeypatch, Trainer, "_backward", 11)
    file = RunFolder(config.out).metrics_file
    file.write_text(file.read_text()[:-25])
    finetune(resumed(config), QUIET)
    assert_same_run(config.out, other)


# ------------------------------------------------------------------------------------- processes that really end

DIES = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from snello import cli
name, calls, *args = sys.argv[1:]
replace, left = Path.replace, int(calls)

def replace_or_die(self, target):
    global left
    left -= Path(target).name == name
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)

Path.replace = replace_or_die
sys.exit(cli.main(args))
"""

posix = pytest.mark.skipif(os.name != "posix", reason="there are no such signals on Windows")


@posix
@pytest.mark.parametrize(("name", "call"), [("last.safetensors", 3), ("model.safetensors", 1)])
@pytest.mark.slow
def test_killed_between_write_and_rename(small, tmp_path, name, call):
    config = with_method(small, method="alast", checkpoint_steps=3)
    other = whole(config, tmp_path / "whole")
    process = subprocess.run([sys.executable, "-c", DIES, name, str(call), "finetune", *flags(config)], timeout=300)
    assert process.returncode == -signal.SIGKILL
    left = [path.name for path in config.out.glob(".*") if path.name != ".lock"]
    assert left == [f".{name}.tmp"], "a killed process cleans nothing up"
    step = 6
    assert len(rows_of(config.out, "step")) == 7 > step
    assert files.load_tensors(RunFolder(config.out).checkpoint_file)[1]["progressed"]["step"] == step
    assert cli.main(["finetune", "--out", str(config.out), "--resume"]) == 0
    assert_same_run(config.out, other)


def start(config: FinetuneConfig, err: Path) -> subprocess.Popen[str]:
    """`snello finetune` in a process group of its own."""
    with err.open("w") as file:  # no pipe: workers that outlive a killed process would hold it open
        return subprocess.Popen(
            [sys.executable, "-m", "snello.cli", "finetune", *flags(config)],
            stdout=file,
            stderr=file,
            text=True,
            start_new_session=True,
        )


def wait_for_lines(process: subprocess.Popen[str], config: FinetuneConfig, num: int) -> None:
    """Until the run has logged `num` lines."""
    file, deadline = RunFolder(config.out).metrics_file, time.monotonic() + 300
    while not file.exists() or file.read_text().count("\n") < num:
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.002)


@posix
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.slow
def test_killed_at_any_moment(small, tmp_path, workers):
    config = with_method(
        small,
        method="alast",
        epochs=8,
        workers=workers,
        accumulate=3,
        precision="bf16" if workers else "fp32",
        checkpoint_steps=2,
        augment=AugmentConfig(rand_ops=3),
    )
    other = whole(config, tmp_path / "whole")
    process = start(config, tmp_path / "err")
    wait_for_lines(process, config, 9)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    had = len(rows_of(config.out, "step"))
    assert 7 <= had < 24
    finetune(resumed(config), QUIET)
    assert_same_run(config.out, other)


@posix
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 2), (signal.SIGTERM, 0)])
@pytest.mark.slow
def test_asked_to_stop(small, tmp_path, number, workers):
    """Ctrl-C reaches the whole process group, loaders too; `kill` only the process."""
    config = with_method(small, method="alast", epochs=8, workers=workers)
    other = whole(config, tmp_path / "whole")
    process = start(config, tmp_path / "err")
    wait_for_lines(process, config, 9)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    assert process.wait(60) == 130
    text = (tmp_path / "err").read_text()
    step = files.load_tensors(RunFolder(config.out).checkpoint_file)[1]["progressed"]["step"]
    assert "Traceback" not in text and "Error" not in text
    expected = f"snello: stopped after step {step} of 56; resume with: snello finetune --out {config.out} --resume"
    assert text.splitlines()[-1] == expected
    assert 8 <= step < 56 and len(rows_of(config.out, "step")) == step
    assert not RunFolder(config.out).summary_file.exists()
    assert cli.main(["finetune", "--out", str(config.out), "--resume"]) == 0
    assert_same_run(config.out, other)


@posix
def test_asked_to_stop_without_a_name_for_the_run(small, tmp_path, monkeypatch, capfd):
    """What is printed can be typed: it names the folder that snello chose."""
    monkeypatch.chdir(tmp_path)
    step = Trainer._step

    def interrupted_step(self):
        os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Trainer, "_step", interrupted_step)
    assert cli.main(["finetune", *flags(replace(small, out=None))]) == 130
    (run,) = Path("runs").iterdir()
    err = capfd.readouterr().err
    assert err.splitlines()[-1].endswith(
        f"stopped after step 1 of 14; resume with: snello finetune --out {run} --resume"
    )
    assert RunFolder(run).checkpoint_file.exists()


@posix
def test_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    asked: list[int] = []
    with stopping(asked):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert asked == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_before_training(small, monkeypatch, capfd):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetuning, "splits_of", interrupted)
    assert cli.main(["finetune", *flags(small)]) == 130
    assert capfd.readouterr().err == "snello: interrupted\n"
    assert not small.out.exists()


# ------------------------------------------------------------------------------------------------ what is refused


def test_another_config_is_refused(small):
    config = with_method(small, "alast", epochs=1)
    finetune(config, QUIET)
    before = {path: path.read_bytes() for path in config.out.iterdir()}
    changed = replace(resumed(config), lr=0.25, alast=AlastConfig(**DROPPING | {"blocks": 2}, alpha=5.0), workers=1)
    with pytest.raises(ConfigError) as caught:
        finetune(changed, QUIET)
    text = str(caught.value)
    assert "lr was 0.0005, now 0.25" in text and "alast.blocks was 0.75, now 2" in text
    assert "workers" not in text and "epochs" not in text
    assert before == {path: path.read_bytes() for path in config.out.iterdir()}


def test_other_pictures_are_refused(small, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(small.data, data)
    config = replace(small, data=data, epochs=1)
    finetune(config, QUIET)
    next((data / "train" / "red").iterdir()).unlink()
    with pytest.raises(ConfigError, match=r"the pictures are not those .*\(num_train\)"):
        finetune(resumed(config), QUIET)


def test_other_pictures_of_the_same_number_are_refused(small, tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(small.data, data)
    config = replace(small, data=data, checkpoint_steps=3)
    cut_off(config, monkeypatch, Trainer, "_backward", 5)
    file = next((data / "train" / "red").iterdir())
    before, state = file.read_bytes(), {path: path.read_bytes() for path in config.out.iterdir() if path.is_file()}
    write_pictures(data / "train", {"other": 1}, seed=3)
    (data / "train" / "other" / "000.png").rename(file)
    (data / "train" / "other").rmdir()
    with pytest.raises(ConfigError, match=r"the pictures are not those .*\(labels or sizes of files\)$"):
        finetune(resumed(config), QUIET)
    assert state == {path: path.read_bytes() for path in config.out.iterdir() if path.is_file()}
    file.write_bytes(before)
    finetune(resumed(config), QUIET)


def test_a_run_of_a_version_that_noted_no_fingerprint_goes_on(small, monkeypatch):
    config = replace(small, checkpoint_steps=3)
    cut_off(config, monkeypatch, Trainer, "_backward", 5)
    file = RunFolder(config.out).config_file
    values = yaml.safe_load(file.read_text())
    assert values["resolved"].pop("fingerprint")
    file.write_text(yaml.safe_dump(values))
    assert finetune(resumed(config), QUIET)["steps"] == 14


def test_nothing_to_resume(small, tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        finetune(resumed(small), QUIET)
    with pytest.raises(ConfigError, match="--resume needs --out"):
        finetune(replace(small, resume=True, out=None), QUIET)
    assert not small.out.exists()


def test_damaged_checkpoint_is_named(small, monkeypatch):
    config = replace(small, checkpoint_steps=3)
    cut_off(config, monkeypatch, Trainer, "_backward", 6)
    file = RunFolder(config.out).checkpoint_file
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"could not read .*last\.safetensors"):
        finetune(resumed(config), QUIET)


@posix
def test_asked_to_stop_at_the_last_step(small, monkeypatch):
    """There is nothing left to stop: the run ends as ever."""
    step = Trainer._step

    def interrupted_step(self):
        if self.progress.step == self.total_steps - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Trainer, "_step", interrupted_step)
    assert finetune(small, QUIET)["steps"] == 14
    assert RunFolder(small.out).summary_file.exists()
