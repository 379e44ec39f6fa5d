"""Sessions whose codec remembers: what one side knows of the bases of the other, and what happens where it does not."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUIET, finetune, rows_of
from helpers.clients import Client, Largest, digest, ended, picture, registry_in, to_bytes
from helpers.servers import Running, join_config

from snello.config import FinetuneConfig, ServeConfig, SplitConfig
from snello.errors import ProtocolError, SnelloError
from snello.files import load_tensors
from snello.split.client.join import RemoteSession
from snello.split.server.registry import Registry
from snello.split.wire.frames import Frame, Kind
from snello.split.wire.refusals import Code, Refused

pytestmark = pytest.mark.usefixtures("known_models")

LABELS = pytest.mark.parametrize("labels", ["server", "client"])


class Told:
    """Carries frames to a session as a connection does, which tells a client of a refusal by its code."""

    def __init__(self, client: Client) -> None:
        self.client, self.refused, self.keys = client, 0, 0
        client.remote.link.exchange = self._carry  # type: ignore[method-assign]

    def __call__(self, frame: Frame) -> Frame:
        return self.client.remote._answer(frame)

    def _carry(self, frame: Frame) -> Frame:
        try:
            answer = self.client.carry(frame)
        except ProtocolError as error:
            self.refused += 1
            raise Refused(Code(error.code), str(error)) from error
        self.keys += frame.kind == Kind.ACTIVATIONS and self.client.remote.codec.is_key(frame.arrays)
        return answer


def opened(registry: Registry, name: str = "ann", seed: int = 0) -> Client:
    client = Client(registry, name, seed=seed)
    client.open()
    return client


def counters(client: Client) -> tuple[Any, Any]:
    """What both sides have counted."""
    return client.remote.ledger.counters.state_dict(), client.session.ledger.counters.state_dict()


# ------------------------------------------------------------------------------------------------- a basis is unknown


@LABELS
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("codec", ["pca(0.5)", "adc(samples=1, tokens=0.5)+pca(0.5, basis=3)"])
def test_a_server_that_has_forgotten_gets_a_key_frame(tmp_path, labels, accumulate, codec):
    client = opened(registry_in(tmp_path, codec=codec, labels=labels, accumulate=accumulate))
    carry, client_steps = Told(client), client.plan.total_steps
    frames = 0

    def forgetful(frame: Frame) -> Frame:
        nonlocal frames
        if frame.kind == Kind.ACTIVATIONS:
            frames += 1
            if frames == 2:  # the first of this basis that is no key
                client.session.model.codec.format.restore(None)
        return carry(frame)

    client.train(carry=forgetful)
    assert client.session.step == client_steps and carry.refused == 1 and carry.keys >= 2
    ours, theirs = counters(client)
    assert ours == theirs


@LABELS
def test_the_frame_that_was_refused_has_left_nothing(tmp_path, labels):
    """Weights and ledgers end as where the client had sent a key by itself."""
    ends = []
    for forgets in (True, False):
        client = opened(registry_in(tmp_path / str(forgets), codec="pca(0.5)", labels=labels))
        carry = Told(client)
        client.train(2, carry=carry)
        if forgets:
            client.session.model.codec.format.restore(None)
        else:
            client.remote.codec.forget()
            client.session.model.codec.forget()
        client.train(carry=carry)
        assert carry.refused == forgets and carry.keys == 2
        half = digest(client.session.model.half.vit.model.state_dict())
        ends.append((client.weights, half, counters(client)))
    assert ends[0] == ends[1]


def test_the_refusal_leaves_the_session_where_it_was(tmp_path):
    client = opened(registry_in(tmp_path, codec="pca(0.5)"))
    client.train(1)
    client.session.model.codec.format.restore(None)
    conversation = client.step()
    frame = next(conversation)
    before = picture(client.session)
    for _ in range(3):
        with pytest.raises(ProtocolError, match="basis that is not here") as caught:
            client.session.take(to_bytes(frame))
        assert caught.value.code == "unknown-basis" and picture(client.session) == before
    key = client.remote.half.again()
    assert (key.kind, key.step, key.micro, key.flags) == (frame.kind, frame.step, frame.micro, frame.flags)
    assert key.arrays.keys() - frame.arrays.keys() == {"scales.basis"}
    for name in ("labels", "labels.share"):
        assert torch.equal(key.arrays[name], frame.arrays[name])
    with pytest.raises(StopIteration):
        conversation.send(client.carry(key))
    assert client.session.step == 2


def test_a_server_that_never_understands_ends_the_run(tmp_path):
    client = opened(registry_in(tmp_path, codec="pca(0.5)"))
    sent: list[Frame] = []

    def stubborn(frame: Frame) -> Frame:
        sent.append(frame)
        raise Refused(Code.UNKNOWN_BASIS, "no")

    client.remote.link.exchange = stubborn  # type: ignore[method-assign]
    with pytest.raises(Refused, match="unknown-basis"):
        client.train(carry=client.remote._answer)
    assert len(sent) == 2 and all(client.remote.codec.is_key(frame.arrays) for frame in sent)


@pytest.mark.parametrize("code", [Code.MALFORMED, Code.OUT_OF_TURN, Code.NOT_FINITE])
def test_other_refusals_are_not_answered(tmp_path, code):
    client = opened(registry_in(tmp_path, codec="pca(0.5)"))
    sent: list[Frame] = []

    def stubborn(frame: Frame) -> Frame:
        sent.append(frame)
        raise Refused(code, "no")

    client.remote.link.exchange = stubborn  # type: ignore[method-assign]
    with pytest.raises(Refused, match=code.value):
        client.train(carry=client.remote._answer)
    assert len(sent) == 1


def test_a_gradient_of_an_unknown_basis_is_an_error_here(tmp_path):
    """The server has it from this client, which told it of every basis that came down: nothing to be sent again."""
    client = opened(registry_in(tmp_path, codec="pca(0.5)"))
    client.train(1)
    client.remote.codec.format.restore(None)
    client.session.model.codec.format._up.current = None
    with pytest.raises(ProtocolError, match="basis that is not here"):
        client.train(1)


def test_a_repeated_frame_gets_the_same_answer(tmp_path):
    """One whose answer was lost is sent again: the bases of neither way move on by it."""
    client = opened(registry_in(tmp_path, codec="pca(0.5, basis=2)"))

    def twice(frame: Frame) -> Frame:
        first = client.carry(frame)
        remembered = client.session.model.codec.state_dict()
        again = client.carry(frame)
        assert to_bytes(first) == to_bytes(again)
        assert all(torch.equal(v, remembered[k]) for k, v in client.session.model.codec.state_dict().items())
        return again

    client.train(carry=twice)
    other = opened(registry_in(tmp_path / "other", codec="pca(0.5, basis=2)"))
    other.train()
    assert ended(client) == ended(other)


# ---------------------------------------------------------------------------------------------------- shared sessions


@LABELS
@pytest.mark.parametrize("codec", ["pca(0.5)", "pca(0.5, basis=2)"])
def test_clients_that_share_a_half_have_bases_of_their_own(tmp_path, labels, codec):
    registry = registry_in(tmp_path, sessions="shared", accumulate=2, labels=labels, codec=codec)
    clients = [opened(registry, name, seed) for seed, name in enumerate(("ann", "bob", "cyd"))]
    assert clients[0].session.model is clients[1].session.model
    carries = [Told(client) for client in clients]
    for _ in range(clients[0].plan.total_steps):
        conversations = {index: client.step() for index, client in enumerate(clients)}
        due = {index: next(conversation) for index, conversation in conversations.items()}
        while due:
            for index in list(due):
                try:
                    due[index] = conversations[index].send(carries[index](due[index]))
                except StopIteration:
                    del due[index]
    names = [set(client.session.steps._format[0][2]) for client in clients]
    assert all(names) and not names[0] & names[1] and not names[1] & names[2]
    for client, carry in zip(clients, carries, strict=True):
        assert carry.refused == 0 and client.session.step == client.plan.total_steps
        ours, theirs = counters(client)
        assert ours == theirs
    half = clients[0].session.model.codec.format.snapshot()
    assert half == ((None, 0, {}), (None, 0, {}))  # nothing of a client is left in what they share


def test_a_refused_frame_of_one_changes_nothing_of_the_others(tmp_path):
    registry = registry_in(tmp_path, sessions="shared", codec="pca(0.5)")
    ann, bob = opened(registry, "ann"), opened(registry, "bob", 1)
    ann.train(1)
    bob.train(1)
    remembered = [client.session.steps._format for client in (ann, bob)]
    conversation = bob.step()
    frame = next(conversation)
    key = bob.remote.half.again()
    wrong = replace(key, arrays={**key.arrays, "labels": key.arrays["labels"] + 3})  # refused when it has been decoded
    with pytest.raises(ProtocolError, match="labels"):
        bob.session.take(to_bytes(wrong))
    assert [client.session.steps._format for client in (ann, bob)] == remembered
    ann.train(1)
    bob.carry(frame)


@LABELS
def test_a_client_that_comes_back_to_a_shared_half(tmp_path, labels):
    """The server has forgotten its bases; both ways begin again with a key."""
    registry = registry_in(tmp_path, sessions="shared", accumulate=2, labels=labels, codec="pca(0.5)")
    ann, bob = opened(registry, "ann"), opened(registry, "bob", 1)
    carry = Told(ann)
    ann.train(2, carry=carry)
    bob.train(1)
    registry.leave(ann.place)
    ann.open(step=2, incarnation="another", checkpoints=[0])
    ann.train(carry=carry)
    bob.train()
    assert carry.refused == 1 and ann.session.step == ann.plan.total_steps


# ------------------------------------------------------------------------------------------------ saved and gone back


@LABELS
@pytest.mark.parametrize("basis", [1, 2, 3, 20])
def test_back_to_a_checkpoint_both_sides_go_on_as_they_did(tmp_path, undisturbed, labels, basis):
    """Both save what they remember: also the numbers of bytes are those of a run that nothing happened to."""
    options = {"codec": f"pca(0.5, basis={basis})", "labels": labels, "accumulate": 2}
    client = opened(registry_in(tmp_path, **options))
    client.train(1)
    client.carry(client.save())
    own, optimizer = (
        {name: {key: value.clone() for key, value in module.state_dict().items()} for name, module in
         client.remote.modules.items()},
        client.remote.half.optimizer.state_dict(),
    )  # fmt: skip
    state = client.remote.state_dict()
    optimizer = {**optimizer, "state": {k: {n: v.clone() for n, v in s.items()} for k, s in optimizer["state"].items()}}
    client.train(2)
    client.registry = Registry(client.registry.config, client.registry.run)
    client.open(checkpoints=[0, 1])
    for name, module in client.remote.modules.items():
        module.load_state_dict(own[name])
    client.remote.half.optimizer.load_state_dict(optimizer)
    client.remote.load_state_dict(state)
    client.train()
    assert ended(client) == undisturbed(**options)


def test_hostile_frames_leave_what_is_remembered(tmp_path):
    client = opened(registry_in(tmp_path, codec="pca(0.5, basis=2)"))
    client.train(1)
    conversation = client.step()
    for key in (False, True):
        frame = client.remote.half.again() if key else next(conversation)
        before = picture(client.session)
        half = client.session.model.half
        batch = half.max_rows * (half.vit.num_prefix_tokens + half.vit.num_patches) * half.vit.embed_dim * 4
        basis = torch.full((64, 64), 3, dtype=torch.int8)
        for change in (
            {"scales.basis": basis},
            {"scales.basis": basis.repeat(1, 50)},
            {"scales": frame.arrays["scales"][:-1]},
            {"scales": frame.arrays["scales"].flip(0)},
            {"activations": frame.arrays["activations"][:-2]},
            {"indices.outliers": torch.zeros(1, dtype=torch.int32)},
            {"indices.shape": torch.tensor([2**20, 10, 64], dtype=torch.int32)},
            {"indices.shape": torch.tensor([4, 2**20, 64], dtype=torch.int32)},
            {"indices.shape": torch.tensor([4, 10, 2**20], dtype=torch.int32)},
            {"indices.shape": torch.tensor([4, 10, -64], dtype=torch.int32)},
            {"labels": frame.arrays["labels"] + 3},
        ):
            data = to_bytes(replace(frame, arrays={**frame.arrays, **change}))
            with Largest() as largest, pytest.raises(SnelloError):
                client.session.take(data)
            assert picture(client.session) == before, change.keys()
            assert largest.bytes <= max(len(data), 2 * batch)
    with pytest.raises(StopIteration):
        conversation.send(client.carry(frame))
    client.train()


# -------------------------------------------------------------------------------------------------- over the network


def recipe(small: FinetuneConfig, **split: Any) -> tuple[FinetuneConfig, ServeConfig]:
    """The same settings for a run in one process and for a server."""
    config = replace(small, split=SplitConfig(cut=3, **split))
    names = ("model", "weights", "image_size", "method", "epochs", "batch_size", "precision", "attention", "device")
    values = {name: getattr(config, name) for name in (*names, "checkpoint_steps")}
    return config, ServeConfig(**values, split=config.split, insecure_loopback=True)


def assert_same(config: FinetuneConfig, session: RemoteSession, out: Path) -> None:
    """Losses, bytes and the client's weights are those of the run in config.out."""
    whole, _ = load_tensors(config.out / "last.safetensors")  # type: ignore[operator]
    for name, value in session.get_state("client").items():
        assert torch.equal(value, whole[f"model.{name}"]), name
    pairs = zip(rows_of(out, "step"), rows_of(config.out, "step"), strict=True)  # type: ignore[arg-type]
    for ours, theirs in pairs:
        for name in ("step", "loss", "uplink_bytes", "downlink_bytes"):
            assert ours[name] == theirs[name], name


