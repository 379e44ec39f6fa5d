"""Several processes that train one model: what they compute, and how they stop, fail and go on together."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import QUIET, assert_same_run, finetune, flags, resumed, rows_of, small_config, write_pictures
from helpers.budgets import DROPPING

from snello.config import AlastConfig, AugmentConfig, FinetuneConfig
from snello.config.values import to_dict
from snello.data import loaders as loading
from snello.errors import ConfigError
from snello.files import load_tensors
from snello.runs.folder import RunFolder
from snello.seeds import mix, permutation
from snello.train.ranks import ALONE, Ranks, connect

posix = pytest.mark.skipif(os.name != "posix", reason="torchrun's processes are started as on POSIX")

# Every process runs each config in turn. After every step it looks at the weights of the
# others; what it saw, or how the run ended, goes to a file of its own.
PROGRAM = """
import atexit, json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from rich.console import Console
from snello.train import learner as learners, signals as stopping
from snello.config import FinetuneConfig
from snello.config.values import from_dict
from snello.finetuning import finetune
from snello.train.loop import Trainer

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])

@atexit.register  # before snello's, so it is called after them
def what_is_left():
    tasks = Path("/proc/self/task").glob("*/comm")  # on Linux
    (folder / f"threads.{rank}.json").write_text(json.dumps([file.read_text().strip() for file in tasks]))
seen, update, step, stop_after = {}, learners.WholeLearner.update, Trainer._step, None

def watched_update(self, lr):
    before = {name: p.detach().clone() for name, p in self.modules["model"].named_parameters()}
    frozen = sorted(name for name, p in self.modules["model"].named_parameters() if not p.requires_grad)
    update(self, lr)
    now = dict(self.modules["model"].named_parameters())
    moved = sorted(name for name, value in before.items() if not torch.equal(value, now[name]))
    flat = torch.cat([p.detach().flatten() for p in now.values()])
    others = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(others, flat)
    equal, noise = torch.equal(*others), torch.initial_seed()
    seen["steps"].append({"frozen": frozen, "moved": moved, "equal": equal, "noise": noise})

def watched_step(self):
    if self.progress.step + 1 == stop_after and rank == 1:
        self._stop.append(2)  # only one of them is asked to stop
    return step(self)

learners.WholeLearner.update, Trainer._step = watched_update, watched_step
for name, values, stop_after in json.loads((folder / "runs.json").read_text()):
    seen = {"steps": [], "result": None}
    try:
        seen["result"] = finetune(from_dict(FinetuneConfig, values), Console(quiet=True)).to_dict()
    except Exception as error:
        seen["error"] = [type(error).__name__, str(error)]
    (folder / f"{name}.{rank}.json").write_text(json.dumps(seen))
"""


def launch(*args: str, **options) -> subprocess.CompletedProcess[str]:
    """torchrun with two processes."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*run, *args], capture_output=True, text=True, timeout=280, **options)


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """25 pictures to train, 9 held out: with batches of 6 the last is one picture, too few for two ranks."""
    folder = tmp_path_factory.mktemp("odd")
    write_pictures(folder / "train", {"blue": 9, "green": 8, "red": 8})
    write_pictures(folder / "val", {"blue": 3, "green": 3, "red": 3}, seed=1)
    return folder


def base(odd: Path) -> FinetuneConfig:
    return replace(small_config(odd), batch_size=3)


ALAST = {"method": "alast", "alast": AlastConfig(**DROPPING, alpha=5.0), "accumulate": 2, "layer_decay": 0.8}


