"""A share of full fine-tuning's time or FLOPs that ALaST's budgets are scaled to meet."""

import json

import pytest
import torch
from conftest import tiny_deit, tiny_vit
from helpers.budgets import DROPPING, LINEAR
from torch.utils.flop_counter import FlopCounterMode

from snello import cli
from snello.config import AlastConfig, FinetuneConfig, SplitConfig
from snello.errors import ConfigError
from snello.methods import make_method
from snello.methods.alast import ALaST
from snello.vit import ViT
from snello.vit.times import StepTime


def backward(model: torch.nn.Module, seed: int) -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    model(images).square().sum().backward()


SETTINGS = {
    "default": {"token_multiple": 1},
    "dropping": DROPPING,
    "block-end": DROPPING | {"drop_at": "block-end"},
    "start": {"token_multiple": 1, "drop_at": "start", "rule": "merge"},
    "all blocks": {"token_multiple": 1, "merge_blocks": (0, 1, 2, 3)},
    "some train": {"token_multiple": 1, "blocks": 2, "draw": "lowest-first", "train_embeddings": False},
}


@pytest.mark.parametrize("savings", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_time_that_is_predicted_meets_the_share(name, savings):
    model, settings = tiny_vit(), {"alpha": 0.3, **SETTINGS[name]}
    vit = ViT(model)
    vit.set_exact_savings(savings)
    share = 0.3 if name == "some train" else 0.5
    alast = ALaST(vit, time=share, times=LINEAR, **settings)
    full, costs, budgets = StepTime(LINEAR, 4).full(16), [], set()
    for seed in range(16):
        alast.step()
        before = alast.target.cost(alast.step_budgets, alast.trained)
        backward(model, seed)
        model.zero_grad()
        costs.append(before / full)
        budgets.add(tuple(alast.budgets))
    assert sum(costs) / len(costs) == pytest.approx(share, abs=0.01) and len(budgets) > 5
    # No step misses what it should take by more than whole tokens do: a token fewer in each block.
    token = max(LINEAR.attention) / 17 + max(LINEAR.mlp) / 17 + max(LINEAR.reducing) / 17
    assert max(abs(cost - share) for cost in costs) < 2 * 4 * token / full


@pytest.mark.parametrize("multiple", [2, 4])
def test_tokens_in_multiples_meet_it_over_the_steps(multiple):
    model = tiny_vit()
    alast = ALaST(model, time=0.6, times=LINEAR, token_multiple=multiple, alpha=0.3)
    full, costs = StepTime(LINEAR, 4).full(16), []
    for seed in range(40):
        alast.step()
        costs.append(alast.target.cost(alast.step_budgets, alast.trained) / full)
        backward(model, seed)
        model.zero_grad()
    assert sum(costs) / len(costs) == pytest.approx(0.6, abs=0.01)


def test_what_is_predicted_is_of_the_tokens_that_blocks_get():
    model = tiny_vit()
    vit = ViT(model)
    vit.set_exact_savings(True)
    alast = ALaST(vit, time=0.5, times=LINEAR, token_multiple=1)
    attended: list[int] = []
    in_mlp: list[int] = []
    for block in model.blocks:
        block.attn.proj.register_forward_hook(lambda m, a, y: attended.append(y.shape[1]))
        block.norm2.register_forward_hook(lambda m, a, y: in_mlp.append(y.shape[1]))
    alast.step()
    backward(model, 0)
    tokens = alast.target.tokens(alast.step_budgets)
    assert in_mlp == [n.mlp for n in tokens] and in_mlp[-1] == 1
    assert attended == [n.attention if n.queries is None else n.queries for n in tokens]


@pytest.mark.parametrize("option", ["time", "flops"])
@pytest.mark.parametrize("share", [0.01, 1.0])
def test_a_share_out_of_reach_names_the_option_and_what_is_within_it(option, share):
    model = tiny_vit()
    options = {"blocks": 3, "times": LINEAR, option: share}
    with pytest.raises(ConfigError) as error:
        ALaST(model, **options)
    told, flag = str(error.value), error.value.for_command_line
    assert told.startswith(f"{option} must be in 0.") and told.endswith(f"3 of 4 blocks trained, got {share}")
    assert flag == f"--alast.{told}" and "\n" not in flag and not ViT(model).attached
    low, high = map(float, told.removeprefix(f"{option} must be in ").split(" ")[0].split(".."))
    for reachable in (low, high):
        ALaST(model, **options | {option: reachable}).detach()
    for beyond in (low - 0.02, high + 0.02):
        with pytest.raises(ConfigError):
            ALaST(model, **options | {option: beyond})


def test_a_run_out_of_reach_says_so_on_one_line(small, monkeypatch, capfd):
    monkeypatch.setattr("snello.train.loop.measure_times", lambda *args: LINEAR)
    args = ["--model", "test_vit", "--weights", "none", "--image-size", "48", "--workers", "0", "--device", "cpu"]
    args += ["--data", str(small.data), "--out", str(small.out), "--alast.time", "0.01", "--no-compare"]
    assert cli.main(["finetune", *args]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert "--alast.time must be in 0." in last and "with 6 of 6 blocks trained, got 0.01" in last
    assert not (small.out / "config.yaml").exists()


def test_both_targets_at_once_are_refused():
    with pytest.raises(ConfigError) as error:
        AlastConfig(time=0.5, flops=0.5)
    text = "--alast.time and --alast.flops are two targets for one thing: give one of them"
    assert error.value.for_command_line == text
    with pytest.raises(ConfigError, match="two targets"):
        ALaST(tiny_vit(), time=0.5, flops=0.5, times=LINEAR)


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan")])
def test_a_share_is_above_nothing_and_at_most_all(share):
    for option in ("time", "flops"):
        with pytest.raises(ConfigError, match=rf"^{option} must be in \(0, 1\], got {share}$"):
            AlastConfig(**{option: share})


def test_a_share_of_time_needs_times():
    model = tiny_vit()
    with pytest.raises(
        ConfigError, match=r"^time must be left out, or given with times=.*; flops needs none, got 0\.4$"
    ):
        ALaST(model, time=0.4)
    assert not ViT(model).attached
    config = FinetuneConfig(alast=AlastConfig(time=0.4))
    with pytest.raises(ConfigError, match=r"^time must be left out, or given with times"):
        make_method(ViT(model), config)
    method = make_method(ViT(model), config, times=LINEAR)
    assert method.target.option == "time"


@pytest.mark.parametrize("option", ["time", "flops"])
def test_a_half_of_a_model_has_no_target(option):
    with pytest.raises(ConfigError, match=rf"^--alast\.{option} does not go with --split\.cut"):
        FinetuneConfig(method="alast", alast=AlastConfig(**{option: 0.5}), split=SplitConfig(cut=2))


@pytest.mark.parametrize("option", ["time", "flops"])
def test_a_resumed_run_meets_it_by_the_same_tokens(option):
    options = {"alpha": 0.3, option: 0.6, "times": LINEAR}
    model = tiny_vit()
    alast = ALaST(model, **options)
    for seed in range(3):
        alast.step()
        backward(model, seed)
    resumed = ALaST(tiny_vit(), **options)
    resumed.load_state_dict(json.loads(json.dumps(alast.state_dict())))
    assert resumed.step_budgets == alast.step_budgets != alast.budgets
    for one in (alast, resumed):
        one.step()
    assert resumed.state_dict() == alast.state_dict() and resumed.step_budgets == alast.step_budgets


COUNTED = {
    "default": {},
    "dropping": DROPPING,
    "block-end": DROPPING | {"drop_at": "block-end"},
    "merging at the start": {"rule": "merge", "drop_at": "start"},
    "some train": {"blocks": 2, "draw": "lowest-first", "train_embeddings": False},
}
READERS = {"cls": tiny_vit, "distilled": tiny_deit, "patches": lambda: tiny_vit(global_pool="avg")}


@pytest.mark.parametrize(
    ("name", "reader"),
    [(name, reader) for name in COUNTED for reader in READERS if reader != "patches" or "merging" not in name],
)
def test_flops_with_exact_savings_are_what_torch_counts(name, reader):
    model = READERS[reader]()
    vit = ViT(model)
    vit.set_attention_paths(["explicit"] * 4)  # torch's counter knows no fused kernel on a CPU
    vit.set_exact_savings(True)
    share = 0.45 if name == "some train" else 0.6
    alast = ALaST(vit, flops=share, alpha=0.3, **COUNTED[name])
    for seed in range(3):
        alast.step()
        with FlopCounterMode(display=False) as counter:
            backward(model, seed)
        model.zero_grad()
        assert counter.get_total_flops() / 2 == alast.target.cost(alast.step_budgets, alast.trained)
