"""Sessions of a server without a network: every frame applied once, or refused with the session as it was."""

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.budgets import DROPPING
from helpers.clients import (
    CLASSES,
    CODEC_TEXTS,
    Client,
    Largest,
    answer_of,
    digest,
    ended,
    picture,
    registry_in,
    take,
    to_bytes,
    weights,
)
from torch.utils._pytree import tree_map

from snello import files as files_of
from snello.config import AlastConfig
from snello.errors import CheckpointError, ProtocolError, SnelloWarning
from snello.split.server.registry import Registry
from snello.split.server.sessions import InferenceSession
from snello.split.wire.frames import Flags, Frame, Kind, control, control_values, weights_frame, weights_of
from snello.split.wire.handshake import Hello, RunShape
from snello.split.wire.refusals import Code, Refused

pytestmark = pytest.mark.usefixtures("known_models")


# ------------------------------------------------------------------------------------------------------ exactly once


class TestExactlyOnce:
    @pytest.mark.parametrize("labels", ["server", "client"])
    @pytest.mark.parametrize("accumulate", [1, 3])
    def test_exchanges(self, tmp_path, undisturbed, labels, accumulate):
        options = {"labels": labels, "accumulate": accumulate, "codec": "adc(0.5)+int8"}
        client = Client(registry_in(tmp_path, **options))
        client.open()
        kinds = []

        def thrice(frame: Frame) -> Frame:
            session = client.session
            first = session.take(to_bytes(frame))
            before_after = picture(session)
            again = session.take(to_bytes(frame))  # before what is left to be done of the first
            assert again.repeated and again.after is None and picture(session) == before_after
            if first.after is not None:
                first.after()
            now = picture(session)
            third = session.take(to_bytes(frame))
            assert third.repeated and picture(session) == now
            assert not first.repeated and first.chunks == again.chunks == third.chunks
            kinds.append(frame.kind)
            return answer_of(first)

        before = weights(client.session)
        client.train(carry=thrice)
        assert weights(client.session) != before and ended(client) == undisturbed(**options)
        wanted = {Kind.ACTIVATIONS} | ({Kind.FEATURE_GRADIENTS} if labels == "client" else set())
        assert set(kinds) == wanted and len(kinds) == 6 * len(wanted)

    def test_between_steps(self, tmp_path):
        client = Client(registry_in(tmp_path))
        client.open()
        client.train(2)
        session = client.session
        wanted = {
            Kind.EVALUATED: client.evaluation(),
            Kind.SAVED: client.save(accuracy=0.5, best=True),
            Kind.WEIGHTS: client.request(control(Kind.GET_WEIGHTS, {})),
        }
        for kind, frame in wanted.items():
            first = session.take(to_bytes(frame))
            now = picture(session)
            again = session.take(to_bytes(frame))
            assert answer_of(first).kind == kind and again.repeated and again.chunks == first.chunks
            assert picture(session) == now and now["place"][0] == 2
        assert len(list(session.run.rows("eval"))) == 1 and session.checkpoints.steps() == [0, 2]
        client.train()
        finish = client.request(control(Kind.FINISH, {}))
        first, again = session.take(to_bytes(finish)), session.take(to_bytes(finish))
        assert again.repeated and again.chunks == first.chunks and session.finished
        assert control_values(answer_of(first))["summary"] == session.ledger.summary()

    def test_an_answer_has_the_numbers_of_its_frame(self, tmp_path):
        client = Client(registry_in(tmp_path))
        client.open()
        client.train(1)
        for frame in (client.evaluation(), client.save(), client.evaluation()):
            answer = answer_of(take(client.session, frame))
            assert (answer.step, answer.micro) == (frame.step, frame.micro)

    def test_two_requests_of_one_kind_are_two(self, tmp_path):
        client = Client(registry_in(tmp_path))
        client.open()
        for accuracy in (0.25, 0.5):
            assert not take(client.session, client.save(accuracy=accuracy)).repeated
        assert [row["accuracy"] for row in client.session.run.rows("eval")] == [0.25, 0.5]

    def test_evaluation_is_counted_once_and_apart(self, tmp_path):
        client = Client(registry_in(tmp_path))
        client.open()
        frame = client.evaluation()
        answer = take(client.session, frame)
        take(client.session, frame)
        counters = client.session.ledger.counters
        assert counters.evaluation == len(to_bytes(frame)) + len(b"".join(answer.chunks)) and counters.training == 0


@pytest.mark.parametrize("labels", ["server", "client"])
def test_both_sides_count_the_same(tmp_path, labels):
    client = Client(registry_in(tmp_path, labels=labels, codec="adc(0.5)+int4"))
    client.open()

    def carry(frame: Frame) -> Frame:
        return client.counted(client.carry)(frame)

    client.train(carry=carry)
    assert client.session.ledger.counters.state_dict() == client.remote.ledger.counters.state_dict()
    assert client.session.ledger.counters.training > 0


# ------------------------------------------------------------------------------------------------------- out of turn


