"""Rotate and code: how far off and how many bytes, bases that come and go, and frames that nobody writes."""

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from helpers.clients import Largest
from torch import Tensor

from snello.codecs.base import Arrays, Codec, Context, Message
from snello.codecs.pca import KEPT, PCA
from snello.errors import ConfigError, ProtocolError, SnelloWarning, TrainingError

B, SIDE, D = 8, 4, 24
N = 1 + SIDE * SIDE
CONTEXT = Context(num_prefix_tokens=1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(num: int = B, *, dim: int = D, num_tokens: int = N, seed: int = 0) -> Tensor:
    """Tokens (num, N, D) around a mean, of which few directions hold most of the variance."""
    turned = torch.linalg.qr(noise(dim, dim, seed=77))[0]
    deviations = torch.exp(-torch.arange(dim) / 4) + 0.02
    return noise(num, num_tokens, dim, seed=seed) * deviations @ turned + noise(dim, seed=78)


def num_bytes(arrays: Arrays) -> int:
    return sum(value.numel() * value.element_size() for value in arrays.values())


def decibels(x: Tensor, decoded: Tensor) -> float:
    """Signal to noise, the mean token not counted as signal."""
    x, decoded = x.double(), decoded.detach().double()
    return float(10 * torch.log10((x - x.mean(dim=(0, 1))).square().sum() / (decoded - x).square().sum()))


def up(text: str, z: Tensor, context: Context = CONTEXT) -> tuple[Arrays, Tensor]:
    """The arrays of activations between two fresh codecs, and what arrives."""
    arrays = Codec(text, embed_dim=z.shape[2]).encode(z, context).arrays
    return arrays, Codec(text, embed_dim=z.shape[2]).decode(arrays).z.detach()


def message_of(z: Tensor) -> Message:
    return Message({}, z, None, len(z))


class Pair:
    """A client's codec and a server's, and what crosses between them."""

    def __init__(self, text: str = "pca(0.5)", dim: int = D) -> None:
        self.text, self.dim = text, dim
        self.client, self.server = (Codec(text, embed_dim=dim) for _ in range(2))

    def up(self, z: Tensor) -> tuple[Arrays, Tensor]:
        arrays = self.client.encode(z, CONTEXT).arrays
        return arrays, self.server.decode(arrays).z.detach()

    def down(self, gradient: Tensor) -> tuple[Arrays, Tensor]:
        arrays = self.server.encode_gradient(gradient, CONTEXT)
        return arrays, self.client.decode_gradient(message_of(gradient), arrays)

    def exchange(self, seed: int, num: int = B) -> tuple[Arrays, Tensor, Arrays, Tensor]:
        """A frame each way."""
        return *self.up(tokens(num, dim=self.dim, seed=seed)), *self.down(tokens(num, dim=self.dim, seed=seed + 5000))

    def saved(self) -> "Pair":
        """Two other codecs that were loaded from what these have saved."""
        other = Pair(self.text, self.dim)
        other.client.load_state_dict(self.client.state_dict())
        other.server.load_state_dict(self.server.state_dict())
        return other


def same(ours: Any, theirs: Any) -> bool:
    """Whether two exchanges are the same, bit for bit."""
    if isinstance(ours, Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(value, theirs[name]) for name, value in ours.items())
    return all(same(one, other) for one, other in zip(ours, theirs, strict=True))


def is_key(arrays: Arrays) -> bool:
    return "scales.basis" in arrays


# ------------------------------------------------------------------------------------------------ how far, how many


@pytest.mark.parametrize("dct", [0, 1])
def test_a_finer_step_is_nearer_and_takes_more_bytes(dct):
    z = tokens(64)
    found = [(decibels(z, decoded), num_bytes(arrays)) for arrays, decoded in (
        up(f"pca({step}, dct={dct})", z) for step in (2, 1, 0.5, 0.25, 0.1, 0.03, 0.01)
    )]  # fmt: skip
    levels, sizes = zip(*found, strict=True)
    assert list(levels) == sorted(levels) and list(sizes) == sorted(sizes)
    assert 5 < levels[0] < 9 and 16 < levels[2] < 20 and 49 < levels[-1] < 52  # about 6 dB for each half
    assert sizes[1] < z.numel() / 4 < sizes[-1] < 2 * z.numel()


@pytest.mark.parametrize("step", [1, 0.3, 0.05, 0.001])
@pytest.mark.parametrize("dct", [0, 1])
def test_no_component_is_further_off_than_the_dead_zone(step, dct):
    """In the space of components and frequencies, in which numbers are rounded."""
    z = tokens(16)
    client, server = (PCA(step, dct=dct) for _ in range(2))
    arrays = client.pack(z, CONTEXT)
    decoded = server.unpack(arrays)
    basis = client._up.current
    assert basis is not None
    wrong = (decoded - z).double() @ basis.inverse
    if dct:
        index = torch.arange(SIDE, dtype=torch.float64)
        table = torch.cos(math.pi / SIDE * (index + 0.5) * index[:, None]) * math.sqrt(2 / SIDE)
        table[0] /= math.sqrt(2)
        assert torch.allclose(table @ table.T, torch.eye(SIDE, dtype=torch.float64))
        wrong = torch.cat([wrong[:, :1], torch.kron(table, table) @ wrong[:, 1:]], dim=1)
    centred = torch.cat([part - part.mean(dim=(0, 1)) for part in (z[:, :1], z[:, 1:])], dim=1)
    unit = step * float(centred.square().mean().sqrt())
    worst = float(wrong.abs().max()) / unit
    assert 0.5 < worst < 0.601 + 1e-4 / step


def test_gradients_are_rounded_likewise_with_a_step_of_their_own():
    gradient = 1e-6 * (tokens(64) - tokens(64).mean(dim=(0, 1)))
    for text, low, high in (("pca(0.01, down=1)", 10, 15), ("pca(1, down=0.1)", 28, 34), ("pca(0.1)", 28, 34)):
        arrays, decoded = Pair(text).down(gradient)
        assert low < decibels(gradient, decoded) < high and num_bytes(arrays) < gradient.numel() * 2
        assert decoded.dtype == torch.float32


def test_all_components_and_a_fine_step_leave_nothing_but_rounding():
    z = tokens(16)
    _, decoded = up("pca(0.00001)", z)
    assert decibels(z, decoded) > 95
    _, decoded = up("pca(0.000000001)", z)  # finer than the numbers themselves
    assert decibels(z, decoded) > 95


def test_a_basis_in_8_bits_costs_no_accuracy():
    """Its directions are not quite orthogonal; where they are all there, nothing may be lost by that."""
    z = tokens(64, dim=96)
    _, decoded = up("pca(0.001)", z)
    assert decibels(z, decoded) > 68


def test_prefix_tokens_have_a_mean_of_their_own():
    z = tokens()
    z[:, 0] += 1000
    arrays, decoded = up("pca(0.5)", z)
    usual = num_bytes(up("pca(0.5)", tokens())[0])
    assert float((decoded[:, 0] - z[:, 0]).abs().max()) < 5 and num_bytes(arrays) < 1.1 * usual
    together, _ = up("pca(0.5)", z, Context(num_prefix_tokens=0))
    assert num_bytes(together) < num_bytes(arrays)  # one huge direction hides all others from the step
    _, decoded = up("pca(0.5)", z, Context(num_prefix_tokens=0))
    assert decibels(tokens()[:, 1:], decoded[:, 1:]) < 0


@pytest.mark.parametrize("num_prefix", [0, 1, 2, 5, N, N + 3])
def test_any_number_of_prefix_tokens(num_prefix):
    z = tokens()
    arrays, decoded = up("pca(0.3)", z, Context(num_prefix_tokens=num_prefix))
    assert decibels(z, decoded) > 18
    grid = math.isqrt(max(0, N - num_prefix))
    assert bytes(arrays["scales"].tolist())[14] == (grid > 1 and grid**2 == N - num_prefix)


def smooth() -> Tensor:
    """Tokens whose patches are much like their neighbours."""
    z = tokens(32)
    grid = z[:, 1:].unflatten(1, (SIDE, SIDE))
    grid = grid.roll(1, 1) + grid + grid.roll(-1, 1)
    grid = grid.roll(1, 2) + grid + grid.roll(-1, 2)
    ramp = torch.arange(SIDE) - 1.5
    z[:, 1:] = (grid * 0.1 + 3 * noise(32, 1, 1, D, seed=4) * ramp[:, None, None]).flatten(1, 2)
    return z


def test_frequencies_take_fewer_bytes_where_neighbours_are_alike():
    z = smooth()
    (plain, first), (less, second) = up("pca(0.4, dct=0)", z), up("pca(0.4)", z)
    assert num_bytes(less) < 0.85 * num_bytes(plain) and decibels(z, second) > decibels(z, first) - 0.3


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 6, 8, 17, 18])
def test_a_transform_for_square_grids_alone(num_tokens):
    z = tokens(num_tokens=num_tokens)
    arrays, decoded = up("pca(0.3)", z)
    assert bytes(arrays["scales"].tolist())[14] == (num_tokens in (5, 10, 17))
    assert decoded.shape == z.shape and decibels(z, decoded) > 15
    assert not bytes(up("pca(0.3, dct=0)", z)[0]["scales"].tolist())[14]


