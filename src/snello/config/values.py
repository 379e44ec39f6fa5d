"""Configs as plain values and back: what YAML files, JSON messages and run folders hold."""

import contextlib
import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from snello.config.names import advice, near_text
from snello.errors import ConfigError, require

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain values that YAML and JSON can hold; paths become strings."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return values


def from_dict(
    cls: type[T], values: Mapping[str, Any], where: str = "config", *, checked: bool = True, base: T | None = None
) -> T:
    """The config of class `cls` that `values` describe; keys that are left out are as in `base`, or else by default.

    Unless `checked`, only the types of `values` are: flags may still complete what a file leaves open, and what tyro
    makes of both is checked as a whole.

    Raises:
        ConfigError: for an unknown key, a value of the wrong type, or one out of range, naming `where` it stands.
    """
    hints = typing.get_type_hints(cls)
    unknown = [str(key) for key in values if key not in hints]
    if unknown:
        told = [key + advice(key, _names(hints)) for key in unknown]
        rest = "" if all(map(str.__ne__, told, unknown)) else f"; known: {', '.join(hints)}"
        raise ConfigError(f"{where}: unknown setting {', '.join(told)}{rest}")
    known = {field.name: default_of(field) for field in dataclasses.fields(typing.cast(Any, cls))}
    known = {name: value for name, value in known.items() if value is not dataclasses.MISSING}
    known |= {} if base is None else vars(base)
    for key, value in values.items():
        known[key] = _convert(value, hints[key], f"{where}: {key}", checked, known.get(key))
    if checked:
        return cls(**known)
    config = object.__new__(cls)
    vars(config).update(known)  # frozen, and checked only when it is made in the usual way
    return config


def _names(hints: Mapping[str, Any]) -> list[str]:
    """The names of all settings, those of groups too, as `alast.min_budget`."""
    groups = {name: typing.get_type_hints(hint) for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    return [*hints, *(f"{group}.{name}" for group, names in groups.items() for name in names)]


def default_of(field: "dataclasses.Field[Any]") -> Any:
    """The default of a field, made where it has a factory; MISSING where it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _convert(value: Any, hint: Any, where: str, checked: bool, base: Any) -> Any:
    """`value` as YAML gave it, as the type `hint`; YAML's 1e-3 is a string, and paths are strings too."""
    if _is_union(hint):
        if value is None and type(None) in hint.__args__:
            return None
        hint = next(option for option in hint.__args__ if option is not type(None))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a mapping of settings, got {value!r}")
        return from_dict(typing.cast(type, hint), value, where, checked=checked, base=base)
    if typing.get_origin(hint) is Literal:
        if value not in hint.__args__:
            near = near_text(str(value), hint.__args__)
            raise ConfigError(f"{where} must be one of {', '.join(hint.__args__)}, got {value!r}{near}")
        return value
    if typing.get_origin(hint) is tuple and value is not None:
        items = value if isinstance(value, (list, tuple)) else (value,)  # `name: one` for a list of one
        return tuple(_convert(item, typing.get_args(hint)[0], where, checked, None) for item in items)
    fits = value is not None and isinstance(value, bool) == (hint is bool)  # bool() and int() would take anything
    fits &= not (hint is int and isinstance(value, float))
    fits &= hint is not str or isinstance(value, (str, int, float))
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if fits:
            return hint(value)
    raise ConfigError(f"{where} must be of type {hint.__name__}, got {value!r}")


def _is_union(hint: Any) -> bool:
    """Whether it was written with `|`, which with a Literal makes another type than with a class."""
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def read_yaml(path: Path, where: str | None = None) -> dict[str, Any]:
    """The mapping in the YAML file `path`, called `where` in messages.

    Raises:
        ConfigError: where the file is missing, is no YAML, or holds no mapping.
    """
    where = where or str(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must hold settings as `name: value`")
    return values


def flag(name: str) -> str:
    """The flag of a setting: `batch_size` is `--batch-size`, `alast.min_budget` is `--alast.min-budget`."""
    return "--" + name.replace("_", "-")


def require_choices(config: Any, prefix: str = "", section: str = "") -> None:
    """Raises a ConfigError for a setting that is none of its choices, which its type alone does not keep from Python.

    The message has the flag, which begins with `prefix`, or in a `section` the option, as `require` does.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        several = typing.get_origin(hint) is tuple
        kind = typing.get_args(hint)[0] if several or _is_union(hint) else hint
        if typing.get_origin(kind) is not Literal:
            continue
        value, choices = getattr(config, name), typing.get_args(kind)
        for one in value if several else (value,) if value is not None else ():
            called = name if section else flag(f"{prefix}{name}")
            require(one in choices, called, f"one of {', '.join(choices)}", one, section=section)
