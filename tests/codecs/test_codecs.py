"""What each codec promises: bounds on its error, exact gradients, real bytes."""

import math

import pytest
import torch
from helpers.codecs import context_of
from torch import Tensor

from snello.codecs.base import Arrays, Codec, Context, Message
from snello.codecs.bottlenet import BottleNet
from snello.codecs.c3sl import C3SL
from snello.codecs.integers import Int2, Int4, Int8, Integers, pack_bits, unpack_bits
from snello.codecs.topk import RandTopK, TopK

B, N, D = 4, 5, 8


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def num_bytes(arrays: Arrays) -> int:
    return sum(value.numel() * value.element_size() for value in arrays.values())


def there_and_back(codec: Codec, z: Tensor, weight: Tensor) -> tuple[Message, Arrays]:
    """Backward of the sum of `weight` times the tokens that arrive; fills z.grad."""
    message = codec.encode(z, Context())
    decoded = codec.decode(message.arrays)
    (decoded.z * weight).sum().backward()
    down = codec.encode_gradient(decoded.leaf.grad, Context())
    message.sent.backward(codec.decode_gradient(message, down))
    return message, down


# Floats


def wide() -> Tensor:
    """Numbers of all sizes that float16 has as normal numbers."""
    sizes = 10 ** torch.linspace(-4, 4.8, 200)
    return sizes * noise(B, N, 200).sign() * (1 + noise(B, N, 200, seed=1).sigmoid() / 99)


@pytest.mark.parametrize(("text", "bound"), [("none", 0), ("bf16", 2**-8), ("fp16", 2**-11)])
def test_floats_round_within_their_precision(text, bound):
    codec, x = Codec(text, embed_dim=200), wide()
    arrays = codec.encode(x, Context()).arrays
    assert num_bytes(arrays) == x.numel() * (4 if text == "none" else 2)
    decoded = codec.decode(arrays).z
    assert decoded.dtype == torch.float32
    worst = ((decoded.double() - x.double()) / x.double()).abs().max()
    assert worst <= bound and (worst > bound / 8 or bound == 0)


def test_none_is_exact_for_gradients_too():
    codec, z, weight = Codec("none", embed_dim=D), noise(B, N, D).requires_grad_(), noise(B, N, D, seed=1)
    there_and_back(codec, z, weight)
    assert torch.equal(z.grad, weight)


def test_half_precision_clips_what_is_too_large():
    codec = Codec("fp16", embed_dim=4)
    x = torch.tensor([[[1e6, -1e6, 65504.0, 3e38]]])
    assert codec.decode(codec.encode(x, Context()).arrays).z.tolist() == [[[65504.0, -65504.0, 65504.0, 65504.0]]]
    down = codec.encode_gradient(x, Context())
    assert down["gradients"].float().tolist() == [[[65504.0, -65504.0, 65504.0, 65504.0]]]


# Integers


def spread() -> Tensor:
    """A row of every size, each with an offset of its own, from far smaller to far larger than its spread."""
    sizes = 10.0 ** torch.linspace(-12, 12, 12)
    offsets = torch.tensor([0.0, 1.0, -3.0, 30.0]).view(4, 1, 1)
    return (noise(4, 12, 21) + offsets) * sizes.view(12, 1)


TENSORS = {
    "plain": lambda: noise(B, N, 21),
    "offset": lambda: 10 + noise(B, N, 21).sigmoid(),
    "negative": lambda: -3 - noise(B, N, 21).abs(),
    "far off": lambda: 1000 + noise(B, N, 21),
    "constant": lambda: torch.full((B, N, 21), -0.1),
    "outlier": lambda: torch.cat((noise(B, N, 20), torch.full((B, N, 1), 1e5)), dim=2),
    "all sizes": spread,
    "rows": lambda: noise(B, 21),
}