def out_of_turn(frame: Frame, client: Client) -> dict[str, Frame]:
    """Frames that are not due where `frame` is, nor the last that was applied."""
    step, micro = frame.step, frame.micro
    swapped = Kind.FEATURE_GRADIENTS if frame.kind == Kind.ACTIVATIONS else Kind.ACTIVATIONS
    wrong = {
        "later step": replace(frame, step=step + 1),
        "much later step": replace(frame, step=2**64 - 1),
        "later micro-step": replace(frame, micro=micro + 1),
        "wrong kind": replace(frame, kind=swapped, micro=micro + 5),
        "not from a client": replace(frame, kind=Kind.GRADIENTS),
        "a second hello": replace(frame, kind=Kind.HELLO),
        "save of another step": client.save() if micro else client.request(control(Kind.SAVE, {}), step + 1),
        "finish of another step": client.request(control(Kind.FINISH, {}), step + 1),
    }
    if step:
        wrong["older step"] = replace(frame, step=step - 1, micro=99)
    if micro:
        wrong["earlier micro-step"] = replace(frame, micro=micro + 7)
    if micro or frame.kind == Kind.FEATURE_GRADIENTS:
        wrong["evaluation in mid-step"] = client.evaluation()
        wrong["save in mid-step"] = client.save()
        wrong["weights in mid-step"] = client.request(control(Kind.GET_WEIGHTS, {}))
        wrong["finish in mid-step"] = client.request(control(Kind.FINISH, {}))
    return wrong


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("sessions", ["independent", "shared"])
def test_out_of_turn(tmp_path, undisturbed, labels, sessions):
    options = {"labels": labels, "accumulate": 3, "sessions": sessions}
    client = Client(registry_in(tmp_path, **options))
    client.open()
    seen = set()

    def disturbed(frame: Frame) -> Frame:
        before = picture(client.session)
        for name, wrong in out_of_turn(frame, client).items():
            with pytest.raises(Refused) as caught:
                client.session.take(to_bytes(wrong))
            assert caught.value.code == Code.OUT_OF_TURN and picture(client.session) == before, name
            seen.add(name)
        return client.carry(frame)

    client.train(carry=disturbed)
    assert ended(client) == undisturbed(**options) and len(seen) == 14
    with pytest.raises(Refused, match="out-of-turn"):  # the run is complete
        client.session.take(to_bytes(Frame(Kind.ACTIVATIONS, client.plan.total_steps, 0, {})))


def test_the_refusal_says_where_both_are(tmp_path):
    client = Client(registry_in(tmp_path, accumulate=3))
    client.open()
    conversation = client.step()
    conversation.send(client.carry(next(conversation)))
    with pytest.raises(Refused, match=r"activations of step 5\.0 came, the server is at step 0\.1 and waits for acti"):
        client.session.take(to_bytes(Frame(Kind.ACTIVATIONS, 5, 0, {})))
    with pytest.raises(Refused, match=r"SAVE came for step 0, the server is at step 0\.1"):
        client.session.take(to_bytes(client.save()))


# ----------------------------------------------------------------------------------------------- malformed content


