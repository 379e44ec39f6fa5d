"""The section of costs: where time and memory of a step go, this method against full fine-tuning."""

from collections.abc import Mapping
from typing import Any

from snello.measure.comparison import SAVING
from snello.reports.facts import Facts

MiB = 2**20
METHODS = {"alast": "ALaST", "alast+lora": "ALaST + LoRA", "lora": "LoRA", "full": "full, exact savings"}
"""What a method is called where it stands beside others; of the others the name says enough."""
OTHERS = {"lora": "LoRA", SAVING: "full, exact savings", "full": "full fine-tuning"}
"""What it is measured beside, by the prefix of its figures."""
BARS: tuple[tuple[str, str, str, float, int], ...] = (
    ("Time of a step", "step_time_s", "ms", 1e-3, 0),
    ("FLOPs of a picture", "flops_per_sample", "GFLOPs", 1e9, 3),
    ("Kept for the backward pass, a picture", "saved_bytes_per_sample", "MiB", MiB, 2),
    ("Peak memory of the process", "peak_memory_bytes", "MiB", MiB, 0),
)
"""Title, figure, unit, how much that is, digits."""
MEMORY = {
    "weight_bytes": "weights",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer state",
    "saved_bytes": "saved for backward",
}


def costs(facts: Facts) -> dict[str, Any] | None:
    """Time, FLOPs and memory of a step as bars; None where nothing was measured."""
    summary = facts.summary
    if summary is None or summary.costs.get("step_time_s") is None:
        return None
    values = summary.costs
    others = {called: f"{prefix}_" for prefix, called in OTHERS.items() if f"{prefix}_step_time_s" in values}
    methods = {METHODS.get(summary.method, summary.method): ""} | others
    return {
        "bars": [
            {"title": title, "rows": _bars(values, methods, name, unit, scale, digits)}
            for title, name, unit, scale, digits in BARS
        ],
        "memory": _memory(values, methods),
        "parts": list(MEMORY.values()),
        "batch": values.get("compared_batch_size"),
        "precision": summary.precision,
        "device": summary.device,
        "files": "summary.json",
    }


def _bars(
    values: Mapping[str, Any], methods: Mapping[str, str], name: str, unit: str, scale: float, digits: int
) -> list[dict[str, Any]]:
    """One figure of every method, as a share of the largest."""
    found = {called: values.get(prefix + name) for called, prefix in methods.items()}
    most = max((value for value in found.values() if value), default=1)
    return [
        {"name": called, "share": 0.0, "text": "does not fit into memory"}
        if value is None
        else {"name": called, "share": value / most, "text": f"{value / scale:,.{digits}f} {unit}"}
        for called, value in found.items()
    ]


def _memory(values: Mapping[str, Any], methods: Mapping[str, str]) -> list[dict[str, Any]]:
    """What the memory of every method that fits is for."""
    held: dict[str, dict[str, float]] = {}
    for called, prefix in methods.items():
        sizes = {part: values.get(prefix + name) for name, part in MEMORY.items()}
        known = {part: float(size) for part, size in sizes.items() if size is not None}
        if len(known) == len(MEMORY):
            held[called] = known
    most = max((sum(sizes.values()) for sizes in held.values()), default=0.0) or 1.0
    return [
        {
            "name": called,
            "text": f"{sum(sizes.values()) / MiB:,.0f} MiB",
            "parts": [{"share": size / most, "text": f"{part}: {size / MiB:,.1f} MiB"} for part, size in sizes.items()],
        }
        for called, sizes in held.items()
    ]