@pytest.mark.slow
@LABELS
def test_a_run_over_the_socket_ends_as_in_one_process(small, pictures, tmp_path, labels):
    config, of_server = recipe(small, codec="pca(0.5, basis=3)", labels=labels)
    finetune(config, QUIET)
    with Running(of_server, tmp_path / "server") as server:
        session = RemoteSession(join_config(server, pictures, tmp_path / "client"), console=QUIET)
        session.trainer.fit()
        assert_same(config, session, tmp_path / "client")
        session.finish()
        session.close()
        assert not server.logged("refused")


@pytest.mark.slow
@LABELS
def test_a_server_on_the_network_that_has_forgotten(small, pictures, tmp_path, labels):
    """The stream ends with the refusal; on a new one the frame goes up again, with its basis."""
    _, of_server = recipe(small, codec="pca(0.5)", labels=labels)
    with Running(of_server, tmp_path / "server") as server:
        session = RemoteSession(join_config(server, pictures, tmp_path / "client"), console=QUIET)
        session.run(3)
        (upper,) = server.registry._in_memory.values()
        done = threading.Event()

        def forget() -> None:
            upper.model.codec.format.restore(None)
            done.set()

        server.server._compute.submit(forget)
        assert done.wait(10)
        session.trainer.fit()
        summary = session.finish()  # an error where both sides have not counted the same
        session.close()
        assert summary.steps == 14 and server.refused(Code.UNKNOWN_BASIS) == 1
        assert session.place.rolled_back == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "basis",
    [1, 2, 3],
)
def test_a_stop_between_two_steps(small, pictures, tmp_path, basis):
    """The client has packed the next frame already when it hears of the stop, and saves what was before that."""
    config, of_server = recipe(small, codec=f"pca(0.5, basis={basis})")
    finetune(config, QUIET)
    with Running(of_server, tmp_path / "server") as first:
        session = RemoteSession(join_config(first, pictures, tmp_path / "client"), console=QUIET)
        session.run(3)
        first.stop()
        with Running(of_server, tmp_path / "server", port=first.port):
            try:
                session.run(100)
                assert_same(config, session, tmp_path / "client")
            finally:
                session.close()
