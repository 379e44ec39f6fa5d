"""What fits into a given memory: estimates without allocating anything, then real steps of what may fit.

An estimate takes a step of the real model on tensors without data, so it counts what the step would hold, to the
byte, and what cannot fit is never run. The rest is measured: each method once, then the most promising first. A method
is estimated when its turn comes, for on a large model that takes as long as measuring, and counts against the time.
"""

import importlib.util
import shlex
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from typing import Any, Literal

import torch

from snello.config import AlastConfig, FinetuneConfig, PlanConfig
from snello.config.effect import changed
from snello.config.units import parse_bytes
from snello.config.values import flag
from snello.devices import resolve_device, resolve_precision
from snello.errors import ConfigError
from snello.measure.process import OutOfMemoryError, Process, available_memory, make_request
from snello.measure.step import Memory, TrainingStep, resident_memory
from snello.models import create_model
from snello.vit import AttentionPath, ViT
from snello.vit.attention import faster_attention

LOWEST = AlastConfig(blocks=0.75, draw="lowest-first", train_embeddings=False)
VARIANTS: tuple[tuple[str, AlastConfig], ...] = (
    *((method, AlastConfig()) for method in ("alast", "full", "alast+lora", "lora", "last-k", "head")),
    ("alast", LOWEST),
)
"""Methods and settings, in the order in which they are tried: each method once, then ALaST in another way."""
STEPS = 3.5  # that measuring a candidate takes: one to warm up, one that is timed, one that is counted
SHORTEST = 0.3  # seconds of timed steps
SLACK = 2**30  # beyond the memory that is asked for, before a measuring process is stopped: stacks, reservations


@dataclass(frozen=True)
class Candidate:
    """Settings of a run, and what a step of it is estimated to need."""

    config: FinetuneConfig
    memory: Memory


@dataclass(frozen=True)
class PlanRow:
    """A candidate after real steps."""

    config: FinetuneConfig
    step_time_s: float
    memory: Memory
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
        method, lowest_first = _kind(self.config)
        measured = ("pictures_per_second", "step_time_s", "need_bytes", "peak_bytes", "process_bytes")
        return {
            "method": method,
            "lowest_first": lowest_first,
            **{name: getattr(self.config, name) for name in ("batch_size", "precision", "grad_checkpointing")},
            **{name: getattr(self, name) for name in measured},
            **asdict(self.memory),
            "command": command(self.config),
        }


@dataclass(frozen=True)
class NotRanked:
    """A method of which no setting could be ranked."""

    method: str
    lowest_first: bool
    reason: Literal["does not fit", "no time"]


@dataclass(frozen=True)
class Plan:
    """What was found."""

    memory_bytes: int
    rows: list[PlanRow]
    """What fits, the fastest first."""
    not_ranked: list[NotRanked]
    """The methods that are missing there."""
    candidates: int
    too_large: int
    """Not run, since the estimate does not fit."""
    refused: int
    """Run, and found not to fit."""
    left_out: int
    """Not run, since the time was up; not even estimated, perhaps."""

    def to_dict(self) -> dict[str, Any]:
        """As values that JSON can hold."""
        values = {**vars(self), "not_ranked": [asdict(one) for one in self.not_ranked]}
        return values | {"rows": [row.row() for row in self.rows]}


def make_plan(config: PlanConfig, say: Callable[[str], None] = lambda text: None) -> Plan:
    """Tries what `config` says on this machine.

    Raises:
        ConfigError: for a memory, device or precision that cannot be used, where nothing fits, or where the time was
            up before anything was measured.
        ModelError: for a model that cannot be built.
        SnelloError: where a measuring process fails for another reason than memory.
    """
    device = resolve_device(config.device)
    try:
        memory = available_memory(device) if config.memory == "auto" else parse_bytes(config.memory, "--memory")
    except OSError:
        raise ConfigError("--memory auto is for Linux and CUDA devices: give an amount as 4GB") from None
    planner = _Planner(config, device, memory, say)
    planner.search()
    return planner.plan()


@dataclass
class _Variant:
    """A method in one precision, and what has been found out about it: all that stays while the batch grows."""

    smallest: FinetuneConfig
    round: int
    """When its first candidate is measured."""
    waiting: list[Candidate] | None = None
    """What may fit by estimate and is not measured yet; None before it is estimated."""
    too_large: list[Candidate] = field(default_factory=list)
    refused: list[Candidate] = field(default_factory=list)
    measured: list[PlanRow] = field(default_factory=list)
    left_out: int = 0

    @property
    def order(self) -> tuple[int, float]:
        """Each method once in the first precision, then larger batches and the next one; the fastest first."""
        return self.round + len(self.measured) + len(self.refused), -self.rate

    @property
    def rate(self) -> float:
        """Pictures per second, as last measured; 0 before."""
        return self.measured[-1].pictures_per_second if self.measured else 0.0


