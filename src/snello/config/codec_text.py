"""The text that names a codec, as `adc(samples=0.5, tokens=0.2)+int4`; no torch, so that flags are checked at once.

The text is read as Python reads it, and calls with numbers and words, joined by "+", are all that it may hold.
"""

import ast
import re
import warnings
from dataclasses import dataclass

from snello.config.registry import CODECS, GOALS
from snello.errors import ConfigError

Value = int | float | str
MAX_LENGTH = 500
"""Characters: far more than any chain needs, and too few to nest deeply."""
_STRANGE = re.compile(r"[^\w\s.,=()+-]|,(?=\s*\))", re.ASCII)


@dataclass(frozen=True)
class Part:
    """One codec of a chain with its options."""

    name: str
    positional: tuple[Value, ...] = ()
    named: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        arguments = [*map(str, self.positional), *(f"{key}={value}" for key, value in self.named)]
        return self.name + (f"({', '.join(arguments)})" if arguments else "")


def parse_codec(text: str, flag: str = "codec") -> list[Part]:
    """The codecs that `text` chains, in order; `auto`, `small` and `smallest` are those chosen for that.

    Raises:
        ConfigError: where the text does not parse or names an unknown codec, with a caret at the place; it begins with
            `flag`.
    """
    text = GOALS.get(text.strip(), text)
    if len(text) > MAX_LENGTH:
        raise ConfigError(f"{flag} must have at most {MAX_LENGTH} characters, got {len(text)}")
    line = re.sub(r"\s", " ", text)
    begin = len(line) - len(line.lstrip())
    strange = _STRANGE.search(line, begin)
    try:
        if strange:
            raise _error("unexpected character", strange.start() - begin)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # a refusal is all that the user sees
            warnings.simplefilter("ignore", DeprecationWarning)
            tree = ast.parse(line[begin:] or "+", mode="eval").body
        return [_part(node) for node in _terms(tree)]
    except (SyntaxError, RecursionError, MemoryError) as error:
        offset = getattr(error, "offset", None) or len(text) + 1  # Python has none for the end
        at = min(begin + offset - 1, len(text))
        problem = getattr(error, "msg", "nested too deeply")
        raise ConfigError(f"{flag} {text!r}: {problem} at the caret: {text[:at]}^{text[at:]}") from None


def _terms(node: ast.expr) -> list[ast.expr]:
    """What stands between the "+", from left to right."""
    terms: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        terms.append(node.right)
        node = node.left
    return [node, *reversed(terms)]


def _part(node: ast.expr) -> Part:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name):
        raise _error("expected the name of a codec", node.col_offset)
    if call.func.id not in CODECS:
        raise _error(f"unknown codec {call.func.id!r}; known: {', '.join(CODECS)}; it stands", node.col_offset)
    named: dict[str, Value] = {}
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in named:
            raise _error(f"{keyword.arg} is given twice", keyword.col_offset)
        named[keyword.arg] = _value(keyword.value)
    return Part(call.func.id, tuple(map(_value, call.args)), tuple(named.items()))


def _value(node: ast.expr) -> Value:
    """A number, with or without a minus, or a word."""
    sign, number = (-1, node.operand) if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else (1, node)
    if isinstance(node, ast.Name):
        return node.id
    value = number.value if isinstance(number, ast.Constant) else ...
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return sign * value
    if value in (True, False, None) and sign == 1:
        return str(value)
    raise _error("expected a number or a word", node.col_offset)


def _error(problem: str, column: int) -> SyntaxError:
    return SyntaxError(problem, (None, 1, column + 1, None))
