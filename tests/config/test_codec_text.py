"""The text that names a codec: what parses, where the caret stands when it does not, and which chains make sense."""

import warnings

import pytest

from snello.codecs import build
from snello.codecs.base import Codec
from snello.config.codec_text import Part, parse_codec
from snello.config.registry import CODECS, GOALS
from snello.errors import ConfigError

ADC = Part("adc", (), (("samples", 1), ("tokens", 0.4)))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("int8", [Part("int8")]),
        ("int8()", [Part("int8")]),
        ("int8( )", [Part("int8")]),
        ("  int8", [Part("int8")]),
        ("int8  ", [Part("int8")]),
        ("int8\n", [Part("int8")]),
        ("adc(0.2) ", [Part("adc", (0.2,))]),
        ("adc(0.1)", [Part("adc", (0.1,))]),
        ("adc(.1)", [Part("adc", (0.1,))]),
        ("adc(1.)", [Part("adc", (1.0,))]),
        ("adc(1e-3)", [Part("adc", (0.001,))]),
        ("adc(2.5E+1)", [Part("adc", (25.0,))]),
        ("adc(-0.5)", [Part("adc", (-0.5,))]),
        ("c3sl(5)", [Part("c3sl", (5,))]),
        ("c3sl(-5)", [Part("c3sl", (-5,))]),
        ("int8(pow2)", [Part("int8", ("pow2",))]),
        ("int8(True, per=None)", [Part("int8", ("True",), (("per", "None"),))]),
        ("adc(0.1)+\nint8(\n4)", [Part("adc", (0.1,)), Part("int8", (4,))]),
        ("int8(4, scale=pow2, per=sample)", [Part("int8", (4,), (("scale", "pow2"), ("per", "sample")))]),
        ("adc(samples=1, tokens=0.4)+int4", [ADC, Part("int4")]),
        ("adc(samples=1,tokens=.4)+int4", [ADC, Part("int4")]),
        (" adc ( samples = 1 ,\ttokens = 0.4 ) + int4", [ADC, Part("int4")]),
        ("adc(0.3)+bottlenet(0.5)+int4", [Part("adc", (0.3,)), Part("bottlenet", (0.5,)), Part("int4")]),
    ],
)
def test_valid_texts_parse_and_survive_a_round_trip(text, parts):
    parsed = parse_codec(text)
    assert parsed == parts
    kinds = [[type(value) for value in (*part.positional, *dict(part.named).values())] for part in parts]
    assert [[type(value) for value in (*part.positional, *dict(part.named).values())] for part in parsed] == kinds
    assert parse_codec("+".join(map(str, parsed))) == parsed


def test_a_part_prints_as_it_is_typed():
    assert str(ADC) == "adc(samples=1, tokens=0.4)"
    assert str(Part("topk", (0.2,))) == "topk(0.2)"
    assert str(Part("int8")) == "int8"


@pytest.mark.parametrize("text", ["auto", " auto "])
def test_auto_is_the_recommended_chain(text):
    assert parse_codec(text) == parse_codec(GOALS["auto"]) != []


