"""What fits into a given memory: estimates first, without allocating anything, then one real step of what may fit.

An estimate takes a step of the real model on tensors without data, so it counts what the step would hold, to the
byte, and what cannot fit is never run. The rest is measured, the most promising first, until the time is up.
"""

import dataclasses
import importlib.util
import shlex
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from snello.config import AlastConfig, FinetuneConfig, PlanConfig
from snello.config.units import parse_bytes
from snello.devices import Precision, resolve_device, resolve_precision
from snello.errors import ConfigError
from snello.measure.comparison import OutOfMemoryError, Process, available_memory, make_request
from snello.measure.step import Memory, TrainingStep, resident_memory
from snello.models import create_model
from snello.vit import AttentionPath, ViT
from snello.vit.attention import faster_attention

LOWEST = AlastConfig(draw="lowest-first", train_embeddings=False)
VARIANTS: tuple[tuple[str, AlastConfig], ...] = (
    ("alast", LOWEST),
    ("full", AlastConfig()),
    ("alast", AlastConfig()),
    ("alast+lora", replace(LOWEST, train_embeddings=True)),  # LoRA freezes them anyway
    ("lora", AlastConfig()),
    ("last-k", AlastConfig()),
    ("head", AlastConfig()),
)
"""Methods and settings, in the order in which they are tried."""
STEPS = 3.5  # that measuring a candidate takes: one to warm up, one that is timed, one that is counted
SHORTEST = 0.3  # seconds of timed steps
SLACK = 2**30  # beyond the memory that is asked for, before a measuring process is stopped: stacks, reservations


@dataclass(frozen=True)
class Candidate:
    """Settings of a run, and what a step of it is estimated to need."""

    config: FinetuneConfig
    memory: Memory

    @property
    def variant(self) -> tuple[Any, ...]:
        """What stays the same while the batch grows."""
        return self.config.method, self.config.alast, self.config.precision


@dataclass(frozen=True)
class Measured:
    """A candidate after a real step."""

    config: FinetuneConfig
    step_time_s: float
    memory: Memory
    """Counted in that step."""
    peak_bytes: int
    """Measured: of the device, or of the process beyond what it had before the model."""
    process_bytes: int
    """What the process had before the model; 0 on a GPU."""

    @property
    def pictures_per_second(self) -> float:
        """How fast it trains."""
        return self.config.batch_size / self.step_time_s

    @property
    def need_bytes(self) -> int:
        """The memory that it takes: on a GPU the real peak, on a CPU that or what was counted, and the process."""
        if self.process_bytes == 0:
            return self.peak_bytes
        return self.process_bytes + max(self.peak_bytes, self.memory.total_bytes)

    def row(self) -> dict[str, Any]:
        """As values that JSON can hold."""
        config = self.config
        return {
            "method": config.method,
            "lowest_first": config.alast.draw == "lowest-first",
            "batch_size": config.batch_size,
            "precision": config.precision,
            "grad_checkpointing": config.grad_checkpointing,
            "pictures_per_second": self.pictures_per_second,
            "step_time_s": self.step_time_s,
            "need_bytes": self.need_bytes,
            "peak_bytes": self.peak_bytes,
            "process_bytes": self.process_bytes,
            **asdict(self.memory),
            "command": command(config),
        }


@dataclass(frozen=True)
class Plan:
    """What was found."""

    memory_bytes: int
    rows: list[Measured]
    """What fits, the fastest first."""
    candidates: int
    too_large: int
    """Not run, since the estimate does not fit."""
    refused: int
    """Run, and found not to fit."""
    left_out: int
    """Would fit by estimate, but the time was up."""

    def to_dict(self) -> dict[str, Any]:
        """As values that JSON can hold."""
        counts = {name: getattr(self, name) for name in ("memory_bytes", "candidates", "too_large", "refused")}
        return counts | {"left_out": self.left_out, "rows": [row.row() for row in self.rows]}


