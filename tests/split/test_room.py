"""Frames of few bytes that would decode to much are refused by every session before memory is taken."""

from dataclasses import replace

import pytest
import torch
from helpers.clients import CODEC_TEXTS, Client, Largest, registry_in, to_bytes

from snello.errors import ProtocolError

pytestmark = pytest.mark.usefixtures("known_models")

CHAINS = ["adc(0.5)+topk(0.5)+fedlite(2, 4)", "adc(0.3)+bottlenet(0.5)+int4", "adc(0.3, rule=merge)+int4"]


@pytest.mark.parametrize("codec", [*CODEC_TEXTS, *CHAINS])
def test_more_than_a_batch_is_refused_before_memory_is_taken(tmp_path, codec):
    client = Client(registry_in(tmp_path, codec=codec))
    client.open()
    half = client.session.model.half
    batch = half.max_rows * (half.vit.num_prefix_tokens + half.vit.num_patches) * half.vit.embed_dim * 4
    frame = next(client.step())
    changes = [{"activations": frame.arrays["activations"].repeat_interleave(40, dim=0)}]
    changes.append({name: value.repeat_interleave(40, dim=0) for name, value in frame.arrays.items()})
    changes += [
        {name: torch.full_like(value, large)}
        for name, value in frame.arrays.items()
        if name.startswith("indices.shape")
        for large in (1 << 12, 1 << 24)
    ]
    client.session.max_body *= 40  # the size of a frame does not give it away
    for change in changes:
        data = to_bytes(replace(frame, arrays={**frame.arrays, **change}))
        with Largest() as largest, pytest.raises(ProtocolError):
            client.session.take(data)
        assert largest.bytes <= max(len(data), 4 * batch)
    client.remote.codec.forget()  # the frame that no session has taken may have been a key
    client.train()


@pytest.mark.parametrize("codec", ["bottlenet(0.5)+topk(0.5)", "bottlenet(0.5)+c3sl(2)+int8"])
def test_a_codec_behind_one_that_narrows_tokens_trains(tmp_path, codec):
    client = Client(registry_in(tmp_path, codec=codec))
    client.open()
    client.train()
    assert client.session.step == client.session.schedule.total_steps
