"""The run folder: one process at a time, nothing lost where a run is resumed, and all that it says read back."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import QUIET, finetune, flags, resumed, rows_of

from snello import cli, finetuning
from snello.config import FinetuneConfig, SplitConfig
from snello.data import splits_of
from snello.errors import CheckpointError, ConfigError
from snello.files import load_tensors
from snello.models import Preprocessing
from snello.runs.folder import RunFolder, longer
from snello.runs.resolved import Machine, Resolved, ServerAddress
from snello.runs.summary import Summary
from snello.train.loop import Trainer
from snello.train.place import LocalPlace

PRE = Preprocessing(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic", 0.9)
SERVER = ServerAddress("127.0.0.1:7443", "0" * 32, reconnect_seconds=5.0)


def test_what_was_resolved_comes_back(small, tmp_path):
    made = Resolved(
        device="cuda:1",
        precision="bf16",
        versions={"torch": "2"},
        classes=("a", "b"),
        preprocessing=PRE,
        architecture={"model_type": "vit"},
        codec="int8",
        server=SERVER,
        data="/somewhere",
    )
    run = RunFolder(tmp_path / "run")
    run.create(small, made)
    run.release()
    assert run.read() == (replace(small, resume=False), made)
    assert RunFolder(tmp_path / "run").read(type(small), Resolved)[1] == made
    run.config_file.write_text(run.config_file.read_text().replace("version: 1", "version: 9"))
    with pytest.raises(CheckpointError, match="is of version 9, this snello reads 1"):
        run.read()


def test_a_config_that_is_no_runs_is_refused_in_one_line(small, tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create(small, Machine())
    with pytest.raises(CheckpointError, match=r"config\.yaml is not that of a run: it does not say what was resolved"):
        run.read()


def test_a_summary_comes_back(small):
    summary = finetune(small, QUIET)
    run = RunFolder(small.out)
    read = Summary.read(run.summary_file)
    assert read is not None and read.to_dict() == summary == json.loads(run.summary_file.read_text())
    assert read.traffic is None and read.accuracy == summary["accuracy"]
    run.summary_file.write_text(json.dumps({**summary, "version": 9}))
    with pytest.raises(CheckpointError, match="version 9"):
        Summary.read(run.summary_file)
    run.summary_file.unlink()
    assert Summary.read(run.summary_file) is None


# ------------------------------------------------------------------------------------------- one process at a time


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    config = replace(small, out=None, epochs=1)
    one, two = RunFolder.of(config), RunFolder.of(config)
    for run in (one, two):
        run.create(config, Machine())
    assert two.path == one.path.with_name(f"{one.path.name}-2")
    assert two.config_file.parent == two.path and two.config_file.exists() and one.config_file.exists()


def test_two_runs_cannot_share_a_folder(small):
    one, two = RunFolder.of(small), RunFolder.of(small)
    one.create(small, Machine())
    with pytest.raises(ConfigError, match=rf"--out {small.out} is in use by process {os.getpid()}: wait for its end"):
        two.create(small, Machine())
    one.release()
    with pytest.raises(ConfigError, match="is not empty"):
        two.create(small, Machine())
    assert not list(small.out.glob(".lock"))


@pytest.mark.skipif(sys.platform == "win32", reason="folders are not locked there")
@pytest.mark.slow
def test_a_second_process_is_told_whose_the_folder_is(small, capfd):
    """And the lock of a process that was killed is gone with it."""
    finetune(replace(small, epochs=1), QUIET)
    hold = "import sys; from pathlib import Path; from snello.runs.folder import RunFolder\n"
    hold += "run = RunFolder(Path(sys.argv[1])); run.lock(); print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(small.out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    rows = rows_of(small.out)
    assert cli.main(["finetune", *flags(replace(small, epochs=1)), "--resume"]) == 2
    assert f"is in use by process {holder.pid}" in capfd.readouterr().err and rows_of(small.out) == rows
    assert cli.main(["finetune", *flags(replace(small, epochs=1))]) == 2
    assert f"is in use by process {holder.pid}" in capfd.readouterr().err
    holder.kill()
    holder.wait()
    assert cli.main(["finetune", *flags(replace(small, epochs=1)), "--resume"]) == 0


# --------------------------------------------------------------------------------------------------- nothing is lost


def test_a_run_of_join_is_not_resumed_by_finetune(small):
    """It would begin anew over its metrics and weights."""
    finetune(small, QUIET)
    run = RunFolder(small.out)
    values = yaml.safe_load(run.config_file.read_text())
    values["resolved"]["server"] = {"address": "127.0.0.1:7443", "session": "0" * 32}
    run.config_file.write_text(yaml.safe_dump(values))
    run.checkpoint_file.unlink()
    before = run.metrics_file.read_bytes(), run.model_file.read_bytes()
    with pytest.raises(CheckpointError, match=rf"is a run of `snello join`.*snello join ADDRESS --out {small.out}"):
        finetune(resumed(small), QUIET)
    assert (run.metrics_file.read_bytes(), run.model_file.read_bytes()) == before


@pytest.mark.parametrize("keep_summary", [True, False])
def test_a_run_whose_checkpoint_is_gone_is_not_begun_anew(small, keep_summary):
    finetune(small, QUIET)
    run = RunFolder(small.out)
    run.checkpoint_file.unlink()
    if not keep_summary:
        run.summary_file.unlink()
    weights, rows = load_tensors(run.model_file)[0], rows_of(small.out)
    last = rows[-1]["step"]
    with pytest.raises(
        CheckpointError, match=rf"metrics up to step {last}, but its checkpoint last\.safetensors is gone"
    ):
        finetune(resumed(small), QUIET)
    assert rows_of(small.out) == rows and load_tensors(run.model_file)[0].keys() == weights.keys()


# ------------------------------------------------------------------------------------------------ from another folder


def test_evaluate_finds_the_pictures_from_any_folder(small, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(pictures.parent)
    finetune(replace(small, data=pictures.name, epochs=1), QUIET)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli.main(["evaluate", str(small.out), "--workers", "0", "--device", "cpu"]) == 0
    assert "on 9 pictures" in capsys.readouterr().out


def test_pictures_that_were_moved_are_asked_for_by_flag(small, pictures, tmp_path, capsys):
    moved = tmp_path / "pictures"
    moved.symlink_to(pictures)
    finetune(replace(small, data=str(moved), epochs=1), QUIET)
    moved.unlink()
    assert cli.main(["evaluate", str(small.out), "--workers", "0"]) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"snello: error: the run's pictures are not in \S+/pictures any more: .* with --data\n", err)


def test_no_checkpoint_file_of_a_new_run_is_needed(small):
    """A run that was killed before its first checkpoint starts again."""
    run = RunFolder(small.out)
    run.create(small, Resolved(classes=("a", "b"), preprocessing=PRE))
    run.log({"kind": "step", "step": 1, "loss": 1.0})
    run.release()
    run.require_resumable(small)


def test_a_lock_is_a_file_only_while_it_is_held(small):
    seen: list[list[str]] = []

    class Watching(type(QUIET)):  # type: ignore[misc]
        def print(self, *args, **options):
            seen.append([path.name for path in Path(small.out).glob(".*")] if Path(small.out).exists() else [])

    finetune(replace(small, epochs=1), Watching(quiet=True))
    assert [".lock"] in seen and not list(Path(small.out).glob(".*"))


def test_a_config_that_cannot_be_used_is_that_of_its_run(small):
    run = RunFolder(small.out)
    finetune(replace(small, epochs=1), QUIET)
    text = run.config_file.read_text()
    for wrong in (text.replace("epochs: 1", "epochs: 0"), "a: [1"):
        run.config_file.write_text(wrong)
        with pytest.raises(CheckpointError, match=f"^{re.escape(str(run.config_file))}") as caught:
            run.read()
        assert "--config" not in str(caught.value)


def test_a_run_that_cannot_begin_lets_its_folder_go(small):
    finetune(replace(small, epochs=1), QUIET)
    run = RunFolder(small.out)
    run.checkpoint_file.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError) as caught:
        finetune(replace(small, epochs=1, resume=True), QUIET)
    run.lock()
    assert caught.value
    run.release()


def test_a_folder_with_brackets_is_named_as_it_is(small, capfd):
    folder = small.out.parent / "[x]"
    assert cli.main(["finetune", *flags(replace(small, epochs=1, out=folder))]) == 0
    assert f"run folder: {folder}\n" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------------- another length


def refused_length(out: Path, *args: str, capfd) -> str:
    """The line that answers `--resume` for another length."""
    capfd.readouterr()
    assert cli.main(["finetune", "--out", str(out), "--resume", *args]) == 2
    return capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("cut", [0, 2])
def test_a_finished_run_is_not_made_longer_but_the_commands_are_there(small, capfd, cut):
    """A cosine that has ended is not the half of a longer one."""
    finetune(replace(small, epochs=1, split=SplitConfig(cut=cut)), QUIET)
    told = refused_length(small.out, "--epochs", "2", capfd=capfd)
    assert told.startswith(f"snello: error: --resume: {small.out} is a run of 1 epoch, over which its learning rate")
    anew, more = re.findall(r"snello (finetune --config .*?)(?:; for|$)", told)
    assert cli.main(shlex.split(anew)) == cli.main(shlex.split(more)) == 0
    first, second = (RunFolder(small.out.with_name(name)) for name in ("run-2", "run-more"))
    one, two = (run.read()[0] for run in (first, second))
    assert replace(one, out=None, weights="none") == replace(two, out=None, weights="none") and one.epochs == 2
    assert (one.weights, two.weights) == ("none", str(RunFolder(small.out).model_file))
    begun, known = (next(run.rows("step"))["loss"] for run in (first, second))
    assert known < begun, "it starts from what was trained"


def test_the_name_of_a_longer_run_does_not_grow(tmp_path):
    config = FinetuneConfig(epochs=10)
    anew, more = longer(RunFolder(tmp_path / "run-10"), config)
    assert (anew[-1], more[-1]) == (str(tmp_path / "run-20"), str(tmp_path / "run-more"))
    assert longer(RunFolder(tmp_path / "run-5"), config)[0][-1] == str(tmp_path / "run-5-20")


def test_a_run_that_was_cut_off_has_no_other_length_either(small, capfd):
    trainer = Trainer(small, splits_of(small), LocalPlace(small), QUIET)
    trainer.advance(3)
    trainer._save()
    trainer.close()
    told = refused_length(small.out, "--epochs", "10", capfd=capfd)
    assert "is a run of 2 epochs" in told and f"--epochs 10 --out {small.out}-10" in told
    assert "--weights" not in told, "there are no best weights yet"
    assert cli.main(["finetune", "--out", str(small.out), "--resume"]) == 0


def test_a_time_budget_has_no_other_length(small, monkeypatch, capfd):
    monkeypatch.setattr(finetuning.comparison, "relative_time", lambda config, num_classes: 0.5)
    finetune(replace(small, time_budget=0.5), QUIET)
    told = refused_length(small.out, "--time-budget", "1", capfd=capfd)
    assert "is a run of --time-budget 0.5, over" in told and f"--time-budget 1 --out {small.out}-1" in told
    assert "--epochs" not in told
    assert "was made with another config: epochs was 1, now 7" in refused_length(
        small.out, "--epochs", "7", capfd=capfd
    )


# ---------------------------------------------------------------------------------------------------------- free space


@pytest.fixture
def disk(monkeypatch) -> SimpleNamespace:
    """What is free on the disk, in bytes."""
    free = SimpleNamespace(free=2**40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    return free


def test_a_disk_without_room_is_found_before_anything_is_written(small, disk, capfd):
    disk.free = 3 * 2**20
    assert cli.main(["finetune", *flags(small)]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"snello: error: {small.out}: 3.0 MiB of disk are free, an epoch needs ")
    need = float(re.search(r"needs ([0-9.]+) MiB to save the model and a checkpoint; free space or choose", line)[1])
    disk.free = round((need + 0.1) * 2**20)
    assert not small.out.exists() and cli.main(["finetune", *flags(small)]) == 0
    files = small.out / "model.safetensors", small.out / "last.safetensors"
    assert sum(file.stat().st_size for file in files) == pytest.approx(need * 2**20, rel=0.05)


def test_the_next_epoch_is_not_begun_without_room(small, disk, monkeypatch, capfd):
    save = Trainer._save

    def filling(self):
        save(self)
        disk.free = 2**20

    monkeypatch.setattr(Trainer, "_save", filling)
    assert cli.main(["finetune", *flags(small)]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "1.0 MiB of disk are free, an epoch needs " in line
    assert line.endswith(f"; free space, then: snello finetune --out {small.out} --resume")
    assert [row["step"] for row in rows_of(small.out, "step")] == list(range(1, 8)), "the first epoch, and it is saved"
    disk.free = 2**40
    monkeypatch.undo()
    assert cli.main(["finetune", "--out", str(small.out), "--resume"]) == 0


def test_what_is_replaced_is_not_needed_twice(tmp_path, disk):
    """A checkpoint of 10 beside weights of 4: each is written beside the old one, which then goes."""
    run = RunFolder(tmp_path)

    def fits(free: int) -> bool:
        disk.free = free
        try:
            run.require_room(4, 10, "advice")
        except CheckpointError:
            return False
        return True

    assert fits(14) and not fits(13)
    run.model_file.write_bytes(b"1234")
    assert fits(10) and not fits(9)


def test_a_disk_that_says_nothing_is_no_obstacle(small, monkeypatch):
    def fails(path):
        raise OSError

    monkeypatch.setattr(shutil, "disk_usage", fails)
    assert finetune(replace(small, epochs=1), QUIET)["steps"] == 7


# ------------------------------------------------------------------------------------------------------------ summaries


def test_a_summary_of_before_there_were_probes_is_read(small):
    finetune(replace(small, epochs=1), QUIET)
    file = RunFolder(small.out).summary_file
    values = json.loads(file.read_text())
    assert values["probe_accuracy"] is values["probe_pictures"] is None
    file.write_text(json.dumps({name: value for name, value in values.items() if not name.startswith("probe_")}))
    read = Summary.read(file)
    assert read is not None and read.probe_accuracy is None and read.to_dict() == values
    assert finetune(replace(small, epochs=1, resume=True), QUIET) == values