@pytest.fixture(scope="module")
def two(odd, tmp_path_factory) -> Path:
    """A folder with the runs of two processes, and what each of them saw."""
    folder = tmp_path_factory.mktemp("two")
    bad = write_pictures(folder / "bad" / "train", {"blue": 9, "green": 8}).parent
    write_pictures(bad / "val", {"blue": 2, "green": 2})
    found = sorted((bad / "train").glob("*/*.png"))
    found[permutation(17, mix(0, 0))[3]].write_bytes(b"no picture")  # in the first batch of 6, the other rank's
    config = base(odd)
    runs = {
        "full": (config, None),
        "plain": (replace(config, exact_savings=False), None),
        "alast": (replace(config, **ALAST), None),
        "mixed": (replace(config, augment=AugmentConfig(mixup=0.8, cutmix=1.0)), None),
        "stopped": (replace(config, **ALAST), 4),
        "gone-on": (replace(config, **ALAST, resume=True, out=folder / "stopped"), None),
        "bad": (replace(config, data=bad, check_pictures=False, out=folder / "bad-run"), None),
        "nan": (replace(config, lr=1e30, clip_norm=0.0, warmup=0.0), None),
        "device": (replace(config, device="cuda:0"), None),
    }
    plan = [(n, to_dict(c if c.out else replace(c, out=folder / n)), stop) for n, (c, stop) in runs.items()]
    (folder / "runs.json").write_text(json.dumps(plan))
    (folder / "program.py").write_text(PROGRAM)
    done = launch(str(folder / "program.py"), str(folder))
    assert done.returncode == 0, done.stderr
    return folder


def saw(folder: Path, name: str) -> list[dict]:
    """What each rank wrote down of a run."""
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(2)]


@posix
@pytest.mark.parametrize("name", ["full", "alast"])
@pytest.mark.slow
def test_two_processes_compute_what_one_does(odd, two, tmp_path, name):
    """With the same global batch; two micro-steps a step, the last of an epoch with one picture for both ranks."""
    config = replace(base(odd), batch_size=6, out=tmp_path / "one", **(ALAST if name == "alast" else {}))
    summary = finetune(config, QUIET)
    rows, others = rows_of(config.out), rows_of(two / name)
    assert len(rows) == len(others) == (8 if name == "alast" else 12)
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            assert other[key] == (
                pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, (float, list)) else value
            )
    if name == "alast":
        assert len({tuple(row["budgets"]) for row in rows if row["kind"] == "step"}) > 2, "they must move"
        assert len({tuple(row["trained"]) for row in rows if row["kind"] == "step"}) > 2
    ours, theirs = (load_tensors(RunFolder(path).checkpoint_file)[0] for path in (config.out, two / name))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-3, atol=2e-5)
    for key in ("accuracy", "balanced_accuracy", "per_class"):
        assert [seen["result"][key] for seen in saw(two, name)] == [summary[key]] * 2
    assert not (two / name / "last.safetensors.tmp").exists() and (two / name / "summary.json").exists()


@posix
@pytest.mark.slow
def test_exact_savings_compute_the_same_in_two_processes(two):
    ours, plain = (load_tensors(RunFolder(two / name).checkpoint_file)[0] for name in ("full", "plain"))
    assert ours.keys() == plain.keys()
    for key, value in plain.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=2e-5)
    rows, others = (rows_of(two / name) for name in ("full", "plain"))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in others], rel=1e-5)


@posix
@pytest.mark.parametrize("name", ["full", "alast", "mixed", "gone-on"])
@pytest.mark.slow
def test_ranks_stay_equal_after_every_step(two, name):
    one, other = (seen["steps"] for seen in saw(two, name))
    assert len(one) == len(other) >= 2
    for mine, its in zip(one, other, strict=True):
        assert mine["equal"] and mine["frozen"] == its["frozen"] and mine["moved"] == its["moved"]
        assert not set(mine["frozen"]) & set(mine["moved"])
        assert mine["noise"] != its["noise"], "dropout must not be the same on both"
    assert (len({tuple(step["frozen"]) for step in one}) > 1) == (name not in ("full", "mixed"))
    assert set().union(*(step["moved"] for step in one)) >= {f"blocks.{i}.mlp.fc1.weight" for i in range(6)}


@posix
@pytest.mark.slow
def test_one_asked_to_stop_stops_all_at_the_same_step_and_they_go_on_exactly(two):
    one, other = saw(two, "stopped")
    assert one["error"] == other["error"] and one["error"][0] == "Interrupted"
    command = f"torchrun --standalone --nproc-per-node 2 -m snello finetune --out {two / 'stopped'} --resume"
    assert one["error"][1] == f"stopped after step 4 of 6; resume with: {command}"
    assert [len(seen["steps"]) for seen in (one, other)] == [4, 4]
    assert_same_run(two / "stopped", two / "alast")


