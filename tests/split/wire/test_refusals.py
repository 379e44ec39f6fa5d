"""Refusals: every code has advice, and what a server says arrives, whatever is in it."""

import pytest

from snello.errors import SnelloError
from snello.split.wire.refusals import ADVICE, TRANSIENT, Code, Refused


@pytest.mark.parametrize("code", Code)
def test_every_code_says_what_to_do(code):
    refused = Refused(code, "something is wrong")
    assert ADVICE[code] and not ADVICE[code].endswith(".")
    assert str(refused) == f"something is wrong ({code.value}); {ADVICE[code]}" and isinstance(refused, SnelloError)
    back = Refused.from_text(refused.to_text())
    assert back is not None and (back.code, back.reason, back.step) == (code, "something is wrong", None)


def test_no_advice_without_a_code():
    assert set(ADVICE) == set(Code) and set(TRANSIENT) < set(Code)
    assert len({code.value for code in Code}) == len(Code)


@pytest.mark.parametrize("step", [None, 0, 7, 2**63])
def test_the_step(step):
    back = Refused.from_text(Refused(Code.SHUTDOWN, "it ends", step).to_text())
    assert back is not None and back.step == step


@pytest.mark.parametrize(
    "reason, arrives",
    [
        ("two\nlines\r\nand\ttabs", "two lines and tabs"),
        ("  spaces   everywhere ", "spaces everywhere"),
        ("Grüße, 世界", "Gr\\xfc\\xdfe, \\u4e16\\u754c"),
        ("\U0001f600", "\\U0001f600"),
        ("half \ud800 a pair", "half \\ud800 a pair"),
        ("snello/full: nested: /3:", "snello/full: nested: /3:"),
        ("100% of it", "100% of it"),
        ("", ""),
    ],
)
def test_any_reason(reason, arrives):
    text = Refused(Code.MISMATCH, reason, 3).to_text()
    assert text.isascii() and "\n" not in text and text.isprintable()
    back = Refused.from_text(text)
    assert back is not None and (back.code, back.reason, back.step) == (Code.MISMATCH, arrives, 3)


@pytest.mark.parametrize("reason", ["x" * 10**6, pytest.param("\U0001f600" * 10**6)])
def test_it_fits_into_the_headers_of_http(reason):
    """gRPC takes 8 KiB of them by default."""
    text = Refused(Code.MISMATCH, reason).to_text()
    assert len(text) < 4096
    back = Refused.from_text(text)
    assert back is not None and back.code == Code.MISMATCH


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the stream ended",
        "snello",
        "snello/",
        "snello/full",
        "snello/unknown: reason",
        "snello/FULL: reason",
        "snello/full/x: reason",
        "snello/full/-1: reason",
        "snello/full/: reason",
        " snello/full: reason",
        "snello/full:reason",
        "Received RST_STREAM with error code 2",
        pytest.param(f"snello/shutdown/{'1' * 5000}: reason"),
    ],
)
def test_what_is_none_of_ours(text):
    assert Refused.from_text(text) is None
