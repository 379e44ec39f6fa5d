"""Frames of few bytes that would decode to much are refused by every session before memory is taken."""

import struct
import tracemalloc
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.clients import CODEC_TEXTS, Client, Largest, registry_in, to_bytes

from snello.codecs import rans
from snello.codecs.bases import Basis
from snello.errors import ProtocolError
from snello.split.wire import frames
from snello.split.wire.frames import Frame

pytestmark = pytest.mark.usefixtures("known_models")

CHAINS = [
    "adc(0.5)+topk(0.5)+fedlite(2, 4)",
    "adc(0.3)+bottlenet(0.5)+int4",
    "adc(0.3, rule=merge)+int4",
    "adc(0.3, rule=merge)+pca(0.5)",
    "bottlenet(0.5)+pca(0.5, basis=2)",
]


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


def full_frame(frame: Frame, tables: bool) -> Frame:
    """One that announces all components in all groups of tokens, in as few bytes as that takes."""
    groups, dim = 5, 64
    basis = torch.full((dim, dim), 1, dtype=torch.int8)
    name = Basis(basis).name
    header = name + struct.pack("<fHB", 1.0, 1, 1) + bytes(4 * dim)
    used = groups * dim if tables else 0
    side = header + bytes([255 if tables else 0]) * (groups * dim // 8) + bytes([255, 0, 1]) * used
    words = rans.encode(
        np.full(4 * 10 * dim if tables else 0, rans.LARGEST), rans.Tables.of(np.array([[255, 0, 1]], "u1"))
    )
    arrays = {
        **frame.arrays,
        "activations": torch.from_numpy(words),
        "scales": torch.frombuffer(bytearray(side), dtype=torch.uint8),
        "scales.basis": basis,
        "indices.shape": torch.tensor([4, 10, dim], dtype=torch.int32),
    }
    arrays.pop("indices.outliers", None)
    return replace(frame, arrays=arrays)


@pytest.mark.parametrize("tables", [False, True])
def test_pca_takes_memory_for_a_batch_at_most(tmp_path, tables):
    """Whatever few bytes announce: arrays, and tables of 16 kB for three bytes, of which a frame has as many as groups
    and dimensions.
    """
    client = Client(registry_in(tmp_path, codec="pca(1)"))
    client.open()
    frame = next(client.step())
    client.session.max_body *= 40
    right = full_frame(frame, tables)
    batch, most = 4 * 10 * 64 * 4, 5 * 64 * rans.SLOTS * 4 if tables else 0
    for shape in ((4, 10, 64), (2**20, 10, 64), (4, 2**20, 64), (4, 10, 2**20), (5, 10, 64), (4, 11, 64)):
        arrays = {**right.arrays, "indices.shape": torch.tensor(shape, dtype=torch.int32)}
        data = to_bytes(replace(right, arrays=arrays))
        tracemalloc.start()
        try:
            with Largest() as largest, nullcontext() if shape == (4, 10, 64) else pytest.raises(ProtocolError):
                client.session.model.half._decode(client.session.model.half._on_device(frames.read([data])))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert largest.bytes <= max(len(data), 4 * batch) and peak <= 20 * batch + 3 * most + (1 << 18), shape
    client.session.take(to_bytes(right))  # it is a frame like any other


@pytest.mark.parametrize("codec", ["bottlenet(0.5)+topk(0.5)", "bottlenet(0.5)+c3sl(2)+int8"])
def test_a_codec_behind_one_that_narrows_tokens_trains(tmp_path, codec):
    client = Client(registry_in(tmp_path, codec=codec))
    client.open()
    client.train()
    assert client.session.step == client.session.schedule.total_steps
