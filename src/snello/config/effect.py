"""Settings without effect: a config refuses them, naming the flag and what it needs.

Each config lists in `NEEDS` what its settings need; a new entry is one line there.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from snello.config.methods import EARLIER
from snello.config.values import default_of, flag, from_dict
from snello.errors import ConfigError

REMOVED = ("split.prefetch",)
"""Settings of earlier versions, which their runs have kept."""


class Need(NamedTuple):
    """What a setting needs to have an effect."""

    setting: str
    """Its name, as `last_k` or `alast.flops`; `alast` stands for all settings of that group."""
    is_met: Callable[[Any], bool]
    """Whether a config has what the setting needs."""
    reason: str
    """The end of the message, as `without --split.cut`."""


def changed(config: Any, usual: Any = None, prefix: str = "") -> Iterator[str]:
    """The names of the settings in which `config` differs from `usual`, or else from the defaults of its class."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = default_of(field) if usual is None else getattr(usual, field.name)
        if dataclasses.is_dataclass(value):
            yield from changed(value, default, f"{prefix}{field.name}.")
        elif value != default:
            yield prefix + field.name


def idle(config: Any) -> Iterator[tuple[str, str]]:
    """The changed settings that have no effect in `config`, each with the reason."""
    for name in changed(config):
        for need in config.NEEDS:
            if f"{name}.".startswith(f"{need.setting}.") and not need.is_met(config):
                yield name, need.reason
                break


def require_effect(config: Any) -> None:
    """Raises a ConfigError that names the first setting without effect, if there is one."""
    for name, reason in idle(config):
        raise ConfigError(f"{flag(name)} has no effect {reason}")


def effective(cls: type[Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` without the settings that have no effect, nor any left from earlier versions.

    For a run's config.yaml, which an earlier version may have written, and for settings of one method under another.

    Raises:
        ConfigError: for an unknown key or a value of the wrong type.
    """
    kept = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
    for name in REMOVED:
        _remove(kept, name)
    alast = kept.get("alast")
    if isinstance(alast, dict) and "adapt" not in alast:  # a run of before: what it left open had another meaning
        kept["alast"] = EARLIER | {name: value for name, value in alast.items() if value is not None}
        kept.setdefault("exact_savings", False)
    for name, _ in list(idle(from_dict(cls, kept, where, checked=False))):
        _remove(kept, name)
    return kept


def _remove(values: dict[str, Any], name: str) -> None:
    group, _, setting = name.rpartition(".")
    holder = values.get(group) if group else values
    if isinstance(holder, dict):
        holder.pop(setting, None)
