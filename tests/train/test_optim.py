"""Parameter groups and the learning rate."""

import math
from itertools import pairwise

import pytest
import torch
from conftest import tiny_deit, tiny_vit

from snello.train.optim import lr_factor, make_optimizer, set_lr
from snello.vit import ViT

CPU = torch.device("cpu")
MODELS = {
    "plain": tiny_vit,
    "distilled": tiny_deit,
    "all": lambda: tiny_vit(reg_tokens=2, init_values=0.1, qk_norm=True, pre_norm=True),
    "no-cls": lambda: tiny_vit(class_token=False, global_pool="avg"),
}


def groups_of(model, **options):
    """Each parameter's name and its group."""
    optimizer = make_optimizer(ViT(model), **{"lr": 0.1, "weight_decay": 0.05, **options}, device=CPU)
    names = {id(p): name for name, p in model.named_parameters()}
    return optimizer, [(names[id(p)], group) for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("kind", MODELS)
def test_groups_cover_all_parameters_once_frozen_ones_too(kind):
    model = MODELS[kind]()
    model.blocks.requires_grad_(False)
    for decay in (1.0, 0.5):
        _, groups = groups_of(model, layer_decay=decay)
        assert sorted(name for name, _ in groups) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("kind", MODELS)
def test_no_decay_on_biases_norms_position_and_prefix_tokens(kind):
    _, groups = groups_of(MODELS[kind]())
    decayed = {name for name, group in groups if group["weight_decay"]}
    matrices = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    expected = {f"blocks.{i}.{name}" for i in range(4) for name in matrices}
    expected |= {"patch_embed.proj.weight", "head.weight"} | ({"head_dist.weight"} if kind == "distilled" else set())
    assert decayed == expected
    assert {group["weight_decay"] for _, group in groups} == {0.0, 0.05}


def test_layer_decay_scales_the_learning_rate_per_layer():
    optimizer, groups = groups_of(tiny_deit(), layer_decay=0.5)
    set_lr(optimizer, 0.08)
    lr = {name: group["lr"] for name, group in groups}
    for name in ("head.weight", "head.bias", "head_dist.weight", "norm.weight"):
        assert lr[name] == 0.08
    for i in range(4):
        assert {value for name, value in lr.items() if name.startswith(f"blocks.{i}.")} == {0.08 * 0.5 ** (4 - i)}
    for name in ("cls_token", "dist_token", "pos_embed", "patch_embed.proj.weight"):
        assert lr[name] == 0.08 * 0.5**5


def test_without_layer_decay_all_layers_have_the_same_rate():
    optimizer, groups = groups_of(tiny_vit())
    set_lr(optimizer, 0.3)
    assert {group["lr"] for _, group in groups} == {0.3}


def test_warm_up_rises_linearly_and_the_cosine_falls_to_zero():
    factors = [lr_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert all(a < b for a, b in pairwise(factors[:11]))
    assert all(a > b for a, b in pairwise(factors[10:]))


@pytest.mark.parametrize("total", [1, 2, 3, 10])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.99])
def test_every_step_of_a_short_run_has_a_rate(total, warmup):
    factors = [lr_factor(step, total, warmup) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    if warmup == 0:
        assert factors[0] == 1.0
