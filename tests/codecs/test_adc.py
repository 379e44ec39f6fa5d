"""ADC, trap by trap: both factors, what merges, what is dropped, exact gradients, and batches too small to merge."""

import math
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from snello.codecs.adc import ADC
from snello.codecs.base import Codec, Context, Reduced
from snello.errors import ConfigError, SnelloWarning
from snello.vit.tokens import merge_alike


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(B: int, N: int, D: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Activations and attention rows; some samples look at the same things."""
    generator = generator_of(seed)
    group = torch.randint(4, (B,), generator=generator)
    looks = 2 * torch.randn(4, N, generator=generator)[group] + torch.randn(B, N, generator=generator)
    return torch.randn(B, N, D, generator=generator, dtype=torch.float64).to(dtype), looks.softmax(dim=1)


def numbered(B: int, N: int) -> Tensor:
    """Activations that say where they stand: what is left of them names the tokens that were kept."""
    return torch.arange(N, dtype=torch.float32).view(1, N, 1).repeat(B, 1, 1)


def best_of(scores: list[float], num: int, prefix: int) -> list[int]:
    """The prefix tokens and the `num` best others, in their order."""
    others = sorted(range(prefix, len(scores)), key=lambda place: -scores[place])[:num]
    return [*range(prefix), *sorted(others)]


def by_loop(z: Tensor, attention: Tensor, groups: Tensor, num_kept: int, prefix: int) -> Tensor:
    """The merged activations, one group and one token after the other."""
    rows = []
    for group in range(int(groups.max()) + 1):
        members = [b for b in range(len(z)) if int(groups[b]) == group]
        centroid = [sum(float(attention[b, n]) for b in members) / len(members) for n in range(z.shape[1])]
        kept = best_of(centroid, num_kept - prefix, prefix)
        rows.append(torch.stack([sum(z[b, n] for b in members) / len(members) for n in kept]))
    return torch.stack(rows)


# Factors


@pytest.mark.parametrize(
    ("ratio", "B", "N", "P", "T", "k"),
    [
        (0.1, 128, 197, 1, 40, 62),  # the fourth root, as in the released code, would keep 110 tokens
        (0.25, 128, 197, 1, 64, 98),
        (0.09, 10, 20, 1, 3, 6),
        (0.3364, 50, 50, 1, 29, 29),  # 0.58 * 50 is 28.999... in floats
        (0.01, 128, 197, 1, 12, 19),
        (0.01, 10, 17, 1, 2, 2),  # never fewer than two groups, nor than one token beside the prefix
        (0.01, 10, 17, 5, 2, 6),
        (0.01, 10, 6, 5, 2, 6),
        (1.0, 10, 17, 1, 10, 17),
    ],
)
def test_both_factors_are_the_square_root(ratio, B, N, P, T, k):
    adc = ADC(ratio)
    assert adc.samples == adc.tokens == pytest.approx(math.sqrt(ratio))
    z, attention = batch(B, N, D=1)
    reduced = adc.encode(z, Context(num_prefix_tokens=P, attention=attention))
    assert reduced.values.shape == (T, k, 1)
    assert (adc.num_groups(B), adc.num_kept(N, P)) == (T, k)


def test_the_ratio_of_numbers_is_the_one_that_was_asked_for():
    z, attention = batch(128, 197, D=2)
    for ratio in (0.05, 0.1, 0.3, 0.5):
        left = ADC(ratio).encode(z, Context(attention=attention)).values
        assert 0.9 * ratio < left.numel() / z.numel() <= ratio


@pytest.mark.parametrize(
    ("options", "T", "k"),
    [
        ({"samples": 0.5, "tokens": 0.2}, 8, 4),
        ({"samples": 0.2, "tokens": 0.5}, 3, 10),
        ({"samples": 0.5}, 8, 20),
        ({"samples": 0.25, "tokens": 1}, 4, 20),
        ({"samples": 1, "tokens": 0.4}, 16, 8),
        ({"tokens": 0.4}, 16, 8),
    ],
)
def test_each_factor_may_be_given_by_itself(options, T, k):
    z, attention = batch(16, 20)
    reduced = ADC(**options).encode(z, Context(attention=attention))
    assert reduced.values.shape == (T, k, 3)
    assert (reduced.groups is None) == (T == 16)


def test_a_factor_of_one_changes_nothing():
    z, attention = batch(16, 20)
    reduced = ADC(samples=1, tokens=1).encode(z, Context(attention=attention))
    assert torch.equal(reduced.values, z) and reduced.groups is None and not reduced.side


# Merging and dropping


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("options", [{"ratio": 0.2}, {"samples": 0.3, "tokens": 0.9}, {"samples": 0.4}])
def test_groups_are_averaged_at_the_tokens_they_attend_to_most(options, prefix):
    z, attention = batch(15, 14, dtype=torch.float64)
    adc = ADC(**options)
    reduced = adc.encode(z, Context(num_prefix_tokens=prefix, attention=attention))
    assert sorted(set(reduced.groups.tolist())) == list(range(adc.num_groups(15)))
    expected = by_loop(z, attention, reduced.groups, adc.num_kept(14, prefix), prefix)
    torch.testing.assert_close(reduced.values, expected)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_without_merging_every_sample_keeps_what_it_attends_to_most(prefix):
    z, attention = batch(6, 14)
    reduced = ADC(samples=1, tokens=0.5).encode(z, Context(num_prefix_tokens=prefix, attention=attention))
    for row, its, scores in zip(reduced.values, z, attention.tolist(), strict=True):
        assert torch.equal(row, its[best_of(scores, 7 - prefix, prefix)])


@pytest.mark.parametrize("prefix", [1, 2, 5])
@pytest.mark.parametrize("options", [{"ratio": 0.2}, {"samples": 1, "tokens": 0.45}])
def test_prefix_tokens_stay_in_front_however_little_they_are_attended_to(options, prefix):
    _, attention = batch(16, 20)
    attention[:, :prefix] = 0.0
    reduced = ADC(**options).encode(numbered(16, 20), Context(num_prefix_tokens=prefix, attention=attention))
    for row in reduced.values.squeeze(2).tolist():
        assert row[:prefix] == pytest.approx(range(prefix))
        assert all(one < other for one, other in pairwise(row))


def test_samples_that_look_at_the_same_things_merge():
    looks = torch.arange(24) % 6
    attention = (6 * torch.eye(6, 10)[looks] + torch.rand(24, 10, generator=generator_of(0))).softmax(dim=1)
    for seed in range(5):
        reduced = ADC(samples=0.25).encode(numbered(24, 10), Context(attention=attention, seed=seed))
        assert len(set(zip(looks.tolist(), reduced.groups.tolist(), strict=True))) == 6


def test_equal_attention_leaves_no_group_empty():
    """K-means on equal rows finds one group; the others must not be averages of nothing."""
    z, attention = batch(16, 20)
    reduced = ADC(0.3).encode(z, Context(attention=attention[:1].repeat(16, 1)))
    assert sorted(set(reduced.groups.tolist())) == list(range(8)) and reduced.values.isfinite().all()


def test_groups_depend_on_the_seed_alone():
    z, attention = batch(32, 12)

    def groups(seed: int) -> list[int]:
        return ADC(0.2).encode(z, Context(attention=attention, seed=seed)).groups.tolist()

    assert groups(1) == groups(1)
    assert len({tuple(groups(seed)) for seed in range(5)}) > 1


# Gradients


@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize("options", [{"ratio": 0.3}, {"samples": 0.4, "min_cluster": 2}, {"tokens": 0.4}])
def test_the_gradient_is_that_of_the_dense_formula(options, prefix):
    z, attention = batch(12, 10, dtype=torch.float64)
    ours, dense = z.clone().requires_grad_(), z.clone().requires_grad_()
    adc = ADC(**options)
    reduced = adc.encode(ours, Context(num_prefix_tokens=prefix, attention=attention))
    groups = torch.arange(12) if reduced.groups is None else reduced.groups
    averaging = torch.nn.functional.one_hot(groups).T.double()
    averaging = averaging / averaging.sum(dim=1, keepdim=True)
    kept = [
        best_of(row, adc.num_kept(10, prefix) - prefix, prefix) for row in (averaging @ attention.double()).tolist()
    ]
    merged = torch.einsum("tb,bnd->tnd", averaging, dense)
    expected = merged[torch.arange(len(kept)).unsqueeze(1), torch.tensor(kept)]
    torch.testing.assert_close(reduced.values, expected)
    gradient = torch.randn(expected.shape, generator=generator_of(1), dtype=torch.float64)
    reduced.values.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(ours.grad, dense.grad)


def test_the_gradient_over_the_wire_is_exact():
    z, attention = batch(12, 10)
    through, direct = z.clone().requires_grad_(), z.clone().requires_grad_()
    codec, context = Codec("adc(0.3)", embed_dim=3), Context(attention=attention)
    message = codec.encode(through, context)
    decoded = codec.decode(message.arrays)
    decoded.z.square().sum().backward()
    down = codec.encode_gradient(decoded.leaf.grad, Context())
    message.sent.backward(codec.decode_gradient(message, down))
    ADC(0.3).encode(direct, context).values.square().sum().backward()
    torch.testing.assert_close(through.grad, direct.grad)
    assert through.grad.ne(0).any()


# Groups that are small


def test_the_histogram_of_group_sizes_adds_up_and_starts_anew_when_read():
    adc, (z, attention) = ADC(samples=0.4), batch(20, 9)
    assert adc.metrics() == {}
    sizes = adc.encode(z, Context(attention=attention)).groups.bincount().tolist()
    expected = {str(size): sizes.count(size) for size in sorted(set(sizes))}
    assert adc.metrics() == {"cluster_sizes": expected}
    assert adc.metrics() == {}
    for seed in range(3):
        adc.encode(z, Context(attention=attention, seed=seed))
    histogram = adc.metrics()["cluster_sizes"]
    assert sum(int(size) * count for size, count in histogram.items()) == 3 * 20
    assert sum(histogram.values()) == 3 * 8
    assert list(histogram) == sorted(histogram, key=int)


def test_the_codec_hands_on_the_histogram():
    codec, (z, attention) = Codec("adc(samples=0.4)+int8", embed_dim=3), batch(20, 9)
    codec.encode(z, Context(attention=attention))
    assert sum(int(size) * count for size, count in codec.metrics()["cluster_sizes"].items()) == 20
    assert codec.metrics() == {}
    codec.eval().encode(z, Context(attention=attention))
    assert codec.metrics() == {}


@pytest.mark.parametrize("least", [2, 3, 5, 20])
@pytest.mark.parametrize("seed", range(4))
def test_no_group_is_smaller_than_asked_for_and_no_sample_is_lost(least, seed):
    z, attention = batch(20, 9, seed=seed, dtype=torch.float64)
    adc = ADC(samples=0.6, tokens=0.5, min_cluster=least)
    assert min(ADC(samples=0.6).encode(z, Context(attention=attention)).groups.bincount()) == 1
    reduced = adc.encode(z, Context(attention=attention))
    sizes = reduced.groups.bincount()
    assert reduced.groups.shape == (20,) and len(sizes) == len(reduced.values)
    assert sizes.min() >= least and sizes.sum() == 20
    torch.testing.assert_close(reduced.values, by_loop(z, attention, reduced.groups, 4, 1))
    assert sum(int(size) * count for size, count in adc.metrics()["cluster_sizes"].items()) == 20


def test_a_batch_smaller_than_the_smallest_group_is_one_group():
    z, attention = batch(5, 9)
    reduced = ADC(samples=0.6, min_cluster=10).encode(z, Context(attention=attention))
    assert reduced.groups.tolist() == [0] * 5
    torch.testing.assert_close(reduced.values, z.mean(dim=0, keepdim=True))


def test_samples_of_a_small_group_join_the_nearest_one():
    looks = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3])
    attention = torch.eye(4)[looks]
    attention[9] = torch.tensor([0.0, 0.4, 0.0, 0.6])
    reduced = ADC(samples=0.4, min_cluster=2).encode(numbered(10, 4), Context(attention=attention))
    assert len(reduced.values) == 3 and reduced.groups[9] == reduced.groups[3]


@pytest.mark.parametrize("B", [1, 2])
def test_a_batch_too_small_to_merge_drops_tokens_and_warns_once(B):
    adc, (z, attention) = ADC(0.25), batch(B, 10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            reduced = adc.encode(z, Context(attention=attention))
            assert reduced.groups is None and reduced.values.shape == (B, 5, 3) and reduced.values.isfinite().all()
    (warning,) = caught
    assert warning.category is SnelloWarning and f"a batch of {B}" in str(warning.message)
    assert "buffer" in str(warning.message)
    for row, its, scores in zip(reduced.values, z, attention.tolist(), strict=True):
        assert torch.equal(row, its[best_of(scores, 4, 1)])


@pytest.mark.parametrize("B", [1, 2, 16])
def test_who_asked_for_no_merging_is_not_warned(B):
    z, attention = batch(B, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(ADC(samples=1, tokens=0.5).encode(z, Context(attention=attention)).values) == B


def test_three_samples_merge_into_two():
    z, attention = batch(3, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ADC(0.1).encode(z, Context(attention=attention)).values.shape == (2, 3, 3)


# Tokens that were dropped on the client


def dropped(B: int, N: int, K: int, prefix: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Context]:
    """Samples that kept K of N tokens, each at places of its own, the prefix tokens always."""
    z, attention = batch(B, K, dtype=dtype)
    generator = generator_of(3)
    kept = [best_of(torch.rand(N, generator=generator).tolist(), K - prefix, prefix) for _ in range(B)]
    return z, Context(prefix, attention, positions=torch.tensor(kept), num_positions=N)


def in_place_by_loop(z: Tensor, context: Context, groups: Tensor, num_kept: int) -> tuple[Tensor, list[list[int]]]:
    """Merged activations and their places: a place is the mean of the members that have it."""
    assert context.attention is not None and context.positions is not None
    rows, places = [], []
    for group in range(int(groups.max()) + 1):
        members = [b for b in range(len(z)) if int(groups[b]) == group]
        found: dict[int, list[Tensor]] = {}
        centroid = [0.0] * context.num_positions
        for b in members:
            for index, place in enumerate(context.positions[b].tolist()):
                found.setdefault(place, []).append(z[b, index])
                centroid[place] += float(context.attention[b, index]) / len(members)
        kept = best_of(centroid, num_kept - context.num_prefix_tokens, context.num_prefix_tokens)
        rows.append(torch.stack([sum(found[place]) / len(found[place]) for place in kept]))
        places.append(kept)
    return torch.stack(rows), places


@pytest.mark.parametrize("prefix", [1, 2, 5])
@pytest.mark.parametrize("options", [{"ratio": 0.4}, {"samples": 0.3, "tokens": 0.9}, {"samples": 0.4}])
def test_samples_that_kept_different_tokens_merge_place_by_place(options, prefix):
    z, context = dropped(12, 16, 10, prefix)
    adc, leaf = ADC(**options), z.clone().requires_grad_()
    reduced = adc.encode(leaf, context)
    # A share of the tokens that are there, not of those that once were.
    num_kept = max(prefix + 1, int(adc.tokens * 10))
    reference = z.clone().requires_grad_()
    expected, places = in_place_by_loop(reference, context, reduced.groups, num_kept)
    torch.testing.assert_close(reduced.values, expected)
    assert all(row[:prefix] == list(range(prefix)) for row in places)
    gradient = torch.randn(expected.shape, generator=generator_of(1), dtype=torch.float64)
    reduced.values.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(leaf.grad, reference.grad)


def test_prefix_tokens_stay_in_front_where_tokens_were_dropped():
    _, context = dropped(12, 16, 10, 2)
    z = context.positions.double().unsqueeze(2)  # a mean of equal numbers is that number: the place
    for row in ADC(0.4).encode(z, context).values.squeeze(2).tolist():
        assert row[:2] == pytest.approx([0, 1])
        assert all(place == pytest.approx(round(place)) for place in row)
        assert all(one < other for one, other in pairwise(row))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merging_place_by_place_has_a_finite_gradient(dtype):
    z, context = dropped(12, 16, 10, 1, dtype)
    z.requires_grad_()
    values = ADC(samples=0.3).encode(z, context).values
    assert values.dtype == dtype
    (4 * values.float()).sum().backward()
    assert values.isfinite().all() and z.grad.isfinite().all() and z.grad.ne(0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_places_that_no_member_has_are_never_kept(dtype):
    """Attention that underflows to zero does not make a dropped token as good as one that is there."""
    _, context = dropped(4, 40, 5, 1)
    attention = torch.eye(1, 5).repeat(4, 1)  # all of it on the CLS token
    z = torch.ones(4, 5, 3, dtype=dtype, requires_grad=True)
    context = Context(1, attention, positions=context.positions, num_positions=40)
    values = ADC(samples=0.5, tokens=1).encode(z, context).values
    assert values.shape == (2, 5, 3)
    torch.testing.assert_close(values, torch.ones_like(values))  # no zeros in place of tokens
    values.float().sum().backward()
    assert z.grad.isfinite().all()


def test_without_merging_places_play_no_part():
    z, context = dropped(6, 16, 10, 1)
    values = ADC(samples=1, tokens=0.5).encode(z, context).values
    for row, its, scores in zip(values, z, context.attention.tolist(), strict=True):
        assert torch.equal(row, its[best_of(scores, 4, 1)])


# Tokens that merge instead of being dropped


def averaging_of(reduced: Reduced, leaf: Tensor) -> Tensor:
    """How much of each token (N) is in each of those that are left (K), of each sample, as autograd sees it."""
    B, K, _ = reduced.values.shape
    shares = torch.zeros(B, K, leaf.shape[1], dtype=leaf.dtype)
    for k in range(K):
        (gradient,) = torch.autograd.grad(reduced.values[:, k, 0].sum(), leaf, retain_graph=True)
        assert not gradient[:, :, 1:].any()
        shares[:, k] = gradient[:, :, 0]
    return shares


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize(("tokens", "N"), [(0.6, 14), (0.3, 14), (0.2, 33), (0.05, 33)])
def test_each_token_that_is_left_is_the_mean_of_those_that_it_stands_for(tokens, N, prefix):
    """So the gradient is exact; more than half merge in rounds, and what merged before counts as what it is."""
    z, attention = batch(5, N, D=6, dtype=torch.float64)
    leaf, adc = z.clone().requires_grad_(), ADC(samples=1, tokens=tokens, rule="merge")
    reduced = adc.encode(leaf, Context(num_prefix_tokens=prefix, attention=attention))
    sizes = reduced.side["indices.sizes"]
    num_kept = max(prefix + 1, int(tokens * N))
    assert reduced.groups is None and reduced.values.shape == (5, num_kept, 6)
    assert sizes.dtype == torch.uint8 and sizes.shape == (5, num_kept)
    assert sizes.sum(1).tolist() == [N] * 5 and (sizes[:, :prefix] == 1).all()
    shares = averaging_of(reduced, leaf)
    members = shares > 0
    assert torch.equal(members.sum(1), torch.ones(5, N).long())  # each is in one
    assert torch.equal(members.sum(2), sizes.long())
    torch.testing.assert_close(shares, members / sizes.double().unsqueeze(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(reduced.values, shares @ z)
    assert torch.equal(reduced.values[:, :prefix], z[:, :prefix])


def test_equal_tokens_merge_before_others():
    z, attention = batch(4, 8, D=6)
    twice = torch.cat([z[:, :1], z[:, 1:].repeat_interleave(2, dim=1)], dim=1)  # 1 + 2 * 7
    adc = ADC(samples=1, tokens=0.54, rule="merge")
    reduced = adc.encode(twice, Context(attention=attention[:, :1].expand(-1, 15)))
    torch.testing.assert_close(reduced.values, z)
    assert reduced.side["indices.sizes"].tolist() == [[1] + [2] * 7] * 4


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_samples_merge_first_then_their_tokens(prefix):
    z, attention = batch(15, 14, D=6, dtype=torch.float64)
    context = Context(num_prefix_tokens=prefix, attention=attention)
    reduced = ADC(samples=0.4, tokens=0.5, rule="merge").encode(z, context)
    means = by_loop(z, attention, reduced.groups, 14, prefix)
    alone = Context(num_prefix_tokens=prefix, attention=torch.ones(6, 14))
    expected = ADC(samples=1, tokens=0.5, rule="merge").encode(means, alone)
    assert reduced.values.shape == (6, 7, 6)
    torch.testing.assert_close(reduced.values, expected.values)
    assert torch.equal(reduced.side["indices.sizes"], expected.side["indices.sizes"])
    groups = ADC(samples=0.4, tokens=0.5).encode(z, context).groups
    assert torch.equal(reduced.groups, groups)


@pytest.mark.parametrize("samples", [1, 0.3])
def test_tokens_merge_too_where_the_client_dropped_some(samples):
    """Place by place first, as without merging; what is left then merges."""
    z, context = dropped(12, 16, 10, 2)
    reduced = ADC(samples=samples, tokens=0.5, rule="merge").encode(z, context)
    before = ADC(samples=samples, tokens=1).encode(z, context).values
    expected, sizes = merge_alike(before, None, 4, 2)
    expected, sizes = merge_alike(expected, sizes, 3, 2)
    torch.testing.assert_close(reduced.values, expected)
    assert torch.equal(reduced.side["indices.sizes"], sizes.byte()) and sizes.sum(1).eq(10).all()


@pytest.mark.parametrize(
    ("N", "tokens", "dtype"),
    [(256, 0.01, torch.uint8), (257, 0.01, torch.int16), (400, 0.5, torch.uint8), (400, 0.3, torch.int16)],
)
def test_sizes_travel_in_a_byte_where_none_can_be_larger(N, tokens, dtype):
    z = torch.ones(2, N, 3)  # every pair is as good: sizes become as large as they can
    codec = Codec(f"adc(samples=1, tokens={tokens}, rule=merge)", embed_dim=3)
    arrays = codec.encode(z, Context(attention=torch.ones(2, N))).arrays
    assert arrays["indices.sizes.0"].dtype == dtype
    sizes = codec.decode(arrays).sizes
    assert sizes.dtype == torch.float32 and sizes.sum(1).tolist() == [N, N]


@pytest.mark.parametrize("text", ["adc(0.3)", "adc(0.3, rule=drop)", "adc(samples=0.5, rule=merge)"])
def test_no_sizes_are_sent_where_no_tokens_merge(text):
    codec, (z, attention) = Codec(text, embed_dim=3), batch(12, 10)
    arrays = codec.encode(z, Context(attention=attention)).arrays
    assert arrays.keys() == {"activations"} and not codec.merges_tokens
    assert codec.decode(arrays).sizes is None


def test_in_evaluation_no_tokens_merge():
    codec, (z, _) = Codec("adc(0.3, rule=merge)", embed_dim=3, eval_text="none").eval(), batch(12, 10)
    arrays = codec.encode(z, Context()).arrays
    assert arrays.keys() == {"activations"} and torch.equal(codec.decode(arrays).z, z)
    assert codec.decode(arrays).sizes is None


# Options


def test_options_are_attributes():
    adc = ADC(0.2)
    assert (adc.min_cluster, adc.buffer, adc.weighting, adc.score) == (1, 1, "rows", "auto")
    adc = ADC(0.2, min_cluster=3, buffer=4, weight="sizes", score="received")
    assert (adc.min_cluster, adc.buffer, adc.weighting, adc.score) == (3, 4, "sizes", "received")


def test_the_codec_exposes_what_the_client_must_know():
    codec = Codec("adc(0.2, buffer=4, weight=sizes, score=cls)+int8", embed_dim=3)
    assert (codec.buffer, codec.weighting, codec.score) == (4, "sizes", "cls")
    codec = Codec("adc(0.2)", embed_dim=3)
    assert (codec.buffer, codec.weighting, codec.score) == (1, "rows", "auto")
    codec = Codec("int8", embed_dim=3)
    assert (codec.buffer, codec.weighting, codec.score) == (1, "rows", None)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "a ratio is needed"),
        ({"min_cluster": 2}, "a ratio is needed"),
        ({"ratio": 0.2, "samples": 0.5}, "either ratio, or samples and tokens"),
        ({"ratio": 0.2, "tokens": 0.5}, "either ratio, or samples and tokens"),
        ({"ratio": 0}, r"ratio must be in \(0, 1\], got 0"),
        ({"ratio": -0.1}, r"ratio must be in \(0, 1\], got -0.1"),
        ({"ratio": 1.01}, r"ratio must be in \(0, 1\], got 1.01"),
        ({"ratio": math.nan}, r"ratio must be .*, got nan"),
        ({"ratio": "half"}, "ratio must be a number, got 'half'"),
        ({"ratio": True}, "ratio must be a number, got True"),
        ({"samples": 0}, r"samples must be in \(0, 1\], got 0"),
        ({"samples": 2}, r"samples must be in \(0, 1\], got 2"),
        ({"tokens": 0.0}, r"tokens must be in \(0, 1\], got 0.0"),
        ({"tokens": "few"}, "tokens must be a number, got 'few'"),
        ({"ratio": 0.2, "min_cluster": 0}, "min_cluster must be a whole number from 1 on, got 0"),
        ({"ratio": 0.2, "min_cluster": 1.5}, "min_cluster must be a whole number from 1 on, got 1.5"),
        ({"ratio": 0.2, "buffer": 0}, "buffer must be a whole number from 1 on, got 0"),
        ({"ratio": 0.2, "buffer": "all"}, "buffer must be a whole number from 1 on, got 'all'"),
        ({"ratio": 0.2, "weight": "labels"}, "weight must be rows or sizes, got labels"),
        ({"ratio": 0.2, "score": "mean"}, "score must be auto, cls or received, got mean"),
        ({"ratio": 0.2, "rule": "average"}, "rule must be drop or merge, got average"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], problem):
    with pytest.raises(ConfigError, match=problem):
        ADC(**options)


def test_bad_options_in_a_text_are_refused_where_they_stand():
    with pytest.raises(ConfigError, match=r"--split.codec: adc\(0.2, buffer=0\): buffer must be"):
        Codec("adc(0.2, buffer=0)+int8", embed_dim=3, flag="--split.codec")


@pytest.mark.parametrize("options", [{"ratio": 0.2}, {"samples": 1, "tokens": 0.5}])
def test_missing_attention_is_an_error(options):
    with pytest.raises(ValueError, match="needs the attention rows"):
        ADC(**options).encode(batch(16, 20)[0], Context())