def step_of(scales: Tensor) -> Tensor:
    second = scales[..., 1].double()
    return torch.exp2(second) if scales.dtype == torch.int8 else second


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("per", ["token", "sample", "channel", "tensor"])
@pytest.mark.parametrize("scale", ["bf16", "fp32", "pow2"])
@pytest.mark.parametrize("cls", [Int8, Int4, Int2])
def test_the_error_of_integers_is_at_most_half_a_step(cls, scale, per, name):
    x, number_format = TENSORS[name](), cls(scale=scale, per=per)
    arrays = number_format.pack(x, Context())
    scales = arrays["scales"]
    groups = {
        "token": (*x.shape[:-1], 1),
        "sample": (len(x), *[1] * (x.ndim - 1)),
        "channel": (*[1] * (x.ndim - 1), x.shape[-1]),
        "tensor": (1,) * x.ndim,
    }[per]
    assert scales.shape == (*groups, 2)
    assert scales.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32, "pow2": torch.int8}[scale]
    decoded = number_format.unpack(arrays)
    assert decoded.shape == x.shape and decoded.dtype == torch.float32
    x = x.double()
    error = (decoded.double() - x).abs()
    assert (error <= step_of(scales) / 2 * (1 + 1e-6) + 1e-6 * x.abs()).all()


@pytest.mark.parametrize("per", ["token", "sample", "channel", "tensor"])
@pytest.mark.parametrize("cls", [Int8, Int4, Int2])
def test_the_step_is_no_larger_than_it_must_be(cls, per):
    """So the bound above means something: the grid covers the numbers, and little else."""
    levels = 2**cls.bits - 1
    x = noise(B, N, 21)
    dims = {"token": [2], "sample": [1, 2], "channel": [0, 1], "tensor": [0, 1, 2]}[per]
    rows = x.double()
    width, largest = rows.amax(dims, keepdim=True) - rows.amin(dims, keepdim=True), rows.abs().amax(dims, keepdim=True)
    fp32, bf16, pow2 = (
        step_of(cls(None, scale, per).pack(x, Context())["scales"]) for scale in ("fp32", "bf16", "pow2")
    )
    assert (fp32 <= width / levels * (1 + 1e-6)).all()
    assert (bf16 <= (width + largest / 128) / levels * (1 + 1 / 64)).all()
    assert (pow2 <= 4 * torch.maximum(width / levels, largest / 127)).all()


@pytest.mark.parametrize("cls", [Int8, Int4, Int2])
def test_an_offset_costs_no_precision(cls):
    """Symmetric quantization of [10, 11] would have steps of 11 / levels."""
    x = 10 + torch.rand(B, N, 21, generator=torch.Generator().manual_seed(0))
    x[..., 0], x[..., 1] = 10.0, 11.0
    for number_format in (cls(), cls(per="sample"), cls(per="tensor")):
        assert step_of(number_format.pack(x, Context())["scales"]).max() <= 1.1 / (2**cls.bits - 1)


@pytest.mark.parametrize("scale", ["bf16", "fp32", "pow2"])
def test_constant_and_zero_rows_are_exact_where_the_scale_can_say_them(scale):
    for value in (0.0, 1.0, -2.0):
        x = torch.full((2, 3, 5), value)
        number_format = Int4(scale=scale)
        assert torch.equal(number_format.unpack(number_format.pack(x, Context())), x)


@pytest.mark.parametrize("length", range(1, 10))
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_bits_are_packed_and_unpacked(bits, length):
    codes = torch.randint(2**bits, (3, 2, length), generator=torch.Generator().manual_seed(length), dtype=torch.uint8)
    codes[0] = 2**bits - 1
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 2, math.ceil(length * bits / 8))
    assert torch.equal(unpack_bits(packed, bits, length), codes)


@pytest.mark.parametrize("length", range(1, 10))
@pytest.mark.parametrize("cls", [Int8, Int4, Int2])
def test_rows_of_any_length_come_back(cls, length):
    x = noise(2, 3, length)
    number_format = cls()
    arrays = number_format.pack(x, Context())
    assert arrays["values"].shape == (2, 3, math.ceil(length * cls.bits / 8))
    assert number_format.unpack(arrays).shape == x.shape


