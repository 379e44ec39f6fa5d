"""A server on a free port: training over the socket, and everything that clients may do wrong."""

import gc
import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from conftest import QUIET, finetune, rows_of
from helpers.budgets import DROPPING
from helpers.clients import Client, serve_config, to_bytes, weights
from helpers.servers import DEADLINE, Raw, Running, anyone, connected, hello_of, join_config, opened, until
from rich.console import Console

from snello.config import AlastConfig, CertsConfig, FinetuneConfig, ServeConfig, SplitConfig
from snello.errors import CheckpointError, NetworkError
from snello.files import load_tensors
from snello.runs.folder import RunFolder
from snello.split import build as sides
from snello.split.checkpoints import steps_in
from snello.split.client.connection import Connection
from snello.split.client.join import RemoteSession
from snello.split.local import LocalSession
from snello.split.security.auth import Anyone, Token, Tokens, hash_token
from snello.split.security.certs import make_certs
from snello.split.server.registry import Registry
from snello.split.server.streams import MAX_HELLO_BYTES, Limits, Server
from snello.split.wire import chunks as wire
from snello.split.wire.frames import HEADER, MAGIC, VERSION, Frame, Kind, control, write
from snello.split.wire.refusals import Code, Refused
from snello.vit import ViT

pytestmark = pytest.mark.usefixtures("known_models")


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory, known_models: None) -> Iterator[Running]:
    """A server that waits for nothing longer than half a second."""
    limits = Limits(hello_seconds=0.5, frame_seconds=0.5, bytes_per_second=1e9, idle_seconds=0.5, grace_seconds=1.0)
    with Running(serve_config(), tmp_path_factory.mktemp("impatient") / "server", limits=limits) as server:
        yield server


@pytest.fixture
def patient(tmp_path: Path) -> Iterator[Running]:
    """A server with two micro-steps to a step."""
    limits = Limits(grace_seconds=3.0)
    with Running(serve_config(accumulate=2, max_sessions=4), tmp_path / "server", limits=limits) as server:
        yield server


# ------------------------------------------------------------------------------------------- as within one process


def same_recipe(small: FinetuneConfig, **options: Any) -> tuple[FinetuneConfig, ServeConfig]:
    """The same settings for a run in one process and for a server."""
    split = SplitConfig(cut=3, **{"codec": "adc(0.5)+int8", **options.pop("split", {})})
    config = replace(small, split=split, **options)
    names = ("model", "weights", "image_size", "method", "alast", "epochs", "batch_size", "accumulate", "precision")
    values = {name: getattr(config, name) for name in (*names, "attention", "device", "checkpoint_steps")}
    return config, ServeConfig(**values, split=split, insecure_loopback=True)


RECIPES: dict[str, dict[str, Any]] = {
    "labels on the server": {},
    "u-shape": {"split": {"labels": "client"}, "accumulate": 2},
    "alast on both": {"method": "alast", "alast": AlastConfig(**DROPPING, alpha=5.0)},
}


def assert_as_in_one_process(config: FinetuneConfig, session: RemoteSession, out: Path) -> None:
    """The session has ended with the weights, losses, accuracies and bytes of the run in config.out."""
    whole, _ = load_tensors(config.out / "last.safetensors")  # type: ignore[operator]
    halves = {**session.get_state("client"), **session.get_state("server")}
    saved = {name.removeprefix("model."): value for name, value in whole.items() if name.startswith("model.")}
    assert halves.keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in halves.items())
    for kind in ("step", "eval"):
        ours, theirs = rows_of(out, kind), rows_of(config.out, kind)  # type: ignore[arg-type]
        assert len(ours) == len(theirs) > 0
        for one, other in zip(ours, theirs, strict=True):
            names = one.keys() & other.keys() - {"budgets", "trained"}
            assert names >= {"step", "loss"}
            assert {name: one[name] for name in names} == {name: other[name] for name in names}
            if kind == "step":
                assert one["grad_norm_client"] == other["grad_norm_client"]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.slow