class _Planner:
    """Estimates and measurements of one model on one device."""

    def __init__(self, config: PlanConfig, device: torch.device, memory: int, say: Callable[[str], None]) -> None:
        self.deadline = time.monotonic() + config.seconds
        self.config, self.device, self.memory, self.say = config, device, memory, say
        self.base = resident_memory(device) if device.type == "cpu" else 0
        self.sizes = sorted(set(config.batch_sizes))
        self.start_seconds = 0.0  # of the last measuring process, until it could take a step
        precisions = dict.fromkeys(resolve_precision(name, device) for name in config.precisions)
        with torch.device("meta"):
            self._vit = ViT(create_model(config.model, "none", config.num_classes, config.image_size))
        self._attention: dict[str, AttentionPath] = {}
        usual = FinetuneConfig(
            model=config.model, image_size=config.image_size, device=config.device, batch_size=self.sizes[0]
        )
        self.variants = [
            _Variant(replace(usual, method=method, alast=alast, precision=precision), 2 * number)
            for number, precision in enumerate(precisions)
            for method, alast in VARIANTS
            if method in methods_of(config)
        ]

    def search(self) -> None:
        """Estimates a variant when its turn comes and takes real steps of what may fit, until the time is up."""
        while waiting := [variant for variant in self.variants if variant.waiting != []]:
            variant = min(waiting, key=lambda one: one.order)
            if variant.waiting is None:
                self._sort_by_estimate(variant)
            else:
                self._try(variant, variant.waiting.pop(0))

    def _sort_by_estimate(self, variant: _Variant) -> None:
        """Tells what may fit from what does not; with checkpointing only where a batch does not do without."""
        variant.waiting = []
        try:
            self._require_time()
            found = self._estimates(variant.smallest, self.sizes)
            large = [one.config.batch_size for one in found if not self._fits(one)]
            if large and variant.smallest.method not in ("head", "last-k"):
                found += self._estimates(replace(variant.smallest, grad_checkpointing=True), large)
        except TimeoutError:
            variant.left_out = len(self.sizes)
            return
        for candidate in found:
            (variant.waiting if self._fits(candidate) else variant.too_large).append(candidate)
        if not variant.waiting:
            self.say(f"  {_label(variant.smallest)}: does not fit by estimate")

    def _require_time(self) -> None:
        if time.monotonic() >= self.deadline:
            raise TimeoutError

    def _fits(self, candidate: Candidate) -> bool:
        return self.base + candidate.memory.total_bytes <= self.memory

    def _estimates(self, config: FinetuneConfig, sizes: list[int]) -> list[Candidate]:
        """Estimated at the smallest and the largest batch; between them, memory is a straight line."""
        ends = sorted({sizes[0], sizes[-1]})
        low, high = (asdict(memory) for memory in (self._estimate(config, ends) * 2)[:2])
        found = []
        for size in sizes:
            share = (size - sizes[0]) / max(1, sizes[-1] - sizes[0])
            values = {name: round(low[name] + share * (high[name] - low[name])) for name in low}
            found.append(Candidate(replace(config, batch_size=size), Memory(**values)))
        return found

    def _estimate(self, config: FinetuneConfig, sizes: list[int]) -> list[Memory]:
        options: dict[str, Any] = {"num_classes": self.config.num_classes, "batch_size": config.batch_size}
        options |= {"device": self.device, "precision": config.precision, "attention": self._faster(config.precision)}
        step = TrainingStep(config, without_data=True, **options)
        found = []
        for size in sizes:
            step.set_batch_size(size)
            found.append(step.memory(self._require_time))
        return found

    def _faster(self, precision: Any) -> AttentionPath:  # resolved, not `auto`
        if precision not in self._attention:
            self._attention[precision] = faster_attention(self._vit, self.sizes[0], self.device, precision)
        return self._attention[precision]

    def _try(self, variant: _Variant, candidate: Candidate) -> None:
        """Measures a candidate, unless or until there is no time for it."""
        config = candidate.config
        expected = self.start_seconds + STEPS * config.batch_size / variant.rate if variant.rate else 0.0
        left = self.deadline - time.monotonic()
        if expected > left or left <= 0:
            variant.left_out += 1  # a smaller or faster one may still be in time
            return
        try:
            row = self._measure(config, left)
        except TimeoutError:
            variant.left_out += 1
        except OutOfMemoryError:
            variant.refused.append(candidate)
            self.say(f"  {_label(config)}: does not fit")
        else:
            variant.measured.append(row)
            self.say(f"  {_label(config)}: {row.pictures_per_second:.1f} pictures/s")

    def _measure(self, config: FinetuneConfig, seconds: float) -> PlanRow:
        """Takes real steps in a process that has so many seconds and little more than the memory."""
        started = time.monotonic()
        device, attention = str(self.device), self._faster(config.precision)
        request = make_request(config, self.config.num_classes, device, config.precision, attention)
        request["memory_limit"] = self.memory + self.memory // 4 + SLACK
        with Process(request, seconds) as process:
            self.start_seconds = time.monotonic() - started
            process.ask("step")
            times = [process.ask("step")["seconds"]]
            while sum(times) < SHORTEST:
                times.append(process.ask("step")["seconds"])
            counted = process.ask("memory")
        peak, before = counted.pop("peak_memory_bytes"), counted.pop("process_bytes")
        on_gpu = self.device.type == "cuda"
        return PlanRow(config, statistics.median(times), Memory(**counted), peak, 0 if on_gpu else before)

    def plan(self) -> Plan:
        """Ranks what was found to fit."""
        measured = [row for variant in self.variants for row in variant.measured]
        rows = [row for row in measured if row.need_bytes <= self.memory]
        rows.sort(key=lambda row: -row.pictures_per_second)
        too_large = [one for variant in self.variants for one in variant.too_large]
        refused = [one for variant in self.variants for one in variant.refused]
        left_out = sum(variant.left_out for variant in self.variants)
        if not rows and left_out:
            raise ConfigError(
                f"--seconds {self.config.seconds:g}: over before anything that fits was measured ({left_out} settings "
                "were left out): give more, or fewer --methods, --precisions or --batch-sizes"
            )
        if not rows:
            raise self._nothing(measured, too_large or refused)
        return Plan(
            self.memory,
            rows,
            self._not_ranked(rows),
            candidates=len(measured) + len(too_large) + len(refused) + left_out,
            too_large=len(too_large),
            refused=len(refused) + len(measured) - len(rows),
            left_out=left_out,
        )

    def _not_ranked(self, rows: list[PlanRow]) -> list[NotRanked]:
        ranked, left_out = {_kind(row.config) for row in rows}, dict[tuple[str, bool], int]()
        for variant in self.variants:
            kind = _kind(variant.smallest)
            left_out[kind] = left_out.get(kind, 0) + variant.left_out
        return [
            NotRanked(*kind, "no time" if number else "does not fit")
            for kind, number in left_out.items()
            if kind not in ranked
        ]

    def _nothing(self, measured: list[PlanRow], estimated: list[Candidate]) -> ConfigError:
        """Names what needs least, by measurement where there are some."""
        needs = [(row.need_bytes, row.process_bytes, row.config) for row in measured]
        needs = needs or [(self.base + one.memory.total_bytes, self.base, one.config) for one in estimated]
        need, process, least = min(needs, key=lambda values: values[0])
        held = f", of which {process / 2**20:.0f} MiB are the process without a model" if process else ""
        return ConfigError(
            f"--memory {self.config.memory}: nothing that was tried fits; the least, {need / 2**20:.0f} MiB{held}, is "
            f"needed by: {command(least)}"
        )


def _kind(config: FinetuneConfig) -> tuple[str, bool]:
    """A method, and whether its blocks are drawn lowest first."""
    return config.method_name, config.alast.draw == "lowest-first"


def _label(config: FinetuneConfig) -> str:
    return f"{method_label(*_kind(config))}, batch {config.batch_size}, {config.precision}"


def method_label(method: str, lowest_first: bool) -> str:
    """A method in words."""
    return f"{method}, lowest-first" if lowest_first else method


def methods_of(config: PlanConfig) -> list[str]:
    """The methods to try: those asked for, or all that can be had here."""
    if config.methods:
        return list(config.methods)
    has_peft = importlib.util.find_spec("peft") is not None
    return [method for method, _ in VARIANTS if has_peft or "lora" not in method]


def command(config: FinetuneConfig) -> str:
    """The command line that means `config`."""
    words = ["snello", "finetune"]
    for name in changed(config):
        value, (group, dot, own) = attrgetter(name)(config), name.rpartition(".")
        if isinstance(value, bool):
            words.append(flag(name if value else f"{group}{dot}no_{own}"))
        else:
            words += [flag(name), *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return shlex.join(words)
