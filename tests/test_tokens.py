"""Choosing and picking tokens."""

import pytest
import torch

from snello import tokens


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
