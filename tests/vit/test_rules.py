"""Every token rule, the same battery: what it leaves, what it says of it, and what it costs."""

import pytest
import torch
from conftest import tiny_vit
from torch.utils.flop_counter import FlopCounterMode

from snello.config.registry import RULES
from snello.methods.alast import ALaST
from snello.vit.context import ForwardContext
from snello.vit.rules import make_rule

P, N, D = 2, 13, 8


def context(rule) -> ForwardContext:
    made = ForwardContext(P, block=5)
    made.scores = torch.rand(3, P + N) if rule.needs_scores else None
    return made


@pytest.mark.parametrize("name", RULES)
def test_it_leaves_as_many_as_it_is_told_and_the_prefix_as_it_is(name):
    rule = make_rule(name)
    for keep in range(rule.least_keep(N), N):
        x, pass_ = torch.randn(3, P + N, D, requires_grad=True), context(rule)
        y = rule.reduce(x, pass_, keep)
        assert y.shape == (3, P + keep, D) and torch.equal(y[:, :P], x[:, :P])
        if rule.has_places:
            index = pass_.kept[5]
            assert torch.equal(index, index.sort(dim=1).values) and torch.equal(pass_.positions, index)
            assert torch.equal(y, x[torch.arange(3)[:, None], index])
        else:
            assert pass_.kept == {}
        assert pass_.sizes is None or pass_.sizes.sum(dim=1).tolist() == [P + N] * 3
        y.sum().backward()
        assert x.grad.isfinite().all() and x.grad[:, :P].eq(1).all()


@pytest.mark.parametrize("name", RULES)
def test_it_costs_what_torch_counts(name):
    rule = make_rule(name)
    for keep in {rule.least_keep(N), N - 1}:
        x = torch.randn(1, P + N, D, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            y = rule.reduce(x, context(rule), keep)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert (forward, counter.get_total_flops()) == rule.cost(N, keep, P, D)


@pytest.mark.parametrize("drop_at", ["mid", "block-end"])
@pytest.mark.parametrize("name", RULES)
def test_a_model_trains_by_it(name, drop_at):
    model = tiny_vit()
    alast = ALaST(model, blocks=4, start_budget=0.7, rule=name, drop_at=drop_at, alpha=0.1)
    lengths = []
    model.norm.register_forward_hook(lambda m, args, y: lengths.append(y.shape[1]))
    for seed in range(3):
        alast.step()
        torch.manual_seed(seed)
        model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert max(lengths) < 10 and alast.budgets != [0.7] * 4