def make_plan(config: PlanConfig, say: Callable[[str], None] = lambda text: None) -> Plan:
    """Tries what `config` says on this machine.

    Raises:
        ConfigError: for a memory, device or precision that cannot be used, or where nothing fits.
        ModelError: for a model that cannot be built.
        SnelloError: where a measuring process fails for another reason than memory.
    """
    deadline = time.monotonic() + config.seconds
    device = resolve_device(config.device)
    memory = _free(device) if config.memory == "auto" else parse_bytes(config.memory, "--memory")
    base = resident_memory(device) if device.type == "cpu" else 0
    planner = _Planner(config, device)
    candidates = list(planner.candidates(memory - base))
    fitting = [candidate for candidate in candidates if base + candidate.memory.total_bytes <= memory]
    if not fitting:
        least = min(candidates, key=lambda candidate: candidate.memory.total_bytes)
        raise _nothing(config, least.config, base + least.memory.total_bytes, base)
    say(f"{len(candidates)} candidates, {len(candidates) - len(fitting)} do not fit by estimate; measuring")
    found = planner.measure(fitting, memory, deadline, say)
    rows = [row for row in found.rows if row.need_bytes <= memory]
    if not rows and not found.rows:
        raise _nothing(config, fitting[0].config, base + fitting[0].memory.total_bytes, base)
    if not rows:
        smallest = min(found.rows, key=lambda row: row.need_bytes)
        raise _nothing(config, smallest.config, smallest.need_bytes, smallest.process_bytes)
    rows.sort(key=lambda row: -row.pictures_per_second)
    refused = len(fitting) - found.left_out - len(rows)
    return Plan(memory, rows, len(candidates), len(candidates) - len(fitting), refused, found.left_out)


def _free(device: torch.device) -> int:
    try:
        return available_memory(device)
    except OSError:
        raise ConfigError("--memory auto is for Linux and CUDA devices: give an amount as 4GB") from None