def test_gradients_are_not_transformed():
    arrays, _ = Pair().down(tokens())
    assert bytes(arrays["scales"].tolist())[14] == 0


SHAPES = [(1, 1, 1), (1, 1, 7), (5, 1, 3), (1, 5, 1), (2, 5, 1), (3, 10, 2), (1, 17, 40), (2, 2, 300)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.filterwarnings("ignore:pca. a step of 3:snello.errors.SnelloWarning")
@pytest.mark.parametrize("text", ["pca(0.2)", "pca(3, dct=0, basis=1)"])
def test_odd_shapes(shape, text):
    z, pair = noise(*shape), Pair(text, shape[2])
    for _ in range(3):
        for arrays, decoded in (pair.up(z), pair.down(z)):
            assert decoded.shape == z.shape and decoded.isfinite().all()
            assert float((decoded - z).square().sum()) < 1.5 * float(z.square().sum())
            assert sorted(arrays)[-1].startswith("scales")
    if shape[0] * shape[1] > 4 and text.startswith("pca(0.2"):
        assert float((pair.up(z)[1] - z).square().mean()) < 0.05


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [0, 1e-45, 1e-39, 1e-37, 1e-30, 1e-18, 1.0, 1e15, 1e30])
def test_numbers_of_all_sizes(size):
    z = ((tokens() - tokens().mean(dim=(0, 1))) * size).float()
    for _, decoded in (up("pca(0.1)", z), Pair("pca(0.1)").down(z)):
        assert decoded.isfinite().all()
        if size > 1e-35:
            assert decibels(z.double() / size, decoded.double() / size) > 25
        else:
            assert float((decoded - z).abs().max()) <= 1.5 * float(z.abs().max())


