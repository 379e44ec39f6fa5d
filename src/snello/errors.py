"""What snello raises for input it cannot use; the command line prints it as one line and exits with code 2.

SnelloError
├── ConfigError        a setting out of range, or two that contradict each other
├── DataError          a data folder or picture that cannot be used
├── ModelError         an unknown or unsupported model, or weights that do not fit it
├── CheckpointError    a run folder or checkpoint that cannot be read or written
├── TrainingError      training cannot go on (the loss is not finite)
├── ProtocolError      what came over the wire is not what the other side may send
├── NetworkError       the other side cannot be reached
└── AuthenticationError  the other side did not admit this client
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

__all__ = [
    "AuthenticationError", "CheckpointError", "ConfigError", "DataError", "ModelError", "NetworkError", "ProtocolError",
    "SnelloError", "SnelloWarning", "TrainingError",
]  # fmt: skip


class SnelloError(Exception):
    """Base of every error a user can cause and mend; its text says what was wrong, where, and what to do."""

    section = ""
    """Where the flag of the setting stands whose name the text begins with: `alast` for `--alast.blocks`."""

    @property
    def for_command_line(self) -> str:
        """The text, naming a setting by its flag."""
        name, _, rest = str(self).partition(" ")
        return f"--{self.section}.{name.replace('_', '-')} {rest}" if self.section else str(self)


class SnelloWarning(UserWarning):
    """Something works, but not as the user may think; the command line prints it as one line."""


class ConfigError(SnelloError, ValueError):
    """A setting is out of range, or two settings contradict each other."""


class DataError(SnelloError):
    """A data folder or a picture cannot be used."""


class ModelError(SnelloError):
    """The model is unknown or unsupported, or the weights do not fit it."""


class CheckpointError(SnelloError):
    """A run folder or a checkpoint cannot be read or written."""


class TrainingError(SnelloError):
    """Training cannot go on; what was saved before stays as it is."""


class ProtocolError(SnelloError):
    """What came over the wire is not what the other side may send; nothing was done with it.

    `code` is a value of `snello.split.wire.refusals.Code`: what the refusal is called that answers it.
    """

    def __init__(
        self, text: str, code: Literal["malformed", "version", "too-large", "unknown-basis"] = "malformed"
    ) -> None:
        super().__init__(text)
        self.code = code


class NetworkError(SnelloError):
    """The other side cannot be reached, or has not answered for too long."""


class AuthenticationError(SnelloError):
    """The other side did not admit this client."""


def require(ok: bool, name: str, rule: str, got: object, section: str = "") -> None:
    """Raises the ConfigError `name must be rule, got ...` unless `ok`."""
    if not ok:
        error = ConfigError(f"{name} must be {rule}, got {got}")
        error.section = section
        raise error


def printable(text: Path | str) -> str:
    """A path or name as it can be printed on one line, whatever bytes it is made of."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


def listing(names: Sequence[str], most: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(name) for name in names[:most]) + more


def one_line(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters."""
    text = str(error).strip().split("\n")[0] or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