class _Planner:
    """Estimates and measurements of one model on one device."""

    def __init__(self, config: PlanConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        auto = resolve_precision("auto", device)
        wanted = [resolve_precision(name, device) for name in config.precisions] or [auto, "fp32"]
        self.precisions: list[Precision] = list(dict.fromkeys(wanted))
        with torch.device("meta"):
            vit = ViT(create_model(config.model, "none", config.num_classes, config.image_size))
        self.attention: dict[Precision, AttentionPath] = {
            precision: faster_attention(vit, config.batch_sizes[0], device, precision) for precision in self.precisions
        }

    def candidates(self, memory: int) -> Iterator[Candidate]:
        """All settings with their estimates; with checkpointing only where `memory` bytes do not do without."""
        sizes = sorted(set(self.config.batch_sizes))
        for precision in self.precisions:
            for method, alast in VARIANTS:
                if method not in methods_of(self.config):
                    continue
                plain = self._estimates(method, alast, precision, False, sizes)
                yield from plain
                large = [one.config.batch_size for one in plain if one.memory.total_bytes > memory]
                if large and method not in ("head", "last-k"):
                    yield from self._estimates(method, alast, precision, True, large)

    def _estimates(
        self, method: str, alast: AlastConfig, precision: Precision, checkpointing: bool, sizes: list[int]
    ) -> list[Candidate]:
        """Estimated at the smallest and the largest batch; between them, memory is a straight line."""
        config = FinetuneConfig(
            model=self.config.model,
            image_size=self.config.image_size,
            method=method,
            alast=alast,
            precision=precision,
            device=self.config.device,
            grad_checkpointing=checkpointing,
            batch_size=sizes[0],
        )
        low, high = (asdict(memory) for memory in self._estimate(config, (sizes[0], sizes[-1])))
        found = []
        for size in sizes:
            share = (size - sizes[0]) / max(1, sizes[-1] - sizes[0])
            values = {name: round(low[name] + share * (high[name] - low[name])) for name in low}
            found.append(Candidate(replace(config, batch_size=size), Memory(**values)))
        return found

    def _estimate(self, config: FinetuneConfig, sizes: tuple[int, ...]) -> list[Memory]:
        step = TrainingStep(
            config,
            num_classes=self.config.num_classes,
            batch_size=config.batch_size,
            device=self.device,
            precision=config.precision,  # type: ignore[arg-type]
            attention=self.attention[config.precision],  # type: ignore[index]
            without_data=True,
        )
        found = []
        for size in sizes:
            step.set_batch_size(size)
            found.append(step.memory())
        return found

    def measure(self, fitting: list[Candidate], memory: int, deadline: float, say: Callable[[str], None]) -> "_Found":
        """Takes real steps, the most promising candidate first, until the deadline; at least of one candidate."""
        found = _Found()
        waiting = list(fitting)
        limit = memory + memory // 4 + SLACK
        while waiting:
            candidate = min(waiting, key=lambda one: self._order(one, found))
            waiting.remove(candidate)
            if found.tried and time.monotonic() + found.expected_seconds(candidate) > deadline:
                found.left_out += 1  # a smaller or faster one may still be in time
                continue
            found.enter(candidate, self._measure(candidate.config, limit, found))
            say(f"  {_said(candidate.config)}")
        return found

    def _order(self, candidate: Candidate, found: "_Found") -> tuple[float, float]:
        """Each method once in the first precision, then larger batches and the next one; the fastest methods first."""
        round_ = found.tried.get(candidate.variant, 0) + 2 * self.precisions.index(candidate.config.precision)  # type: ignore[arg-type]
        return round_, -found.rates.get(candidate.variant, 0.0)

    def _measure(self, config: FinetuneConfig, limit: int, found: "_Found") -> Measured | None:
        """One process; None where it runs out of memory."""
        started = time.monotonic()
        request = make_request(
            config,
            num_classes=self.config.num_classes,
            device=str(self.device),
            precision=config.precision,
            attention=self.attention[config.precision],  # type: ignore[index]
            memory_limit=limit,
        )
        try:
            with Process(request) as process:
                found.start_seconds = time.monotonic() - started
                process.ask("step")
                seconds = [process.ask("step")["seconds"]]
                while sum(seconds) < SHORTEST:
                    seconds.append(process.ask("step")["seconds"])
                counted = process.ask("memory")
        except OutOfMemoryError:
            return None
        peak, before = counted.pop("peak_memory_bytes"), counted.pop("process_bytes")
        on_gpu = self.device.type == "cuda"
        return Measured(config, statistics.median(seconds), Memory(**counted), peak, 0 if on_gpu else before)


class _Found:
    """What is known while candidates are measured."""

    def __init__(self) -> None:
        self.rows: list[Measured] = []
        self.tried: dict[tuple[Any, ...], int] = {}
        self.rates: dict[tuple[Any, ...], float] = {}
        """Pictures per second, by variant."""
        self.left_out = 0
        self.start_seconds = 0.0
        """Of the last process, until it could take a step."""

    def enter(self, candidate: Candidate, measured: Measured | None) -> None:
        """Remembers a measurement; None: it ran out of memory."""
        self.tried[candidate.variant] = self.tried.get(candidate.variant, 0) + 1
        if measured is not None:
            self.rows.append(measured)
            self.rates[candidate.variant] = measured.pictures_per_second

    def expected_seconds(self, candidate: Candidate) -> float:
        """What measuring will take, from the same settings at another batch, or else the slowest so far."""
        rate = self.rates.get(candidate.variant) or min(self.rates.values(), default=None)
        return self.start_seconds + (STEPS * candidate.config.batch_size / rate if rate else 0.0)


def methods_of(config: PlanConfig) -> list[str]:
    """The methods to try: those asked for, or all that can be had here."""
    if config.methods:
        return list(config.methods)
    has_peft = importlib.util.find_spec("peft") is not None
    return [method for method, _ in VARIANTS if has_peft or "lora" not in method]


def command(config: FinetuneConfig) -> str:
    """The command line that means `config`."""
    return shlex.join(["snello", "finetune", *_flags(config, FinetuneConfig(), "--")])


def _flags(config: Any, default: Any, prefix: str) -> Iterator[str]:
    """What sets `config` apart from `default`."""
    for name, value in vars(config).items():
        usual, dashed = getattr(default, name), name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from _flags(value, usual, f"{prefix}{dashed}.")
        elif value != usual or name == "method":
            if isinstance(value, bool):
                yield f"{prefix}{dashed}" if value else f"{prefix}no-{dashed}"
            else:
                yield from (f"{prefix}{dashed}", str(value))


def _said(config: FinetuneConfig) -> str:
    return f"{config.method}, batch {config.batch_size}, {config.precision}"


def _nothing(config: PlanConfig, least: FinetuneConfig, need: int, process: int) -> ConfigError:
    held = f", of which {process / 2**20:.0f} MiB are the process without a model" if process else ""
    return ConfigError(
        f"--memory {config.memory}: nothing that was tried fits; the least, {need / 2**20:.0f} MiB{held}, is needed "
        f"by: {command(least)}"
    )
