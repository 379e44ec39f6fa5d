"""The measuring process: questions and answers, lack of memory and of time, and Ctrl-C after a run."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import flags, run_python

from snello.config import FinetuneConfig
from snello.errors import SnelloError
from snello.measure import process
from snello.measure.comparison import TimedCosts, compare, not_measured
from snello.measure.process import OutOfMemoryError, Process, make_request

pytestmark = pytest.mark.slow

SUMMARY = {"num_classes": 3, "device": "cpu", "precision": "fp32", "attention": "explicit"}
linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")


def request(config: FinetuneConfig, **changes):
    return make_request(config, **SUMMARY) | {"batch_size": 2} | changes


def test_out_of_memory(small):
    """Not a mock: a batch for which the operating system gives no memory."""
    with pytest.raises(OutOfMemoryError):
        Process(request(small, batch_size=10**6, memory_limit=4 * 2**30))


def test_out_of_time(small):
    with pytest.raises(TimeoutError):
        Process(request(small), seconds=0.0)
    with Process(request(small), seconds=600.0) as one:
        assert one.ask("step")["seconds"] > 0
        one._kill_late()
        with pytest.raises(TimeoutError):
            one.ask("step")


def test_failing_otherwise_is_a_snello_error(small, capfd):
    config = replace(small, model="no_such_model")
    with pytest.raises(SnelloError, match=r"measuring process failed with exit code 1$"):
        Process(request(config))
    with pytest.raises(SnelloError, match=r"measuring process failed with exit code 1; --no-compare leaves it out"):
        compare(config, SimpleNamespace(**SUMMARY), {})


def test_answers_on_a_clean_line(small):
    """Whatever libraries print, an answer is JSON; after the first question come others."""
    text = json.dumps(request(small)) + "\nstep\ncosts\n"
    code = f"import io, sys; sys.stdin = io.StringIO({text!r}); import snello.measure.process as p; p._serve()"
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    ready, step, costs = map(json.loads, result.stdout.splitlines())
    assert ready == {"ready": True} and step["seconds"] > 0
    assert costs.keys() | {"step_time_s"} == set(TimedCosts.__dataclass_fields__)


def test_ends_without_a_word_when_its_input_ends():
    ended = run_python("-m", "snello.measure.process")  # pytest's own input is empty
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8519680 bytes"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("could not create a primitive"), True),  # oneDNN, when memory is short
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("wrong"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, memory):
    assert process._is_memory(error) is memory


# ----------------------------------------------------------------------------------------------- Ctrl-C after a run


def children(pid: int) -> dict[int, str]:
    """The processes that `pid` has started, with their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid:
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(process: subprocess.Popen[str], condition) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.002)


@linux
@pytest.mark.parametrize(("number", "when"), [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 2)])
def test_asked_to_stop_while_costs_are_measured(small, tmp_path, number, when):
    """Ctrl-C reaches the whole process group; once with the first measuring process just started, once with both."""
    config, err = replace(small, method="alast", epochs=1, compare=True), tmp_path / "err"
    with err.open("w") as file:
        run = subprocess.Popen(
            [sys.executable, "-m", "snello.cli", "finetune", *flags(config), "--compare"],
            stdout=file,
            stderr=file,
            text=True,
            start_new_session=True,
        )
    measuring = lambda: [pid for pid, line in children(run.pid).items() if "snello.measure" in line]  # noqa: E731
    wait_for(run, lambda: len(measuring()) == when)
    started = measuring()
    (os.killpg if number == signal.SIGINT else os.kill)(run.pid, number)
    assert run.wait(60) == 0, err.read_text()
    deadline = time.monotonic() + 60  # a process that ended on its own may still be on its way out
    while any(map(runs, started)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    text = err.read_text()
    assert "Traceback" not in text and "Error" not in text
    lines = [line for line in text.splitlines() if not line.startswith("that is not above the linear probe")]
    saved, skipped, report, verdict, folder = lines[-9:-4]
    assert saved == (
        f"the model is saved in {config.out}; measuring a linear probe, and a step of alast against full fine-tuning "
        "with the same exact savings and full fine-tuning (Ctrl-C skips this)"
    )
    assert skipped == f"measuring skipped; the model is in {config.out}" and folder == f"run folder: {config.out}"
    assert report == f"report: {config.out}/report.html"
    summary = json.loads((config.out / "summary.json").read_text())
    assert (
        summary["probe_accuracy"] > 0
        and f"(linear probe of the model before training: {summary['probe_accuracy']:.2%})" in verdict
    )
    assert {name: summary[name] for name in not_measured(config)} == not_measured(config)