def test_a_run_over_the_socket_ends_as_in_one_process(small, pictures, tmp_path, name):
    config, of_server = same_recipe(small, **RECIPES[name])
    local = finetune(config, QUIET)
    with Running(of_server, tmp_path / "server") as server:
        session = RemoteSession(join_config(server, pictures, tmp_path / "client"), console=QUIET)
        session.trainer.fit()
        assert_as_in_one_process(config, session, tmp_path / "client")
        summary = session.finish().to_dict()
        session.close()
        until(lambda: server.value("snello_sessions", mode="train") == 0)
        (folder,) = (tmp_path / "server" / "sessions").iterdir()
        theirs = json.loads((folder / "summary.json").read_text())
        for key in ("uplink_bytes", "downlink_bytes", "eval_bytes", "uncompressed_bytes", "ratio", "accuracy", "steps"):
            assert summary[key] == local[key] == theirs[key], key
        for way in ("uplink", "downlink"):  # what operators see is all frames, also those between steps
            for kind, size in local[f"{way}_bytes_by_kind"].items():
                if kind != "evaluation":
                    assert server.value("snello_bytes_total", direction=way, kind=kind) >= size
        assert server.value("snello_steps_total") == local["steps"]
        of_server_rows = rows_of(folder, "step")
        assert [row["grad_norm"] for row in of_server_rows] == [
            row["grad_norm_server"]
            for row in rows_of(config.out, "step")  # type: ignore[arg-type]
        ]
        assert not server.logged("refused") and not server.logged("unexpected error")


def test_a_model_of_transformers_whose_folder_only_the_server_has(small, pictures, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    shape = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2}
    config = transformers.ViTConfig(**shape, intermediate_size=64)
    folder = tmp_path / "model"
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    wishes = {"size": {"height": 16}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(wishes))
    config, of_server = same_recipe(small, model=f"hf:{folder}", weights="pretrained", image_size=None)
    finetune(config, QUIET)
    with Running(of_server, tmp_path / "server") as server:
        make = sides.create_model

        def without_folder(name: str, *args: Any) -> torch.nn.Module:
            assert args[-1] is not None, "the client has no folder to look into"
            return make("hf:nowhere/to-be-found", *args)

        monkeypatch.setattr("snello.split.client.place.meta_vit", lambda *args: ViT(meta(without_folder, *args)))
        session = RemoteSession(join_config(server, pictures, tmp_path / "client"), console=QUIET)
        session.trainer.fit()
        assert session.trainer.preprocessing.mean == (0.1, 0.2, 0.3)
        assert_as_in_one_process(config, session, tmp_path / "client")
        session.finish()
        session.close()


def meta(
    build: Callable[..., torch.nn.Module], config: FinetuneConfig, num_classes: int, *rest: Any
) -> torch.nn.Module:
    """As `sides.meta_vit` builds a model."""
    with torch.device("meta"):
        return build(config.model, "none", num_classes, config.image_size, *rest)


