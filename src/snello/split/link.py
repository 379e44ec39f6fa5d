"""Amounts that the command line gives as text, and what a network link would add to a run. No torch."""

import re
from dataclasses import dataclass

from snello.errors import ConfigError

BYTES = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
BITS_PER_SECOND = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", re.IGNORECASE)


def parse_bytes(text: str, name: str) -> int:
    """Bytes that a text such as `500MB` (10^6) or `1.5GiB` (2^30) means.

    Raises:
        ConfigError: where it means none.
    """
    return int(_amount(text, BYTES, name, "an amount as 500MB or 2GiB"))


@dataclass(frozen=True)
class Link:
    """A network link with the same rate in both directions."""

    bits_per_second: float
    round_trip_s: float

    @classmethod
    def parse(cls, text: str, name: str) -> "Link":
        """The link that a text such as `10mbit/20ms` means: rate, and time of a round trip (0 if left out).

        Raises:
            ConfigError: where it means none.
        """
        rate, _, round_trip = text.partition("/")
        rule = "a link as 10mbit/20ms (rate in kbit, mbit or gbit per second, time of a round trip in us, ms or s)"
        return cls(
            _amount(rate, BITS_PER_SECOND, name, rule), _amount(round_trip, SECONDS, name, rule) if round_trip else 0.0
        )

    def seconds(self, num_bytes: int, round_trips: int) -> float:
        """Time that so many bytes in so many round trips take, one after the other."""
        return num_bytes * 8 / self.bits_per_second + round_trips * self.round_trip_s


def _amount(text: str, units: dict[str, float] | dict[str, int], name: str, rule: str) -> float:
    match = _AMOUNT.fullmatch(text)
    if not match or match[2].lower() not in units or float(match[1]) <= 0:
        raise ConfigError(f"{name} must be {rule}, got {text!r}")
    return float(match[1]) * units[match[2].lower()]