@pytest.mark.parametrize(("scale", "size"), [("bf16", 4), ("fp32", 8), ("pow2", 2)])
@pytest.mark.parametrize(("down", "down_bits"), [(None, 4), (2, 2), (8, 8)])
def test_integers_take_their_bits_up_and_down(scale, size, down, down_bits):
    number_format: Integers = Int4(down=down, scale=scale)
    x = noise(B, N, 16)
    up, gradient = number_format.pack(x, Context()), number_format.pack_gradient(x, Context())
    assert up["values"].shape == (B, N, 8) and gradient["values"].shape == (B, N, 2 * down_bits)
    assert num_bytes(up) == B * N * (8 + size) and num_bytes(gradient) == B * N * (2 * down_bits + size)
    error = (number_format.unpack_gradient(gradient).double() - x.double()).abs()
    assert (error <= step_of(gradient["scales"]) / 2 * (1 + 1e-6) + 1e-6 * x.abs()).all()


@pytest.mark.parametrize("per", ["token", "sample", "tensor"])
def test_clipping_moves_outliers_to_the_ends_and_loses_less_in_all(per):
    x = 5 + noise(B, N, 400)
    whole, clipped = Int2(scale="fp32", per=per), Int2(scale="fp32", per=per, clip=1.5)
    arrays = clipped.pack(x, Context())
    first, step = arrays["scales"].unbind(-1)
    inside = x.clamp(first, first + 3 * step)
    assert ((clipped.unpack(arrays) - inside).abs() <= step / 2 * (1 + 1e-5)).all()
    torch.testing.assert_close(3 * step, torch.full_like(step, 3.0), rtol=0.15, atol=0)  # 1.5 deviations either way
    loss, whole_loss = ((f.unpack(f.pack(x, Context())) - x).square().mean() for f in (clipped, whole))
    assert loss < whole_loss / 2


def test_rounding_is_straight_through():
    codec, z, weight = Codec("int2(down=8, scale=fp32)", embed_dim=D), noise(B, N, D).requires_grad_(), noise(B, N, D)
    there_and_back(codec, z, weight)
    torch.testing.assert_close(z.grad, weight, rtol=0, atol=float(weight.abs().max()) / 100)


# Top-k


def by_loop(z: Tensor, num: int) -> Tensor:
    """z with all but the `num` largest numbers of every sample set to zero."""
    kept = torch.zeros_like(z).flatten(1)
    for row, its in zip(kept, z.flatten(1), strict=True):
        sizes = its.abs().tolist()
        for place in sorted(range(len(its)), key=lambda i: -sizes[i])[:num]:
            row[place] = its[place]
    return kept.view(z.shape)


SHAPES = [
    (4, 6, 10, 0.05, False),  # one byte a place
    (4, 6, 10, 0.3, True),
    (4, 7, 9, 0.5, True),  # places that do not fill the last byte
    (3, 10, 33, 0.1, True),
    (3, 10, 33, 0.01, False),  # two bytes
    (2, 300, 220, 0.001, False),  # three bytes
    (3, 6, 10, 1.0, None),
]


@pytest.mark.parametrize(("num_samples", "num_tokens", "width", "ratio", "as_bitmap"), SHAPES)
def test_topk_keeps_the_largest_and_says_where_they_were(num_samples, num_tokens, width, ratio, as_bitmap):
    topk, z = TopK(ratio), noise(num_samples, num_tokens, width)
    reduced = topk.encode(z, Context())
    if as_bitmap is not None:
        assert reduced.side["indices"].ndim == (2 if as_bitmap else 3)
    assert reduced.side["indices"].dtype == torch.uint8
    assert torch.equal(topk.decode(reduced.values, reduced.side), by_loop(z, reduced.values.shape[1]))


