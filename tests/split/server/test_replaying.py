"""Sessions whose clients are frozen: what they send is stored once, and the server goes on by itself."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.clients import (
    Client,
    Kept,
    answer_of,
    picture,
    registry_in,
    serve_config,
    take,
    to_bytes,
    weights,
)
from helpers.servers import Running, anyone, connected, until

from snello.errors import CheckpointError, ProtocolError, TrainingError
from snello.split.halves import ServerHalf
from snello.split.server import registry as registry_of
from snello.split.server.registry import Registry
from snello.split.server.sessions import TrainingSession
from snello.split.steps import ServerSteps
from snello.split.store import Store
from snello.split.wire import frames
from snello.split.wire.frames import Flags, Frame, Kind, control, control_values
from snello.split.wire.handshake import RunShape
from snello.split.wire.refusals import Code, Refused

pytestmark = pytest.mark.usefixtures("known_models")

SENT, ALL = 3, 9
FROZEN: dict[str, Any] = {
    "codec": "pca(2)",
    "client": "frozen",
    "send_epochs": 1,
    "replay": 1,
    "epochs": 3,
    "checkpoint_steps": 0,
}
"""Ten pictures: three frames, a step on stored samples after each, and three more."""


def frozen_in(folder: Path, **options: Any) -> Registry:
    return registry_in(folder, **{**FROZEN, **options})


def to_the_end(session: TrainingSession) -> None:
    while session.behind:
        session.replay()


def store_of(session: TrainingSession) -> Store:
    assert session.steps.store is not None
    return session.steps.store


def ended(client: Client) -> dict[str, Any]:
    """All that must not depend on what happened on the way."""
    session = client.session
    return {
        "server": weights(session),
        "client": client.weights,
        "ledger": session.ledger.state_dict(),
        "store": store_of(session).path.read_bytes(),
        "steps": (session.steps.step, session.steps.done),
        "rows": [{k: v for k, v in row.items() if k != "seconds"} for row in session.run.rows()],
    }


def evaluated(client: Client) -> None:
    """What a client does when the server has taken its last step."""
    assert client.left() == 0
    client.carry(client.evaluation())
    client.carry(client.save(accuracy=0.5, best=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Callable[..., dict[str, Any]]:
    """What a session with some options ends with when nothing disturbs it."""
    known: dict[str, dict[str, Any]] = {}

    def get(**options: Any) -> dict[str, Any]:
        key = repr(sorted(options.items()))
        if key not in known:
            client = Client(frozen_in(tmp_path_factory.mktemp("whole"), **options))
            client.open()
            client.train()
            to_the_end(client.session)
            evaluated(client)
            known[key] = ended(client)
        return known[key]

    return get


def restarted(client: Client, *checkpoints: int) -> Any:
    """The client at another server that has the folder of the first, which was killed."""
    before = client.registry
    client.registry = Registry(before.config, before.run)
    return client.open(checkpoints=list(checkpoints))


@pytest.fixture
def client(tmp_path) -> Client:
    made = Client(frozen_in(tmp_path))
    made.open()
    return made


# ------------------------------------------------------------------------------------------------------ exactly once


@pytest.mark.parametrize("accumulate", [1, 2])
def test_frames_sent_again_are_stored_once(tmp_path, whole, accumulate):
    client = Client(frozen_in(tmp_path, accumulate=accumulate))
    client.open()

    def thrice(frame: Frame) -> Frame:
        session = client.session
        first = session.take(to_bytes(frame))
        size = store_of(session).num_bytes
        again = session.take(to_bytes(frame))
        if first.after is not None:
            first.after()
        now = picture(session), store_of(session).state_dict()
        third = session.take(to_bytes(frame))
        assert again.repeated and third.repeated and first.chunks == again.chunks == third.chunks
        assert (picture(session), store_of(session).state_dict()) == now and store_of(session).num_bytes == size
        return answer_of(first)

    client.train(carry=thrice)
    to_the_end(client.session)
    evaluated(client)
    assert ended(client) == whole(accumulate=accumulate)


def test_the_file_is_what_came(client):
    sent = []
    client.train(carry=lambda frame: sent.append(bytes(to_bytes(frame))) or client.carry(frame))
    assert store_of(client.session).path.read_bytes() == b"".join(sent) and len(sent) == SENT
    assert store_of(client.session).path == client.session.run.path / "store.frames"
    uplink = client.session.ledger.counters.total("uplink")
    assert store_of(client.session).num_bytes == uplink, "the file is as long as the frames were counted"


def test_steps_on_stored_samples_come_before_the_next_frame_at_the_latest(client):
    done = []
    client.train(carry=lambda frame: (client.carry(frame), done.append(client.session.steps.done))[0])
    assert done == [1, 3, 5]
    assert client.session.behind == ALL - 5
    client.session.replay()
    assert client.session.steps.done == 6 and client.session.behind == 3


@pytest.mark.parametrize("when", ["at once", "late"])
def test_when_they_are_taken_does_not_matter(client, whole, when):
    def carry(frame: Frame) -> Frame:
        answer = client.carry(frame)
        if when == "at once" and frame.step < SENT - 1:
            to_the_end(client.session)
        return answer

    client.train(carry=carry)
    to_the_end(client.session)
    evaluated(client)
    assert ended(client) == whole()


def test_out_of_turn(client, whole):
    def disturbed(frame: Frame) -> Frame:
        client.session._catch_up()
        before = picture(client.session), store_of(client.session).state_dict()
        step = frame.step
        wrong = [replace(frame, step=step + 1), replace(frame, micro=1), replace(frame, kind=Kind.FEATURE_GRADIENTS)]
        wrong += [replace(frame, step=step - 1, micro=9)] if step else []
        wrong += [client.request(control(Kind.SAVE, {}), step + 1), client.request(control(Kind.WAIT, {}), step + 1)]
        for other in wrong:
            with pytest.raises(Refused) as caught:
                client.session.take(to_bytes(other))
            assert caught.value.code == Code.OUT_OF_TURN
            assert (picture(client.session), store_of(client.session).state_dict()) == before
        return client.carry(frame)

    client.train(carry=disturbed)
    to_the_end(client.session)
    evaluated(client)
    assert ended(client) == whole()


@pytest.mark.parametrize("step", [0, 2])
def test_a_client_that_is_not_frozen_is_refused(client, whole, step):
    def carry(frame: Frame) -> Frame:
        if frame.step == step:
            client.session._catch_up()
            before = picture(client.session), store_of(client.session).state_dict()
            assert Flags.FORWARD_ONLY in frame.flags
            with pytest.raises(ProtocolError, match=rf"from step {step} on the client's half is frozen, but it wants"):
                client.session.take(to_bytes(replace(frame, flags=frame.flags & ~Flags.FORWARD_ONLY)))
            assert (picture(client.session), store_of(client.session).state_dict()) == before
        return client.carry(frame)

    client.train(carry=carry)
    to_the_end(client.session)
    evaluated(client)
    assert ended(client) == whole()


def test_broken_frames_are_not_stored(client, whole):
    def carry(frame: Frame) -> Frame:
        client.session._catch_up()
        before = picture(client.session), store_of(client.session).state_dict()
        for name in frame.arrays:
            for change in (None, lambda x: x[:0], lambda x: x.flatten()[:1]):
                arrays = {key: value for key, value in frame.arrays.items() if key != name}
                if change is not None:
                    arrays[name] = change(frame.arrays[name])
                other = replace(frame, arrays=arrays)
                if to_bytes(other) == to_bytes(frame) or (name == "scales.basis" and change is None and frame.step):
                    continue
                with pytest.raises((Refused, ProtocolError)):
                    client.session.take(to_bytes(other))
                assert (picture(client.session), store_of(client.session).state_dict()) == before, name
        return client.carry(frame)

    client.train(carry=carry)
    to_the_end(client.session)
    evaluated(client)
    assert ended(client) == whole()


def test_a_plan_of_other_steps_is_refused(tmp_path):
    """What the server takes by itself goes by the pictures, and may not go on for ever."""
    client = Client(frozen_in(tmp_path))
    for steps in (1, 10**6):
        with pytest.raises(Refused, match=f"steps: the client wants {steps}, its pictures make 3") as caught:
            client.open(plan=RunShape(10, steps, client.plan.classes))
        assert caught.value.code == Code.MISMATCH
    with pytest.raises(Refused, match=r"the store of this run needs up to \d+ bytes") as caught:
        client.open(plan=RunShape(10**9, 250_000_000, client.plan.classes))
    client.open()


# ------------------------------------------------------------------------------------------------------------ the tail


def test_waiting(client):
    assert client.left() == 0
    client.train(1)
    assert client.left() == 1, "to ask takes no step"
    client.train()
    lefts = []
    while client.session.behind:
        lefts.append(client.left())
        client.session.replay()
    assert lefts == [4, 3, 2, 1] and client.left() == 0


def test_a_question_asked_again_has_the_same_answer(client):
    client.train()
    ask = client.request(control(Kind.WAIT, {}))
    first = take(client.session, ask)
    client.session.replay()
    again = take(client.session, ask)
    assert again.repeated and again.chunks == first.chunks
    assert client.left() == control_values(answer_of(first))["left"] - 1


def test_what_has_to_wait_in_the_tail(client):
    client.train()
    client.session.replay()
    requests = [client.evaluation(), *(client.request(control(kind, {})) for kind in (Kind.FINISH, Kind.GET_WEIGHTS))]
    for frame in requests:
        before = picture(client.session)
        with pytest.raises(Refused, match="the server has 3 steps on stored samples left") as caught:
            client.session.take(to_bytes(frame))
        assert caught.value.code == Code.OUT_OF_TURN and picture(client.session) == before
    assert answer_of(take(client.session, client.save())).kind == Kind.SAVED
    assert client.session.checkpoints.steps() == [0, SENT]
    to_the_end(client.session)
    for frame in requests:
        take(client.session, frame)
    assert client.session.finished


def test_the_server_saves_in_the_tail_now_and_then_and_at_its_end(tmp_path):
    client = Client(frozen_in(tmp_path, checkpoint_steps=4, epochs=5))
    client.open()
    client.train()
    saved = []
    while client.session.behind:
        client.session.replay()
        saved.append(client.session.saved == client.session.position)
    assert [step for step, is_saved in enumerate(saved, 6) if is_saved] == [8, 12, 15]


# --------------------------------------------------------------------------------------------- crashes, and going back


@pytest.mark.parametrize("codec", ["pca(2)", "pca(2, basis=1)", "adc(0.5)+int4"])
@pytest.mark.parametrize("client_goes_too", [False, True])
def test_the_server_is_killed_after_every_step(tmp_path, whole, codec, client_goes_too):
    """Each time both have the checkpoint of the step before, and the store is longer than that."""
    client = Client(frozen_in(tmp_path, codec=codec))
    client.open()
    kept: dict[int, Kept] = {0: client.keep()}
    for step in range(SENT):
        client.train(1)
        size = store_of(client.session).num_bytes
        other = Client(client.registry) if client_goes_too else client
        other.id, other.place = client.id, client.place
        client = other
        welcome = restarted(client, step)
        assert (welcome.step, welcome.back) == (step, True) and store_of(client.session).num_bytes < size
        client.go_back(kept[step])
        client.train(1)
        assert store_of(client.session).num_bytes == size
        client.carry(client.save())
        kept[step + 1] = client.keep()
    while client.session.behind:
        client.session.replay()
        client.session.save()
        if client.session.behind:
            client.session.replay()  # is lost
        assert restarted(client, SENT).step == SENT
        client.go_back(kept[SENT])
    to_the_end(client.session)
    evaluated(client)
    assert ended(client) == whole(codec=codec)


def test_what_was_stored_beyond_the_checkpoint_is_stored_again(client, whole):
    """The server dies when a frame is in the file and nothing says so yet."""
    client.train(1)
    client.carry(client.save())
    kept = client.keep()
    client.train(1)
    conversation = client.step()
    client.session.take(to_bytes(next(conversation)))
    path, sizes = store_of(client.session).path, store_of(client.session).num_bytes
    restarted(client, 0, 1)
    assert path.stat().st_size < sizes and len(store_of(client.session)) == 1
    client.go_back(kept)
    client.train()
    to_the_end(client.session)
    evaluated(client)
    assert ended(client) == whole()


@pytest.mark.parametrize("client_has_saved", [False, True])
def test_what_an_evaluation_adds_belongs_to_the_last_checkpoint(client, whole, client_has_saved):
    """Both sides have saved the last step when the tail began; one of them, or both, the evaluation after it."""
    client.train()
    client.carry(client.save())
    kept = client.keep()
    to_the_end(client.session)
    evaluated(client)
    numbers = [SENT, client.schedule.checkpoint(SENT, finished=True)]
    assert client.session.checkpoints.steps() == numbers and numbers[0] < numbers[1]
    welcome = restarted(client, *numbers[: 1 + client_has_saved])
    assert welcome.step == numbers[client_has_saved] and client.session.step == SENT
    if not client_has_saved:
        client.go_back(kept)
        assert client.left() == 0
        evaluated(client)
    assert ended(client) == whole()
    client.carry(client.request(control(Kind.FINISH, {})))


def test_half_an_evaluation_is_forgotten_where_the_server_stops(client, whole):
    client.train()
    client.carry(client.save())
    kept = client.keep()
    to_the_end(client.session)
    client.carry(client.evaluation())
    client.registry.save_all()
    restarted(client, SENT)
    client.go_back(kept)
    evaluated(client)
    assert ended(client) == whole()


def test_a_client_goes_on_after_its_connection_broke_in_the_tail(client, whole):
    client.train()
    client.registry.leave(client.place)
    client.session.replay()
    welcome = client.open(step=SENT, incarnation=client.incarnation)
    assert not welcome.back and client.left() == 3
    to_the_end(client.session)
    evaluated(client)
    assert ended(client) == whole()


def test_room_is_made_of_a_session_in_the_tail(tmp_path, whole):
    registry = frozen_in(tmp_path, max_sessions=1)
    one = registry.sizes(3)
    registry = frozen_in(tmp_path, max_sessions=1, max_memory=f"{one.state + one.messages + one.stored_memory}B")
    client, other = Client(registry), Client(registry, "ben")
    client.open()
    client.train()
    client.carry(client.save())
    kept = client.keep()
    client.session.replay()
    registry.leave(client.place)
    before = client.session
    other.open()
    assert not registry.keeps(before), "there was room for one"
    registry.leave(other.place)
    assert client.open(checkpoints=[0, SENT]).step == SENT
    assert client.session is not before and client.session.steps.done == 6, "what it had done was saved"
    client.go_back(kept)
    to_the_end(client.session)
    evaluated(client)
    assert ended(client) == whole()


def test_a_session_in_the_tail_is_not_forgotten(tmp_path):
    registry = frozen_in(tmp_path, idle_seconds=1e-9)
    client = Client(registry)
    client.open()
    client.train()
    registry.leave(client.place)
    registry.forget_idle()
    assert registry.keeps(client.session)
    to_the_end(client.session)
    registry.forget_idle()
    assert not registry.keeps(client.session)


def test_sessions_in_the_tail_are_saved_at_the_end(client, whole):
    client.train()
    client.carry(client.save())
    kept = client.keep()
    client.session.replay()
    client.registry.save_all()
    restarted(client, 0, SENT)
    assert client.session.steps.done == 6
    client.go_back(kept)
    to_the_end(client.session)
    evaluated(client)
    assert ended(client) == whole()


def test_others_are_served_while_a_session_is_in_its_tail(tmp_path):
    """It has hours of steps left, and its client has gone."""
    config = serve_config(**{**FROZEN, "epochs": 100_000})
    with Running(config, tmp_path / "server") as server:
        client, other = Client(server.registry), Client(server.registry)
        with connected(server, client) as connection:
            client.train(carry=connection.exchange)
        session = server.registry._in_memory[anyone(client)]
        until(lambda: session.steps.done > 10)
        with connected(server, other) as connection:
            done = session.steps.done
            other.train(carry=connection.exchange)
            waiting = connection.request(control(Kind.WAIT, {}), SENT)
            assert control_values(waiting)["left"] > 200_000
            connection.request(control(Kind.SAVE, {}), SENT)
        until(lambda: session.steps.done > done + 3)
        both = [session, server.registry._in_memory[anyone(other)]]
    assert all(one.behind and one.saved == one.position for one in both), "and a server that stops saves them all"


def test_what_fails_in_the_background_is_told_when_its_client_asks(tmp_path, monkeypatch, caplog):
    config = serve_config(**{**FROZEN, "epochs": 1000})
    with Running(config, tmp_path / "server") as server:
        client = Client(server.registry)
        with connected(server, client) as connection:
            client.train(carry=connection.exchange)

            def broken(self: ServerSteps) -> float:
                raise RuntimeError("no such thing")

            monkeypatch.setattr(ServerSteps, "replay", broken)
            session = server.registry._in_memory[anyone(client)]
            until(lambda: session.failed)
            with pytest.raises(Refused, match=r"the server failed in a step of its own after step 3") as caught:
                connection.request(control(Kind.WAIT, {}), SENT)
        assert caught.value.code == Code.INTERNAL and server.logged("a step on stored samples could not be taken")


# ----------------------------------------------------------------------------------------- files, disks, bad numbers


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [shortened, flipped, Path.unlink], ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("tail", [False, True])
def test_a_store_that_was_harmed_while_the_server_was_down(client, whole, harm, tail):
    client.train(SENT if tail else 2)
    client.carry(client.save())
    kept, at, path = client.keep(), client.session.step, store_of(client.session).path
    data = path.read_bytes()
    harm(path)
    before = {file: file.read_bytes() for file in client.session.run.path.rglob("*") if file.is_file()}
    with pytest.raises(Refused, match=r"store\.frames is gone or damaged") as caught:
        restarted(client, 0, at)
    assert caught.value.code == Code.STORE and "\n" not in str(caught.value)
    assert "put the session's file back" in str(caught.value)
    assert before == {file: file.read_bytes() for file in client.session.run.path.rglob("*") if file.is_file()}
    path.write_bytes(data)
    client.open(checkpoints=[0, at])
    client.go_back(kept)
    client.train()
    to_the_end(client.session)
    evaluated(client)
    assert ended(client) == whole()


@pytest.mark.parametrize("harm", [flipped, Path.unlink], ids=lambda harm: harm.__name__)
def test_a_store_that_is_harmed_while_the_server_runs(client, harm):
    client.train()
    store_of(client.session)._decoded.clear()
    harm(store_of(client.session).path)
    to_the_end(client.session)
    with pytest.raises(Refused, match=r"store\.frames is gone or damaged") as caught:
        client.left()
    assert caught.value.code == Code.STORE


def full(*args: Any, **options: Any) -> None:
    raise CheckpointError("could not write store.frames: No space left on device")


def test_a_disk_that_is_full_when_a_frame_comes(client, whole, monkeypatch):
    client.train(1)
    conversation = client.step()
    frame = next(conversation)
    client.session._catch_up()
    before = picture(client.session), store_of(client.session).state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(Store, "append", full)
        with pytest.raises(Refused, match="No space left") as caught:
            client.carry(frame)
    assert caught.value.code == Code.STORAGE
    assert (picture(client.session), store_of(client.session).state_dict()) == before
    with pytest.raises(StopIteration):
        conversation.send(client.carry(frame))
    client.train()
    to_the_end(client.session)
    evaluated(client)
    assert ended(client) == whole()


def test_a_disk_that_is_full_in_the_tail(client, whole, monkeypatch):
    client.train()
    client.carry(client.save())
    kept = client.keep()
    with monkeypatch.context() as patch:
        patch.setattr(TrainingSession, "save", full)
        to_the_end(client.session)
    with pytest.raises(Refused, match="No space left") as caught:
        client.left()
    assert caught.value.code == Code.STORAGE
    client.registry.leave(client.place)
    assert client.open(step=SENT, incarnation=client.incarnation, checkpoints=[0, SENT]).back
    client.go_back(kept)
    to_the_end(client.session)
    evaluated(client)
    assert ended(client) == whole()


def test_a_loss_that_is_not_finite_in_the_tail(client, monkeypatch):
    client.train()
    before = weights(client.session)
    with monkeypatch.context() as patch:
        patch.setattr(ServerHalf, "learn", lambda *args: torch.tensor(float("nan")))
        client.session.replay()
    assert client.session.behind == 0 and weights(client.session) == before
    with pytest.raises(Refused, match="not finite at step 6 of the server") as caught:
        client.left()
    assert caught.value.code == Code.NOT_FINITE


def test_a_loss_that_is_not_finite_between_frames(client, monkeypatch):
    client.train(1)

    def bad(self: ServerSteps) -> float:
        raise TrainingError("the loss on stored samples is not finite")

    monkeypatch.setattr(ServerSteps, "replay", bad)
    with pytest.raises(Refused, match="not finite at step 2 of the server"):
        client.train(1)


class TestRoom:
    """What a store needs is refused before training where it is not there, with what it needs."""

    @staticmethod
    def need(folder: Path, **options: Any) -> int:
        registry = frozen_in(folder, **options)
        return registry.sizes(3).stored_disk(Client(registry).schedule)

    def test_what_a_store_needs_is_no_less_than_it_takes(self, tmp_path):
        for codec in ("none", "int4", "pca(0.1)", "pca(2, basis=1)", "adc(0.5)+int8", "adc(0.5, buffer=2)"):
            client = Client(frozen_in(tmp_path / codec, codec=codec, accumulate=2))
            client.open()
            client.train()
            need = client.registry.sizes(3).stored_disk(client.schedule)
            assert store_of(client.session).num_bytes <= need <= 60 * store_of(client.session).num_bytes, codec

    def test_more_than_max_disk(self, tmp_path):
        need = self.need(tmp_path)
        client = Client(frozen_in(tmp_path, max_disk=f"{need - 1}B"))
        message = rf"needs up to {need} bytes on the server's disk; others hold 0 of --max-disk {need - 1}B, and \d+ b"
        with pytest.raises(Refused, match=message) as caught:
            client.open()
        assert caught.value.code == Code.FULL and not client.registry._in_memory
        assert "--max-disk of `snello serve`" in str(caught.value)
        assert not list(client.registry.run.path.rglob("*.*")), "nothing is left of it"
        Client(frozen_in(tmp_path, max_disk=f"{need}B")).open()

    def test_others_have_their_share_from_the_start(self, tmp_path):
        need = self.need(tmp_path)
        registry = frozen_in(tmp_path, max_disk=f"{2 * need}B")
        clients = [Client(registry), Client(registry, "ben"), Client(registry, "cyd")]
        clients[0].open()
        clients[1].open()
        with pytest.raises(Refused, match=f"others hold {2 * need} of --max-disk"):
            clients[2].open()
        clients[0].train()
        to_the_end(clients[0].session)
        evaluated(clients[0])
        clients[0].carry(clients[0].request(control(Kind.FINISH, {})))
        size = store_of(clients[0].session).num_bytes
        registry.leave(clients[0].place)
        with pytest.raises(Refused, match=f"others hold {need + size} of --max-disk"):
            clients[2].open()
        registry.leave(clients[1].place)
        registry.forget(clients[1].place)
        clients[2].open()

    def test_a_disk_without_room(self, tmp_path, monkeypatch):
        need = self.need(tmp_path)
        client = Client(frozen_in(tmp_path))
        free = SimpleNamespace(free=need - 1)
        monkeypatch.setattr(registry_of.shutil, "disk_usage", lambda path: free)
        with pytest.raises(Refused, match=f"and {need - 1} bytes are free") as caught:
            client.open()
        assert caught.value.code == Code.FULL
        free.free = need
        client.open()

    def test_a_session_that_comes_back_has_its_file_already(self, tmp_path, monkeypatch):
        client = Client(frozen_in(tmp_path))
        need = client.registry.sizes(3).stored_disk(client.schedule)
        client.open()
        client.train(2)
        client.carry(client.save())
        free = SimpleNamespace(free=need - store_of(client.session).num_bytes)
        monkeypatch.setattr(registry_of.shutil, "disk_usage", lambda path: free)
        assert restarted(client, 0, 2).step == 2
        free.free -= 1
        with pytest.raises(Refused, match="bytes are free"):
            restarted(client, 0, 2)

    def test_no_more_is_stored_than_there_is_room_for(self, tmp_path):
        client = Client(frozen_in(tmp_path, codec="none"))
        client.open()
        client.train(1)
        client.session._catch_up()
        store_of(client.session).max_disk = 2 * store_of(client.session).num_bytes - 1
        before = picture(client.session)
        with pytest.raises(ProtocolError, match=r"than the \d+ bytes that it was given"):
            client.train(1)
        assert picture(client.session) == before

    def test_memory(self, tmp_path):
        sizes = frozen_in(tmp_path).sizes(3)
        assert sizes.stored_memory >= 8 * 4 * 10 * 64 * 2 and registry_in(tmp_path).sizes(3).stored_memory == 0
        least = frozen_in(tmp_path, max_memory="1MB", max_sessions=1000).sizes(3)
        need = least.messages + least.stored_memory + least.state
        client = Client(frozen_in(tmp_path, max_memory=f"{need - 1}B", max_sessions=1000))
        with pytest.raises(Refused, match=rf"--max-memory {need - 1}B; this one needs {need} bytes") as caught:
            client.open()
        assert caught.value.code == Code.FULL
        assert not (tmp_path / "server" / "sessions").exists()

    def test_what_is_kept_decoded_is_bounded_by_it(self, tmp_path):
        client = Client(frozen_in(tmp_path), num_train=100)
        client.plan = replace(client.plan, num_train=100)
        client.open()
        store = store_of(client.session)
        store._max_memory = 3 * 4 * (10 * 64 * 2 + 3 * 4 + 4)
        client.train(8)
        assert len(store) == 8 and len(store._decoded) == 3


def test_an_old_folder_without_a_store_is_that_of_another_run(tmp_path):
    """A folder that was copied without its largest file."""
    client = Client(frozen_in(tmp_path))
    client.open()
    client.train(2)
    client.carry(client.save())
    copied = tmp_path / "copy" / "server"
    shutil.copytree(tmp_path / "server", copied, ignore=shutil.ignore_patterns("store.frames"))
    client.registry = frozen_in(tmp_path / "copy")
    with pytest.raises(Refused, match="gone or damaged"):
        client.open(checkpoints=[0, 2])


def test_frames_of_the_wire_and_of_the_file_are_the_same(client):
    client.train(1)
    path = store_of(client.session).path
    frame = frames.read([bytearray(path.read_bytes())])
    assert (frame.kind, frame.step, frame.micro) == (Kind.ACTIVATIONS, 0, 0) and "labels" in frame.arrays
