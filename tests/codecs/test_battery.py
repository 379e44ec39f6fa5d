"""Every codec, and chains of them, through everything that may come: forth and back over real frames."""

import math
import re
from dataclasses import dataclass

import pytest
import torch
from helpers.codecs import EXAMPLES, INPUTS, TEXTS, B, D, N, context_of, noise
from torch import Tensor

from snello.codecs.base import Arrays, Codec, Context, Decoded, Message
from snello.config.registry import CODECS
from snello.errors import TrainingError
from snello.split.wire import frames
from snello.split.wire.frames import Frame, Kind

pytestmark = pytest.mark.filterwarnings("ignore:a batch of [12] leaves ADC:snello.errors.SnelloWarning")


def over_the_wire(arrays: Arrays, kind: Kind) -> Arrays:
    """Written and read again; every byte is there, counted, and read alike from many buffers and from one."""
    frame = Frame(kind, 7, 1, arrays)
    buffers = frames.write(frame)
    counted = frames.sizes(frame)
    assert sum(counted.values()) == sum(map(len, buffers))
    assert sum(counted.values()) - counted["headers"] == sum(a.numel() * a.element_size() for a in arrays.values())
    apart = frames.read(buffers)
    joined = frames.read([b"".join(buffers)])
    for received in (apart.arrays, joined.arrays):
        assert received.keys() == arrays.keys()
        for name, value in arrays.items():
            assert received[name].dtype == value.dtype and torch.equal(received[name], value), name
    return joined.arrays


@dataclass
class Exchange:
    """A whole exchange between two codecs that share nothing but frames."""

    z: Tensor
    message: Message
    decoded: Decoded
    down: Arrays


def pair(text: str, embed_dim: int) -> tuple[Codec, Codec]:
    """A client's codec and a server's."""
    client, server = (Codec(text, embed_dim=embed_dim, seed=3) for _ in range(2))
    return client, server


def exchange(text: str, z: Tensor, codecs: tuple[Codec, Codec] | None = None) -> Exchange:
    z = z.requires_grad_()
    context = context_of(z.detach())
    client, server = codecs or pair(text, z.shape[-1])
    message = client.encode(z, context)
    decoded = server.decode(over_the_wire(message.arrays, Kind.ACTIVATIONS))
    (decoded.z * noise(*decoded.z.shape)).sum().backward()
    assert decoded.leaf.grad is not None
    down = server.encode_gradient(decoded.leaf.grad, Context(seed=5))
    gradient = client.decode_gradient(message, over_the_wire(down, Kind.GRADIENTS))
    assert gradient.shape == message.sent.shape and gradient.dtype == message.sent.dtype
    message.sent.backward(gradient)
    return Exchange(z, message, decoded, down)


def test_the_table_names_every_codec():
    assert EXAMPLES.keys() == CODECS.keys()
    assert all(re.match(rf"{name}\b", text) for name, text in EXAMPLES.items())


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("text", TEXTS)
def test_everything_stays_finite_forth_and_back(text, kind):
    done = exchange(text, INPUTS[kind]())
    z, message, decoded = done.z, done.message, done.decoded
    assert decoded.z.ndim == 3 and decoded.z.shape[2] == z.shape[2] and decoded.z.isfinite().all()
    assert decoded.z.shape[0] == message.num_rows
    if message.groups is None:
        assert message.num_rows == len(z)
    else:
        assert message.groups.shape == (len(z),)
        assert sorted(set(message.groups.tolist())) == list(range(message.num_rows))
    assert all(value.isfinite().all() for value in (*message.arrays.values(), *done.down.values()))
    assert z.grad.shape == z.shape and z.grad.dtype == z.dtype and z.grad.isfinite().all()
    if kind in ("plain", "float16", "bfloat16", "non-contiguous"):
        assert z.grad.ne(0).any()


@pytest.mark.parametrize("kind", ["plain", "offset", "float16", "non-contiguous"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_same_seed_gives_the_same_arrays(text, kind):
    torch.manual_seed(0)
    first = exchange(text, INPUTS[kind]())
    torch.manual_seed(1)  # nothing is drawn from the global generator
    again = exchange(text, INPUTS[kind]())
    for ours, theirs in ((first.message.arrays, again.message.arrays), (first.down, again.down)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert torch.equal(first.z.grad, again.z.grad)


@pytest.mark.parametrize("text", TEXTS)
def test_exchanges_one_after_the_other(text):
    """Whatever a codec remembers of them: the last batch of an epoch is small, the next one is not."""
    codecs, saved = pair(text, D), pair(text, D)
    for size in (1.0, 1.0, 100.0, 1.0):
        for num in (B, 2):
            z = size * noise(B, N, D)[:num]
            for codec, other in zip(codecs, saved, strict=True):  # also where it was saved in between
                other.load_state_dict(codec.state_dict())
            done, again = exchange(text, z.clone(), codecs), exchange(text, z.clone(), saved)
            assert done.decoded.z.isfinite().all() and done.z.grad.isfinite().all()
            assert torch.equal(done.decoded.z, again.decoded.z) and torch.equal(done.z.grad, again.z.grad)
            assert done.message.arrays.keys() == again.message.arrays.keys() and done.down.keys() == again.down.keys()


@pytest.mark.parametrize("text", TEXTS)
def test_making_a_codec_leaves_the_global_generator_alone(text):
    before = torch.get_rng_state()
    Codec(text, embed_dim=D)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("text", TEXTS)
def test_what_is_not_finite_is_refused_both_ways(text, bad):
    codec, context = Codec(text, embed_dim=D), context_of(noise(B, N, D))
    z = noise(B, N, D)
    z[3, 4, 5] = bad
    with pytest.raises(TrainingError, match=rf"activations .* codec {re.escape(text)} "):
        codec.encode(z, context)
    with pytest.raises(TrainingError, match=rf"activations .* codec {re.escape(text)} "):
        codec.eval().encode(z, context)
    gradient = torch.zeros_like(codec.train().encode(noise(B, N, D), context).sent)
    gradient.view(-1)[-1] = bad
    with pytest.raises(TrainingError, match=rf"gradients .* codec {re.escape(text)} "):
        codec.encode_gradient(gradient, context)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("text", TEXTS)
def test_evaluation_merges_and_drops_nothing(text, kind):
    z = INPUTS[kind]()
    client, server = (Codec(text, embed_dim=z.shape[-1], seed=3).eval() for _ in range(2))
    message = client.encode(z, Context())  # nobody looks at attention then
    decoded = server.decode(over_the_wire(message.arrays, Kind.EVALUATION))
    assert message.groups is None and message.num_rows == len(z)
    assert decoded.z.shape == z.shape and decoded.z.isfinite().all() and not decoded.leaf.requires_grad
    if "bottlenet" in text:
        return
    step = message.arrays["scales"][..., 1].double()
    assert step.shape == (*z.shape[:2], 1) and message.arrays["activations"].dtype == torch.uint8
    z = z.double()
    assert ((decoded.z - z).abs() <= step / 2 * (1 + 1e-6) + 1e-6 * z.abs()).all()
    spread = z.amax(dim=2, keepdim=True) - z.amin(dim=2, keepdim=True)
    assert (step <= (1.02 * spread + z.abs().amax(dim=2, keepdim=True) / 64) / 255).all()