def test_with_tls_no_secret_is_logged(small, pictures, tmp_path):
    config, of_server = same_recipe(small, epochs=1)
    finetune(config, QUIET)
    certs = tmp_path / "certs"
    make_certs(CertsConfig(certs, clients=("ann", "bob")))
    make_certs(CertsConfig(tmp_path / "others", clients=("ann",)))
    tokens = {name: (certs / "clients" / name / "token").read_text().strip() for name in ("ann", "bob")}
    of_server = replace(of_server, certs=certs, insecure_loopback=False)
    with Running(of_server, tmp_path / "server") as server:
        options = {"certs": certs / "clients" / "ann"}
        session = RemoteSession(join_config(server, pictures, tmp_path / "client", **options), console=QUIET)
        session.trainer.fit()
        assert_as_in_one_process(config, session, tmp_path / "client")
        session.close()
        wrong = {
            "of another name": Token("bob", tokens["bob"]),
            "of nobody": Token("eve", tokens["ann"]),
            "guessed": Token("ann", "guess-guess-guess"),
            "none": Anyone(),
        }
        for shown in wrong.values():
            with pytest.raises((Refused, NetworkError)) as caught:  # see LOST below: it should always be Refused
                RemoteSession(join_config(server, pictures, tmp_path / "x", **options), shown, QUIET)
            assert getattr(caught.value, "code", Code.CREDENTIALS) == Code.CREDENTIALS
            assert not (tmp_path / "x").exists()
        assert server.refused(Code.CREDENTIALS) == len(wrong)
        for bad in ({"certs": tmp_path / "others" / "clients" / "ann"}, {}):
            with pytest.raises(NetworkError):
                RemoteSession(join_config(server, pictures, tmp_path / "x", patience_seconds=5, **bad), console=QUIET)
        text = server.log_file.read_text() + server.shown.export_text()
        assert "session opened" in text and "ann" in text
        secrets = [*tokens.values(), "guess-guess-guess", *map(hash_token, tokens.values()), "PRIVATE KEY"]
        assert not [secret for secret in secrets if secret in text]


def test_a_session_runs_as_within_one_process(small, pictures, tmp_path):
    config, of_server = same_recipe(small)
    local = LocalSession(config, console=QUIET)
    with Running(of_server, tmp_path / "server") as server:
        remote = RemoteSession(join_config(server, pictures, tmp_path / "client"), console=QUIET)
        for steps in (3, 6, 100, 1):
            assert remote.run(steps) == local.run(steps)
        for side in ("client", "server"):
            ours, theirs = remote.get_state(side), local.get_state(side)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
        remote.finish()
        remote.close()


def test_states(small, pictures, tmp_path):
    _, of_server = same_recipe(small, split={"codec": "bottlenet(0.5)"})
    with Running(of_server, tmp_path / "server") as server:
        remote = RemoteSession(join_config(server, pictures, tmp_path / "client"), console=QUIET)
        before = remote.get_state("client")
        assert any(name.startswith("codec.") for name in before)
        remote.run(2)
        assert any(not torch.equal(value, before[name]) for name, value in remote.get_state("client").items())
        remote.set_state("client", before)
        assert all(torch.equal(value, before[name]) for name, value in remote.get_state("client").items())
        with pytest.raises(CheckpointError, match="client half"):
            remote.set_state("client", {**before, "more": torch.ones(1)})
        assert remote.run(1)["steps"] == 1
        remote.close()


def test_the_state_of_the_server(small, pictures, tmp_path):
    _, of_server = same_recipe(small)
    with Running(replace(of_server, accept_weights=True), tmp_path / "server") as server:
        remote = RemoteSession(join_config(server, pictures, tmp_path / "client"), console=QUIET)
        try:
            before = remote.get_state("server")
            remote.run(1)
            remote.set_state("server", before)
            assert all(torch.equal(value, before[name]) for name, value in remote.get_state("server").items())
        finally:
            remote.close()


# ------------------------------------------------------------------------------------------------------ many clients