@posix
@pytest.mark.slow
def test_what_fails_on_one_rank_ends_both(two):
    """One says why, in the words of the rank that knows; the other says nothing."""
    one, other = (seen["error"] for seen in saw(two, "bad"))
    assert one[1].endswith(".png: cannot be read as a picture: not a known picture format (process 1 of 2)")
    assert other[0] == "OtherRankFailed" and not RunFolder(two / "bad-run").checkpoint_file.exists()
    for error in (seen["error"] for seen in saw(two, "nan")):
        assert error[0] == "TrainingError" and "is not finite at step" in error[1]
    one, other = (seen["error"] for seen in saw(two, "device"))
    assert one == [
        "ConfigError",
        "--device must be auto, cpu or cuda with several processes (each takes its own GPU), got cuda:0",
    ]
    assert other[0] == "OtherRankFailed" and not (two / "device").exists()


@posix
@pytest.mark.slow
def test_no_thread_of_the_group_outlives_it(two):
    """One that lets go of a tensor while the interpreter ends would abort the process."""
    for threads in saw(two, "threads"):
        assert not [name for name in threads if "gloo" in name]


@posix
@pytest.mark.slow
def test_another_number_of_processes_is_refused(odd, two):
    config = replace(base(odd), **ALAST, out=two / "alast")
    with pytest.raises(ConfigError, match="started with 2 processes, now it has 1: its batches would be others"):
        finetune(resumed(config), QUIET)


# ------------------------------------------------------------------------------------------------- the command line


@posix
@pytest.mark.slow
def test_ctrl_c_reaches_all_and_the_printed_command_goes_on(odd, tmp_path):
    config = replace(base(odd), **ALAST, epochs=10, out=tmp_path / "run")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "snello"]
    file, deadline = RunFolder(config.out).metrics_file, time.monotonic() + 250
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen([*run, "finetune", *flags(config)], stderr=err, start_new_session=True)
    while not file.exists() or file.read_text().count("\n") < 5:
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "err").read_text()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(200) != 0
    lines = [line for line in (tmp_path / "err").read_text().splitlines() if line.startswith("snello: ")]
    assert len(lines) == 1, lines
    said, command = lines[0].split("; resume with: ")
    assert said == f"snello: stopped after step {len(rows_of(config.out, 'step'))} of 30"
    assert command == f"torchrun --standalone --nproc-per-node 2 -m snello finetune --out {config.out} --resume"
    again = subprocess.run([*run, *shlex.split(command)[6:]], capture_output=True, text=True, timeout=280)
    assert again.returncode == 0, again.stderr
    assert "2 processes (cpu), 12 pictures a step together" in again.stderr
    assert again.stderr.count("run folder:") == 1 and "Warning" not in again.stderr
    assert [row["step"] for row in rows_of(config.out, "step")] == list(range(1, 31))


@posix
@pytest.mark.slow
def test_an_error_is_one_line(two):
    done = launch(
        "-m", "snello", "finetune", "--data", str(two / "bad"), "--out", str(two / "refused"), "--device", "cpu"
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("snello: ")]
    assert done.returncode != 0 and len(lines) == 1
    assert lines[0].startswith("snello: error: ") and "cannot be read as a picture" in lines[0]
    assert not (two / "refused").exists()


# ---------------------------------------------------------------------------------------------------- without torchrun


@pytest.mark.parametrize("num", [0, 1, 2, 6, 7, 64])
def test_shares_are_even_and_add_up(num):
    shares = [Ranks(rank, 3).share(num) for rank in range(3)]
    assert [i for share in shares for i in share] == list(range(num))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert ALONE.share(num) == range(num)


def test_ranks_take_their_parts_of_the_same_batches():
    whole = list(loading.EpochBatches(25, 6, 2, seed=3, start=4))
    parts = [list(loading.EpochBatches(25, 6, 2, seed=3, start=4, share=Ranks(rank, 2).share)) for rank in range(2)]
    assert len(whole) == 6 and [len(batch) for batch in whole] == [1, 6, 6, 6, 6, 1]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert first + second == batch if len(batch) > 1 else first == second == batch


def test_the_command_for_several_machines(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node-1")
    assert ALONE.command(["finetune", "--out", "a b"]) == "snello finetune --out 'a b'"
    assert Ranks(3, 8, 3, 4).command(["finetune", "--resume"]) == (
        "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint node-1:29500 --nproc-per-node 4 "
        "-m snello finetune --resume"
    )


def test_plugins_of_accelerate_are_refused_by_name(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="DEEPSPEED is not supported"):
        connect("cpu")
