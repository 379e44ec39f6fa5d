"""What is said before the first step: checked value by value, whatever JSON may hold."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.clients import serve_config
from torch import nn

from snello.config import FinetuneConfig, Recipe, ServeConfig, SplitConfig
from snello.config.values import from_dict
from snello.errors import ProtocolError
from snello.models import create_model
from snello.split.wire.frames import VERSION, Kind, control, control_values, read, write
from snello.split.wire.handshake import Hello, RunShape, Terms, Welcome, hash_of, make_terms, parse, recipe_values
from snello.split.wire.refusals import Code, Refused

TERMS = Terms(VERSION, "test_vit", 3, "none", "server", 10, 48, "fp32", "0123456789abcdef")
PLAN = RunShape(10, 6, "abc")
SESSION = "0123456789abcdef" * 2
HELLO = Hello("train", SESSION, TERMS, PLAN, 3, "f" * 32, [2, 3])
WELCOME = Welcome(1.5, "0.1.0", {"model": "test_vit"}, 10, "f" * 32, 3, True, False, 2, False)
OTHER = {
    "protocol": VERSION + 1,
    "model": "other",
    "fingerprint": "f" * 16,
    "cut": 4,
    "codec": "int8",
    "labels": "client",
    "num_classes": 11,
    "image_size": 64,
    "precision": "bf16",
}


def over_the_wire(values: Any) -> dict[str, Any]:
    return control_values(read([b"".join(write(control(Kind.HELLO, values)))]))


@pytest.mark.parametrize("message", [HELLO, WELCOME, TERMS, PLAN, Hello("describe")], ids=lambda m: type(m).__name__)
def test_what_is_said_arrives(message):
    assert parse(type(message), over_the_wire(asdict(message))) == message


@pytest.mark.parametrize("cls", [Hello, Welcome, Terms, RunShape])
@pytest.mark.parametrize("values", [{}, {"more": 1}, {"__class__": 1}, {"": None}, {"mode": None}])
def test_missing_and_unknown(cls, values):
    with pytest.raises(ProtocolError):
        parse(cls, values)


@pytest.mark.parametrize("name", [f.name for f in fields(Terms)])
def test_every_term_is_needed(name):
    values = asdict(TERMS)
    del values[name]
    with pytest.raises(ProtocolError):
        parse(Terms, values)
    with pytest.raises(ProtocolError):
        parse(Hello, {**asdict(HELLO), "terms": values})


HOSTILE: dict[str, list[Any]] = {
    "mode": [None, "", "steal", 1, ["train"], {}, True],
    "session": [
        None,
        "",
        "../" * 11,
        "/etc/passwd",
        SESSION[:-1],
        SESSION + "0",
        SESSION.upper(),
        SESSION + "\n",
        [],
        {},
    ],
    "terms": [1, "none", [], [1, 2], {}, {"model": 1}, True],
    "plan": [1, [], {}, "10", {**asdict(PLAN), "more": 1}],
    "step": [1.5, "x", [], {}, True, False, float("nan"), float("inf"), [3]],
    "incarnation": [None, True],
    "checkpoints": [
        None,
        3,
        "3",
        [1.5],
        ["3"],
        [True],
        [None],
        [-1],
        [2**48],
        list(range(17)),
        list(range(10**4)),
        [[1]],
        {"1": 1},
    ],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in HOSTILE.items() for value in values])
def test_values_of_a_hello(name, value):
    values = over_the_wire({**asdict(HELLO), name: value})
    with pytest.raises(ProtocolError) as caught:
        parse(Hello, values)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize("step", [pytest.param(step) for step in (-1, 2**48)])
def test_steps_that_nobody_can_have_done(step):
    with pytest.raises(ProtocolError):
        parse(Hello, {**asdict(HELLO), "step": step})


@pytest.mark.parametrize("name", ["num_train", "total_steps"])
@pytest.mark.parametrize("value", [0, -1, 2**48, 10**30, 1.5, True, None, "x", [1], float("nan")])
def test_plans_that_are_none(name, value):
    with pytest.raises(ProtocolError):
        parse(RunShape, {**asdict(PLAN), name: value})


@pytest.mark.parametrize(
    "name, value",
    [
        ("time", None), ("time", "soon"), ("time", True), ("time", []), ("recipe", 3), ("recipe", "x"),
        ("num_classes", 1.5), ("step", "x"), ("step", None), ("back", 1), ("back", "true"), ("fresh", None),
        ("releases_weights", 0), ("lost_steps", 2.5),
        pytest.param("time", 10**400),
    ],
)  # fmt: skip
def test_values_of_a_welcome(name, value):
    with pytest.raises(ProtocolError):
        parse(Welcome, {**asdict(WELCOME), name: value})


def test_an_error_stays_short():
    with pytest.raises(ProtocolError) as caught:
        parse(Hello, {"mode": "describe", "x" * 50000: 1})
    assert len(str(caught.value)) <= 200


@pytest.mark.parametrize("name", OTHER)
def test_both_values_are_named(name):
    assert set(OTHER) == {f.name for f in fields(Terms)}
    with pytest.raises(Refused) as caught:
        TERMS.require(replace(TERMS, **{name: OTHER[name]}))
    ours, theirs, shown = getattr(TERMS, name), OTHER[name], name.replace("_", " ")
    assert caught.value.reason == f"{shown}: the server has {ours}, the client {theirs}"
    assert caught.value.code == (Code.VERSION if name == "protocol" else Code.MISMATCH)


def test_the_same_terms_are_accepted():
    TERMS.require(replace(TERMS))


def terms_of(model: nn.Module, **options: Any) -> Terms:
    return make_terms(model, serve_config(**options), codec="none", num_classes=3, precision="fp32")


def test_the_fingerprint_is_of_the_architecture():
    with torch.device("meta"):
        model = create_model("test_vit", "none", 3, 48)
        again = create_model("test_vit", "none", 3, 48)
        others = [create_model("test_vit", "none", 4, 48), create_model("test_vit", "none", 3, 64)]
        others.append(create_model("test_vit2", "none", 3, 48))
    wanted = terms_of(model)
    assert wanted == terms_of(again) == terms_of(create_model("test_vit", "none", 3, 48))
    assert len({wanted.fingerprint, *(terms_of(other).fingerprint for other in others)}) == 4
    with torch.no_grad():
        assert terms_of(again.half()).fingerprint == wanted.fingerprint  # weights are not part of it
    assert (wanted.protocol, wanted.model, wanted.cut, wanted.labels) == (VERSION, "test_vit", 4, "server")


def test_the_hash_of_classes():
    names = ["blue", "green", "red"]
    assert hash_of(names) == hash_of(list(names)) and len(hash_of(names)) == 16
    different = [names[::-1], names[:2], [*names, ""], ["blue", "greenred"], ["Blue", "green", "red"], [], [""]]
    assert len({hash_of(other) for other in [names, *different]}) == 1 + len(different) - 1  # [] is as [""]
    assert not any(name in hash_of(names) for name in names)


def test_what_a_client_is_told_of_the_settings():
    config = ServeConfig(
        config=Path("/secret/config.yaml"), out=Path("/secret/out"), certs=Path("/secret/certs"), device="cuda:7",
        weights="/secret/weights.safetensors", attention="explicit", model="test_vit", split=SplitConfig(cut=2),
        listen="192.0.2.7:1", metrics_port=1234, max_memory="7GiB", lr=0.125, seed=77,
    )  # fmt: skip
    values = recipe_values(config)
    text = json.dumps(values)
    for hidden in ("secret", "cuda", "192.0.2.7", "1234", "7GiB"):
        assert hidden not in text
    own = {"config", "out", "resume", "device", "attention", "weights"}
    assert values.keys() == {f.name for f in fields(Recipe)} - own
    back = from_dict(FinetuneConfig, over_the_wire(values))
    assert (back.model, back.lr, back.seed, back.split) == ("test_vit", 0.125, 77, config.split)
    for f in fields(Recipe):
        if f.name not in own:
            assert getattr(back, f.name) == getattr(config, f.name), f.name


def test_other_classes_are_named_before_a_fingerprint():
    """The head's shape, so the fingerprint, differs too, but says nothing to a user."""
    recipe = Recipe(model="test_vit", weights="none")
    terms = [
        make_terms(create_model("test_vit", "none", n), recipe, codec="none", num_classes=n, precision="fp32")
        for n in (3, 4)
    ]
    with pytest.raises(Refused, match="num classes: the server has 3, the client 4"):
        terms[0].require(terms[1])
