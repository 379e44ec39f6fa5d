"""What ALaST decides where its settings are left open, which blocks reduce tokens, and budgets that follow shares."""

import copy
import json
import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from conftest import tiny_deit, tiny_vit
from helpers.budgets import DROPPING
from helpers.halves import LR, Cut, batch, step
from torch import nn

from snello.config import AlastConfig, FinetuneConfig, SplitConfig
from snello.config.methods import PUBLISHED
from snello.config.registry import RULES
from snello.errors import ConfigError
from snello.methods import make_method
from snello.methods.alast import ALaST
from snello.methods.budgets import MOMENTUM, decided
from snello.vit import ViT

FEW = {"rule": "merge-even", "merge_blocks": (0, 1), "start_budget": 0.5, "min_budget": 0.25}
ALL = {"rule": "drop", "merge_blocks": (0, 1, 2, 3), "start_budget": 0.9, "min_budget": 0.45}


def pictures(seed: int, n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def backward(model: nn.Module, seed: int) -> float:
    loss = model(pictures(seed)).square().sum()
    loss.backward()
    return loss.item()


# What is left open


def chosen(vit: ViT, **options) -> dict:
    config = decided(AlastConfig(**options), vit)
    return {name: getattr(config, name) for name in FEW}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (tiny_vit, FEW),
        (tiny_deit, FEW),
        (lambda: tiny_vit(reg_tokens=2), FEW),
        (lambda: tiny_vit(global_pool="avg"), ALL),
        (lambda: tiny_vit(global_pool="max"), ALL),
        (lambda: tiny_vit(global_pool="avg", class_token=False), ALL),
        (lambda: tiny_vit(depth=1), FEW | {"merge_blocks": (0,)}),
        (lambda: tiny_vit(depth=2), FEW),
        (lambda: tiny_vit(depth=12), FEW),
    ],
)
def test_few_blocks_merge_or_all_drop_where_patch_tokens_are_read(model, expected):
    assert chosen(ViT(model())) == expected


@pytest.mark.parametrize("lower", [2, 3])
@pytest.mark.parametrize("model", [tiny_vit, tiny_deit])
def test_all_blocks_below_a_cut_drop(model, lower):
    below, _ = ViT(model()).cut(lower)
    assert chosen(below) == ALL | {"merge_blocks": tuple(range(lower))}


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("head_below", [False, True])
def test_few_blocks_above_a_cut_merge(cut, head_below):
    _, above = ViT(tiny_vit()).cut(cut, head_below=head_below)
    assert chosen(above) == FEW | {"merge_blocks": (0, 1)[: 4 - cut]}


def test_above_a_cut_too_all_drop_where_patch_tokens_are_read():
    _, above = ViT(tiny_vit(global_pool="avg")).cut(1)
    assert chosen(above) == ALL | {"merge_blocks": (0, 1, 2)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rule": "drop"}, ALL),
        ({"rule": "merge"}, ALL | {"rule": "merge"}),
        ({"rule": "merge-even"}, FEW),
        ({"rule": "drop", "merge_blocks": (1,)}, FEW | {"rule": "drop", "merge_blocks": (1,)}),
        ({"merge_blocks": (3, 1)}, FEW | {"merge_blocks": (3, 1)}),
        ({"merge_blocks": (0, 1, 2, 3)}, ALL | {"rule": "merge-even"}),
        ({"start_budget": 0.8}, FEW | {"start_budget": 0.8, "min_budget": 0.4}),
        ({"min_budget": 0.1}, FEW | {"min_budget": 0.1}),
        ({"start_budget": 0.7, "min_budget": 0.7}, FEW | {"start_budget": 0.7, "min_budget": 0.7}),
    ],
)
def test_what_is_given_stays_and_the_rest_follows_from_it(options, expected):
    assert chosen(ViT(tiny_vit()), **options) == expected