@pytest.mark.parametrize("size", [1e37, 1e38])
@pytest.mark.parametrize("eval_text", ["int8", "pca(1)"])
def test_numbers_too_large_to_add_up(size, eval_text):
    z = noise(B, N, D).sign() * size + 2 * size
    codec = Codec("pca(1)", embed_dim=D, eval_text=eval_text).train(eval_text == "int8")
    with pytest.raises(TrainingError, match="too large for pca"):
        codec.encode(z, CONTEXT)


@pytest.mark.parametrize("value", [0.0, 3.3, -1e-30, 1e30])
def test_constants(value):
    z = torch.full((B, N, D), value)
    arrays, decoded = up("pca(1)", z)
    assert float((decoded - z).abs().max()) <= abs(value) / 256 and num_bytes(arrays) < 2000
    _, decoded = Pair("pca(1)").down(z)
    assert float((decoded - z).abs().max()) <= abs(value)
    assert value or not decoded.any()


@pytest.mark.parametrize("way", ["up", "down"])
def test_zeros_between_others(way):
    """A sample without anything, a token, a dimension; and a whole frame after one that was not."""
    pair = Pair("pca(0.2)")
    z = tokens() - tokens().mean(dim=(0, 1))
    z[2], z[:, 3], z[..., 4] = 0, 0, 0
    assert decibels(z, getattr(pair, way)(z)[1]) > 18
    arrays, decoded = getattr(pair, way)(torch.zeros(B, N, D))
    assert not decoded.any() and not is_key(arrays)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_in(dtype):
    z = tokens().to(dtype)
    arrays, decoded = up("pca(0.1)", z)
    assert decoded.dtype == torch.float32 and same(arrays, up("pca(0.1)", z.float())[0])
    pair = Pair("pca(0.1)")
    down = pair.server.encode_gradient(z, CONTEXT)
    assert pair.client.decode_gradient(message_of(z), down).dtype == dtype


@pytest.mark.parametrize(
    "change", [lambda z: z.transpose(0, 1).contiguous().transpose(0, 1), lambda z: z.repeat(1, 1, 2)[..., :D]]
)
def test_not_contiguous(change):
    z = change(tokens())
    assert not z.is_contiguous()
    for ours, theirs in ((up("pca(0.1)", z), up("pca(0.1)", tokens())), (Pair().down(z), Pair().down(tokens()))):
        assert same(ours, theirs)


