"""What arrays decode to is declared, and known before it is made: few bytes must not become much memory."""

from typing import Any

import pytest
import torch
from helpers.codecs import INPUTS, TEXTS, B, D, N, context_of, noise
from torch.utils._python_dispatch import TorchDispatchMode

from snello.codecs.base import Arrays, Codec, Context
from snello.errors import ProtocolError

pytestmark = pytest.mark.filterwarnings("ignore:a batch of 1 leaves ADC:snello.errors.SnelloWarning")


class Most(TorchDispatchMode):
    """Notes the numbers of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("text", TEXTS)
def test_the_declared_shape_is_the_decoded_one(text, kind):
    z = INPUTS[kind]()
    codec = Codec(text, embed_dim=z.shape[-1], seed=3)
    arrays = codec.encode(z, context_of(z)).arrays
    assert codec.decoded_shape(arrays) == tuple(codec.decode(arrays).z.shape)
    arrays = codec.eval().encode(z, Context()).arrays
    assert codec.decoded_shape(arrays) == tuple(codec.decode(arrays).z.shape)


def encoded(text: str) -> tuple[Codec, Arrays]:
    codec, z = Codec(text, embed_dim=D, seed=3), noise(B, N, D)
    return codec, codec.encode(z, context_of(z)).arrays


ANNOUNCED = [
    ("topk(0.2)", "indices.shape.0", [N, D]),
    ("topk(0.02)", "indices.shape.0", [N, D]),
    ("c3sl(3)", "indices.shape.0", [B, N, D]),
    ("fedlite(3)", "indices.shape", [B, N, D]),
    ("adc(samples=1, tokens=1)+topk(0.2)+fedlite(2, 4)", "indices.shape.1", [N, D]),
]


@pytest.mark.parametrize(("text", "name", "shape"), ANNOUNCED)
def test_the_announced_shape_is_there(text, name, shape):
    assert encoded(text)[1][name].tolist() == shape


@pytest.mark.parametrize(("text", "name", "shape"), ANNOUNCED)
@pytest.mark.parametrize("factor", [1 << 10, 1 << 20, -1, 0])
def test_an_announced_shape_that_the_arrays_do_not_have_is_refused_before_memory_is_taken(text, name, shape, factor):
    codec, arrays = encoded(text)
    for index in range(len(shape)):
        wrong = [n * factor if i == index else n for i, n in enumerate(shape)]
        with Most() as most, pytest.raises(ProtocolError):
            codec.decoded_shape({**arrays, name: torch.tensor(wrong, dtype=torch.int32)})
        assert most.numel <= len(shape)


@pytest.mark.parametrize(("text", "name", "shape"), ANNOUNCED)
@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(0), torch.ones(3), torch.ones(2, 2), torch.tensor(5), torch.ones(9), torch.ones(2).bool()],
    ids=["empty", "floats", "table", "number", "long", "bits"],
)
def test_an_announced_shape_of_another_kind_is_refused(text, name, shape, wrong):
    codec, arrays = encoded(text)
    with pytest.raises(ProtocolError, match="shape"):
        codec.decoded_shape({**arrays, name: wrong})


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("topk(0.2)", "activations"),
        ("topk(0.2)", "indices.0"),
        ("topk(0.02)", "indices.0"),
        ("c3sl(3)", "activations"),
        ("fedlite(3)", "activations"),
        ("fedlite(3)", "scales"),
    ],
)
@pytest.mark.parametrize("dim", [0, 1])
def test_more_rows_or_numbers_than_belong_to_the_shape_are_refused(text, name, dim):
    codec, arrays = encoded(text)
    more = arrays[name].repeat_interleave(50, dim=dim)
    with Most() as most, pytest.raises(ProtocolError):
        codec.decoded_shape({**arrays, name: more})
    assert most.numel <= 3


WRONG_SIZES = {
    "missing": lambda sizes: None,
    "floats": lambda sizes: sizes.float(),
    "signed bytes": lambda sizes: sizes.to(torch.int8),
    "long": lambda sizes: sizes.long(),
    "a token less": lambda sizes: sizes[:, 1:],
    "a row less": lambda sizes: sizes[1:],
    "flat": lambda sizes: sizes.flatten(),
    "a table in each": lambda sizes: sizes.unsqueeze(2),
    "zero": lambda sizes: sizes * (torch.arange(sizes.shape[1]) > 0),
    "negative": lambda sizes: -sizes.short(),
}


@pytest.mark.parametrize("wrong", WRONG_SIZES)
@pytest.mark.parametrize("text", ["adc(0.3, rule=merge)", "adc(samples=1, tokens=0.4, rule=merge)+int4"])
def test_sizes_that_merged_tokens_cannot_have_are_refused_before_memory_is_taken(text, wrong):
    codec, arrays = encoded(text)
    sizes = arrays.pop("indices.sizes.0")
    assert sizes.dtype == torch.uint8 and codec.decoded_shape({**arrays, "indices.sizes.0": sizes})[:2] == sizes.shape
    changed = WRONG_SIZES[wrong](sizes)
    with Most() as most, pytest.raises(ProtocolError, match="merged tokens must come with their sizes"):
        codec.decoded_shape(arrays if changed is None else {**arrays, "indices.sizes.0": changed})
    assert most.numel <= sizes.numel()


@pytest.mark.parametrize("length", [-1, 0, 3, 1 << 30])
def test_a_length_that_the_packed_numbers_do_not_have_is_refused(length):
    codec = Codec("int4", embed_dim=9)
    arrays = codec.encode(noise(B, N, 9), Context()).arrays
    assert codec.decoded_shape(arrays) == (B, N, 9)
    with pytest.raises(ProtocolError, match="length"):
        codec.decoded_shape({**arrays, "indices.length": torch.tensor([length], dtype=torch.int32)})


@pytest.mark.parametrize(("text", "name"), [("topk(0.02)", "indices.0"), ("fedlite(3, 10)", "activations")])
def test_places_and_codes_outside_are_refused_before_a_gpu_would_stop_for_good(text, name):
    codec, arrays = encoded(text)
    with pytest.raises(ProtocolError, match="outside"):
        codec.decode({**arrays, name: torch.full_like(arrays[name], 255)})