@pytest.mark.parametrize(
    ("options", "multiple"),
    [
        ({"img_size": 224, "patch_size": 16}, 16),  # 197 tokens
        ({"img_size": 32}, 16),  # 65
        ({"img_size": 28}, 8),  # 50
        ({}, 4),  # 17
        ({"class_token": False, "global_pool": "avg"}, 4),  # 16
        ({"img_size": 12}, 2),  # 10
        ({"img_size": 8}, 1),  # 5
        ({"img_size": 4}, 1),  # 2
    ],
)
def test_tokens_are_rounded_to_a_power_of_two_of_which_there_are_four_sizes(options, multiple):
    vit = ViT(tiny_vit(**options))
    assert decided(AlastConfig(), vit).token_multiple == multiple
    assert decided(AlastConfig(token_multiple=3), vit).token_multiple == 3


def test_what_is_decided_is_decided_once_and_for_all():
    vit = ViT(tiny_vit())
    config = decided(AlastConfig(), vit)
    assert decided(config, vit) == config and None not in {getattr(config, name) for name in FEW}
    alast = ALaST(vit)
    assert alast.config == config and alast.budgets == [0.5, 0.5, 1.0, 1.0] and alast.num_blocks == 4


def test_a_lowest_budget_above_the_start_that_is_decided_is_refused():
    model = tiny_vit()
    with pytest.raises(ConfigError, match=r"^min_budget must be in \(0, 0\.5\] \(start_budget\), got 0\.6$"):
        ALaST(model, min_budget=0.6)
    assert not ViT(model).attached
    assert ALaST(model, rule="drop", min_budget=0.6).min_budget == 0.6  # below 0.9


def test_a_model_trains_by_what_is_decided():
    model = tiny_vit()
    alast = ALaST(model)
    lengths: list[int] = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda m, a, y: lengths.append(y.shape[1]))
    alast.step()
    backward(model, 0)
    assert lengths == [17, 8, 4, 4]  # half of 16 and the CLS token is nearest to 8, half of 7 and the CLS token to 4
    assert alast.vit.context.sizes.sum(1).tolist() == [17.0] * 4


# Which blocks


@pytest.mark.parametrize("drop_at", ["mid", "block-end"])
@pytest.mark.parametrize("rule", RULES)
def test_the_blocks_that_are_named_reduce_and_no_others(rule, drop_at):
    model = tiny_vit()
    alast = ALaST(model, rule=rule, drop_at=drop_at, merge_blocks=(3, 1), start_budget=0.5, token_multiple=1)
    lengths: list[int] = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, a, y: lengths.append(y.shape[1]))
    for seed in range(3):
        alast.step()
        backward(model, seed)
        assert lengths[-4:] == [17, *[1 + alast.num_keep(1, 16)] * 2, lengths[-1]] and lengths[-1] < lengths[-2] < 17
    assert [alast.num_keep(index, 16) for index in (0, 2)] == [16, 16]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ((4,), "merge_blocks must be in 0..3 (the model's depth less 1), got 4"),
        ((0, 7, 2), "merge_blocks must be in 0..3 (the model's depth less 1), got 7"),
        ((), "merge_blocks must be block numbers from 0 on, got none"),
        ((0, -1), "merge_blocks must be block numbers from 0 on, got 0 -1"),
    ],
)
def test_blocks_that_there_are_not_are_refused(blocks, message):
    model = tiny_vit()
    with pytest.raises(ConfigError) as error:
        ALaST(model, merge_blocks=blocks)
    assert str(error.value) == message and error.value.for_command_line == f"--alast.{message.replace('_', '-', 1)}"
    assert not ViT(model).attached


@pytest.mark.parametrize("adapt", ["share", "difference"])
def test_with_lora_too(adapt):
    pytest.importorskip("peft")
    model = tiny_vit()
    settings = AlastConfig(merge_blocks=(1,), token_multiple=1, adapt=adapt, alpha=0.1)
    method = make_method(ViT(model), FinetuneConfig(method="alast+lora", alast=settings))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    lengths: list[int] = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, a, y: lengths.append(y.shape[1]))
    for seed in range(3):
        method.step(1e-3, optimizer, 0.0)
        backward(model, seed)
    assert lengths[:4] == [17, 9, 9, 9] and lengths[-4] == 17 and lengths[-3] == lengths[-1] < 17