def changed(**values: Any) -> Callable[[Frame], Frame]:
    """Replaces arrays by name (`labels_share` is labels.share); None drops one, a function maps one."""

    def change(frame: Frame) -> Frame:
        arrays = dict(frame.arrays)
        for name, value in values.items():
            name = name.replace("_", ".")
            if value is None:
                del arrays[name]
            else:
                arrays[name] = value(arrays.get(name)) if callable(value) else value
        return replace(frame, arrays=arrays)

    return change


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """One element of a tensor of its own becomes `value`."""

    def fill(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x.view(-1)[3] = value
        return x

    return fill


SHAPES: dict[str, Callable[[Frame], Frame]] = {
    "no activations": changed(activations=None),
    "no arrays": lambda frame: replace(frame, arrays={}),
    "too many rows": changed(activations=torch.zeros(5, 10, 64)),
    "a row less": changed(activations=lambda x: x[1:]),
    "no rows": changed(activations=lambda x: x[:0]),
    "no tokens": changed(activations=lambda x: x[:, :0]),
    "too many tokens": changed(activations=lambda x: torch.zeros(len(x), 11, 64)),
    "narrow": changed(activations=lambda x: x[:, :, :63]),
    "wide": changed(activations=lambda x: torch.zeros(len(x), 10, 65)),
    "flat": changed(activations=lambda x: x.flatten(1)),
    "a number": changed(activations=torch.zeros(())),
    "four dimensions": changed(activations=lambda x: x[None]),
    "int64": changed(activations=lambda x: x.long()),
    "uint8": changed(activations=lambda x: x.to(torch.uint8)),
}
OTHER_FLOATS = {
    "half": changed(activations=lambda x: x.half()),
    "bfloat16": changed(activations=lambda x: x.bfloat16()),
}
NOT_FINITE: dict[str, Callable[[Frame], Frame]] = {
    "NaN": changed(activations=filled(float("nan"))),
    "infinite": changed(activations=filled(float("inf"))),
}
LABELS = {
    "no labels": changed(labels=None),
    "labels beyond the classes": changed(labels=lambda x: x + 3),
    "negative labels": changed(labels=lambda x: x.to(torch.int8) - 5),
    "float labels": changed(labels=lambda x: x.float()),
    "a label more": changed(labels=lambda x: torch.cat([x, x[:1]])),
    "a label less": changed(labels=lambda x: x[1:]),
    "labels of two dimensions": changed(labels=lambda x: x[None]),
    "no share": changed(labels_share=None),
    "two shares": changed(labels_share=torch.ones(2)),
    "sizes too large": changed(labels_sizes=torch.tensor([100], dtype=torch.int64)),
    "sizes of nothing": changed(labels_sizes=torch.zeros(0, dtype=torch.uint8)),
    "sizes of zero": changed(labels_sizes=lambda _: torch.tensor([0, 4], dtype=torch.uint8)),
    "sizes that overflow": changed(labels_sizes=torch.full((4,), 2**62, dtype=torch.int64)),
    "float sizes": changed(labels_sizes=torch.ones(4)),
}
NOT_FINITE["share NaN"] = changed(labels_share=torch.tensor([float("nan")]))
FEATURES = {
    "no gradients": lambda frame: replace(frame, arrays={}),
    "gradients of another shape": changed(gradients=lambda x: x[:, 1:]),
    "gradients of a row less": changed(gradients=lambda x: x[1:]),
    "a number": changed(gradients=torch.zeros(())),
}
NOT_FINITE_FEATURES = {
    "NaN": changed(gradients=filled(float("nan"))),
    "infinite": changed(gradients=filled(float("inf"))),
}


def refusing(
    client: Client, changes: dict[str, Callable[[Frame], Frame]], kind: Kind = Kind.ACTIVATIONS
) -> Callable[[Frame], Frame]:
    """Carries frames, and before each one of `kind` in the second step those that are broken and must be refused."""

    def carry(frame: Frame) -> Frame:
        if (frame.kind, frame.step) == (kind, 1):
            before = picture(client.session)
            for name, change in changes.items():
                with pytest.raises((Refused, ProtocolError)):
                    client.session.take(to_bytes(change(frame)))
                assert picture(client.session) == before, name
        return client.carry(frame)

    return carry


class TestMalformed:
    """A frame of an exchange with anything wrong in it: refused, and the right one goes on as if it had not come."""

    @pytest.mark.parametrize(
        "changes",
        [
            pytest.param(SHAPES, id="shapes"),
            pytest.param(LABELS, id="labels"),
            pytest.param(OTHER_FLOATS, id="other floats"),
            *(pytest.param({name: NOT_FINITE[name]}, id=name) for name in NOT_FINITE),
        ],
    )
    def test_activations_with_labels(self, tmp_path, undisturbed, changes):
        client = Client(registry_in(tmp_path, accumulate=3))
        client.open()
        client.train(carry=refusing(client, changes))
        assert ended(client) == undisturbed(accumulate=3)

    @pytest.mark.parametrize("sessions", ["independent", "shared"])
    @pytest.mark.parametrize(
        "changes", [pytest.param(SHAPES, id="shapes"), pytest.param(OTHER_FLOATS, id="other floats")]
    )
    def test_activations_in_u_shape(self, tmp_path, undisturbed, changes, sessions):
        options = {"accumulate": 3, "labels": "client", "sessions": sessions}
        client = Client(registry_in(tmp_path, **options))
        client.open()
        client.train(carry=refusing(client, {n: c for n, c in changes.items() if n != "a row less"}))
        assert ended(client) == undisturbed(**options)

    @pytest.mark.parametrize(
        "sessions, changes",
        [
            pytest.param("shared", FEATURES, id="shapes, shared"),
            pytest.param("independent", FEATURES, id="shapes"),
            pytest.param("shared", NOT_FINITE_FEATURES, id="not finite, shared"),
            pytest.param("independent", NOT_FINITE_FEATURES, id="not finite"),
        ],
    )
    def test_gradients_of_features(self, tmp_path, undisturbed, changes, sessions):
        options = {"accumulate": 3, "labels": "client", "sessions": sessions}
        client = Client(registry_in(tmp_path, **options))
        client.open()
        client.train(carry=refusing(client, changes, Kind.FEATURE_GRADIENTS))
        assert ended(client) == undisturbed(**options)

    @pytest.mark.parametrize(
        "codec",
        ["adc(0.5)+int8", "topk(0.2)", "c3sl(2)", pytest.param("bottlenet(0.5)"), "fedlite(8)"],
    )
    def test_arrays_of_codecs(self, tmp_path, undisturbed, codec):
        """Each array of a frame left out, empty, and cut short."""
        client = Client(registry_in(tmp_path, codec=codec))
        client.open()
        num = 0

        def disturbed(frame: Frame) -> Frame:
            nonlocal num
            before = picture(client.session)
            for name in frame.arrays if frame.step == 1 else ():
                for change in (None, lambda x: x[:0], lambda x: x.flatten()[:1]):
                    arrays = {key: value for key, value in frame.arrays.items() if key != name}
                    if change is not None:
                        arrays[name] = change(frame.arrays[name])
                    other = replace(frame, arrays=arrays)
                    if to_bytes(other) == to_bytes(frame):
                        continue
                    with pytest.raises((Refused, ProtocolError)):
                        client.session.take(to_bytes(other))
                    assert picture(client.session) == before, name
                    num += 1
            return client.carry(frame)

        client.train(2, carry=disturbed)
        assert num >= 8 and ended(client) == undisturbed(2, codec=codec)

    @pytest.mark.parametrize("name", ["no labels", "narrow"])
    def test_a_method_that_looks_at_steps(self, tmp_path, undisturbed, name):
        """ALaST moves its budgets by what it saw in forward passes: those of a refused frame do not count."""
        options = {"method": "alast", "alast": AlastConfig(**DROPPING, alpha=5.0), "cut": 2}
        client = Client(registry_in(tmp_path, **options))
        client.open()
        client.train(carry=refusing(client, {name: {**SHAPES, **LABELS}[name]}))
        assert ended(client) == undisturbed(**options)

    @pytest.mark.parametrize("data", [b"", b"snlo", b"\0" * 28, b"snlo\1\1", bytes(range(256))])
    def test_no_frame_at_all(self, tmp_path, data):
        client = Client(registry_in(tmp_path))
        client.open()
        before = picture(client.session)
        with pytest.raises(ProtocolError):
            client.session.take(bytearray(data))
        assert picture(client.session) == before

    @pytest.mark.parametrize(
        "frame",
        [
            Frame(Kind.SAVE, 0, 1, {}),
            control(Kind.SAVE, {"accuracy": 1.5}),
            control(Kind.SAVE, {"accuracy": float("nan")}),
            control(Kind.SAVE, {"accuracy": "high"}),
            control(Kind.SAVE, {"accuracy": [1]}),
            Frame(Kind.SAVE, 0, 1, {"control": torch.zeros(3)}),
            Frame(Kind.SAVE, 0, 1, {"control": torch.frombuffer(bytearray(b"[1]"), dtype=torch.uint8)}),
            Frame(Kind.SAVE, 0, 1, {"control": torch.frombuffer(bytearray(b"[" * 60000), dtype=torch.uint8)}),
            Frame(Kind.SAVE, 0, 1, {"control": torch.frombuffer(bytearray(b'{"a": \xff}'), dtype=torch.uint8)}),
        ],
    )
    def test_values_of_a_save(self, tmp_path, frame):
        client = Client(registry_in(tmp_path))
        client.open()
        before = picture(client.session)
        with pytest.raises(ProtocolError):
            client.session.take(to_bytes(client.request(frame)))
        assert picture(client.session) == before

    def test_few_labels_do_not_take_much_memory(self, tmp_path):
        registry = registry_in(tmp_path)
        terms = registry.sizes(1000).terms
        hello = Hello("train", session="0" * 32, terms=terms, plan=RunShape(10, 6, CLASSES))
        _, session, _ = registry.open("ann", hello)
        arrays = {
            "activations": torch.zeros(4, 10, 64),
            "labels": torch.zeros(30000, dtype=torch.uint8),
            "labels.sizes": torch.ones(30000, dtype=torch.uint8),
            "labels.share": torch.ones(1),
        }
        with Largest() as largest, pytest.raises(ProtocolError):
            session.take(to_bytes(Frame(Kind.ACTIVATIONS, 0, 0, arrays)))
        assert largest.bytes < 16 * session.max_body

    def test_a_frame_beyond_the_limit(self, tmp_path):
        client = Client(registry_in(tmp_path))
        client.open()
        frame = Frame(Kind.ACTIVATIONS, 0, 0, {"activations": torch.zeros(client.session.max_body // 4)})
        with pytest.raises(ProtocolError, match="larger than the limit"):
            client.session.take(to_bytes(frame))


# -------------------------------------------------------------------------------------------------- every codec once


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("codec", CODEC_TEXTS)
@pytest.mark.slow
def test_every_codec_trains(tmp_path, codec, labels):
    client = Client(registry_in(tmp_path, codec=codec, labels=labels))
    client.open()
    before = weights(client.session), client.weights
    client.train(2, carry=client.counted(client.carry))
    assert weights(client.session) != before[0] and client.weights != before[1] and client.session.step == 2
    assert client.session.ledger.counters == client.remote.ledger.counters
    evaluated = client.remote.half.logits(client.carry(client.evaluation()))
    assert evaluated.shape == (3, 3) and bool(evaluated.isfinite().all())


# -------------------------------------------------------------------------------------------------- saves, and back


class TestSaves:
    @pytest.mark.parametrize(
        "options",
        [
            {"codec": "adc(0.5)+int8"},
            {"codec": "bottlenet(0.5)", "labels": "client"},
            {"method": "alast", "alast": AlastConfig(**DROPPING, alpha=5.0), "cut": 2},
            {"accumulate": 3, "labels": "client"},
        ],
        ids=["adc", "bottlenet", "alast", "accumulate"],
    )
    @pytest.mark.parametrize("fresh", [False, True], ids=["in memory", "from the folder"])
    @pytest.mark.slow
    def test_going_back_gives_the_same_bit_for_bit(self, tmp_path, undisturbed, options, fresh):
        registry = registry_in(tmp_path, **options)
        client = Client(registry)
        client.open()
        at = 1 if "accumulate" in options else 2
        client.train(at)
        client.carry(client.save(accuracy=0.5, best=True))
        state = [value.clone() for value in client.remote.half.vit.model.state_dict().values()]
        kept = client.remote.state_dict(), client.remote.half.optimizer.state_dict(), client.remote.codec.state_dict()
        kept = json.loads(json.dumps(kept[0])), *(tree_map(_clone, part) for part in kept[1:])
        ran = []
        for _ in range(2):
            client.train(carry=lambda frame: ran.append(to_bytes(frame)) or client.carry(frame))
            end = ended(client)
            del end["client"]
            if fresh:
                registry.leave(client.place)
                client.registry = registry = Registry(registry.config, registry.run)
                welcome = client.open(checkpoints=[0, at])
                assert (welcome.step, welcome.back, welcome.fresh) == (at, True, False)
            else:
                client.session.go_back(at)
            assert client.session.step == at and client.session.checkpoints.steps() == [0, at]
            assert [row["step"] for row in client.session.run.rows("step")] == list(range(1, at + 1))
            for value, before in zip(client.remote.half.vit.model.state_dict().values(), state, strict=True):
                value.copy_(before)
            client.remote.half.optimizer.load_state_dict(tree_map(_clone, kept[1]))
            client.remote.codec.load_state_dict(
                {**kept[2], **{n: v for n, v in client.session.model.codec.state_dict().items() if ".decoder." in n}}
            )
            client.remote.load_state_dict(kept[0])
        assert len(ran) % 2 == 0 and ran[: len(ran) // 2] == ran[len(ran) // 2 :]
        wanted = undisturbed(**options)
        assert end["server"] == wanted["server"] and end["ledger"] == wanted["ledger"]

    def test_keeps_the_best_weights(self, tmp_path):
        client = Client(registry_in(tmp_path, codec="bottlenet(0.5)"))
        client.open()
        client.train(1)
        client.carry(client.save(accuracy=0.5, best=True))
        best = {name: value.clone() for name, value in client.session.model.half.vit.model.state_dict().items()}
        client.train(1)
        client.carry(client.save(accuracy=0.25, best=False))
        saved = files_of.load_tensors(client.session.run.model_file)[0]
        assert saved.keys() == best.keys() and all(torch.equal(saved[name], best[name]) for name in best)
        assert client.session.run.codec_file.is_file()
        assert [row["accuracy"] for row in client.session.run.rows("eval")] == [0.5, 0.25]

    def test_a_full_disk(self, tmp_path, undisturbed, monkeypatch):
        client = Client(registry_in(tmp_path))
        client.open()
        client.train(2)
        client.carry(client.save())
        client.train(1)
        files = sorted(path.name for path in client.session.run.path.rglob("*"))
        with monkeypatch.context() as patch:
            patch.setattr(files_of, "save_file", full)
            before = picture(client.session)
            with pytest.raises(Refused, match="No space left") as caught:
                client.carry(client.save())
        assert caught.value.code == Code.STORAGE and picture(client.session) == before
        assert sorted(path.name for path in client.session.run.path.rglob("*")) == files
        client.carry(client.save())
        assert client.session.checkpoints.steps() == [2, 3]
        client.train()
        assert ended(client) == undisturbed()

    def test_a_save_that_is_repeated_after_a_full_disk_logs_once(self, tmp_path, monkeypatch):
        client = Client(registry_in(tmp_path))
        client.open()
        client.train(2)
        frame = client.save(accuracy=0.5)
        with monkeypatch.context() as patch:
            patch.setattr(files_of, "save_file", full)
            with pytest.raises(Refused):
                client.carry(frame)
        client.carry(frame)
        assert len(list(client.session.run.rows("eval"))) == 1

    def test_metrics_that_cannot_be_written(self, tmp_path):
        client = Client(registry_in(tmp_path))
        client.open()
        client.train(1)
        client.session.run.metrics_file.unlink()
        client.session.run.metrics_file.mkdir()
        client.train(1)
        with pytest.raises(Refused, match="could not write") as caught:
            client.carry(client.save())
        assert caught.value.code == Code.STORAGE


def full(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


class TestNotFinite:
    def test_weights_are_not_touched(self, tmp_path, undisturbed):
        """The gradient of a client that wants none goes nowhere: only the server can notice."""
        client = Client(registry_in(tmp_path))
        client.open()
        client.train(1)
        conversation = client.step()
        good = next(conversation)
        before, rows = weights(client.session), list(client.session.run.rows())
        with pytest.raises(Refused, match="the loss is not finite") as caught:
            take(client.session, replace(NOT_FINITE["NaN"](good), flags=Flags.FORWARD_ONLY))
        assert caught.value.code == Code.NOT_FINITE
        assert weights(client.session) == before and list(client.session.run.rows()) == rows

    def test_a_gradient_that_goes_down(self, tmp_path):
        client = Client(registry_in(tmp_path))
        client.open()
        before = weights(client.session)
        with pytest.raises(Refused) as caught:
            client.carry(NOT_FINITE["NaN"](next(client.step())))
        assert caught.value.code == Code.NOT_FINITE and weights(client.session) == before


# ---------------------------------------------------------------------------------------------------- shared sessions


def gradients_at_updates(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Digests of the gradients that a shared half would be moved by; its weights stay, so that they are comparable."""
    seen: list[str] = []
    half = registry._shared.half  # type: ignore[union-attr]

    def note(closure: Any = None) -> None:
        seen.append(digest([p.grad for p in half.parameters() if p.grad is not None]))

    monkeypatch.setattr(half.optimizer, "step", note)
    return seen


def interleaved(clients: list[Client]) -> None:
    """One frame of each client after the other, until all have taken a step."""
    conversations = {client: client.step() for client in clients}
    due = {client: next(conversation) for client, conversation in conversations.items()}
    while due:
        for client in list(due):
            try:
                due[client] = conversations[client].send(client.carry(due[client]))
            except StopIteration:
                del due[client]


@pytest.mark.parametrize("labels", ["server", "client"])
class TestShared:
    def options(self, labels: str) -> dict[str, Any]:
        return {"sessions": "shared", "accumulate": 2, "labels": labels}

    def test_gradients_do_not_mix(self, tmp_path, labels, monkeypatch):
        alone = []
        for seed in (0, 1):
            client = Client(registry_in(tmp_path / f"alone {seed}", **self.options(labels)), seed=seed)
            client.open()
            seen = gradients_at_updates(client.registry, monkeypatch)
            client.train(1)
            alone += seen
        registry = registry_in(tmp_path, **self.options(labels))
        clients = [Client(registry, name, seed=seed) for seed, name in enumerate(("ann", "bob"))]
        for client in clients:
            client.open()
        seen = gradients_at_updates(registry, monkeypatch)
        assert clients[0].session.model is clients[1].session.model
        interleaved(clients)
        assert len(set(alone)) == 2 and seen == alone

    def test_each_learns_from_the_other(self, tmp_path, labels):
        registry = registry_in(tmp_path, **self.options(labels))
        clients = [Client(registry, name, seed=seed) for seed, name in enumerate(("ann", "bob"))]
        for client in clients:
            client.open()
        start = weights(clients[0].session)
        interleaved(clients)
        interleaved(clients)
        assert [client.session.step for client in clients] == [2, 2] and weights(clients[0].session) != start
        first = clients[0].session
        clients[1].train(1)
        moved = weights(first)
        clients[0].train(1)
        assert weights(clients[1].session) != moved

    def test_a_returning_client_loses_only_its_own_steps(self, tmp_path, labels):
        registry = registry_in(tmp_path, **self.options(labels))
        ann, bob = Client(registry, "ann"), Client(registry, "bob", seed=1)
        for client in (ann, bob):
            client.open()
        ann.train(1)
        ann.carry(ann.save())
        ann.train(2)
        bob.train(2)
        registry.leave(ann.place)
        before, counters = weights(bob.session), bob.session.ledger.state_dict()
        welcome = ann.open(checkpoints=[0, 1])
        assert (welcome.step, welcome.back, welcome.fresh, welcome.lost_steps) == (1, True, False, 2)
        assert weights(ann.session) == before and ann.session.model is bob.session.model
        assert bob.session.step == 2 and bob.session.ledger.state_dict() == counters
        assert [row["step"] for row in ann.session.run.rows("step")] == [1]
        bob.train(1)
        assert bob.session.step == 3
        assert ann.open(checkpoints=[0, 1]).lost_steps == 2

    def test_a_client_that_has_all_loses_nothing(self, tmp_path, labels):
        registry = registry_in(tmp_path, **self.options(labels))
        ann = Client(registry, "ann")
        ann.open()
        ann.train(2)
        registry.leave(ann.place)
        welcome = ann.open(step=2, incarnation=ann.incarnation, checkpoints=[0])
        assert (welcome.step, welcome.back, welcome.lost_steps) == (2, False, 0)
        ann.train(1)

    def test_the_half_outlives_the_server(self, tmp_path, labels):
        registry = registry_in(tmp_path, **self.options(labels))
        ann = Client(registry, "ann")
        ann.open()
        ann.train(1)
        registry.stepped()
        ann.carry(ann.save())
        registry.saved()
        before = weights(ann.session)
        ann.registry = Registry(registry.config, registry.run)
        welcome = ann.open(checkpoints=[0, 1])
        assert (welcome.step, welcome.lost_steps) == (1, 0) and weights(ann.session) == before

    @pytest.mark.parametrize("damaged", [False, True])
    def test_without_a_checkpoint_that_can_be_used(self, tmp_path, labels, damaged):
        registry = registry_in(tmp_path, **self.options(labels))
        ann = Client(registry, "ann")
        ann.open()
        ann.train(1)
        ann.carry(ann.save())
        for path in (ann.session.run.path / "checkpoints").iterdir():
            path.write_bytes(b"x") if damaged else path.unlink()
        ann.registry = Registry(registry.config, registry.run)
        for known in ({"checkpoints": [0, 1]}, {"step": 1, "incarnation": ann.incarnation}):
            with pytest.raises(Refused, match=r"the client has .*\b1\b.*, the server .*\[\]") as caught:
                ann.open(**known)
            assert caught.value.code == Code.NO_CHECKPOINT

    def test_other_classes_are_refused(self, tmp_path, labels):
        registry = registry_in(tmp_path, **self.options(labels))
        Client(registry, "ann").open()
        with pytest.raises(Refused, match=r"class names: .* abc, this one's xyz") as caught:
            Client(registry, "bob", classes="xyz").open()
        assert caught.value.code == Code.MISMATCH
        Client(registry, "cyd").open()


def test_an_overflow_is_its_own(tmp_path, monkeypatch):
    registry = registry_in(tmp_path, sessions="shared", accumulate=2, labels="client")
    ann, bob = Client(registry, "ann"), Client(registry, "bob", seed=1)
    due = []
    for client in (ann, bob):
        client.open()
        conversation = client.step()
        due.append((conversation, conversation.send(client.carry(next(conversation)))))
    seen = gradients_at_updates(registry, monkeypatch)
    ann.carry(replace(due[0][1], flags=Flags.OVERFLOW))
    conversation, frame = due[1]
    with pytest.raises(StopIteration):
        while True:
            frame = conversation.send(bob.carry(frame))
    assert len(seen) == 1


# ------------------------------------------------------------------------------------------------------------ registry


class TestRegistry:
    def test_full(self, tmp_path):
        registry = registry_in(tmp_path, max_sessions=2)
        first, second, third = (Client(registry, name) for name in ("ann", "bob", "cyd"))
        first.open()
        second.open()
        with pytest.raises(Refused, match="max-sessions 2") as caught:
            third.open()
        assert caught.value.code == Code.FULL and third.place not in registry._in_memory
        registry.leave(first.place)
        third.open()
        with pytest.raises(Refused):
            first.open(step=0, incarnation=first.incarnation)

    def test_the_one_longest_without_a_client_goes_first(self, tmp_path):
        sizes = registry_in(tmp_path / "probe").sizes(3)
        room = 2 * (sizes.messages + sizes.state)
        registry = registry_in(tmp_path, max_memory=f"{room}B")
        ann, bob, cyd = (Client(registry, name) for name in ("ann", "bob", "cyd"))
        for client in (ann, bob):
            client.open()
            client.train(1)
        with pytest.raises(Refused, match="max-memory"):
            cyd.open()
        for client in (bob, ann):
            registry.leave(client.place)
        cyd.open()
        assert set(registry._in_memory) == {ann.place, cyd.place}
        welcome = ann.open(step=1, incarnation=ann.incarnation, checkpoints=[0])
        assert (welcome.step, welcome.back) == (1, False)
        with pytest.raises(Refused, match="full"):
            bob.open(step=1, incarnation=bob.incarnation, checkpoints=[0])
        registry.leave(ann.place)
        welcome = bob.open(step=1, incarnation=bob.incarnation, checkpoints=[0])
        assert (welcome.step, welcome.back) == (0, True)

    def test_a_client_that_cannot_be_taken_costs_nobody_anything(self, tmp_path):
        registry = registry_in(tmp_path, max_sessions=1)
        ann, bob, cyd = (Client(registry, name) for name in ("ann", "bob", "cyd"))
        ann.open()
        ann.train(1)
        registry.leave(ann.place)
        bob.open()
        with pytest.raises(Refused, match="full"):
            cyd.open()
        registry.leave(bob.place)
        assert ann.open(step=1, incarnation=ann.incarnation, checkpoints=[0]).step == 1

    def test_sessions_that_nobody_comes_back_to_are_forgotten(self, tmp_path):
        registry = registry_in(tmp_path, idle_seconds=3600)
        ann, bob = Client(registry, "ann"), Client(registry, "bob")
        ann.open()
        bob.open()
        registry.leave(ann.place)
        registry.forget_idle()
        assert set(registry._in_memory) == {ann.place, bob.place}
        registry._left[ann.place] -= 3601
        registry.forget_idle()
        assert set(registry._in_memory) == {bob.place}

    def test_a_finished_session_is_forgotten(self, tmp_path):
        client = Client(registry_in(tmp_path))
        client.open()
        client.carry(client.request(control(Kind.FINISH, {})))
        client.registry.leave(client.place)
        assert not client.registry._in_memory

    @pytest.mark.parametrize("hello", [{"step": 0}, {"checkpoints": [0]}, {"checkpoints": [3]}])
    def test_unknown_session(self, tmp_path, hello):
        with pytest.raises(Refused, match="nothing of this session") as caught:
            Client(registry_in(tmp_path)).open(**hello)
        assert caught.value.code == Code.UNKNOWN_SESSION

    def test_no_common_checkpoint(self, tmp_path):
        client = Client(registry_in(tmp_path))
        client.open()
        client.train(1)
        client.carry(client.save())
        for path in client.session.checkpoints.folder.glob("*000.safetensors"):
            path.unlink()
        for hello in ({}, {"checkpoints": [5]}, {"checkpoints": [0, 7]}):
            with pytest.raises(Refused, match=r"the server of \[1\]") as caught:
                client.open(**hello)
            assert caught.value.code == Code.NO_CHECKPOINT
        assert client.open(checkpoints=[0, 1, 9]).step == 1

    def test_a_damaged_checkpoint(self, tmp_path):
        client = Client(registry_in(tmp_path))
        client.open()
        client.train(1)
        client.carry(client.save())
        path = client.session.checkpoints.path(1)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.warns(SnelloWarning, match="step-000000001"), pytest.raises(Refused) as caught:
            client.open(checkpoints=[1])
        assert caught.value.code == Code.NO_CHECKPOINT and client.place not in client.registry._in_memory
        with pytest.warns(SnelloWarning, match="left out"):
            assert client.open(checkpoints=[0, 1]).step == 0  # it is as if it were not there

    def test_who_comes_back_at_the_very_start_begins(self, tmp_path, undisturbed):
        client = Client(registry_in(tmp_path))
        client.open()
        assert client.open().fresh
        client.train()
        assert ended(client) == undisturbed()

    @pytest.mark.parametrize(
        "behind, step, incarnation, goes_on",
        [
            (0, 2, "same", True),
            (0, 1, "same", True),  # the last answer was lost
            (0, 0, "same", False),
            (0, 3, "same", False),
            (0, 2, "other", False),
            (0, 2, "", False),
            (0, None, "same", False),
        ],
    )
    def test_who_goes_on_where_the_connection_broke(self, tmp_path, behind, step, incarnation, goes_on):
        client = Client(registry_in(tmp_path))
        client.open()
        client.train(1)
        client.carry(client.save())
        client.train(1)
        before = weights(client.session), client.incarnation
        told = {"same": client.incarnation}.get(incarnation, incarnation)
        welcome = client.open(step=step, incarnation=told, checkpoints=[0, 1])
        assert (welcome.step, welcome.back) == ((2, False) if goes_on else (1, True))
        assert (client.incarnation == before[1]) == goes_on and (weights(client.session) == before[0]) == goes_on

    def test_the_frame_in_flight_is_answered_after_a_broken_connection(self, tmp_path, undisturbed):
        client = Client(registry_in(tmp_path, accumulate=3, labels="client"))
        client.open()

        def broken(frame: Frame) -> Frame:
            lost = take(client.session, frame)
            client.registry.leave(client.place)
            client.open(step=client.remote.step, incarnation=client.incarnation, checkpoints=[0])
            again = take(client.session, frame)
            assert again.repeated and again.chunks == lost.chunks
            return answer_of(again)

        client.train(carry=broken)
        assert ended(client) == undisturbed(accumulate=3, labels="client")

    def test_after_a_failure_nothing_in_memory_counts(self, tmp_path):
        client = Client(registry_in(tmp_path))
        client.open()
        client.train(2)
        client.session.failed = Refused(Code.INTERNAL, "something")
        welcome = client.open(step=2, incarnation=client.incarnation, checkpoints=[0])
        assert (welcome.step, welcome.back) == (0, True) and client.session.failed is None

    def test_a_session_of_another_client_is_not_given_away(self, tmp_path):
        registry = registry_in(tmp_path)
        ann, eve = Client(registry, "ann"), Client(registry, "eve")
        ann.open()
        ann.train(2)
        eve.id = ann.id
        before = picture(ann.session)
        file = ann.session.run.path / "session.json"
        text = file.read_text()
        try:
            eve.open()
        except Refused:
            pass
        else:
            assert eve.session is not ann.session
        assert picture(ann.session) == before and file.read_text() == text
        assert ann.open(step=2, incarnation=ann.incarnation, checkpoints=[0]).step == 2

    @pytest.mark.parametrize("hello", [{}, {"step": 2}, {"checkpoints": [0, 2]}])
    def test_nor_is_one_from_the_folder(self, tmp_path, hello):
        registry = registry_in(tmp_path)
        ann, eve = Client(registry, "ann"), Client(registry, "eve")
        ann.open()
        ann.train(2)
        ann.carry(ann.save(best=True, accuracy=1.0))
        registry.leave(ann.place)
        registry.forget(ann.id)
        eve.id = ann.id
        before = weights(ann.session)
        try:
            assert eve.open(**hello).step == 0 and weights(eve.session) != before
        except Refused as refused:
            assert refused.code == Code.UNKNOWN_SESSION and hello
        with pytest.raises(Refused) as caught:
            registry.open("mallory", Hello("inference", session=ann.id, terms=ann.terms))
        assert caught.value.code == Code.UNKNOWN_SESSION
        registry.leave(eve.place)
        registry.forget(eve.id)
        assert ann.open(checkpoints=[0, 2]).step == 2 and weights(ann.session) == before

    def test_another_plan_is_refused(self, tmp_path):
        client = Client(registry_in(tmp_path))
        client.open()
        for plan in (replace(client.plan, num_train=11), replace(client.plan, classes="xyz")):
            with pytest.raises(Refused, match="pictures and steps") as caught:
                client.open(plan=plan, checkpoints=[0])
            assert caught.value.code == Code.MISMATCH

    def test_what_is_missing(self, tmp_path):
        client = Client(registry_in(tmp_path))
        for hello in ({"terms": None}, {"plan": None}):
            with pytest.raises(Refused) as caught:
                client.open(**hello)
            assert caught.value.code == Code.MALFORMED

    @pytest.mark.parametrize("num", [0, -3, 10**6 + 1])
    def test_impossible_classes(self, tmp_path, num):
        client = Client(registry_in(tmp_path))
        with pytest.raises(Refused, match="num classes"):
            client.open(terms=replace(client.terms, num_classes=num))

    def test_classes_that_the_server_wants(self, tmp_path):
        client = Client(registry_in(tmp_path, num_classes=3))
        client.open()
        with pytest.raises(Refused, match="num classes: the server has 3, the client 4"):
            client.open(terms=replace(client.registry.sizes(4).terms, fingerprint=client.terms.fingerprint))

    def test_sizes_do_not_fill_the_memory(self, tmp_path, monkeypatch):
        registry = registry_in(tmp_path)
        monkeypatch.setattr("snello.split.server.registry.Sizes", lambda config, num_classes, precision: num_classes)
        for num in range(1, 150):
            assert registry.sizes(num) == num
            assert len(registry._sizes) <= 64

    def test_one_session_that_cannot_be_saved_does_not_keep_the_others_from_it(self, tmp_path, monkeypatch):
        registry = registry_in(tmp_path)
        ann, bob = Client(registry, "ann"), Client(registry, "bob")
        for client in (ann, bob):
            client.open()
            client.train(1)

        def fail(step: int, state: Any) -> None:
            raise CheckpointError("no space")

        monkeypatch.setattr(ann.session.checkpoints, "save", fail)
        with pytest.raises(CheckpointError):
            registry.save_all()
        assert bob.session.checkpoints.steps() == [0, 1]

    def test_save_all(self, tmp_path):
        registry = registry_in(tmp_path, accumulate=2)
        ann, bob = Client(registry, "ann"), Client(registry, "bob")
        for client in (ann, bob):
            client.open()
        ann.train(1)
        bob.carry(next(bob.step()))
        registry.save_all()
        assert ann.session.checkpoints.steps() == [0, 1]
        assert bob.session.checkpoints.steps() == [0]  # in mid-step there is nothing to save


class TestInference:
    def finished(self, folder: Path, **options: Any) -> Client:
        client = Client(registry_in(folder, **options))
        client.open()
        client.train(2)
        client.carry(client.save(accuracy=0.5, best=True))
        return client

    def open(self, client: Client, **values: Any) -> InferenceSession:
        hello = Hello("inference", **{"session": client.id, "terms": client.terms, **values})
        _, session, _ = client.registry.open(client.name, hello)
        assert isinstance(session, InferenceSession)
        return session

    def test_needs_an_epoch(self, tmp_path):
        client = Client(registry_in(tmp_path))
        with pytest.raises(Refused) as caught:
            self.open(client)
        assert caught.value.code == Code.UNKNOWN_SESSION
        client.open()
        with pytest.raises(Refused, match="not finished an epoch") as caught:
            self.open(client)
        assert caught.value.code == Code.NO_CHECKPOINT

    @pytest.mark.parametrize("codec", ["adc(0.5)+int8", "bottlenet(0.5)"])
    @pytest.mark.parametrize("labels", ["server", "client"])
    def test_answers_as_the_best_weights_do_and_changes_nothing(self, tmp_path, codec, labels):
        client = self.finished(tmp_path, codec=codec, labels=labels)
        frame = client.evaluation()
        wanted = client.carry(frame).arrays["activations"]
        client.train(1)
        before = picture(client.session)
        session = self.open(client)
        assert torch.equal(answer_of(session.take(to_bytes(frame))).arrays["activations"], wanted)
        for wrong in (next(client.step()), client.save(), client.request(control(Kind.SET_WEIGHTS, {}))):
            with pytest.raises(Refused) as caught:
                session.take(to_bytes(wrong))
            assert caught.value.code == Code.OUT_OF_TURN
        for change in SHAPES.values() if codec.startswith("adc") else ():
            if change not in (SHAPES["a row less"], SHAPES["uint8"], SHAPES["int64"]):
                with pytest.raises(ProtocolError):
                    session.take(to_bytes(change(frame)))
        before["method"] = client.session.model.half.method.state_dict()
        assert picture(client.session) == before

    def test_gives_the_best_weights(self, tmp_path):
        client = self.finished(tmp_path)
        best = {name: value.clone() for name, value in client.session.model.half.weights().items()}
        client.train(1)
        frame = answer_of(self.open(client).take(to_bytes(client.request(control(Kind.GET_WEIGHTS, {})))))
        given = weights_of(frame)
        assert given.keys() == best.keys() and all(torch.equal(given[name], best[name]) for name in best)

    def test_counts_as_a_session_until_it_leaves(self, tmp_path):
        client = self.finished(tmp_path, max_sessions=2)
        name, _, _ = client.registry.open("ann", Hello("inference", session=client.id, terms=client.terms))
        with pytest.raises(Refused, match="full"):
            Client(client.registry, "bob").open()
        client.registry.leave(name)
        Client(client.registry, "bob").open()


class TestWeights:
    def test_a_server_that_does_not_release_them(self, tmp_path):
        client = Client(registry_in(tmp_path, release_weights=False))
        client.open()
        client.carry(client.save(accuracy=0.5, best=True))
        session = TestInference().open(client)
        for taker in (client.session, session):
            with pytest.raises(Refused, match="does not release") as caught:
                taker.take(to_bytes(client.request(control(Kind.GET_WEIGHTS, {}))))
            assert caught.value.code == Code.FORBIDDEN
        client.train(1)

    def test_a_server_that_takes_none(self, tmp_path):
        client = Client(registry_in(tmp_path))
        client.open()
        client.session.max_body = 1 << 30
        before = picture(client.session)
        with pytest.raises(Refused, match="--accept-weights") as caught:
            client.carry(client.request(weights_frame(Kind.SET_WEIGHTS, client.session.model.half.weights())))
        assert caught.value.code == Code.FORBIDDEN and picture(client.session) == before

    @pytest.mark.parametrize("limited", [pytest.param(True), False])
    def test_taken(self, tmp_path, limited):
        client = Client(registry_in(tmp_path, accept_weights=True, codec="bottlenet(0.5)"))
        client.open()
        if not limited:
            client.session.max_body = 1 << 30
        wanted = {name: value + 1 for name, value in client.session.model.half.weights().items()}
        assert client.carry(client.request(weights_frame(Kind.SET_WEIGHTS, wanted))).kind == Kind.WEIGHTS
        given = weights_of(client.carry(client.request(control(Kind.GET_WEIGHTS, {}))))
        assert given.keys() == wanted.keys() and any(name.startswith("codec.") for name in given)
        assert all(torch.equal(given[name], wanted[name]) for name in wanted)
        client.train(1)

    def test_those_that_do_not_fit(self, tmp_path):
        client = Client(registry_in(tmp_path, accept_weights=True))
        client.open()
        client.session.max_body = 1 << 30
        own = client.session.model.half.weights()
        first = next(iter(own))
        before = picture(client.session)
        wrong = {first: own[first][:1]}, {"more": torch.ones(1)}
        for values in ({}, {**own, **wrong[0]}, {**own, **wrong[1]}, {n: v for n, v in own.items() if n != first}):
            with pytest.raises(ProtocolError, match="do not fit"):
                client.carry(client.request(weights_frame(Kind.SET_WEIGHTS, values)))
            assert picture(client.session) == before
