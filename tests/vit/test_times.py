"""What a step takes, from the times of one block: the sum, the line between two measurements, and the measurement."""

import copy
from dataclasses import fields, replace

import pytest
import torch
import yaml
from conftest import tiny_deit, tiny_vit
from helpers.budgets import LINEAR

from snello.config.values import from_dict, to_dict
from snello.devices import Precision
from snello.runs.folder import RunFolder
from snello.runs.resolved import Resolved
from snello.vit import ViT
from snello.vit.flops import Tokens
from snello.vit.rules import make_rule
from snello.vit.times import StepTime, Times, measure_times

COST = StepTime(LINEAR, 4)
ALL = Tokens(17, 17, scored=False)


def step(tokens: list[Tokens], trained=range(4), train_embeddings: bool = True) -> float:
    return COST.step(tokens, 16, trained, train_embeddings)


# The sum


def test_full_fine_tuning_is_the_plain_block_so_often():
    assert COST.full(16) == 4 * LINEAR.plain + LINEAR.embedding + LINEAR.optimizer


def test_a_step_with_all_tokens_is_the_sum_of_its_parts():
    rest = LINEAR.embedding + LINEAR.optimizer
    trained, frozen = LINEAR.attention[-1] + LINEAR.mlp[-1], LINEAR.frozen_attention[-1] + LINEAR.frozen_mlp[-1]
    assert step([ALL] * 4) == pytest.approx(rest + 4 * trained)
    assert step([ALL] * 4, trained=[1, 2]) == pytest.approx(rest + 2 * trained + 2 * frozen)
    # The backward pass ends at the lowest block that trains: below it is a third of the work.
    assert step([ALL] * 4, [1, 2], train_embeddings=False) == pytest.approx(rest + 2 * trained + frozen + frozen / 3)


def test_reducing_counts_where_tokens_are_reduced_and_the_last_block_on_what_is_read_has_its_own_time():
    before = step([ALL] * 4)
    assert step([ALL, replace(ALL, scored=True), ALL, ALL]) - before == pytest.approx(LINEAR.reducing[-1])
    assert step([ALL, replace(ALL, reducing=(3.0, 1.0)), ALL, ALL]) - before == pytest.approx(LINEAR.reducing[-1])
    read = step([ALL] * 3 + [Tokens(17, 1, scored=False, queries=1)])
    assert before - read == pytest.approx(LINEAR.attention[-1] + LINEAR.mlp[-1] - LINEAR.last[-1])


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, 0.1), (5, 0.5), (3, 0.3), (17, 1.7), (13, 1.3), (21, 2.1), (0, 0.0)]
)
def test_between_two_measurements_time_is_a_straight_line(tokens, expected):
    times = replace(LINEAR, attention=(0.1, 0.5, 1.3, 1.7), mlp=(0.0,) * 4, embedding=0.0, optimizer=0.0)
    assert StepTime(times, 1).step([Tokens(tokens, tokens, scored=False)], 16, [0], True) == pytest.approx(expected)


def test_time_is_never_negative():
    times = replace(LINEAR, attention=(0.0, 2.0, 2.0, 2.0), mlp=(0.0,) * 4, embedding=0.0, optimizer=0.0)
    assert StepTime(times, 1).step([Tokens(0, 0, scored=False)], 16, [0], True) == 0.0


# The measurement

MODELS = {
    "plain": (tiny_vit, "merge-even"),
    "distilled": (tiny_deit, "merge"),
    "no-cls": (lambda: tiny_vit(class_token=False, global_pool="avg"), "drop"),
    "registers": (lambda: tiny_vit(reg_tokens=3), "drop"),
}


def measured(model: torch.nn.Module, rule: str, savings: bool = True, precision: Precision = "fp32") -> Times:
    return measure_times(ViT(model), make_rule(rule), 4, 16, 2, torch.device("cpu"), precision, savings)


@pytest.mark.parametrize("savings", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_every_part_is_timed_and_the_model_left_alone(kind, savings):
    make, rule = MODELS[kind]
    model = make().eval()
    model.blocks[1].requires_grad_(False)
    before, inside = copy.deepcopy(model.state_dict()), [dict(vars(block)) for block in model.blocks]
    asks = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(3)
    times = measured(model, rule, savings)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1)), "what a run draws does not hang on it"
    prefix, N = ViT(model).num_prefix_tokens, ViT(model).num_prefix_tokens + 16
    assert list(times.tokens) == sorted(set(times.tokens)) and times.tokens[-1] == N and times.tokens[0] == prefix + 1
    for name in ("attention", "mlp", "frozen_attention", "frozen_mlp", "reducing", "last"):
        values = getattr(times, name)
        assert len(values) == len(times.tokens) and all(0 < value < 10 for value in values), name
    assert times.plain > 0 and times.embedding >= 0 and times.optimizer > 0
    assert not model.training and not ViT(model).attached and all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == asks
    assert [dict(vars(block)) for block in model.blocks] == inside
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_in_half_precision_too():
    assert measured(tiny_vit(), "merge-even", precision="bf16").plain > 0


def test_a_model_of_transformers_is_timed_too():
    transformers = pytest.importorskip("transformers")
    shape = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**shape, intermediate_size=64))
    assert measured(model, "merge-even").tokens == measured(tiny_vit(), "merge-even").tokens


def test_a_model_of_one_block_is_timed_too():
    assert measured(tiny_vit(depth=1), "merge-even").plain > 0


# What a run keeps


def test_times_come_back_from_plain_values_as_they_were():
    times = measured(tiny_vit(), "merge-even")
    assert from_dict(Times, to_dict(times)) == times
    assert from_dict(Times, yaml.safe_load(yaml.safe_dump(to_dict(times)))) == times
    tiny = replace(times, plain=1e-7, embedding=0.0, optimizer=1 / 3)
    assert from_dict(Times, yaml.safe_load(yaml.safe_dump(to_dict(tiny)))) == tiny


@pytest.mark.parametrize("times", [LINEAR, None])
def test_times_are_kept_in_the_folder_of_a_run(small, times):
    run = RunFolder(small.out)
    run.create(small, Resolved(classes=("a", "b"), times=times))
    run.release()
    kept = RunFolder(small.out).read()[1].times
    assert kept == times
    if times is not None:
        kinds = {field.name: type(getattr(kept, field.name)) for field in fields(Times)}
        assert {name for name, kind in kinds.items() if kind is float} == {"plain", "embedding", "optimizer"}
        assert {kind for kind in kinds.values() if kind is not float} == {tuple}