@pytest.mark.slow
def test_two_at_once_get_what_each_gets_alone(tmp_path):
    options = {"accumulate": 2, "labels": "client", "codec": "adc(0.5)+int8"}
    alone = []
    for seed in (0, 1):
        client = Client(Registry(serve_config(**options), RunFolder(tmp_path / f"alone {seed}")), seed=seed)
        client.open()
        client.train()
        alone.append((client.weights, client.session.ledger.counters.state_dict(), weights(client.session)))
    with Running(serve_config(**options), tmp_path / "server") as server:
        clients = [Client(server.registry, seed=seed) for seed in (0, 1)]
        failures: list[BaseException] = []

        def work(client: Client, connection: Connection) -> None:
            try:
                client.train(carry=client.counted(connection.exchange))
            except BaseException as error:
                failures.append(error)

        with connected(server, clients[0]) as first, connected(server, clients[1]) as second:
            threads = [threading.Thread(target=work, args=pair) for pair in zip(clients, (first, second), strict=True)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(DEADLINE)
            until(lambda: server.value("snello_steps_total") == 8)
            assert not failures
            sessions = [server.registry._in_memory[anyone(client)] for client in clients]
            for client, session, wanted in zip(clients, sessions, alone, strict=True):
                assert (client.weights, client.remote.ledger.counters.state_dict(), weights(session)) == wanted
            assert server.value("snello_sessions", mode="train") == 2


def test_who_stops_reading_or_sending_slows_nobody(patient):
    stuck, silent, ann = (Client(patient.registry) for _ in range(3))
    with opened(patient, stuck) as deaf, opened(patient, silent) as mute, connected(patient, ann) as connection:
        for _ in range(4):  # half a megabyte each, more than flow control lets through unread
            deaf.send(stuck.request(control(Kind.GET_WEIGHTS, {})))
        whole = to_bytes(next(silent.step()))
        mute.send(bytes(whole[: len(whole) - 1]))  # the last byte will not come
        ann.train(carry=connection.exchange)
        assert ann.remote.step == 4
        until(lambda: patient.value("snello_steps_total") == 4)
        assert patient.serves()


def test_no_more_than_the_server_takes(tmp_path):
    with Running(serve_config(max_sessions=1), tmp_path / "server") as server:
        ann, bob = Client(server.registry), Client(server.registry)
        with opened(server, ann), Raw(server).send(hello_of(bob)) as second:
            code, details = second.end()
            assert code == grpc.StatusCode.RESOURCE_EXHAUSTED and details.startswith("snello/full: ")
        until(lambda: server.value("snello_sessions", mode="train") == 0)
        with opened(server, bob):
            assert server.value("snello_sessions", mode="train") == 1


def test_the_one_who_comes_back_takes_over(patient):
    client = Client(patient.registry)
    conversation = client.step()
    with opened(patient, client) as first:
        frame = next(conversation)
        first.send(frame)
        answer = first.receive()
        told = {"step": 0, "incarnation": client.incarnation, "checkpoints": [0]}
        with opened(patient, client, **told) as second:
            refused = first.refusal()
            assert refused.code == Code.TAKEN_OVER and patient.refused(Code.TAKEN_OVER) == 1
            second.send(frame)
            again = second.receive()
            assert to_bytes(again) == to_bytes(answer)
            second.send(conversation.send(again))
            with pytest.raises(StopIteration):
                conversation.send(second.receive())
            until(lambda: patient.value("snello_steps_total") == 1)
            assert patient.value("snello_reconnects_total") == 1
            assert patient.value("snello_sessions", mode="train") == 1
            assert anyone(client) in patient.registry._connected


def test_a_stranger_takes_nothing_over(tmp_path):
    tokens = Tokens({name: hash_token(f"secret of {name}") for name in ("ann", "eve")})
    with Running(serve_config(), tmp_path / "server", authenticator=tokens) as server:
        client = Client(server.registry)
        shown = {name: json.dumps({"name": name, "token": f"secret of {name}"}) for name in ("ann", "eve")}
        with Raw(server, shown["ann"]).send(hello_of(client)) as ann:
            ann.receive()
            with Raw(server, shown["eve"]).send(hello_of(client, step=0, incarnation="x")) as eve:
                eve.refusal()
            assert not ann.call.done()
            ann.send(client.evaluation())
            assert ann.receive().kind == Kind.EVALUATED


# ----------------------------------------------------------------------------------------------------------- refusals


def header(kind: int = Kind.HELLO, body: int = 0, version: int = VERSION, magic: bytes = MAGIC) -> bytes:
    return HEADER.pack(magic, version, kind, 0, 0, 0, body)


def hello_values(**values: Any) -> bytes:
    return bytes(to_bytes(control(Kind.HELLO, {"mode": "describe", **values})))


FIRST: dict[str, tuple[Code, list[bytes]]] = {
    "nothing": (Code.TOO_SLOW, []),
    "an empty message": (Code.MALFORMED, [b""]),
    "garbage": (Code.MALFORMED, [bytes(range(256))]),
    "text": (Code.MALFORMED, [b"GET / HTTP/1.1\r\n\r\n" * 4]),
    "half a header": (Code.MALFORMED, [header()[:10]]),
    "another magic": (Code.MALFORMED, [header(magic=b"snli") + bytes(8)]),
    "another version": (Code.VERSION, [header(version=VERSION + 1, body=8) + bytes(8)]),
    "an unknown kind": (Code.MALFORMED, [header(kind=99, body=8) + bytes(8)]),
    "a huge frame": (Code.TOO_LARGE, [header(body=1 << 40)]),
    "a hello that is too large": (Code.TOO_LARGE, [header(body=MAX_HELLO_BYTES + 1)]),
    "half a hello": (Code.MALFORMED, [hello_values()[:-5]]),
    "a hello and more": (Code.MALFORMED, [hello_values() + b"more"]),
    "two hellos in one": (Code.MALFORMED, [hello_values() * 2]),
    "no table": (Code.MALFORMED, [header(body=8) + b"\xff" * 8]),
    "an empty hello": (Code.MALFORMED, [bytes(to_bytes(Frame(Kind.HELLO, 0, 0, {})))]),
    "another kind": (Code.OUT_OF_TURN, [bytes(to_bytes(control(Kind.SAVE, {})))]),
    "activations": (Code.OUT_OF_TURN, [bytes(to_bytes(Frame(Kind.ACTIVATIONS, 0, 0, {})))]),
    "an unknown mode": (Code.MALFORMED, [hello_values(mode="steal")]),
    "an unknown value": (Code.MALFORMED, [hello_values(more=1)]),
    "a path for a session": (Code.MALFORMED, [hello_values(mode="train", session="../../../../etc/passwd0000000")]),
    "no terms": (Code.MALFORMED, [hello_values(mode="train", session="0" * 32)]),
    "an unknown session": (
        Code.MALFORMED,
        [hello_values(mode="train", session="0" * 32, checkpoints=list(range(1000)))],
    ),
}


def assert_told(server: Running, before: float, code: Code, since: int) -> None:
    """The refusal was counted once, and logged with who it was."""
    until(lambda: server.refused(code) == before + 1)
    (row,) = server.logged("refused")[since:]
    assert row["code"] == code.value and row["peer"].startswith("ipv4:127.0.0.1:") and row["reason"]


@pytest.mark.parametrize("name", FIRST)
def test_what_comes_first(impatient, name):
    code, messages = FIRST[name]
    before, since = impatient.refused(code), len(impatient.logged("refused"))
    with Raw(impatient).send(*messages) as raw:
        status, details = raw.end()
        assert status == grpc.StatusCode.FAILED_PRECONDITION and details.startswith(f"snello/{code.value}: ")
    assert_told(impatient, before, code, since)
    assert impatient.serves() and not impatient.logged("unexpected error")


@pytest.mark.parametrize(
    "shown",
    [
        "",
        "no json",
        "[]",
        "3",
        '{"name": 3}',
        '{"name": "ann"}',
        '{"name": "ann", "token": ""}',
        '{"name": "ann", "token": "wrong"}',
        '{"name": "../ann", "token": "right"}',
        '{"token": "right"}',
        pytest.param('{"name": "ann", "token": "\\ud800"}'),
        pytest.param("[" * 5000),
    ],
)
def test_who_is_not_admitted(tmp_path, shown):
    tokens = Tokens({"ann": hash_token("right")})
    with Running(serve_config(), tmp_path / "server", authenticator=tokens) as server:
        with Raw(server, shown).send(hello_values()) as raw:
            code, details = raw.end()
        assert code == grpc.StatusCode.UNAUTHENTICATED and details.startswith("snello/credentials: ")
        assert_told(server, 0, Code.CREDENTIALS, 0)
        with Raw(server, '{"name": "ann", "token": "right"}').send(hello_values()) as raw:
            assert raw.receive().kind == Kind.WELCOME
        assert "wrong" not in server.log_file.read_text() and not server.logged("unexpected error")


LATER: dict[str, tuple[Code, Callable[[Client], list[bytes | Frame]]]] = {
    "nothing": (Code.IDLE, lambda client: []),
    "a second hello": (Code.OUT_OF_TURN, lambda client: [hello_of(client)]),
    "a frame of a server": (Code.OUT_OF_TURN, lambda client: [replace(next(client.step()), kind=Kind.GRADIENTS)]),
    "a later step": (Code.OUT_OF_TURN, lambda client: [replace(next(client.step()), step=3)]),
    "garbage": (Code.MALFORMED, lambda client: [b"x" * 100]),
    "an empty message": (Code.MALFORMED, lambda client: [b""]),
    "another version": (Code.VERSION, lambda client: [header(Kind.SAVE, 8, VERSION + 1) + bytes(8)]),
    "a huge frame": (Code.TOO_LARGE, lambda client: [header(Kind.ACTIVATIONS, 1 << 40)]),
    "too large a frame": (
        Code.TOO_LARGE,
        lambda client: [header(Kind.ACTIVATIONS, client.registry.sizes(3).max_frame + 1)],
    ),
    "half a frame": (Code.MALFORMED, lambda client: [bytes(to_bytes(next(client.step())))[:2000]]),
    "no labels": (Code.MALFORMED, lambda client: [replace(next(client.step()), arrays={})]),
    "weights": (Code.FORBIDDEN, lambda client: [client.request(control(Kind.SET_WEIGHTS, {}))]),
}


@pytest.mark.parametrize("name", LATER)
def test_what_comes_later(impatient, name):
    code, messages = LATER[name]
    client = Client(impatient.registry)
    made = messages(client)
    before, since = impatient.refused(code), len(impatient.logged("refused"))
    with opened(impatient, client) as raw:
        refused = raw.send(*made).refusal()
        assert refused.code == code
    assert_told(impatient, before, code, since)
    until(lambda: impatient.value("snello_sessions", mode="train") == 0)
    assert impatient.serves() and not impatient.logged("unexpected error")
    client.registry.forget(client.id)


class TestSlow:
    """Frames larger than a chunk, which come in parts."""

    @pytest.fixture(scope="class")
    def server(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
        limits = Limits(hello_seconds=5.0, frame_seconds=0.5, bytes_per_second=1e9, idle_seconds=5.0, grace_seconds=0.5)
        with Running(serve_config(batch_size=700), tmp_path_factory.mktemp("slow") / "server", limits=limits) as server:
            yield server

    def test_half_a_frame_and_then_nothing(self, server):
        client = Client(server.registry, num_train=700)
        whole = list(wire.chunks(write(next(client.step()))))
        assert len(whole) > 1
        with opened(server, client) as raw:
            refused = raw.send(whole[0]).refusal()
            assert refused.code == Code.TOO_SLOW and "was not through" in refused.reason
        assert_told(server, 0, Code.TOO_SLOW, 0)
        with opened(server, client, step=0, incarnation=client.incarnation) as raw:
            assert raw.send(*whole).receive().kind == Kind.GRADIENTS

    def test_half_a_frame_and_then_the_end(self, server):
        client = Client(server.registry, num_train=700)
        with opened(server, client) as raw:
            raw.send(next(wire.chunks(write(next(client.step())))))
            raw._queue.put(None)
            code, _ = raw.end()
            assert code == grpc.StatusCode.OK
        until(lambda: server.value("snello_sessions", mode="train") == 0)
        assert server.serves()

    def test_a_client_that_vanishes(self, server):
        client = Client(server.registry, num_train=700)
        with opened(server, client) as raw:
            raw.send(next(wire.chunks(write(next(client.step())))))
        until(lambda: server.value("snello_sessions", mode="train") == 0)
        until(lambda: anyone(client) not in server.registry._connected)
        assert server.serves()


class TestBesideTheProtocol:
    def test_unknown_methods(self, impatient):
        for path in ("/snello.Split/Steal", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "/"):
            with Raw(impatient, path=path).send(b"x") as raw:
                assert raw.end()[0] == grpc.StatusCode.UNIMPLEMENTED
        assert impatient.serves()

    def test_a_message_larger_than_a_chunk(self, impatient):
        with Raw(impatient).send(bytes(2 << 20)) as raw:
            assert raw.end()[0] in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)
        assert impatient.serves()

    def test_compressed_messages(self, impatient):
        with Raw(impatient, compression=grpc.Compression.Gzip).send(hello_values()) as raw:
            assert raw.receive().kind == Kind.WELCOME

    def test_a_message_that_decompresses_to_much(self, impatient):
        for num in (2 << 20, 256 << 20):
            with Raw(impatient, compression=grpc.Compression.Gzip).send(bytes(num)) as raw:
                code, details = raw.end()
                assert code not in (grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED), details
        assert impatient.serves()

    def test_metadata_without_end(self, impatient):
        with Raw(impatient, credentials="x" * 60000).send(hello_values()) as raw:
            assert raw.end()[0] in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
        assert impatient.serves()

    def test_health(self, patient):
        client = Client(patient.registry)
        channel = grpc.insecure_channel(patient.address)
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert check(b"", timeout=DEADLINE) == b"\x08\x01"
        with opened(patient, client) as raw:
            conversation = client.step()
            frame = next(conversation)
            raw.send(frame)
            frame = conversation.send(raw.receive())  # the step is under way: the server waits for its end
            stopping = threading.Thread(target=patient.stop)
            stopping.start()
            until(lambda: check(b"", timeout=DEADLINE) == b"\x08\x02")
            with Raw(patient).send(hello_of(Client(patient.registry))) as late:
                assert late.refusal().code == Code.SHUTDOWN
            raw.send(frame)
            with pytest.raises(StopIteration):
                conversation.send(raw.receive())
            refused = raw.refusal()
            assert (refused.code, refused.step) == (Code.SHUTDOWN, 1)
            stopping.join(DEADLINE)
        channel.close()


# ------------------------------------------------------------------------------------------------------ the orderly end


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.slow
def test_a_server_that_is_stopped_and_started_again(small, pictures, tmp_path, labels):
    config, of_server = same_recipe(small, accumulate=2, split={"labels": labels})
    finetune(config, QUIET)
    text = Console(file=io.StringIO(), record=True, width=200)
    first = Running(of_server, tmp_path / "server")
    done: list[Any] = []

    def restart() -> None:
        first.stop()
        (folder,) = (tmp_path / "server" / "sessions").iterdir()
        done.append(steps_in(folder / "checkpoints"))
        done.append(Running(of_server, tmp_path / "server", port=first.port))

    thread = threading.Thread(target=restart)

    def after_step(session: Any, seconds: float) -> None:
        if session.step == 3 and not thread.is_alive() and not done:
            thread.start()

    first.server.on_step = after_step
    session = RemoteSession(join_config(first, pictures, tmp_path / "client"), console=text)
    try:
        session.trainer.fit()
        thread.join(DEADLINE)
        assert_as_in_one_process(config, session, tmp_path / "client")
        session.finish()
        assert max(done[0]) >= 3 and "connected again" in text.export_text()
        assert first.refused(Code.SHUTDOWN) >= 1
    finally:
        session.close()
        first.stop()
        if len(done) > 1:
            done[1].stop()


@pytest.mark.slow
def test_a_stop_between_two_steps_costs_nothing(small, pictures, tmp_path):
    """The client is told which step the server has saved, and saves it too: both go on from there."""
    config, of_server = same_recipe(small)
    finetune(config, QUIET)
    text = Console(file=io.StringIO(), record=True, width=200)
    with Running(of_server, tmp_path / "server") as first:
        session = RemoteSession(join_config(first, pictures, tmp_path / "client"), console=text)
        session.run(3)
        first.stop()
        with Running(of_server, tmp_path / "server", port=first.port):
            try:
                session.run(1)
                assert "the server shuts down; step 3 is saved" in text.export_text()
                assert session.place.rolled_back == 0
                assert 3 in steps_in(tmp_path / "client" / "checkpoints")
                session.run(100)
                assert_as_in_one_process(config, session, tmp_path / "client")
            finally:
                session.close()


def test_who_was_taken_over_while_it_computed_is_told(patient):
    """Else it would connect again, and two processes would take the session from each other for ever."""
    client = Client(patient.registry)
    with connected(patient, client) as connection:
        frame = next(client.step())
        connection.exchange(frame)
        with opened(patient, client, step=0, incarnation=client.incarnation, checkpoints=[0]):
            until(lambda: patient.refused(Code.TAKEN_OVER) == 1)
            until(lambda: len(patient.logged("session left")) == 1)
            with pytest.raises(Refused) as caught:
                connection.exchange(frame)
            assert caught.value.code == Code.TAKEN_OVER


@pytest.mark.slow
def test_a_stop_with_nobody_there_and_with_one_in_mid_step(tmp_path):
    limits = Limits(grace_seconds=0.5)
    server = Running(serve_config(accumulate=2), tmp_path / "server", limits=limits)
    gone, client = Client(server.registry), Client(server.registry)
    with opened(server, gone) as raw:
        conversation = gone.step()
        raw.send(next(conversation))
        raw.send(conversation.send(raw.receive()))
        raw.receive()
        until(lambda: server.value("snello_steps_total") == 1)
    until(lambda: server.value("snello_sessions", mode="train") == 0)
    with opened(server, client) as raw:
        raw.send(next(client.step()))
        raw.receive()
        server.stop()
        assert raw.end()[0] != grpc.StatusCode.OK
    folders = {path.name[-12:]: path for path in (tmp_path / "server" / "sessions").iterdir()}
    assert steps_in(folders[gone.id[:12]] / "checkpoints") == [0, 1]
    assert steps_in(folders[client.id[:12]] / "checkpoints") == [0]


def test_a_failed_step_is_not_saved_at_the_end(tmp_path):
    server = Running(serve_config(), tmp_path / "server", limits=Limits(grace_seconds=2.0))
    client = Client(server.registry)
    with opened(server, client) as raw:
        raw.send(next(client.step()))
        session = server.registry._in_memory[anyone(client)]
        session.model.half.clip = lambda most: torch.tensor(float("nan"))  # type: ignore[method-assign]
        raw.receive()
        until(lambda: session.failed is not None)
        server.stop()
        refused = raw.refusal()
    assert session.checkpoints.steps() == [0] and refused.code != Code.SHUTDOWN


@pytest.mark.slow
def test_a_connection_ends_without_noise(patient, caplog):
    for _ in range(10):
        assert patient.serves()
        gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_an_address_that_is_taken(patient):
    second = Server(patient.registry, Anyone(), patient.telemetry, patient.log)
    with pytest.raises(OSError):
        patient.run(second.start(patient.address, None))
    assert patient.serves()


def test_what_fails_inside_is_one_line_for_the_client(impatient, monkeypatch):
    monkeypatch.setattr(impatient.registry, "open", lambda client, hello: 1 / 0)
    with Raw(impatient).send(hello_of(Client(impatient.registry))) as raw:
        refused = raw.refusal()
    assert refused.code == Code.INTERNAL and refused.reason == "the server failed with ZeroDivisionError"
    assert "1 / 0" in impatient.logged("unexpected error")[-1]["traceback"]
    lines = impatient.log_file.read_text().splitlines()
    impatient.log_file.write_text("".join(f"{line}\n" for line in lines if "unexpected error" not in line))
    assert impatient.serves()
