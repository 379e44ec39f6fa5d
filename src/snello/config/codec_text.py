"""The text that names a codec, as `adc(samples=0.5, tokens=0.2)+int4`; no torch, so that flags are checked at once.

codec := part ("+" part)*
part  := name ["(" [argument ("," argument)*] ")"]
argument := [name "="] value            positional ones first
value := a number or a word
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from snello.config.registry import AUTO, CODECS
from snello.errors import ConfigError

_TOKEN = re.compile(r"\s*(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)|(?P<word>[A-Za-z_]\w*)|(?P<sign>\S))")

Value = int | float | str


@dataclass(frozen=True)
class Part:
    """One codec of a chain with its options."""

    name: str
    positional: tuple[Value, ...] = ()
    named: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        arguments = [*map(str, self.positional), *(f"{key}={value}" for key, value in self.named)]
        return self.name + (f"({', '.join(arguments)})" if arguments else "")


def parse(text: str, known: Collection[str], flag: str = "codec") -> list[Part]:
    """The codecs that `text` chains, in order.

    Args:
        text: see the grammar above.
        known: names of codecs.
        flag: what the user typed the text after, for messages.

    Raises:
        ConfigError: where the text does not parse, with a caret at the place, or a name is not known.
    """
    return _Parser(text, known, flag).codec()


class _Parser:
    def __init__(self, text: str, known: Collection[str], flag: str) -> None:
        self.text, self.known, self.flag = text, known, flag
        self.at = 0

    def codec(self) -> list[Part]:
        """The first rule of the grammar."""
        parts = [self.part()]
        while self.accept("+"):
            parts.append(self.part())
        if self.peek() is not None:
            self.fail('expected "+" or the end')
        return parts

    def part(self) -> Part:
        """A codec with its arguments."""
        start = self.peek()
        if start is None or start.lastgroup != "word":
            self.fail("expected the name of a codec")
        assert start is not None
        name = start["word"]
        if name not in self.known:
            self.fail(f"unknown codec {name!r}; known: {', '.join(self.known)}; it stands", start.start("word"))
        self.at = start.end()
        positional: list[Value] = []
        named: list[tuple[str, Value]] = []
        if self.accept("(") and not self.accept(")"):
            self.argument(positional, named)
            while not self.accept(")"):
                if not self.accept(","):
                    self.fail('expected "," or ")"')
                self.argument(positional, named)
        return Part(name, tuple(positional), tuple(named))

    def argument(self, positional: list[Value], named: list[tuple[str, Value]]) -> None:
        """An argument, put where it belongs."""
        place = self.at
        value = self.value()
        if isinstance(value, str) and self.accept("="):
            if value in dict(named):
                self.fail(f"{value} is given twice", place)
            named.append((value, self.value()))
        elif named:
            self.fail("a value without a name must come before those with one", place)
        else:
            positional.append(value)

    def value(self) -> Value:
        """A number or a word."""
        token = self.peek()
        if token is None or token.lastgroup == "sign":
            self.fail("expected a number or a word")
        assert token is not None
        self.at = token.end()
        if token.lastgroup == "word":
            return token["word"]
        number = token["number"]
        return int(number) if re.fullmatch(r"[-+]?\d+", number) else float(number)

    def peek(self) -> "re.Match[str] | None":
        """The next token; a sign where the character means nothing here; None at the end."""
        token = _TOKEN.match(self.text, self.at)
        # A "+" between codecs is a sign, but "+" before a digit could be taken for a number's.
        if token and token.lastgroup == "number" and token["number"].startswith("+"):
            return re.compile(r"\s*(?P<sign>\+)").match(self.text, self.at)
        return token

    def accept(self, sign: str) -> bool:
        """Goes past `sign` if it comes next, and says whether it did."""
        token = self.peek()
        if token is None or token.lastgroup != "sign" or token["sign"] != sign:
            return False
        self.at = token.end()
        return True

    def fail(self, problem: str, at: int | None = None) -> None:
        """Raises the ConfigError that shows the place, by default the one reached."""
        at = self.at if at is None else at
        at += len(self.text[at:]) - len(self.text[at:].lstrip())
        marked = f"{self.text[:at]}^{self.text[at:]}"
        raise ConfigError(f"{self.flag} {self.text!r}: {problem} at the caret: {marked}")


def parse_codec(text: str, flag: str = "codec") -> list[Part]:
    """The parts of a codec's text; `auto` is the recommended chain.

    Raises:
        ConfigError: where the text does not parse or names an unknown codec.
    """
    return parse(AUTO if text.strip() == "auto" else text, CODECS, flag)
