"""Choosing and picking tokens."""

import pytest
import torch

from snello.vit import tokens


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("num_keep", [1, 4, 9])
def test_keep_top_keeps_prefix_and_highest_scores_in_order(prefix, num_keep):
    scores = torch.randn(5, prefix + 9)
    scores[:, :prefix] = -100.0  # what a prefix token scores plays no part
    index = tokens.keep_top(scores, num_keep, prefix)
    assert index.dtype == torch.int64
    for row, kept in zip(scores, index.tolist(), strict=True):
        best = sorted(range(prefix, prefix + 9), key=lambda i: -row[i].item())[:num_keep]
        assert kept == [*range(prefix), *sorted(best)]


def test_keep_top_of_equal_scores_keeps_the_asked_number():
    index = tokens.keep_top(torch.zeros(2, 9), 4, 1)
    assert index.shape == (2, 5)
    assert all(len(set(row)) == 5 for row in index.tolist())


@pytest.mark.parametrize("num_keep", [-1, 0, 9])
def test_keep_top_refuses_impossible_numbers(num_keep):
    with pytest.raises(ValueError, match=r"1\.\.8, got"):
        tokens.keep_top(torch.randn(2, 9), num_keep, 1)


@pytest.mark.parametrize("contiguous", [True, False])
def test_gather_equals_indexing_and_its_gradient(contiguous):
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    x = x if contiguous else x.transpose(0, 1).contiguous().transpose(0, 1)
    ours, reference = x.clone(memory_format=torch.preserve_format).requires_grad_(), x.clone().requires_grad_()
    index = torch.stack([torch.randperm(7)[:4] for _ in range(3)])
    weight = torch.randn(3, 4, 4, dtype=torch.float64)
    y, expected = tokens.gather(ours, index), reference[torch.arange(3)[:, None], index]
    assert torch.equal(y, expected)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.equal(ours.grad, reference.grad)
    dropped = torch.ones(3, 7, dtype=torch.bool).scatter(1, index, False)
    assert ours.grad[dropped].eq(0).all() and ours.grad[~dropped].ne(0).all()


# Merging


