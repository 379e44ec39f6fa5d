"""Amounts and addresses that the command line gives as text, and what a network link would add. No torch."""

import re
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from ipaddress import IPv4Address, IPv6Address, ip_address

from snello.errors import ConfigError

BYTES = {unit: Fraction(1000**power) for power, unit in enumerate(("b", "kb", "mb", "gb", "tb"))}
BYTES |= {unit: Fraction(1024**power) for power, unit in enumerate(("kib", "mib", "gib", "tib"), start=1)}
BITS_PER_SECOND = {"kbit": Fraction(10**3), "mbit": Fraction(10**6), "gbit": Fraction(10**9)}
SECONDS = {"us": Fraction(1, 10**6), "ms": Fraction(1, 1000), "s": Fraction(1)}
_ADDRESS = re.compile(r"(?:\[([^\]]+)\]|([\w.-]+)):([0-9]{1,5})")
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", re.IGNORECASE)


def parse_bytes(text: str, name: str) -> int:
    """Bytes that a text such as `500MB` (10^6) or `1.5GiB` (2^30) means; a ConfigError where it means none."""
    rule = "an amount as 500MB or 2GiB"
    amount = _amount(text, BYTES, name, rule)
    if not 1 <= amount < 2**63:
        raise ConfigError(f"{name} must be {rule}, got {text!r}")
    return int(amount)


def parse_address(text: str, name: str, *, any_port: bool = False) -> tuple[str, int]:
    """Host and port that a text such as `server.example:7443` or `[::1]:7443` means.

    With `any_port` port 0 may be given, which lets the system choose where one listens; messages begin with `name`.

    Raises:
        ConfigError: where it means none.
    """
    match, lowest = _ADDRESS.fullmatch(text), 0 if any_port else 1
    if match and (not match[1] or isinstance(_ip(match[1]), IPv6Address)) and lowest <= int(match[3]) < 2**16:
        return match[1] or match[2], int(match[3])
    ports = "" if any_port else " with a port in 1..65535"
    raise ConfigError(f"{name} must be host:port, as server.example:7443 or [::1]:7443{ports}, got {text!r}")


def is_loopback(host: str) -> bool:
    """Whether a name or address can only mean this machine."""
    address = _ip(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def _ip(text: str) -> IPv4Address | IPv6Address | None:
    with suppress(ValueError):
        return ip_address(text)
    return None


@dataclass(frozen=True)
class Link:
    """A network link with the same rate in both directions."""

    bits_per_second: float
    round_trip_s: float

    @classmethod
    def parse(cls, text: str, name: str) -> "Link":
        """The link that a text such as `10mbit/20ms` means, 0 ms if left out; a ConfigError where it means none."""
        rate, slash, round_trip = text.partition("/")
        rule = "a link as 10mbit/20ms (rate in kbit, mbit or gbit per second, time of a round trip in us, ms or s)"
        bits = _amount(rate, BITS_PER_SECOND, name, rule)
        return cls(float(bits), float(_amount(round_trip, SECONDS, name, rule)) if slash else 0.0)

    def seconds(self, num_bytes: int, round_trips: int) -> float:
        """Time that so many bytes in so many round trips take, one after the other."""
        return num_bytes * 8 / self.bits_per_second + round_trips * self.round_trip_s


def _amount(text: str, units: dict[str, Fraction], name: str, rule: str) -> Fraction:
    """Exact: as a float, 1.001 kB would be a byte short."""
    match = _AMOUNT.fullmatch(text)
    if not match or match[2].lower() not in units or not 0 < Fraction(match[1]) < 10**18:
        raise ConfigError(f"{name} must be {rule}, got {text!r}")
    return Fraction(match[1]) * units[match[2].lower()]
