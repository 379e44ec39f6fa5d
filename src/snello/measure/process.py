"""The process in which steps are measured: a fresh one, since a process's peak memory never falls.

    python -m snello.measure.process   reads one JSON request, then one question a line, and answers each with JSON

What runs out of memory there is a result, not the end of the run.
"""

import contextlib
import gc
import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from snello.config import FinetuneConfig
from snello.config.default_model import TOY
from snello.config.effect import effective
from snello.config.values import from_dict, to_dict
from snello.devices import return_freed_memory, return_large_blocks
from snello.environment import set_environment
from snello.errors import SnelloError
from snello.measure.step import TrainingStep, peak_memory, resident_memory
from snello.models import is_transformers
from snello.vit.times import Times

# In lower case: torch's allocators, C++'s std::bad_alloc, and oneDNN, which does not say why.
SIGNS_OF_NO_MEMORY = ("memory", "alloc", "could not create a primitive", "could not execute a primitive")


class OutOfMemoryError(Exception):
    """The measuring process ran out of memory, or was killed for it."""


def make_request(
    config: FinetuneConfig, num_classes: int, device: str, precision: str, attention: str
) -> dict[str, Any]:
    """What a measuring process is asked first: all that the step of a run with `config` is made of.

    With `moving`, ALaST's budgets move. `memory_limit` is the bytes that the process may take on a CPU; None: what is
    available when it starts.
    """
    own = {"method": config.method_name, "data": None, "out": None, "config": None, "resume": False}
    return {
        "config": effective(FinetuneConfig, to_dict(config) | own, "request"),
        "batch_size": config.batch_size,
        "num_classes": num_classes,
        "device": device,
        "precision": precision,
        "attention": attention,
        "state": None,
        "times": None,
        "moving": False,
        "threads": torch.get_num_threads(),
        "memory_limit": None,
    }


class Process:
    """A measuring process, asked one question at a time, and killed at the end of the `with` block.

    It is made from a `make_request`, is killed after so many seconds, and raises what `ask` does.
    """

    def __init__(self, request: dict[str, Any], seconds: float | None = None) -> None:
        command, pipe = [sys.executable, "-m", "snello.measure.process"], subprocess.PIPE
        # In a session of its own: the terminal's Ctrl-C is for the parent, which ends this process.
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
        self._is_late = False
        self._timer = threading.Timer(seconds or 0.0, self._kill_late)
        self._timer.daemon = True
        try:
            if seconds is not None:
                self._timer.start()
            self.ask(json.dumps(request))
        except BaseException:
            self.__exit__()
            raise

    def ask(self, line: str) -> dict[str, Any]:
        """Sends a line, returns the JSON answer.

        Raises:
            OutOfMemoryError: where the process ran out of memory.
            TimeoutError: where its time was up first.
            SnelloError: where it failed otherwise.
        """
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(line + "\n")
            process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            code = process.wait()
            if self._is_late:
                raise TimeoutError
            if code < 0:  # killed: on Linux that is how the kernel answers a lack of memory
                raise OutOfMemoryError
            raise SnelloError(f"the measuring process failed with exit code {code}")
        values: dict[str, Any] = json.loads(answer)
        if "error" in values:
            raise OutOfMemoryError
        return values

    def _kill_late(self) -> None:
        self._is_late = True
        self._process.kill()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with contextlib.suppress(BrokenPipeError), self._process:  # closes its pipes and waits for it
            self._process.kill()


def _serve() -> None:
    """The measuring process: answers on the real standard output, whatever libraries print elsewhere."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends without a word where the parent is gone
    set_environment()
    if not (line := sys.stdin.readline()):
        return
    request = json.loads(line)
    torch.set_num_threads(request["threads"])
    device = torch.device(request["device"])
    if device.type == "cpu":
        _limit_memory(request["memory_limit"])
    try:
        config = from_dict(FinetuneConfig, request["config"])
        if config.grad_checkpointing:
            return_large_blocks()
        options = {"device": device, "precision": request["precision"], "attention": request["attention"]}
        _load_libraries(config, options)
        before = resident_memory(device)
        own = {name: request[name] for name in ("num_classes", "batch_size", "state", "moving")}
        own["times"] = from_dict(Times, request["times"]) if request.get("times") else None
        step = TrainingStep(config, **own, **options)
        _answer({"ready": True})
        for command in sys.stdin:
            if command.strip() == "step":
                cpu = time.process_time()
                _answer({"seconds": step.run(), "cpu_seconds": time.process_time() - cpu})
            elif command.strip() == "memory":
                memory = asdict(step.memory())
                _answer(memory | {"peak_memory_bytes": max(peak_memory(device) - before, 0), "process_bytes": before})
            else:
                peak = max(peak_memory(device) - before, 0)  # before counting, which takes memory of its own
                _answer(asdict(step.costs()) | {"peak_memory_bytes": peak})
    except (MemoryError, RuntimeError, SnelloError) as error:
        if not _is_memory(error):
            raise
        _answer({"error": "out of memory"})


def _load_libraries(config: FinetuneConfig, options: dict[str, Any]) -> None:
    """Takes a step of a small model, so that what libraries take is not counted as the method's."""
    if is_transformers(config.model):
        import snello.models.transformers_models  # noqa: F401
    TrainingStep(FinetuneConfig(model=TOY, method=config.method_name), num_classes=2, batch_size=2, **options).run()
    gc.collect()
    return_freed_memory()


def _answer(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


def _is_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in text for sign in SIGNS_OF_NO_MEMORY)


def available_memory(device: torch.device) -> int:
    """Bytes that are free now on a CUDA device, or in a Linux machine; an OSError where that cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _limit_memory(limit: int | None) -> None:
    """Makes this process, not its parent or the machine, the one that runs out of memory (Linux)."""
    if sys.platform != "linux":
        return
    import resource

    with contextlib.suppress(OSError, ValueError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    with contextlib.suppress(OSError, ValueError):
        limit = limit or available_memory(torch.device("cpu"))
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    _serve()
