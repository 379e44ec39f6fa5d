"""A method against full fine-tuning on this machine, each in a process of its own.

A process's peak memory never falls, so each method is measured in a fresh one; the two take their steps in turn on
the same pictures, so that whatever else the machine does weighs on both alike. Where full fine-tuning does not fit
into memory that is a result, and the times are taken at the largest batch that fits.

    python -m snello.measure.comparison   is the measuring process: one JSON request, then one command a line
"""

import contextlib
import gc
import json
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch

from snello.config import FinetuneConfig
from snello.config.effect import effective
from snello.config.values import from_dict, to_dict
from snello.devices import return_freed_memory, return_large_blocks
from snello.environment import set_environment
from snello.errors import SnelloError
from snello.measure.step import TrainingStep, peak_memory, resident_memory
from snello.models import is_transformers

WARMUP, STEPS = 2, 9

# In lower case: torch's allocators, C++'s std::bad_alloc, and oneDNN, which does not say why.
SIGNS_OF_NO_MEMORY = ("memory", "alloc", "could not create a primitive", "could not execute a primitive")


@dataclass(frozen=True)
class Measured:
    """One method's costs, as in `Costs`, and what they were on the clock and in the process."""

    step_time_s: float
    flops_per_sample: float
    saved_bytes_per_sample: float
    saved_bytes: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    peak_memory_bytes: int
    trainable_parameters: int

    @property
    def memory_bytes(self) -> int:
        """The counted part of the peak."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.saved_bytes


@dataclass(frozen=True)
class Comparison:
    """A method beside others: full fine-tuning, and LoRA alone where ALaST draws adapters."""

    method: str
    batch_size: int
    """The run's."""
    compared_batch_size: int
    """The one that was measured: smaller where full fine-tuning does not fit at the run's."""
    own: Measured
    others: dict[str, Measured | None]
    """By method; None for one that does not fit at any batch size."""

    @property
    def full_fits(self) -> bool:
        """Whether full fine-tuning fits at the run's batch size."""
        return self.others["full"] is not None and self.compared_batch_size == self.batch_size

    def summary(self) -> dict[str, Any]:
        """The fields of summary.json."""
        values = asdict(self.own)
        for method, measured in self.others.items():
            values |= {f"{method}_{name}": getattr(measured, name, None) for name in asdict(self.own)}
        return values | {"compared_batch_size": self.compared_batch_size, "full_fits": self.full_fits}


def compared_with(method: str) -> list[str]:
    """The methods that `method` is measured beside."""
    return ["lora", "full"] if method == "alast+lora" else ["full"]


def not_measured(method: str) -> dict[str, Any]:
    """`Comparison.summary` of a run that is not, or not yet, compared."""
    names = [field.name for field in fields(Measured)]
    prefixes = ["", *(f"{other}_" for other in compared_with(method))]
    return dict.fromkeys([f"{prefix}{name}" for prefix in prefixes for name in names]) | dict.fromkeys(
        ["compared_batch_size", "full_fits"]
    )


class OutOfMemoryError(Exception):
    """The measuring process ran out of memory, or was killed for it."""


def compare(
    config: FinetuneConfig, summary: dict[str, Any], state: dict[str, Any], memory_limit: int | None = None
) -> Comparison:
    """Measures the run's method and full fine-tuning.

    Args:
        config: the run's.
        summary: the run's; device, precision and attention path are taken from it.
        state: the method's at the end of the run: its budgets are what is measured.
        memory_limit: bytes that a process may take on a CPU; default: what is available now.

    Raises:
        SnelloError: where a measuring process fails for another reason than memory.
    """
    request = make_request(
        config,
        num_classes=summary["num_classes"],
        device=summary["device"],
        precision=summary["precision"],
        attention=summary["attention"],
        memory_limit=memory_limit,
    )
    others = compared_with(config.method_name)
    try:
        return _compare(request | {"state": state}, others)
    except OutOfMemoryError:
        raise SnelloError("too little memory is left to measure the costs; --no-compare leaves it out") from None
    except SnelloError as error:
        raise SnelloError(f"{error}; --no-compare leaves it out") from None