@pytest.mark.parametrize("shape", [(), (3,), (3, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_merge_is_the_mean_of_each_groups_members(shape, dtype):
    groups = [2, 0, 1, 0, 2, 2, 3]
    z = torch.randn(7, *shape).to(dtype)
    merged = tokens.merge(z, torch.tensor(groups), 4)
    assert merged.dtype == dtype and merged.shape == (4, *shape)
    for group in range(4):
        members = [row.double() for row, its in zip(z, groups, strict=True) if its == group]
        expected = sum(members[1:], members[0]) / len(members)
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(merged[group].double(), expected, rtol=tolerance, atol=tolerance)


def test_merge_shares_the_gradient_equally():
    groups = torch.tensor([2, 0, 1, 0, 2, 2, 3])
    z = torch.randn(7, 3, 4, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(4, 3, 4, dtype=torch.float64)
    tokens.merge(z, groups, 4).backward(gradient)
    for row, group in zip(z.grad, groups.tolist(), strict=True):
        torch.testing.assert_close(row, gradient[group] / int((groups == group).sum()), rtol=1e-12, atol=0)


# K-means


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def inertia(x: torch.Tensor, centroids: torch.Tensor) -> float:
    return float(torch.cdist(x.double(), centroids.double()).min(dim=1).values.square().sum())


HARD = {
    "plain": noise(24, 5),
    "duplicates": noise(12, 5).repeat(2, 1),
    "three distinct": noise(3, 5)[torch.arange(24) % 3],
    "one apart": torch.cat((torch.full((23, 5), 0.1), torch.full((1, 5), 0.7))),
    "constant": torch.full((24, 5), 0.1),
    "zero": torch.zeros(24, 5),
    "huge offset": noise(24, 5) + 1e6,
    "constant and huge": torch.full((24, 5), 1.1e6),
    "large": noise(24, 5) * 1e12,
    "tiny": noise(24, 5) * 1e-22,
    "one feature": noise(24, 1),
    "half": noise(24, 5).half(),
}


@pytest.mark.parametrize("num_clusters", [1, 2, 5, 23, 24])
@pytest.mark.parametrize("name", HARD)
def test_kmeans_leaves_no_cluster_empty_and_centroids_are_means(name, num_clusters):
    x = HARD[name]
    for seed in range(3):
        assignment, centroids = tokens.kmeans(x, num_clusters, seeded(seed))
        assert assignment.shape == (24,) and assignment.dtype == torch.int64
        assert sorted(set(assignment.tolist())) == list(range(num_clusters))
        assert centroids.shape == (num_clusters, x.shape[1]) and centroids.dtype == torch.float32
        assert centroids.isfinite().all()
        for cluster, centroid in enumerate(centroids):
            members = [row.double() for row, its in zip(x, assignment.tolist(), strict=True) if its == cluster]
            expected = sum(members[1:], members[0]) / len(members)
            torch.testing.assert_close(centroid.double(), expected, rtol=1e-5, atol=1e-6 * float(x.abs().max()))


def test_kmeans_of_one_row():
    assignment, centroids = tokens.kmeans(torch.tensor([[3.0, 4.0]]), 1)
    assert assignment.tolist() == [0] and centroids.tolist() == [[3.0, 4.0]]


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_kmeans_finds_groups_that_are_far_apart(offset):
    group = torch.arange(60) % 6
    x = 16 * torch.eye(6, 8)[group] + torch.rand(60, 8, generator=seeded(0)) + offset
    for seed in range(10):
        assignment, _ = tokens.kmeans(x, 6, seeded(seed))
        assert len(set(zip(group.tolist(), assignment.tolist(), strict=True))) == 6


def test_kmeans_ends_where_every_row_is_with_its_nearest_centroid():
    x = noise(60, 5)
    for seed in range(5):
        assignment, centroids = tokens.kmeans(x, 7, seeded(seed))
        assert torch.equal(torch.cdist(x, centroids).argmin(dim=1), assignment)


def test_kmeans_depends_on_its_generator_alone():
    x = noise(60, 5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = tokens.kmeans(x, 9, seeded(3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = tokens.kmeans(x, 9, seeded(3))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert any(not torch.equal(tokens.kmeans(x, 9, seeded(seed))[0], first[0]) for seed in range(4, 9))


def test_kmeans_carries_no_gradient_and_leaves_its_input_alone():
    x = noise(20, 5).requires_grad_()
    _, centroids = tokens.kmeans(x, 4, seeded(0))
    assert not centroids.requires_grad
    assert torch.equal(x, noise(20, 5))


@pytest.mark.parametrize("num_clusters", [-1, 0, 25])
def test_kmeans_refuses_impossible_numbers(num_clusters):
    with pytest.raises(ValueError, match=rf"1\.\.24, got {num_clusters}"):
        tokens.kmeans(HARD["plain"], num_clusters)


@pytest.mark.parametrize("num_clusters", [12, 40])
def test_kmeans_is_as_good_as_scikit_learns(num_clusters):
    cluster = pytest.importorskip("sklearn.cluster")
    group = torch.randint(10, (128,), generator=seeded(7))
    logits = 1.5 * noise(10, 197, seed=8)[group] + 0.7 * noise(128, 197, seed=9)
    rows = logits.softmax(dim=1)  # as attention rows of the CLS token
    ours = theirs = 0.0
    for seed in range(5):
        ours += inertia(rows, tokens.kmeans(rows, num_clusters, seeded(seed))[1])
        found = cluster.KMeans(num_clusters, n_init=1, random_state=seed).fit(rows.double().numpy())
        theirs += inertia(rows, torch.from_numpy(found.cluster_centers_))
    assert ours <= 1.05 * theirs
