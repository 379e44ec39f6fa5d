"""The settings of a config, one by one: flag, values, default and text, all from its dataclass."""

import ast
import dataclasses
import functools
import inspect
import itertools
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from snello.config.values import default_of, flag

_KINDS = {"int": "INT", "float": "FLOAT", "Path": "PATH", "bool": ""}


@dataclass(frozen=True)
class Setting:
    """One setting, as `alast.min_budget`."""

    name: str
    text: str
    """What its dataclass says of it, in one line."""
    default: Any
    """MISSING where it must be given."""
    metavar: str
    choices: tuple[str, ...]
    """The values that it may have, if there are few."""
    takes_none: bool
    is_many: bool
    """Whether it takes several values."""
    is_switch: bool
    is_positional: bool

    @property
    def flags(self) -> tuple[str, ...]:
        """How it is given: one flag, two where it is switched on and off, none where it has none."""
        if self.is_positional:
            return ()
        if not self.is_switch:
            return (flag(self.name),)
        group, dot, name = self.name.rpartition(".")
        return (flag(self.name), flag(f"{group}{dot}no_{name}"))

    @property
    def is_required(self) -> bool:
        """Whether it must be given."""
        return self.default is dataclasses.MISSING


def settings_of(cls: type[Any]) -> tuple[Setting, ...]:
    """All settings of a config, those of its groups too, in the order of its fields."""
    return tuple(_settings(cls, None, ""))


def _settings(cls: type[Any], defaults: Any, prefix: str) -> Iterator[Setting]:
    hints, texts = typing.get_type_hints(cls, include_extras=True), texts_of(cls)
    for field in dataclasses.fields(cls):
        default = default_of(field) if defaults is None else getattr(defaults, field.name)
        if dataclasses.is_dataclass(default):
            yield from _settings(typing.cast(type, type(default)), default, f"{prefix}{field.name}.")
        else:
            yield _setting(prefix + field.name, hints[field.name], default, texts.get(field.name, ""))


def _setting(name: str, hint: Any, default: Any, text: str) -> Setting:
    marks: tuple[Any, ...] = ()
    while typing.get_origin(hint) is typing.Annotated:
        hint, *more = typing.get_args(hint)
        marks += tuple(more)
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    kind = next(option for option in options if option is not type(None))
    is_many = typing.get_origin(kind) is tuple
    kind = typing.get_args(kind)[0] if is_many else kind
    choices = tuple(map(str, typing.get_args(kind))) if typing.get_origin(kind) is Literal else ()
    is_positional = tyro.conf.Positional in marks
    last = name.rpartition(".")[2].upper()
    called = next((mark.metavar for mark in marks if getattr(mark, "metavar", None)), None)
    word = f"{{{','.join(choices)}}}" if choices else _KINDS.get(kind.__name__, last)
    return Setting(
        name,
        text,
        default,
        metavar=called or (last if is_positional else word),
        choices=choices,
        takes_none=type(None) in options,
        is_many=is_many,
        is_switch=kind is bool,
        is_positional=is_positional,
    )


def texts_of(cls: type[Any]) -> dict[str, str]:
    """The string under each field of a dataclass and its bases, in one line."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        texts |= _texts_in(base.__module__).get(base.__name__, {}) if dataclasses.is_dataclass(base) else {}
    return texts


@functools.cache
def _texts_in(module: str) -> dict[str, dict[str, str]]:
    """The same for every class of a module, from its source."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: dict(_texts(node.body)) for node in tree.body if isinstance(node, ast.ClassDef)}


def _texts(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for field, below in itertools.pairwise(body):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            yield field.target.id, " ".join(below.value.value.split())