@pytest.mark.parametrize(("num_samples", "num_tokens", "width", "ratio", "as_bitmap"), SHAPES)
@pytest.mark.parametrize("name", ["topk", "randtopk"])
def test_topk_takes_the_bytes_that_were_asked_for(name, num_samples, num_tokens, width, ratio, as_bitmap):
    codec = Codec(f"{name}({ratio})", embed_dim=width)
    z = noise(num_samples, num_tokens, width).requires_grad_()
    message, down = there_and_back(codec, z, noise(*z.shape))
    taken, uncompressed = num_bytes(message.arrays) + num_bytes(down), 2 * 4 * z.numel()
    # The shape is 8 bytes once; a bitmap is filled up to a byte.
    assert taken <= ratio * uncompressed + 8 + num_samples
    room = 8 + 3  # numbers are kept as long as one more has room
    assert taken > ratio * uncompressed - num_samples * room or message.sent.shape[1] == num_tokens * width


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("name", ["topk", "randtopk"])
def test_topk_is_within_a_percent_of_its_ratio(name, ratio):
    codec, z = Codec(f"{name}({ratio})", embed_dim=64), noise(8, 17, 64).requires_grad_()
    message, down = there_and_back(codec, z, noise(8, 17, 64, seed=1))
    assert (num_bytes(message.arrays) + num_bytes(down)) / (8 * z.numel()) == pytest.approx(ratio, rel=0.01)


def test_the_gradient_comes_back_at_the_kept_places_alone():
    for text in ("topk(0.3)", "topk(0.05)", "randtopk(0.3, 0.5)"):
        codec, z, weight = Codec(text, embed_dim=10), noise(4, 6, 10).requires_grad_(), noise(4, 6, 10, seed=1)
        message, down = there_and_back(codec, z, weight)
        kept = codec.decode(message.arrays).z != 0
        assert int(kept.sum()) == message.sent.numel() == down["gradients"].numel()
        assert torch.equal(z.grad, weight * kept)


def test_topk_of_equal_numbers_keeps_as_many_as_of_others():
    topk = TopK(0.3)
    for z in (torch.ones(2, 6, 10), torch.zeros(2, 6, 10)):
        reduced = topk.encode(z, Context())
        assert reduced.values.shape == topk.encode(noise(2, 6, 10), Context()).values.shape
        assert topk.decode(reduced.values, reduced.side).sum() == reduced.values.sum()


def picks(codec: TopK, z: Tensor, seed: int = 0) -> Tensor:
    """Which places are sent, (B, N * D) bool."""
    reduced = codec.encode(z, Context(seed=seed))
    return codec.decode(torch.ones_like(reduced.values), reduced.side).flatten(1) == 1


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_randtopk_picks_a_share_outside_the_largest(share):
    z = noise(64, 8, 40)
    top, ours = picks(TopK(0.3), z), picks(RandTopK(0.3, share), z)
    assert torch.equal(ours.sum(dim=1), top.sum(dim=1))  # all different, and as many
    assert int((ours & ~top).sum()) / int(ours.sum()) == pytest.approx(share, abs=0.02)


def test_randtopk_draws_anew_with_every_seed_and_from_all_places():
    z, codec = noise(4, 8, 40), RandTopK(0.3, 0.5)
    first = picks(codec, z, seed=1)
    assert torch.equal(first, picks(codec, z, seed=1))
    assert not torch.equal(first, picks(codec, z, seed=2))
    times = torch.stack([picks(codec, z, seed) for seed in range(100)]).sum(dim=0)
    assert times.min() > 0 and times.max() < 100


# C3-SL


def keys_of(codec: C3SL, shape: tuple[int, int]) -> Tensor:
    """The keys (R, N * D), seen from outside: a unit impulse bound with a key is the key."""
    keys = []
    for index in range(codec.num):
        impulse = torch.zeros(codec.num, *shape)
        impulse[index, 0, 0] = 1.0
        keys.append(codec.encode(impulse, Context()).values[0])
    return torch.stack(keys)


