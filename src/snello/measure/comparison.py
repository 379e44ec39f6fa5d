"""A method against full fine-tuning on this machine, plain and with exact savings, each in a process of its own.

A process's peak memory never falls, so each method is measured in a fresh one; all take their steps in turn on
the same pictures, so that whatever else the machine does weighs on all alike. Where full fine-tuning does not fit
into memory that is a result, and the times are taken at the largest batch that fits.
"""

import contextlib
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from itertools import count, takewhile
from typing import Any

from snello.config import FinetuneConfig
from snello.config.effect import effective
from snello.devices import resolve_device, resolve_precision
from snello.errors import SnelloError
from snello.measure.process import OutOfMemoryError, Process, make_request
from snello.measure.step import Costs
from snello.models import create_model
from snello.runs.summary import Summary
from snello.vit import ViT
from snello.vit.attention import faster_attention
from snello.vit.times import Times

WARMUP, STEPS = 2, 9
SAVING = "full_saving"
"""Full fine-tuning with exact savings."""

Progress = Callable[[str, int, int], None]
"""Told what is measured, how much of it is done, and how much there is; it starts anew at each batch size."""


@dataclass(frozen=True)
class TimedCosts(Costs):
    """One method's costs, and what they were on the clock and in the process."""

    step_time_s: float
    """Median of the steps' times."""
    peak_memory_bytes: int
    """Of the process, beyond what it had before the model."""

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
    own: TimedCosts
    others: dict[str, TimedCosts | None]
    """By name, as `compared_with` lists them; None for one that does not fit at any batch size."""

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


def compared_with(config: FinetuneConfig) -> list[str]:
    """What the run's method is measured beside: `full` is plain full fine-tuning, SAVING that with exact savings."""
    method = config.method_name
    others = ["lora"] if method == "alast+lora" else []
    others += [SAVING] if config.exact_savings and method != "full" else []
    return [*others, "full"]


def not_measured(config: FinetuneConfig) -> dict[str, Any]:
    """`Comparison.summary` of a run that is not, or not yet, compared."""
    prefixes = ["", *(f"{other}_" for other in compared_with(config))]
    names = [f"{prefix}{field.name}" for prefix in prefixes for field in fields(TimedCosts)]
    return dict.fromkeys([*names, "compared_batch_size", "full_fits"])


def compare(
    config: FinetuneConfig,
    summary: Summary,
    state: dict[str, Any],
    times: Times | None = None,
    progress: Progress = lambda text, done, total: None,
) -> Comparison:
    """Measures the run's method, with the budgets in its last `state`, beside those of `compared_with`.

    `times` are those that the run's own time target was planned with.

    Raises:
        SnelloError: where a measuring process fails for another reason than memory.
    """
    request = make_request(config, summary.num_classes, summary.device, summary.precision, summary.attention)
    try:
        return _compare(request | {"state": state, "times": times and asdict(times)}, compared_with(config), progress)
    except OutOfMemoryError:
        raise SnelloError("too little memory is left to measure the costs; --no-compare leaves it out") from None
    except SnelloError as error:
        raise SnelloError(f"{error}; --no-compare leaves it out") from None


def relative_time(config: FinetuneConfig, num_classes: int) -> float:
    """What a step of a run takes of a step of plain full fine-tuning here; steps in turn, each in its own process.

    Raises:
        SnelloError: where one of the two runs out of memory, or a measuring process fails otherwise.
    """
    if "alast" in config.method_name and config.alast.time is not None:
        own = config.alast.time  # what it is planned to take
    else:
        device = resolve_device(config.device)
        precision, attention = resolve_precision(config.precision, device), config.attention
        if attention == "auto":
            vit = ViT(create_model(config.model, "none", num_classes, config.image_size))
            attention = faster_attention(vit, config.batch_size, device, precision)
        request = make_request(config, num_classes, str(device), precision, attention)
        try:
            with Process(request) as mine, Process(_with_method(request, "full")) as full:
                pairs = [[process.ask("step")["seconds"] for process in (mine, full)] for _ in range(WARMUP + STEPS)]
        except OutOfMemoryError:
            raise SnelloError(
                "--time-budget: full fine-tuning does not fit into memory here: say --epochs instead"
            ) from None
        own = statistics.median(mine / full for mine, full in pairs[WARMUP:])
    tail = config.alast.full_tail if "alast" in config.method_name else 0.0
    return (1 - tail) * own + tail


def _compare(own: dict[str, Any], others: list[str], progress: Progress) -> Comparison:
    """Compares at the largest batch, halved from the run's, where all fit; else at the run's, without what does not."""
    method, batch_size = own["config"]["method"], own["config"]["batch_size"]
    sizes = takewhile(bool, (batch_size >> halved for halved in count()))
    tries = [(others, size) for size in sizes] + [(others[:left], batch_size) for left in reversed(range(len(others)))]
    for fewer, size in tries:
        with contextlib.suppress(OutOfMemoryError):
            requests = [own, *(_with_method(own, other) for other in fewer)]
            measured, *rest = _measure(requests, size, progress)
            found = dict.fromkeys(others) | dict(zip(fewer, rest, strict=True))
            return Comparison(method, batch_size, size, measured, found)
    raise OutOfMemoryError


def _with_method(request: dict[str, Any], other: str) -> dict[str, Any]:
    """Asks the same for another method, from its start, without the settings that have no effect on that."""
    changed: dict[str, Any] = {"method": other}
    if other == SAVING:
        changed = {"method": "full", "exact_savings": True}
    elif other == "full":  # plain, whatever the run spares
        changed = {"method": "full", "exact_savings": False, "grad_checkpointing": False}
    config = effective(FinetuneConfig, request["config"] | changed, "request")
    return request | {"state": None, "times": None, "config": config}


def _measure(requests: list[dict[str, Any]], batch_size: int, progress: Progress) -> list[TimedCosts]:
    """Measures in one process per request; their steps are taken in turn."""
    done, total = count(1), len(requests) * (1 + WARMUP + STEPS)

    def ask(process: Process, question: str) -> dict[str, Any]:
        answer = process.ask(question)
        progress(f"batch {batch_size}", next(done), total)
        return answer

    progress(f"batch {batch_size}", 0, total)
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(Process(request | {"batch_size": batch_size})) for request in requests]
        times = [[ask(process, "step")["seconds"] for process in processes] for _ in range(WARMUP + STEPS)]
        costs = [ask(process, "costs") for process in processes]
    medians = map(statistics.median, zip(*times[WARMUP:], strict=True))
    return [TimedCosts(step_time_s=median, **cost) for median, cost in zip(medians, costs, strict=True)]
