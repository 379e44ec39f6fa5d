"""Every token rule, the same battery: what it leaves, what it says of it, and what it costs."""

from typing import get_args

import pytest
import torch
from conftest import tiny_vit
from torch.utils.flop_counter import FlopCounterMode

from snello.config.methods import DropAt
from snello.config.registry import RULES
from snello.errors import ConfigError
from snello.methods.alast import ALaST
from snello.vit import ViT
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


SCORING = [name for name in RULES if make_rule(name).needs_scores]
EARLY = [at for at in get_args(DropAt) if at not in ("mid", "block-end")]  # before there is attention to look at
PLACES = [(name, at) for name in RULES for at in get_args(DropAt) if at not in EARLY or name not in SCORING]


@pytest.mark.parametrize(("name", "drop_at"), PLACES)
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


@pytest.mark.parametrize(("name", "drop_at"), PLACES)
def test_where_a_block_has_fewer_tokens(name, drop_at):
    model = tiny_vit()
    alast = ALaST(model, start_budget=0.5, rule=name, drop_at=drop_at, merge_blocks=(1,), token_multiple=1)
    lengths = []
    for part in (model.blocks[1].attn.proj, model.blocks[1].mlp, model.blocks[2].attn):
        part.register_forward_hook(lambda m, args, y: lengths.append(y.shape[1]))
    alast.step()
    model(torch.randn(2, 3, 16, 16))
    assert lengths == {"mid": [17, 9, 9], "block-end": [17, 17, 9]}.get(drop_at, [9, 9, 9])


@pytest.mark.parametrize("drop_at", EARLY)
@pytest.mark.parametrize("name", SCORING)
def test_a_rule_that_looks_at_attention_is_refused_before_it(name, drop_at):
    model = tiny_vit()
    with pytest.raises(ConfigError) as error:
        ALaST(model, rule=name, drop_at=drop_at)
    others = " or ".join(other for other in RULES if other not in SCORING)
    reason = "there is no attention yet to choose by"
    assert str(error.value) == f"rule must be {others} with drop_at {drop_at}: {reason}, got {name}"
    assert not ViT(model).attached and "\n" not in error.value.for_command_line


def test_a_model_whose_rule_is_drop_has_no_tokens_to_reduce_before_attention():
    with pytest.raises(ConfigError, match=r"^rule must be merge or merge-even with drop_at start"):
        ALaST(tiny_vit(global_pool="avg"), drop_at="start")


@pytest.mark.parametrize("name", [name for name in RULES if name not in SCORING])
def test_at_the_start_the_block_is_the_block_on_what_is_left(name):
    model, untouched = tiny_vit(), tiny_vit()
    alast = ALaST(model, start_budget=0.5, rule=name, drop_at="start", merge_blocks=(0,), token_multiple=1)
    x = torch.randn(2, 17, 32)
    y = model.blocks[0](x)
    pass_ = ForwardContext(1)
    left = make_rule(name).reduce(x, pass_, 8)
    assert torch.equal(alast.vit.context.sizes, pass_.sizes) and pass_.sizes.max() > 1
    bias = pass_.sizes.log()[:, None, None]  # each counts in attention as often as the tokens that it stands for
    block = untouched.blocks[0]
    h = left + block.attn(block.norm1(left), attn_mask=bias)
    torch.testing.assert_close(y, h + block.mlp(block.norm2(h)))
    change = (y[:, 0] - x[:, 0]).square().sum(-1).mean()
    torch.testing.assert_close(alast.vit.context.changes[0], change.detach())