def cut_at(model: nn.Module, blocks: int, where: Literal["server", "both"], **alast) -> Cut:
    split = SplitConfig(cut=blocks, codec="none", alast=where)
    still = {"lr": LR, "warmup": 0.0, "clip_norm": 0.0}
    return Cut(model, FinetuneConfig(method="alast", alast=AlastConfig(**alast), split=split, **still))


def test_at_the_server_of_a_cut():
    """They are counted from the server's first block, and the client sends all its tokens."""
    cut = cut_at(tiny_vit(), 1, "server", merge_blocks=(1,), token_multiple=1)
    lengths: list[int] = []
    for block in cut.server.vit.blocks:
        block.attn.register_forward_hook(lambda m, a, y: lengths.append(y.shape[1]))
    step(cut, [batch(8)])
    assert lengths == [17, 17, 9] and cut.counters.uplink["activations"] == 8 * 17 * 32 * 4
    assert cut.server.vit.context.sizes.sum(1).tolist() == [17.0] * 8
    with pytest.raises(ConfigError, match=r"^merge_blocks must be in 0\.\.2 "):
        cut_at(tiny_vit(), 1, "server", merge_blocks=(3,))


def test_a_cut_merges_above_and_drops_below_by_itself():
    cut = cut_at(tiny_vit(depth=6), 3, "both", token_multiple=1)
    assert [half.method.rule.has_places for half in (cut.client, cut.server)] == [True, False]
    losses = [step(cut, [batch(8, seed=seed)], seed) for seed in range(3)]
    assert all(loss.isfinite() for loss in losses)
    assert cut.counters.uplink["activations"] < 3 * 8 * 15 * 32 * 4  # 14, 12 and 10 of 16 patches pass on


# Budgets that follow shares


def told(alast: ALaST, deltas: list[float], steps: int = 1) -> None:
    """Steps of which every forward changed the CLS token by `deltas`."""
    for _ in range(steps):
        alast.record([torch.tensor(delta) for delta in deltas])
        alast.step()


def test_a_block_that_does_less_gives_up_more():
    alast = ALaST(tiny_vit(), rule="drop", start_budget=0.5, min_budget=0.1)
    alast.step()
    told(alast, [0.4, 0.1, 0.2, 0.8], 500)
    order = sorted(range(4), key=lambda block: alast.budgets[block])
    assert order == [1, 2, 0, 3] and alast.budgets[1] < 0.5 < alast.budgets[3]
    mean = math.prod([0.4, 0.1, 0.2, 0.8]) ** 0.25
    assert alast.budgets == pytest.approx([0.5 * (delta / mean) ** 0.5 for delta in (0.4, 0.1, 0.2, 0.8)], rel=1e-6)


@pytest.mark.parametrize("deltas", [[0.4, 0.3, 0.2, 0.1], [1e-8, 2e-8, 1e-8, 1e-8], [5.0, 5.0, 5.0, 5.0]])
def test_the_goals_leave_as_much_as_the_start(deltas):
    alast = ALaST(tiny_vit(), rule="drop", start_budget=0.5, min_budget=0.01, alpha=1.0)
    for _ in range(3):
        told(alast, deltas, 2)  # by one step they are at their goals
        assert max(alast.budgets) < 1
        assert math.prod(alast.budgets) == pytest.approx(0.5**4)