@pytest.mark.filterwarnings("error")
def test_what_came_is_left_as_it_was():
    z = tokens()
    before, context = z.clone(), CONTEXT
    arrays = Codec("pca(0.3)", embed_dim=D).encode(z, context).arrays
    copies = {name: value.clone() for name, value in arrays.items()}
    Codec("pca(0.3)", embed_dim=D).decode(arrays)
    assert torch.equal(z, before) and same(arrays, copies)


def test_outliers_come_by_themselves():
    z = tokens()
    z[3, 5] = 4000 * noise(D, seed=9)
    arrays, decoded = up("pca(0.001)", z)
    assert arrays["indices.outliers"].dtype == torch.int32 and len(arrays["indices.outliers"]) >= 3
    assert decibels(z, decoded) > 50  # what the basis in 8 bits leaves of it


def test_other_threads_decode_the_same():
    """The numbers are whole on the way; what is left is a product of matrices."""
    pair = Pair("pca(0.3)")
    arrays, decoded = pair.up(tokens())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert torch.allclose(Codec("pca(0.3)", embed_dim=D).decode(arrays).z, decoded, rtol=0, atol=1e-5)
    finally:
        torch.set_num_threads(before)


# -------------------------------------------------------------------------------------------------------------- bases


@pytest.mark.parametrize("every", [1, 2, 3, 20])
def test_a_basis_comes_first_and_then_every_so_many_frames(every):
    pair = Pair(f"pca(0.5, basis={every})")
    for index in range(2 * every + 3):
        first, _, second, _ = pair.exchange(index)
        assert is_key(first) == is_key(second) == (index % every == 0)
        assert pair.client.is_key(first) == is_key(first)
        assert is_key(first) or not first.keys() & second.keys() - {"scales", "indices.shape", "indices.outliers"}


def test_twenty_frames_by_default():
    pair = Pair("pca(1)")
    assert [is_key(pair.up(tokens())[0]) for _ in range(41)] == [index % 20 == 0 for index in range(41)]


def test_a_basis_is_one_byte_for_each_number():
    arrays, _ = Pair().up(tokens())
    basis = arrays["scales.basis"]
    assert basis.dtype == torch.int8 and len(basis) == D and 1 <= basis.shape[1] <= D
    assert set(basis.abs().amax(dim=0).tolist()) == {127}


def test_the_coarser_the_step_the_fewer_components():
    widths = [up(f"pca({step})", tokens(64))[0]["scales.basis"].shape[1] for step in (0.01, 0.5, 1, 2)]
    assert widths == sorted(widths, reverse=True) and widths[0] == D > widths[2]


def test_no_basis_is_made_of_a_much_smaller_batch():
    """Such as the last of an epoch; the old one lasts until a batch of full size comes."""
    pair = Pair("pca(0.5, basis=2)")
    keys = [is_key(pair.up(tokens(num, seed=num))[0]) for num in (8, 8, 3, 2, 1, 8, 8, 4, 8, 3, 8)]
    assert keys == [True, False, False, False, False, True, False, True, False, True, False]


def test_a_new_basis_where_tokens_have_other_dimensions():
    client, server = PCA(0.5), PCA(0.5)
    for dim in (D, D, 10, 10, 30):
        arrays = client.pack(tokens(dim=dim), CONTEXT)
        assert decibels(tokens(dim=dim), server.unpack(arrays)) > 12
    assert not is_key(client.pack(tokens(dim=30), CONTEXT)) and is_key(client.pack(tokens(dim=10), CONTEXT))


def test_a_receiver_keeps_the_last_two():
    pair = Pair("pca(0.5, basis=2)")
    sent = [pair.client.encode(tokens(seed=index), CONTEXT).arrays for index in range(8)]
    for index in (0, 2, 1, 3, 4, 3, 5, 6, 5, 7, 4, 7):  # those of the basis before may still be under way
        pair.server.decode(sent[index])
    with pytest.raises(ProtocolError, match="basis that is not here") as caught:
        pair.server.decode(sent[1])
    assert caught.value.code == "unknown-basis"
    assert len(pair.server.format._up.known) == KEPT == 2
    pair.server.decode(sent[2])  # it comes again
    pair.server.decode(sent[3])
    pair.server.decode(sent[5])


def test_a_basis_that_is_not_here():
    pair = Pair()
    pair.exchange(0)
    first, _, second, _ = pair.exchange(1)
    fresh = Pair()
    for decode in (
        lambda: fresh.server.decode(first),
        lambda: fresh.client.decode_gradient(message_of(tokens()), second),
    ):
        with pytest.raises(ProtocolError) as caught:
            decode()
        assert caught.value.code == "unknown-basis"
    with pytest.raises(ProtocolError):  # each way has its own
        pair.client.decode_gradient(message_of(tokens()), {**second, "scales": first["scales"]})


