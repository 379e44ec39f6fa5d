"""Half precision over a network: an overflow on either side skips the step on both, whatever comes next."""

import pytest
import torch
from helpers.clients import Client, answer_of, registry_in, take, weights

from snello.split.wire.frames import Flags, Frame, Kind

pytestmark = pytest.mark.usefixtures("known_models")


@pytest.fixture(params=["server", "client"])
def client(request, tmp_path, monkeypatch) -> Client:
    """The scaler's logic, on a CPU: only the scale is special there, forward passes are in fp32."""
    monkeypatch.setattr("snello.split.halves.autocast", lambda *args: torch.autocast("cpu", enabled=False))
    registry = registry_in(tmp_path, labels=request.param, epochs=3)
    registry.precision = "fp16"
    registry._sizes.clear()
    made = Client(registry)
    made.open()
    return made


def overflow(parameter: torch.nn.Parameter) -> torch.utils.hooks.RemovableHandle:
    return parameter.register_hook(lambda gradient: gradient * float("inf"))


def state(client: Client) -> tuple[str, str, float, float]:
    """Both halves' weights and loss scales."""
    return client.weights, weights(client.session), client.remote.half.scale(), client.session.model.half.scale()


def settle(client: Client) -> None:
    """The next frame, which tells the server how the step before ended on this side."""
    client.carry(flagged(client, client.save()))


def flagged(client: Client, frame: Frame) -> Frame:
    return Frame(frame.kind, frame.step, frame.micro, frame.arrays, client.remote.link._flags)


def test_a_step_waits_for_the_clients_word(client):
    before = state(client)
    client.train(1)
    assert client.session.step == 1 and client.session.steps.due and not client.session.between_steps
    assert weights(client.session) == before[1] and client.weights != before[0]
    settle(client)
    assert weights(client.session) != before[1] and client.session.between_steps
    assert sum(row["kind"] == "step" for row in client.session.run.rows()) == 1


def test_an_overflow_on_the_client_skips_the_step_on_the_server(client):
    before = state(client)
    handle = overflow(client.remote.half.vit.blocks[0].norm1.weight)
    client.train(1)
    assert client.remote.link._flags == Flags.SKIPPED
    settle(client)
    assert state(client) == (before[0], before[1], 32768.0, 32768.0)
    handle.remove()
    client.remote.link._flags = Flags(0)
    client.train(1)
    settle(client)
    assert client.weights != before[0] and weights(client.session) != before[1]


def test_an_overflow_in_weights_of_the_server_skips_the_step_on_the_client(client):
    """It does not pass the cut by itself: only the gradient of a weight overflows."""
    before = state(client)
    handle = overflow(client.session.model.half.vit.blocks[0].norm1.weight)
    seen: list[Frame] = []

    def carry(frame: Frame) -> Frame:
        seen.append(answer_of(take(client.session, frame)))
        return seen[-1]

    client.train(1, carry)
    assert seen[-1].kind == Kind.GRADIENTS and Flags.OVERFLOW in seen[-1].flags
    settle(client)
    assert state(client) == (before[0], before[1], 32768.0, 32768.0)
    handle.remove()


def test_a_frame_that_comes_twice_settles_once(client):
    client.train(1)
    frame = flagged(client, client.save())
    client.carry(frame)
    after = weights(client.session)
    assert take(client.session, frame).repeated and weights(client.session) == after