def test_a_running_mean_counts_and_only_of_blocks_that_reduce():
    alast = ALaST(tiny_vit(), merge_blocks=(0, 2), start_budget=0.5, min_budget=0.1, alpha=0.2)
    alast.step()
    told(alast, [0.4, 9.0, 0.1, 0.0])
    assert alast.budgets == [0.5, 1.0, 0.5, 1.0] and alast.state_dict()["deltas"] == pytest.approx([0.4, 9.0, 0.1, 0.0])
    mean = [0.4, 9.0, 0.1, 0.0]
    for deltas in ([0.8, 0.0, 0.3, 5.0], [0.2, 7.0, 0.9, 0.0]):
        before = list(alast.budgets)
        mean = [old + MOMENTUM * (new - old) for old, new in zip(mean, deltas, strict=True)]
        goals = {0: 0.5 * (mean[0] / mean[2]) ** 0.25, 2: 0.5 * (mean[2] / mean[0]) ** 0.25}
        told(alast, deltas)
        assert alast.state_dict()["deltas"] == pytest.approx(mean)
        moved = [before[index] + 0.2 * (goals.get(index, before[index]) - before[index]) for index in range(4)]
        assert alast.budgets == pytest.approx(moved) and alast.budgets[1] == alast.budgets[3] == 1.0


def test_budgets_stay_within_their_bounds_whatever_blocks_do():
    alast = ALaST(tiny_vit(), rule="drop", start_budget=0.8, min_budget=0.3, alpha=1.0)
    told(alast, [0.0, 1e-30, 1e6, 1.0], 3)
    assert alast.budgets[:3] == [0.3, 0.3, 1.0] and 0.3 <= alast.budgets[3] <= 1


@pytest.mark.parametrize("settings", [{}, DROPPING])
def test_a_step_size_of_nothing_holds_budgets_still(settings):
    model = tiny_vit()
    alast = ALaST(model, **settings, alpha=0.0)
    start, deltas = list(alast.budgets), []
    for seed in range(4):
        alast.step(lr=1.0)
        backward(model, seed)
        deltas.append(alast.state_dict()["deltas"])
    assert alast.budgets == start and deltas[-1] != deltas[-2]


def test_the_learning_rate_is_no_step_size_of_shares():
    budgets = []
    for lr in (1e-4, 10.0):
        model = tiny_vit()
        alast = ALaST(model)
        for seed in range(4):
            alast.step(lr=lr)
            backward(model, seed)
        budgets.append(alast.budgets)
    assert budgets[0] == budgets[1] != [0.5] * 4


def train(model: nn.Module, alast: ALaST, optimizer: torch.optim.Optimizer, steps: range) -> list:
    log = []
    for number in steps:
        alast.step(optimizer=optimizer)
        optimizer.zero_grad()
        losses = [backward(model, 2 * number + micro) for micro in range(2)]
        optimizer.step()
        log.append((losses, list(alast.budgets), alast.trained, alast.state_dict()["deltas"]))
    return log


@pytest.mark.parametrize("options", [{}, {"blocks": 2}, {"rule": "drop"}, {"rule": "merge", "drop_at": "start"}])
def test_shares_resume_bit_for_bit(options):
    model = tiny_vit()
    alast, optimizer = ALaST(model, **options, alpha=0.3, seed=5), torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, alast, optimizer, range(3))
    state = json.loads(json.dumps(alast.state_dict()))
    assert len(state["pending"]) == 2  # saved after backward, before the next step
    weights, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = train(model, alast, optimizer, range(3, 7))

    other = tiny_vit(seed=1)
    other.load_state_dict(weights)
    resumed, its_optimizer = ALaST(other, **options, alpha=0.3, seed=6), torch.optim.AdamW(other.parameters(), lr=1e-2)
    its_optimizer.load_state_dict(moments)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert train(other, resumed, its_optimizer, range(3, 7)) == expected
    assert len({tuple(row[1]) for row in expected}) == 4


# The paper's


def test_published_settings_are_attached_as_they_are():
    alast = ALaST(tiny_vit(depth=12), AlastConfig().published())
    assert {name: getattr(alast.config, name) for name in PUBLISHED} == PUBLISHED
    assert alast.num_blocks == 9 and alast.budgets == [0.9] * 12 and alast.config.merge_blocks == tuple(range(12))
    given = replace(AlastConfig().published(), blocks=4)
    assert ALaST(tiny_vit(), given).config.blocks == 4