def test_after_forgetting_the_next_is_a_key():
    pair = Pair()
    for index in range(3):
        pair.exchange(index)
    pair.client.forget()
    pair.server.forget()
    first, _, second, _ = pair.exchange(3)
    assert is_key(first) and is_key(second)
    assert not is_key(pair.exchange(4)[0])


def test_a_basis_that_came_does_not_keep_its_frame():
    """What is read is a part of the frame's bytes, which are many more."""
    pair = Pair()
    arrays = pair.client.encode(tokens(), CONTEXT).arrays
    whole = torch.cat([torch.zeros(100_000, dtype=torch.int8), arrays["scales.basis"].flatten()])
    arrays["scales.basis"] = whole[100_000:].view(arrays["scales.basis"].shape)
    pair.server.decode(arrays)
    (basis,) = pair.server.format._up.known.values()
    assert basis.codes.untyped_storage().nbytes() == basis.codes.numel()
    whole.zero_()  # and nobody changes it
    assert basis.codes.any()


@pytest.mark.parametrize("every", [1, 3])
def test_both_sides_stay_in_step(every):
    """Long, with small batches at the end of each epoch; nothing is known to both but what crossed."""
    pair, keys = Pair(f"pca(0.4, down=0.3, basis={every})"), 0
    for index, num in zip(count(), [8, 8, 8, 2] * 8):
        z, gradient = tokens(num, seed=index), tokens(num, seed=index + 90) - tokens(num).mean(dim=(0, 1))
        (arrays, came), (_, back) = pair.up(z), pair.down(gradient)
        assert decibels(z, came) > 14 and decibels(gradient, back) > 15
        keys += is_key(arrays)
    assert keys == (24 if every == 1 else 8) or keys > 8


@pytest.mark.parametrize("frames", [0, 1, 4, 7])
def test_what_was_saved_goes_on_bit_for_bit(frames):
    pair = Pair("pca(0.5, basis=3)")
    for index in range(frames):
        pair.exchange(index, 8 if index % 3 else 6)
    other = pair.saved()
    for index in range(frames, frames + 8):
        num = 3 if index == frames + 2 else 8  # how old a basis is, and of how many samples, is saved too
        assert same(pair.exchange(index, num), other.exchange(index, num)), index


def test_what_was_saved_is_what_is_saved_again():
    pair = Pair("pca(0.5, basis=2)")
    for index in range(5):
        pair.exchange(index)
    state = pair.client.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values()) and len(state) == 1
    again = pair.saved().client.state_dict()
    assert same(state, again) and len(next(iter(state.values()))) > 2 * D
    fresh = Pair("pca(0.5, basis=2)").client
    pair.client.load_state_dict(fresh.state_dict())  # also nothing
    assert same(pair.client.state_dict(), fresh.state_dict()) and is_key(pair.up(tokens())[0])


def test_an_older_frame_can_be_decoded_after_loading():
    pair = Pair("pca(0.5, basis=2)")
    sent = [pair.up(tokens(seed=index))[0] for index in range(4)]
    other = pair.saved()
    for arrays in (sent[3], sent[1]):
        assert torch.equal(other.server.decode(arrays).z, pair.server.decode(arrays).z)
    third = pair.client.encode(tokens(seed=50), CONTEXT).arrays
    for codec in (other.server, pair.server):
        codec.decode(third)
        codec.decode(sent[3])
        with pytest.raises(ProtocolError):  # the same one is forgotten
            codec.decode(sent[1])


def test_what_was_remembered_comes_back():
    pair = Pair("pca(0.5, basis=3)")
    for index in range(4):
        pair.exchange(index)
    own, theirs = pair.client.format.snapshot(), pair.server.format.snapshot()
    first = [pair.exchange(index) for index in range(10, 14)]
    pair.client.format.restore(own)
    pair.server.format.restore(theirs)
    assert all(same(before, pair.exchange(index)) for before, index in zip(first, range(10, 14), strict=True))
    pair.client.format.restore(own)  # what came after has not changed what was remembered
    assert same(first[0][0], pair.client.encode(tokens(seed=10), CONTEXT).arrays)


def test_nothing_to_remember_is_the_start():
    pair = Pair()
    for index in range(3):
        pair.exchange(index)
    pair.client.format.restore(None)
    pair.server.format.restore(None)
    assert same(pair.exchange(0), Pair().exchange(0))
    assert PCA(1).snapshot() is not None


