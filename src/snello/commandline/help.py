"""Help as text: what comes first, one group, one setting, or everything; all words are those of the dataclasses."""

import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from snello.commandline.groups import FIRST, GROUPS, group_of
from snello.commandline.settings import Setting, settings_of
from snello.config.names import ALIASES, near_text, plain
from snello.config.values import flag
from snello.errors import ConfigError

HELP = ("-h", "--help", "--help-all")
_COLUMN = 22
"""Where texts begin: behind most flags, and with room for a sentence in 80 columns."""


def asked(args: Sequence[str]) -> tuple[str, str | None] | None:
    """The flag that asks for help among the words of a command, and the word behind it; None where nobody asks."""
    for i, word in enumerate(args):
        name, _, topic = word.partition("=")
        if name in HELP:
            behind = next((other for other in args[i + 1 : i + 2] if not other.startswith("-")), None)
            return name, topic or behind
    return None


def help_text(cls: type[Any], verb: str, ask: str = "--help", topic: str | None = None) -> str:
    """What a verb with the config `cls` says to `--help`, `--help-all`, or to one of them with a `topic`.

    Raises:
        ConfigError: where no setting nor group is called as the topic.
    """
    settings = settings_of(cls)
    if topic is not None and (about := _about(topic, settings, verb)):
        return "\n".join(about)
    lines = [_usage(settings, verb), "", *_wrapped(" ".join(str(cls.__doc__).split()), ""), ""]
    if verb not in FIRST:
        return "\n".join([*lines, *_section("options:", settings, _full)])
    first = sorted((s for s in settings if s.name in FIRST[verb]), key=lambda s: FIRST[verb].index(s.name))
    if ask != "--help-all":
        lines += _section("What matters first:", first, _short)
        return "\n".join([*lines, "", *_contents(settings, verb)])
    lines += _section("What matters first:", first, _full)
    for name, members in by_group(settings).items():
        others = [setting for setting in members if setting not in first]
        lines += ["", *_section(_title(name), others, _full)] if others else []
    return "\n".join(lines)


def _about(topic: str, settings: Sequence[Setting], verb: str) -> list[str]:
    """One group, or the settings of one name; nothing where a verb without groups has none, and shows all."""
    groups, name = by_group(settings) if verb in FIRST else {}, plain(topic)
    if topic in groups:
        return _section(_title(topic), groups[topic], _full)
    name = ALIASES.get(name, name)
    found = [s for s in settings if name in (s.name, s.name.replace(".", "_"), *s.name.split("."))]
    if found or not groups:
        return _section(f"snello {verb}:", found, _full) if found else []
    near = near_text(topic, [*groups, *(s.name.replace("_", "-") for s in settings)])
    raise ConfigError(f"no settings of snello {verb} are called {topic!r}{near}; groups: {', '.join(groups)}")


def _contents(settings: Sequence[Setting], verb: str) -> list[str]:
    """The groups, and how to see them."""
    groups = by_group(settings)
    lines = _wrapped(f"By purpose (snello {verb} --help GROUP shows one, --help-all everything):", "")
    for group in GROUPS:
        title = group.title.partition(" (")[0]
        lines += _beside(f"  {group.name}", title, column=12) if group.name in groups else []
    return lines


def by_group(settings: Iterable[Setting]) -> dict[str, list[Setting]]:
    """The groups that the settings are in, in their order in help."""
    settings = list(settings)
    members = {group.name: [s for s in settings if group_of(s.name) is group] for group in GROUPS}
    return {name: found for name, found in members.items() if found}


def _title(name: str) -> str:
    return next(f"{name}: {group.title}" for group in GROUPS if group.name == name)


def _usage(settings: Iterable[Setting], verb: str) -> str:
    words = [f"[{s.metavar} ...]" if s.is_many else s.metavar for s in settings if s.is_positional]
    words += [f"{flag(s.name)} {s.metavar}" for s in settings if s.is_required and not s.is_positional]
    return " ".join(["usage: snello", verb, *words, "[options]"])


def _section(title: str, settings: Iterable[Setting], texts: Callable[[Setting], tuple[str, str]]) -> list[str]:
    lines = _wrapped(title, "")
    for setting in settings:
        left, right = texts(setting)
        lines += _beside(f"  {left}", right)
    return lines


def _full(setting: Setting) -> tuple[str, str]:
    """Flags and values of a setting, and all that is said of it."""
    left = ", ".join(setting.flags) or setting.metavar
    if setting.flags and not setting.is_switch:
        left += f" {setting.metavar}" + (" ..." if setting.is_many else "")
    said = re.search(r"\bdefault: ", setting.text, re.IGNORECASE) is not None
    default = "" if said else _default(setting)
    return left, setting.text.removesuffix(".") + default if default else setting.text


def _short(setting: Setting) -> tuple[str, str]:
    """The flag and what it takes, the first clause of what is said, and the default."""
    clauses = re.split(r"[.;] |\.$", setting.text)
    what = re.split(r"(?<=.{60}): ", clauses[0])[0]  # how it is done is for who asks for more
    default = next((clause for clause in clauses if clause.lower().startswith("default: ")), None)
    left = f"{setting.flags[0]} {setting.metavar}".rstrip() if setting.flags else setting.metavar
    off = setting.is_switch and not setting.default
    return left, what + (f" (d{default[1:]})" if default else "" if off else _default(setting))


def _default(setting: Setting) -> str:
    """The default as it would be typed, in brackets; nothing where it is to leave something open."""
    value = setting.default
    if setting.is_required:
        return " (must be given)"
    if value is None or value == ():
        return ""
    typed = ("on" if value else "off") if setting.is_switch else " ".join(map(str, value)) if setting.is_many else value
    return f" (default: {typed})"


def _beside(left: str, right: str, column: int = _COLUMN) -> list[str]:
    """A text beside what it is about, or below where that is long."""
    lines = _wrapped(right, " " * column)
    if len(left) < column and lines:
        return [left + lines[0][len(left) :], *lines[1:]]
    return [*_wrapped(left.strip(), "  ", "    "), *lines]


def _wrapped(text: str, indent: str, hanging: str | None = None) -> list[str]:
    """Lines as wide as the terminal, within reason, all but the first `hanging`; flags stay whole."""
    width, rest = min(max(shutil.get_terminal_size().columns, 60), 100), indent if hanging is None else hanging
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
    )
