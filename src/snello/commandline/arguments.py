"""The words of a command line: names of other tools, unknown flags, misspelt values, unknown verbs.

What is wrong is said here, with what was meant, before tyro reads the words.
"""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from snello.commandline.settings import Setting, settings_of
from snello.config.names import ALIASES, advice, near_text, plain
from snello.config.values import flag
from snello.errors import ConfigError

VERB_HINTS = {
    "train": "finetune",
    "fit": "finetune",
    "eval": "evaluate",
    "val": "evaluate",
    "validate": "evaluate",
    "test": "evaluate",
    "infer": "predict",
    "classify": "predict",
    "check": "check-data",
    "convert": "export",
    "server": "serve",
    "client": "join",
}
"""What other tools call a verb."""
_NUMBERS: dict[str, tuple[Callable[[str], object], str]] = {
    "INT": (int, "a whole number"),
    "FLOAT": (float, "a number"),
}
_SHORT = re.compile(r"-[A-Za-z]")
_BOOLEANS = ("true", "false", "yes", "no", "on", "off")


def require_verb(word: str, known: Collection[str]) -> None:
    """Raises a ConfigError that says which verb may be meant, unless `word` is one of those `known`."""
    if word in known:
        return
    if word.startswith("-"):
        raise ConfigError(f"the first word is what to do, got {word}: say for instance snello finetune {word} ...")
    meant = VERB_HINTS.get(word, "")
    near = f": snello calls it {meant}" if meant in known else near_text(word, known)
    raise ConfigError(f"unknown verb {word!r}{near}" + ("" if near else f"; known: {', '.join(known)}"))


def with_own_names(cls: type[Any], args: Sequence[str], verb: str) -> list[str]:
    """The words behind a verb, names of other tools replaced by those of the config `cls`.

    Raises:
        ConfigError: for a flag that the config does not have, a value that is missing, no number or none of a few, or a
            word too many, with what is nearest.
    """
    settings = settings_of(cls)
    takes_words = any(setting.is_positional for setting in settings)
    result: list[str] = []
    current: Setting | None = None  # what the next word is a value of
    is_needed = False  # such a value may itself begin with a dash, as -inf
    for i, word in enumerate(args):
        if word.startswith("--") or (_SHORT.match(word) and not is_needed):
            name, equals, value = word.partition("=")
            setting, name = _find(name, settings, verb)
            _require_fit(setting, name, value if equals else next(iter(args[i + 1 :]), None), bool(equals))
            if equals:
                _require_value(setting, name, value)
            current = None if equals or setting.is_switch else setting
            is_needed = current is not None
            result.append(name + equals + value)
            continue
        if current is not None:
            _require_value(current, current.flags[0], word)
        elif not takes_words:
            raise ConfigError(_unexpected(word, settings))
        current = current if current is not None and current.is_many else None
        is_needed = False
        result.append(word)
    return result


def _find(name: str, settings: Sequence[Setting], verb: str) -> tuple[Setting, str]:
    """The setting that a flag is of, and how snello writes the flag."""
    known = {one: setting for setting in settings for one in setting.flags}
    written = name.replace("_", "-")
    if written not in known:
        written = flag(ALIASES.get(plain(name), ""))
    if written in known:
        return known[written], written
    without = {setting.name: f"{setting.metavar}, without a flag" for setting in settings if not setting.flags}
    names = [*(plain(one) for one in known), *without]
    near = advice(name, names, lambda one: without.get(one) or flag(one))
    raise ConfigError(f"unknown flag {name}{near or f'; snello {verb} --help-all lists all that there are'}")


def _require_fit(setting: Setting, name: str, behind: str | None, is_joined: bool) -> None:
    """Raises a ConfigError where a switch has a value, or another flag has none; `behind` is what comes next."""
    if setting.is_switch and (is_joined or (behind or "").lower() in _BOOLEANS):
        raise ConfigError(f"{name} takes no value: say {' or '.join(setting.flags)}")
    is_missing = behind is None or (behind.startswith("--") and not is_joined)
    if is_missing and not setting.is_switch and not setting.is_many:
        raise ConfigError(f"{name} needs a value: say {name} {setting.metavar}")


def _require_value(setting: Setting, name: str, value: str) -> None:
    """Raises a ConfigError where a value is not the number, or none of the few words, that a setting takes."""
    if setting.takes_none and value == "None":
        return
    parse, rule = _NUMBERS.get(setting.metavar, (str, ""))
    try:
        parse(value)
    except ValueError:
        raise ConfigError(f"{name} must be {rule}, got {value!r}") from None
    if setting.choices and value not in setting.choices:
        near = near_text(value, setting.choices)
        raise ConfigError(f"{name} must be one of {', '.join(setting.choices)}, got {value!r}{near}")


def _unexpected(word: str, settings: Sequence[Setting]) -> str:
    """What to say of a word that no flag asked for: `epochs=3` of other tools, or pictures without --data."""
    name, equals, value = word.partition("=")
    known = {setting.name for setting in settings}
    name = ALIASES.get(plain(name), plain(name))
    if equals and name in known:
        return f"unexpected {word!r}: say {flag(name)} {value}"
    rest = f": pictures are given with --data {word}" if "data" in known else "; settings are given as --name value"
    return f"unexpected {word!r}{rest}"