def test_a_copy_shares_nothing():
    pair = Pair("pca(0.5, basis=2)")
    pair.exchange(0)
    other = copy.deepcopy(pair)
    wanted = [copy.deepcopy(pair).exchange(index) for index in (1,)]
    for index in range(5, 9):
        other.exchange(index)
    assert same(wanted[0], pair.exchange(1))
    assert len(pair.server.format._up.known) == 1 and len(other.server.format._up.known) == 2


def test_an_archive_decodes_in_any_order():
    pair = Pair("pca(0.5, basis=2)")
    pair.exchange(90)
    archive = pair.server.eval().archive()
    pair.client.forget()
    frames = [pair.client.encode(tokens(seed=index), CONTEXT).arrays for index in range(12)]
    pair.server.train()
    expected = [pair.server.decode(arrays).z for arrays in frames]
    keys = [index for index, arrays in enumerate(frames) if archive.is_key(arrays)]
    assert keys == [0, 2, 4, 6, 8, 10] and archive.training
    with pytest.raises(ProtocolError):
        archive.decode(frames[1])
    for index in (*keys, 11, 1, 6, 3, 9, 1):
        assert torch.equal(archive.decode(frames[index]).z, expected[index])
    assert len(pair.server.format._up.known) == KEPT  # it is a copy


def test_evaluation_remembers_nothing():
    """Also the last batch, which is small, is understood by who has seen no other: servers evaluate for several."""
    client = Codec("int8", embed_dim=D, eval_text="pca(0.5)").eval()
    for num in (8, 8, 3, 1):
        z = tokens(num, seed=num)
        arrays = client.encode(z, CONTEXT).arrays
        server = Codec("int8", embed_dim=D, eval_text="pca(0.5)").eval()
        assert is_key(arrays) and decibels(z, server.decode(arrays).z) > 12
        assert client._format.snapshot() == server._format.snapshot() == ((None, 0, {}), (None, 0, {}))
    assert client.state_dict() == {}


def test_evaluation_in_between_changes_nothing():
    pair, other = Pair("pca(0.5, basis=2)"), Pair("pca(0.5, basis=2)")
    for index in range(5):
        pair.client.eval().encode(tokens(seed=index + 70), CONTEXT)
        pair.client.train()
        assert same(pair.exchange(index), other.exchange(index))


# --------------------------------------------------------------------------------------------- options and warnings


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("pca(0)", "step must be above 0"),
        ("pca(-1)", "step must be above 0"),
        ("pca(down=1)", "step"),
        ("pca(1, down=0)", "down must be above 0"),
        ("pca(1, down=-0.5)", "down must be above 0"),
        ("pca(1, basis=0)", "basis must be a whole number from 1 on"),
        ("pca(1, basis=-3)", "basis must be a whole number from 1 on"),
        ("pca(1, basis=1.5)", "basis must be a whole number from 1 on"),
        ("pca(1, dct=2)", "dct must be 0 or 1, got 2"),
        ("pca(1, dct=-1)", "dct must be 0 or 1"),
        ("pca(1, wide=2)", "wide"),
        ("topk(0.2)+pca(1)", "pca codes tokens"),
        ("c3sl(2)+pca(1)", "pca codes tokens"),
        ("pca(1)+int8", "must come last"),
        ("pca(1)+pca(1)", "must come last"),
        ("pca(1)+adc(0.2)", "must come last"),
    ],
)
def test_options_that_cannot_be(text, told):
    with pytest.raises(ConfigError, match=told):
        Codec(text, embed_dim=D)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1", None])
@pytest.mark.parametrize("name", ["step", "down"])
def test_steps_that_are_no_numbers(name, value):
    if (name, value) == ("down", None):
        assert PCA(0.5)._down.options.step == 0.5
        return
    with pytest.raises(ConfigError, match=name):
        PCA(**{"step": 1, name: value})


def test_a_step_that_leaves_next_to_nothing_is_told_once():
    z = noise(B, N, D)
    client = Codec("pca(3.5, basis=1)", embed_dim=D)
    with pytest.warns(
        SnelloWarning, match=r"pca: a step of 3\.5 leaves .* of -?[0-2]\.\d dB at the cut: use a sm"
    ) as told:
        arrays = client.encode(z, CONTEXT).arrays
    level = float(str(told[0].message).split(" dB")[0].rsplit(" ", 1)[1])
    arrived = Codec("pca(3.5, basis=1)", embed_dim=D).decode(arrays).z.detach()
    assert abs(decibels(z, arrived) - level) < 0.15
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        client.encode(z, CONTEXT)  # another key, and not another word
        Codec("pca(1)", embed_dim=D).encode(z, CONTEXT)
        Codec("pca(3.5)", embed_dim=D).encode(torch.zeros(B, N, D), CONTEXT)  # nothing is lost
        Codec("pca(3.5)", embed_dim=D).encode_gradient(z, CONTEXT)  # they may be