def _compare(own: dict[str, Any], others: list[str]) -> Comparison:
    """At the largest batch, halved from the run's, at which all fit; else at the run's, without those that do not."""
    method, batch_size = own["config"]["method"], own["config"]["batch_size"]
    sizes = takewhile(bool, (batch_size >> halved for halved in count()))
    tries = [(others, size) for size in sizes] + [(others[:left], batch_size) for left in reversed(range(len(others)))]
    for fewer, size in tries:
        with contextlib.suppress(OutOfMemoryError):
            requests = [own, *(_with_method(own, other) for other in fewer)]
            measured, *rest = _measure(requests, size)
            found = dict.fromkeys(others) | dict(zip(fewer, rest, strict=True))
            return Comparison(method, batch_size, size, measured, found)
    raise OutOfMemoryError


def make_request(
    config: FinetuneConfig,
    *,
    num_classes: int,
    device: str,
    precision: str,
    attention: str,
    memory_limit: int | None = None,
) -> dict[str, Any]:
    """What a measuring process is told; see `compare`."""
    own = {"method": config.method_name, "data": None, "out": None, "config": None, "resume": False}
    return {
        "config": effective(FinetuneConfig, to_dict(config) | own, "request"),
        "batch_size": config.batch_size,
        "num_classes": num_classes,
        "device": device,
        "precision": precision,
        "attention": attention,
        "state": None,
        "threads": torch.get_num_threads(),
        "memory_limit": memory_limit,
    }


def _with_method(request: dict[str, Any], method: str) -> dict[str, Any]:
    """The same for another method, from its start, without the settings that have no effect on that."""
    config = effective(FinetuneConfig, request["config"] | {"method": method}, "request")
    return request | {"state": None, "config": config}


def _measure(requests: list[dict[str, Any]], batch_size: int) -> list[Measured]:
    """One process per request; their steps are taken in turn."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(Process(request | {"batch_size": batch_size})) for request in requests]
        times: list[list[float]] = [[] for _ in processes]
        for _ in range(WARMUP + STEPS):
            for process, seconds in zip(processes, times, strict=True):
                seconds.append(process.ask("step")["seconds"])
        medians = [statistics.median(seconds[WARMUP:]) for seconds in times]
        costs = [process.ask("costs") for process in processes]
    return [Measured(step_time_s=median, **cost) for median, cost in zip(medians, costs, strict=True)]


class Process:
    """A measuring process, asked one question at a time."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "snello.measure.comparison"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.ask(json.dumps(request))
        except BaseException:
            self.__exit__()
            raise

    def ask(self, line: str) -> dict[str, Any]:
        """Sends a line, returns the JSON answer.

        Raises:
            OutOfMemoryError: where the process ran out of memory.
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
            if code < 0:  # killed: on Linux that is how the kernel answers a lack of memory
                raise OutOfMemoryError
            raise SnelloError(f"the measuring process failed with exit code {code}")
        values: dict[str, Any] = json.loads(answer)
        if "error" in values:
            raise OutOfMemoryError
        return values

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _serve() -> None:
    """The measuring process: answers on the real standard output, whatever libraries print elsewhere."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process by closing its input
    set_environment()
    request = json.loads(sys.stdin.readline())
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
        step = TrainingStep(
            config,
            num_classes=request["num_classes"],
            batch_size=request["batch_size"],
            state=request["state"],
            **options,
        )
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
    TrainingStep(FinetuneConfig(method=config.method_name), num_classes=2, batch_size=2, **options).run()
    gc.collect()
    return_freed_memory()


def _answer(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


def _is_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in text for sign in SIGNS_OF_NO_MEMORY)


def available_memory(device: torch.device) -> int:
    """Bytes that are free now on a CUDA device, or in a Linux machine.

    Raises:
        OSError: where that cannot be told.
    """
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
        limit = limit or available_memory(torch.device("cpu"))
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    _serve()