@pytest.mark.parametrize(
    ("text", "problem", "marked"),
    [
        ("", "invalid syntax", "^"),
        ("   ", "invalid syntax", "   ^"),
        ("(0.2)", "expected the name of a codec", "(^0.2)"),
        ("8(0.2)", "expected the name of a codec", "^8(0.2)"),
        ("int8+", "invalid syntax", "int8+^"),
        ("int8++int4", "expected the name of a codec", "int8+^+int4"),
        ("int8+0.5", "expected the name of a codec", "int8+^0.5"),
        ("int8+(topk(0.1)+int4)", "expected the name of a codec", "int8+(^topk(0.1)+int4)"),
        ("int8-int4", "expected the name of a codec", "^int8-int4"),
        ("codecs.int8", "expected the name of a codec", "^codecs.int8"),
        ("adc(0.2", "'(' was never closed", "adc^(0.2"),
        ("adc(0.2+int8", "'(' was never closed", "adc^(0.2+int8"),
        ("adc(", "'(' was never closed", "adc^("),
        ("adc(0.2,)", "unexpected character", "adc(0.2^,)"),
        ("adc(samples= , tokens=1)", "invalid syntax", "adc(samples= ^, tokens=1)"),
        ("adc(+0.2)", "expected a number or a word", "adc(^+0.2)"),
        ("adc(-True)", "expected a number or a word", "adc(^-True)"),
        ("adc(--2)", "expected a number or a word", "adc(^--2)"),
        ("adc(-half)", "expected a number or a word", "adc(^-half)"),
        ("adc(1+1)", "expected a number or a word", "adc(^1+1)"),
        ("adc(1j)", "expected a number or a word", "adc(^1j)"),
        ("adc(...)", "expected a number or a word", "adc(^...)"),
        ("adc(int8(4))", "expected a number or a word", "adc(^int8(4))"),
        ("adc(tokens=x for x in y)", "invalid syntax", "adc(^tokens=x for x in y)"),
        ("adc(x for x in y)", "expected a number or a word", "adc^(x for x in y)"),
        ("adc(0.2) int8", "invalid syntax", "adc(0.2) ^int8"),
        ("adc(0.2))", "unmatched ')'", "adc(0.2)^)"),
        ("int8;", "unexpected character", "int8^;"),
        ("int8 # 4", "unexpected character", "int8 ^# 4"),
        ("int8('pow2')", "unexpected character", "int8(^'pow2')"),
        ("int8(\0)", "unexpected character", "int8(^\0)"),
        ("\uff41dc(0.2)", "unexpected character", "^\uff41dc(0.2)"),  # which Python takes for adc
        ("adc(samples=1, 0.4)", "positional argument follows keyword argument", "adc(samples=1, 0.4^)"),
        ("adc(samples=1,  samples=0.4)", "samples is given twice", "adc(samples=1,  ^samples=0.4)"),
        ("int9", "unknown codec 'int9'", "^int9"),
        ("adc(0.2) + int9(4)", "unknown codec 'int9'", "adc(0.2) + ^int9(4)"),
    ],
)
def test_errors_carry_a_caret_at_the_place(text, problem, marked):
    with pytest.raises(ConfigError) as error:
        parse_codec(text, "--split.codec")
    message = str(error.value)
    assert message.startswith(f"--split.codec {text!r}: ") and problem in message
    assert message.partition(" at the caret: ")[2] == marked


@pytest.mark.parametrize(
    "text",
    ["8int", "adc(samples=1 tokens=0.4)", "adc(0.1.2)", "adc(samples=)", "adc(01)", "adc(0.1if 1else 2)", "adc(*x)"],
)
def test_what_python_cannot_read_is_refused_in_one_line(text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError) as error:
            parse_codec(text)
    assert "^" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["int8(" * 20_000, "(" * 100_000, "-" * 100_000, "int8+" * 20_000 + "int8", "int8(" + "9" * 100_000 + ")"],
    ids=["calls", "parentheses", "signs", "chain", "number"],
)
def test_a_long_text_is_refused_by_its_length(text):
    with pytest.raises(ConfigError, match=r"^codec must have at most 500 characters, got 10\d{4}$"):
        parse_codec(text)


@pytest.mark.parametrize("text", ["int8(" * 100, "(" * 250 + ")" * 250, "-" * 500, "int8(" * 80 + ")" * 80])
def test_a_deeply_nested_text_is_refused_in_one_line(text):
    with pytest.raises(ConfigError) as error:
        parse_codec(text)
    assert "^" in str(error.value) and "\n" not in str(error.value)


def test_a_long_chain_is_read():
    assert parse_codec("+".join(["int8"] * 100)) == [Part("int8")] * 100


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError) as error:
        parse_codec("gzip")
    assert all(name in str(error.value) for name in CODECS)


# Options