# ------------------------------------------------------------------------------------------------------ hostile frames


def side_of(arrays: Arrays, at: int, value: int) -> dict[str, Tensor]:
    side = arrays["scales"].clone()
    side[at] = value
    return {"scales": side}


def basis_of(change: Callable[[Tensor], Tensor]) -> Callable[[Arrays], dict[str, Tensor]]:
    return lambda arrays: {"scales.basis": change(arrays["scales.basis"])}


MEANS = 15
"""Where the mean tokens begin, after the name of the basis, the step, P and the transform."""
HOSTILE: dict[str, Callable[[Arrays], dict[str, Tensor]]] = {
    "another name": lambda arrays: side_of(arrays, 0, arrays["scales"][0] ^ 1),
    "no step": lambda arrays: {
        "scales": torch.cat([arrays["scales"][:8], torch.zeros(4).byte(), arrays["scales"][12:]])
    },
    "a negative step": lambda arrays: side_of(arrays, 11, arrays["scales"][11] | 128),
    "an infinite step": lambda arrays: {
        "scales": torch.cat([arrays["scales"][:8], torch.tensor([0, 0, 128, 127]).byte(), arrays["scales"][12:]])
    },
    "a step that is no number": lambda arrays: {
        "scales": torch.cat([arrays["scales"][:8], torch.tensor([0, 0, 192, 127]).byte(), arrays["scales"][12:]])
    },
    "more prefix tokens than tokens": lambda arrays: side_of(arrays, 12, N + 1),
    "many prefix tokens": lambda arrays: side_of(arrays, 13, 255),
    "a transform of no square": lambda arrays: side_of(arrays, 12, 3),
    "a transform of nothing": lambda arrays: side_of(arrays, 12, N),
    "a transform of one patch": lambda arrays: side_of(arrays, 12, N - 1),
    "a flag that is none": lambda arrays: side_of(arrays, 14, 2),
    "no transform": lambda arrays: side_of(arrays, 14, 0),
    "a mean that is not finite": lambda arrays: {
        "scales": torch.cat([arrays["scales"][:MEANS], torch.tensor([128, 127]).byte(), arrays["scales"][MEANS + 2 :]])
    },
    "no side information": lambda arrays: {"scales": arrays["scales"][:0]},
    "a header alone": lambda arrays: {"scales": arrays["scales"][:MEANS]},
    "side information cut off": lambda arrays: {"scales": arrays["scales"][:-1]},
    "side information too long": lambda arrays: {"scales": torch.cat([arrays["scales"], arrays["scales"][:3]])},
    "side information in two dimensions": lambda arrays: {"scales": arrays["scales"][None]},
    "side information in none": lambda arrays: {"scales": arrays["scales"][0]},
    "side information of another type": lambda arrays: {"scales": arrays["scales"].view(torch.int8)},
    "floats as side information": lambda arrays: {"scales": arrays["scales"].float()},
    "a shape of two": lambda arrays: {"indices.shape": arrays["indices.shape"][:2]},
    "a shape of four": lambda arrays: {
        "indices.shape": torch.cat([arrays["indices.shape"], arrays["indices.shape"][:1]])
    },
    "a wide shape": lambda arrays: {"indices.shape": arrays["indices.shape"].long()},
    "no samples": lambda arrays: {"indices.shape": arrays["indices.shape"] * torch.tensor([0, 1, 1]).int()},
    "another sample": lambda arrays: {"indices.shape": arrays["indices.shape"] + torch.tensor([1, 0, 0]).int()},
    "another token": lambda arrays: {"indices.shape": arrays["indices.shape"] + torch.tensor([0, 1, 0]).int()},
    "another dimension": lambda arrays: {"indices.shape": arrays["indices.shape"] + torch.tensor([0, 0, 1]).int()},
    "words of another type": lambda arrays: {"activations": arrays["activations"].view(torch.int8)},
    "no words": lambda arrays: {"activations": arrays["activations"][:0]},
    "words cut off": lambda arrays: {"activations": arrays["activations"][:-2]},
    "other words": lambda arrays: {"activations": arrays["activations"].flip(0)},
    "outliers that are not due": lambda arrays: {"indices.outliers": torch.ones(2, dtype=torch.int32)},
    "another basis": basis_of(lambda codes: codes.flip(1)),
    "a basis cut off": basis_of(lambda codes: codes[:, :-1]),
    "a wide basis": basis_of(lambda codes: codes.repeat(1, 4)),
    "a high basis": basis_of(lambda codes: codes.repeat(2, 1)),
    "no directions": basis_of(lambda codes: codes[:, :0]),
    "a flat basis": basis_of(lambda codes: codes.flatten()),
    "a deep basis": basis_of(lambda codes: codes[None]),
    "a basis of another type": basis_of(lambda codes: codes.view(torch.uint8)),
    "a basis of floats": basis_of(lambda codes: codes.float()),
    "a basis of nothing": basis_of(torch.zeros_like),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_frames(name):
    pair = Pair("pca(0.3)")
    pair.up(tokens(seed=7))
    pair.client.forget()
    arrays = pair.client.encode(tokens(), CONTEXT).arrays
    remembered = pair.server.format.snapshot()
    with pytest.raises(ProtocolError) as caught:
        pair.server.decode({**arrays, **HOSTILE[name](arrays)})
    assert caught.value.code == "malformed"
    pair.server.format.restore(remembered)
    assert decibels(tokens(), pair.server.decode(arrays).z) > 18


@pytest.mark.parametrize("name", [name for name in HOSTILE if "transform" not in name and "mean" not in name])
def test_hostile_gradients(name):
    pair = Pair("pca(0.3)")
    arrays = pair.server.encode_gradient(tokens(), CONTEXT)
    named = {**arrays, "activations": arrays["gradients"]}
    if name == "a header alone":
        return  # that and the components of zeros are all there is
    changed = {**arrays, **HOSTILE[name](named)}
    changed["gradients"] = changed.pop("activations", changed["gradients"])
    with pytest.raises(ProtocolError):
        pair.client.decode_gradient(message_of(tokens()), changed)


def test_a_known_basis_of_other_dimensions():
    """Another shape with the name of a basis that is known."""
    server, client = PCA(0.5), PCA(0.5)
    narrow = client.pack(tokens(dim=10), CONTEXT)
    server.unpack(narrow)
    client.forget()
    wide = client.pack(tokens(), CONTEXT)
    del wide["scales.basis"]
    wide["scales"] = torch.cat([narrow["scales"][:8], wide["scales"][8:]])
    with pytest.raises(ProtocolError, match="other dimensions"):
        server.unpack(wide)


def test_few_bytes_do_not_take_much_memory():
    """No basis has more components than tokens have dimensions, and so no frame more codes than tokens have numbers."""
    pair = Pair("pca(0.3)")
    arrays = pair.client.encode(tokens(64), CONTEXT).arrays
    changes = [
        {"scales.basis": torch.zeros(D, 40 * D, dtype=torch.int8)},
        {"scales.basis": torch.zeros(40 * D, D, dtype=torch.int8)},
        {"indices.shape": torch.tensor([64, 2**20, D], dtype=torch.int32)},
        {"indices.shape": torch.tensor([64, N, 2**24], dtype=torch.int32)},
        {"indices.outliers": torch.zeros(1, dtype=torch.int32).expand(2**20)},
    ]
    for change in changes[:2] + changes[4:]:
        with Largest() as largest, pytest.raises(ProtocolError):
            pair.server.decode({**arrays, **change})
        assert largest.bytes < 2 * 64 * N * D * 4 + 40 * D * D
    for change in changes[2:4]:
        assert math.prod(pair.server.decoded_shape({**arrays, **change})) > 2**24  # it is asked first


def test_the_shape_of_a_gradient_is_known_before_it_is_decoded():
    pair = Pair("pca(0.3)")
    arrays = pair.server.encode_gradient(tokens(), CONTEXT)
    assert pair.client.gradient_shape(arrays) == (B, N, D)
    for shape in ([0, N, D], [B, N], [B, N, D, 1]):
        with pytest.raises(ProtocolError):
            pair.client.gradient_shape({**arrays, "indices.shape": torch.tensor(shape, dtype=torch.int32)})


def test_a_context_is_no_part_of_the_frame():
    """How many prefix tokens there are, the frame says."""
    arrays = Codec("pca(0.3)", embed_dim=D).encode(tokens(), replace(CONTEXT, num_prefix_tokens=3)).arrays
    assert arrays["scales"][12] == 3