def test_c3sl_is_circular_convolution_and_correlation():
    codec, (n, d) = C3SL(3, seed=1), (2, 5)
    z, length = noise(7, n, d), n * d
    keys = keys_of(codec, (n, d))
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(3))
    bound = torch.zeros(3, length)
    for sample, its in enumerate(z.flatten(1)):
        for i in range(length):
            for j in range(length):
                bound[sample // 3, (i + j) % length] += keys[sample % 3, i] * its[j]
    reduced = codec.encode(z, Context())
    torch.testing.assert_close(reduced.values, bound, rtol=1e-4, atol=1e-5)
    expected = torch.zeros(7, length)
    for sample in range(7):
        for i in range(length):
            for j in range(length):
                expected[sample, j] += keys[sample % 3, i] * bound[sample // 3, (i + j) % length]
    decoded = codec.decode(reduced.values, reduced.side)
    assert decoded.shape == z.shape  # 7 samples in threes: the last group has one
    torch.testing.assert_close(decoded.flatten(1), expected, rtol=1e-4, atol=1e-5)


def test_c3sl_carries_the_gradient_exactly():
    codec, (n, d) = C3SL(1, seed=1), (3, 4)
    z, weight = noise(2, n, d).requires_grad_(), noise(2, n, d, seed=1)
    key = keys_of(codec, (n, d))[0]
    reduced = codec.encode(z, Context())
    (codec.decode(reduced.values, reduced.side) * weight).sum().backward()
    # Convolving and correlating with one key is convolving with its autocorrelation, which is symmetric.
    spectrum = torch.fft.rfft(key).abs().square()
    expected = torch.fft.irfft(torch.fft.rfft(weight.flatten(1)) * spectrum, n=n * d).view_as(z)
    torch.testing.assert_close(z.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num", [1, 2, 4])
def test_c3sl_gets_back_its_own_sample_among_the_others(num):
    codec, z = C3SL(num), noise(8, 16, 32)
    reduced = codec.encode(z, Context())
    assert reduced.values.shape == (8 // num, 16 * 32)
    ours, theirs = z.flatten(1), codec.decode(reduced.values, reduced.side).flatten(1)
    projection = theirs @ ours.T / ours.square().sum(dim=1)
    torch.testing.assert_close(projection, torch.eye(8), rtol=0, atol=0.35)


def test_c3sl_keys_come_from_the_seed_and_never_travel():
    first, same, other = (Codec("c3sl(3)", embed_dim=D, seed=seed) for seed in (1, 1, 2))
    z = noise(7, N, D)
    sent, again, differs = (codec.encode(z, Context()).arrays for codec in (first, same, other))
    assert sent.keys() == {"activations", "indices.shape.0"}
    assert sent["activations"].shape == (3, N * D) and sent["indices.shape.0"].tolist() == [7, N, D]
    assert torch.equal(sent["activations"], again["activations"])
    assert not torch.allclose(sent["activations"], differs["activations"])
    assert torch.equal(first.decode(sent).z, same.decode(sent).z)
    assert not first.state_dict() and not list(first.parameters())


# BottleNet++


def test_bottlenet_trains_on_both_sides():
    codec = Codec("bottlenet(0.5)", embed_dim=D)
    client, server = list(codec.client_parameters()), list(codec.server_parameters())
    assert client and server
    names = {id(p): name for name, p in codec.named_parameters()}
    assert {id(p) for p in client}.isdisjoint(id(p) for p in server)
    assert {id(p) for p in (*client, *server)} == names.keys()
    z = noise(B, N, D).requires_grad_()
    message, down = there_and_back(codec, z, noise(B, N, D, seed=1))
    assert message.sent.shape == message.arrays["activations"].shape == (B, N, 4) == down["gradients"].shape
    assert (message.sent > 0).all() and (message.sent < 1).all()
    for parameter in (*client, *server):
        assert parameter.grad is not None and parameter.grad.isfinite().all()
        if parameter.ndim == 2 or names[id(parameter)].endswith("1.bias"):  # a bias before normalisation has no effect
            assert parameter.grad.abs().max() > 1e-6
    assert z.grad.abs().max() > 1e-6


def test_bottlenet_gradient_is_that_of_the_two_layers_together():
    codec, z, weight = Codec("bottlenet(0.5)", embed_dim=D), noise(B, N, D).requires_grad_(), noise(B, N, D, seed=1)
    there_and_back(codec, z, weight)
    (part,) = codec.reducers
    whole = z.detach().clone().requires_grad_()
    (part.decoder(part.encoder(whole.flatten(0, 1))).view_as(whole) * weight).sum().backward()
    torch.testing.assert_close(z.grad, whole.grad)


def test_bottlenet_starts_from_the_seed():
    first, same, other = (Codec("adc(0.5)+bottlenet(0.5)", embed_dim=D, seed=seed).state_dict() for seed in (1, 1, 2))
    assert first.keys() == same.keys() and first
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_bottlenet_stays_in_evaluation_with_running_statistics():
    codec = Codec("bottlenet(0.5)", embed_dim=D, eval_text="none")
    assert all(part.in_model for part in codec.reducers)
    start = {name: value.clone() for name, value in codec.named_buffers()}
    for seed in range(3):
        codec.decode(codec.encode(noise(B, N, D, seed=seed) + 2, Context()).arrays)
    trained = {name: value.clone() for name, value in codec.named_buffers()}
    assert all(not torch.equal(value, trained[name]) for name, value in start.items())
    z = noise(B, N, D)

    def decoded(z: Tensor) -> Tensor:
        arrays = codec.encode(z, Context()).arrays
        assert arrays["activations"].shape == (len(z), N, 4)
        return codec.decode(arrays).z.detach()

    alone_or_not = decoded(z[:1]), decoded(z)[:1]
    assert not torch.allclose(*alone_or_not, atol=1e-3)
    trained = {name: value.clone() for name, value in codec.named_buffers()}
    codec.eval()
    torch.testing.assert_close(decoded(z[:1]), decoded(z)[:1])
    assert all(torch.equal(value, trained[name]) for name, value in codec.named_buffers())


@pytest.mark.parametrize(("ratio", "width"), [(1.0, 8), (0.5, 4), (0.3, 2), (0.01, 1)])
def test_bottlenet_has_the_width_that_was_asked_for(ratio, width):
    reduced = BottleNet(ratio, embed_dim=D).encode(noise(B, N, D), Context())
    assert reduced.values.shape == (B, N, width)


def test_bottlenet_of_a_single_token_goes_on_training():
    part = BottleNet(0.5, embed_dim=D)
    part.decode(part.encode(noise(1, 1, D), Context()).values, {})
    assert all(module.training for module in part.modules())


# FedLite


def few_subvectors() -> Tensor:
    """Tokens that are one of two, of four subvectors each: eight in all."""
    return noise(2, 12)[torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 1]])]


@pytest.mark.parametrize("correction", [0, 1e-4])
def test_fedlite_is_exact_with_a_cluster_for_every_subvector(correction):
    z = few_subvectors().requires_grad_()
    codec, weight = Codec(f"fedlite(4, 8, correction={correction})", embed_dim=12), noise(3, 3, 12, seed=1)
    message, _ = there_and_back(codec, z, weight)
    torch.testing.assert_close(codec.decode(message.arrays).z, z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z.grad, weight, rtol=1e-5, atol=1e-6)


def test_fedlite_loses_less_with_more_clusters():
    z = noise(B, N, D)
    losses = []
    for clusters in (2, 8, 32, 80):
        codec = Codec(f"fedlite(4, {clusters})", embed_dim=D)
        decoded = codec.decode(codec.encode(z, Context()).arrays, with_gradient=False).z
        losses.append(float((decoded - z).square().mean()))
    assert losses == sorted(losses, reverse=True) and losses[0] < z.var() and losses[-1] < 1e-9


@pytest.mark.parametrize(("clusters", "bits"), [(2, 1), (3, 2), (4, 2), (5, 4), (16, 4), (17, 8), (256, 8)])
@pytest.mark.parametrize("width", [8, 10])
def test_fedlite_sends_codes_codebook_and_shape(clusters, bits, width):
    z = noise(20, N, width)
    arrays = Codec(f"fedlite(4, {clusters})", embed_dim=width).encode(z, Context()).arrays
    assert arrays.keys() == {"activations", "scales", "indices.shape"}
    assert arrays["activations"].shape == (20, N, math.ceil(4 * bits / 8))
    assert arrays["activations"].dtype == torch.uint8
    assert arrays["scales"].shape == (clusters, math.ceil(width / 4)) and arrays["scales"].dtype == torch.float32
    assert arrays["indices.shape"].tolist() == [20, N, width]


def test_fedlite_learns_from_a_sample_where_there_are_many():
    z = noise(20, 10, 64) + 5
    codec = Codec("fedlite(16, 16)", embed_dim=64)  # 3200 subvectors
    decoded = codec.decode(codec.encode(z, Context()).arrays).z
    torch.testing.assert_close(decoded.mean(), z.mean(), rtol=1e-5, atol=0)  # the entries are means of all
    assert (decoded - z).square().mean() < 0.6 * z.var()


def test_fedlite_gradient_travels_uncompressed_and_is_corrected():
    z, gradient = noise(B, N, D), noise(B, N, D, seed=1)
    for correction in (0, 0.5):
        codec = Codec(f"fedlite(4, 4, correction={correction})", embed_dim=D)
        message = codec.encode(z, Context())
        down = codec.encode_gradient(gradient, Context())
        assert down.keys() == {"gradients"} and torch.equal(down["gradients"], gradient)
        lost = z - codec.decode(message.arrays).z
        assert lost.abs().max() > 0.1
        torch.testing.assert_close(codec.decode_gradient(message, down), gradient + correction * lost)


# The chain


def test_a_format_follows_what_a_reducer_leaves():
    z = noise(B, N, D)
    codec = Codec("bottlenet(0.5)+int4", embed_dim=D)
    message = codec.encode(z, Context())
    assert message.arrays["activations"].shape == (B, N, 2) and message.arrays["scales"].shape == (B, N, 1, 2)
    assert codec.decode(message.arrays).z.shape == z.shape


def test_nothing_is_to_go_down_where_no_gradient_is_wanted():
    codec, z = Codec("topk(0.5)", embed_dim=D), noise(B, N, D)
    arrays = codec.encode(z, Context()).arrays
    assert codec.decode(arrays).z.requires_grad
    decoded = codec.decode(arrays, with_gradient=False)
    assert not decoded.leaf.requires_grad and not decoded.z.requires_grad


@pytest.mark.parametrize(
    ("text", "rounded"), [("none", False), ("topk(0.2)", False), ("fp16", True), ("topk(0.2)+int8", True)]
)
def test_features_are_rounded_where_activations_are(text, rounded):
    assert Codec(text, embed_dim=D).feature_dtype == (torch.bfloat16 if rounded else torch.float32)


@pytest.mark.parametrize("text", ["none", "topk(0.3)", "c3sl(2)", "bottlenet(0.5)", "fedlite(4)", "int8"])
def test_autocast_changes_nothing(text):
    """Sums, distances and transforms keep the precision that they come in."""
    z = noise(B, N, D)
    plain, within = Codec(text, embed_dim=D), Codec(text, embed_dim=D)
    expected = plain.encode(z, Context()).arrays
    with torch.autocast("cpu", dtype=torch.bfloat16):
        arrays = within.encode(z, Context()).arrays
        decoded = within.decode(arrays).z
    assert all(torch.equal(value, arrays[name]) for name, value in expected.items())
    assert decoded.dtype == torch.float32 and torch.equal(decoded, plain.decode(expected).z)


@pytest.mark.parametrize("text", ["pca(1)", "int8", "adc(samples=1, tokens=0.5)+pca(1)"])
def test_autocast_around_a_codec_changes_nothing(text):
    z, context = noise(B, N, D), context_of(noise(B, N, D))
    results = []
    for enabled in (False, True):
        client, server = Codec(text, embed_dim=D), Codec(text, embed_dim=D)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            message = client.encode(z, context)
            decoded = server.decode(message.arrays)
            down = server.encode_gradient(decoded.leaf.detach(), context)
            results.append((decoded.z, client.decode_gradient(message, down)))
    for plain, cast in zip(*results, strict=True):
        assert plain.dtype == cast.dtype == torch.float32 and torch.equal(plain, cast)