def built(text: str) -> object:
    (part,) = parse_codec(text)
    return build(part, "codec", embed_dim=8, seed=0)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("adc(ratios=0.2)", "'ratios'; known: ratio, samples, tokens, min_cluster, "),
        ("int8(bits=4)", "'bits'; known: down, scale, per"),
        ("none(bits=4)", "'bits'; known: none"),
        ("bottlenet(0.5, embed_dim=4)", "'embed_dim'; known: ratio"),
        ("c3sl(2, seed=1)", "'seed'; known: num"),
        ("none(1)", "none has 0 options, got 1 values"),
        ("c3sl(2, 3)", "c3sl has 1 options, got 2 values"),
        ("topk(0.2, ratio=0.3)", "topk has two values for ratio"),
        ("topk", "topk needs a value for ratio, as topk(ratio=...)"),
        ("c3sl()", "c3sl needs a value for num, as c3sl(num=...)"),
        ("topk(0)", "topk(0): ratio must be in (0, 1], got 0"),
        ("topk(1.5)", "ratio must be in (0, 1], got 1.5"),
        ("topk(half)", "ratio must be a number, got 'half'"),
        ("bottlenet(2)", "ratio must be in (0, 1], got 2"),
        ("randtopk(0.2, -0.1)", "share must be in [0, 1], got -0.1"),
        ("c3sl(0)", "num must be a whole number from 1 on, got 0"),
        ("c3sl(2.0)", "num must be a whole number from 1 on, got 2.0"),
        ("int8(down=3)", "int8(down=3): down must be 2, 4 or 8, got 3"),
        ("int8(down=True)", "down must be a whole number"),
        ("int4(scale=fp8)", "scale must be bf16, fp32 or pow2, got fp8"),
        ("int2(per=row)", "per must be token, sample, channel or tensor, got row"),
        ("fedlite(0)", "subvectors must be a whole number from 1 on"),
        ("fedlite(clusters=1)", "clusters must be a whole number from 2 on"),
        ("fedlite(clusters=257)", "clusters must be at most 256, got 257"),
        ("fedlite(correction=-1)", "correction must be 0 or more, got -1"),
        # A number that is too large for a float must not become an infinite option.
        ("fedlite(correction=1e999)", "correction must be"),
        ("int8(clip=1e999)", "clip must be"),
        ("adc(1e999)", "ratio must be"),
    ],
)
def test_options_are_checked(text, problem):
    with pytest.raises(ConfigError) as error:
        built(text)
    assert str(error.value).startswith("codec: ") and problem in str(error.value)


# Chains


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("int8+topk(0.2)", "a number format must come last"),
        ("none+adc(0.2)", "a number format must come last"),
        ("int8+int4", "a number format must come last, and there can be one only"),
        ("adc(0.2)+int8+fedlite", "a number format must come last, and there can be one only"),
        ("bottlenet(0.5)+adc(0.2)", "adc looks at the tokens that leave the client, so it must come first"),
        ("adc(0.2)+adc(0.2)", "it must come first"),
        ("topk(0.2)+bottlenet(0.5)", "only a number format can follow"),
        ("c3sl(2)+bottlenet(0.5)+int8", "only a number format can follow"),
        ("randtopk(0.2)+c3sl(2)", "only a number format can follow"),
        ("adc(0.2)+topk(0.2)+c3sl(2)", "only a number format can follow"),
    ],
)
def test_chains_in_an_impossible_order_are_refused(text, problem):
    with pytest.raises(ConfigError) as error:
        Codec(text, embed_dim=8, flag="--split.codec")
    assert problem in str(error.value) and f"--split.codec {text!r}" in str(error.value)


@pytest.mark.parametrize("text", ["adc(0.2)+topk(0.2)+fp16", "adc(0.2)+bottlenet(0.5)+c3sl(2)+int8", "auto"])
def test_chains_in_a_possible_order_are_made(text):
    codec = Codec(text, embed_dim=8)
    assert len(codec.reducers) == len(parse_codec(text)) - 1 and codec.text == text


@pytest.mark.parametrize(
    "eval_text", ["adc(0.2)", "bottlenet(0.5)", "c3sl(2)", "topk(0.2)+int8", "adc(samples=1, tokens=0.4)+int4"]
)
def test_evaluation_takes_one_format_only(eval_text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the refusal is all that the user sees
        with pytest.raises(ConfigError, match="evaluated in one number format"):
            Codec("int8", embed_dim=8, eval_text=eval_text)


def test_an_unreadable_format_of_evaluation_is_refused():
    with pytest.raises(ConfigError, match="unknown codec 'int9'"):
        Codec("int8", embed_dim=8, eval_text="int9")
