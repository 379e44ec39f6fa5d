"""How numbers, shares and settings read in a report."""

from collections.abc import Sequence
from typing import Any

from snello.runs.summary import Traffic


def share_of_full(values: dict[str, Any], name: str) -> float | None:
    """One of the costs of a step as a share of plain full fine-tuning's; None where that was not measured."""
    own, full = values.get(name), values.get(f"full_{name}")
    return None if own is None or not full else own / full


def less(crossed: Traffic) -> str:
    """How many times less crossed the cut than would have uncompressed."""
    return f"{crossed.uncompressed_bytes / max(1, crossed.uplink_bytes + crossed.downlink_bytes):.1f}x less"


def course(what: str, values: Sequence[float]) -> str:
    """Where values began and ended, for those who do not see the curve."""
    return f"{what}: from {values[0]:.3g} to {values[-1]:.3g}" if values else what


def size_text(num: float) -> str:
    """Bytes in decimal units, as networks and disks are sold."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num >= scale:
            return f"{num / scale:,.2f} {unit}"
    return f"{num:,.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds, from a hundred on minutes and hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def setting_text(value: Any) -> str:
    """A setting's value as a person reads it."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return "default" if value is None else str(value)


def percent(share: float, digits: int = 1) -> str:
    """A share as per cent."""
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"
