"""The run folder: one process at a time, nothing lost where a run is resumed, and all that it says read back."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import QUIET, finetune, flags, resumed, rows_of

from snello import cli
from snello.errors import CheckpointError, ConfigError
from snello.files import load_tensors
from snello.models import Preprocessing
from snello.runs.folder import RunFolder
from snello.runs.resolved import Machine, Resolved, ServerAddress
from snello.runs.summary import Summary

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
