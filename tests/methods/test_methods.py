"""What each method trains, and that the training loop can treat all of them alike."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import QUIET, tiny_deit, tiny_vit
from helpers.budgets import DROPPING

from snello.config import AlastConfig, FinetuneConfig, SplitConfig
from snello.config.registry import METHODS
from snello.errors import ConfigError
from snello.finetuning import finetune
from snello.methods import make_method, training_share
from snello.train.optim import make_optimizer
from snello.vit import ViT

HEAD = {"head.weight", "head.bias"}
MODELS = {
    "plain": tiny_vit,
    "distilled": tiny_deit,
    "avg": lambda: tiny_vit(class_token=False, global_pool="avg"),
    "layerscale": lambda: tiny_vit(init_values=0.1, reg_tokens=1),
}


def trainable(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def expected(model, method: str, last_k: int = 2) -> set[str]:
    names = {name for name, _ in model.named_parameters()}
    if method == "full":
        return names
    tops = {"head": ("head.", "head_dist."), "last-k": ("head.", "head_dist.", "norm.", "fc_norm.")}[method]
    blocks = tuple(f"blocks.{i}." for i in range(4 - last_k, 4)) if method == "last-k" else ()
    return {name for name in names if name.startswith(tops + blocks)}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", [name for name in METHODS if "lora" not in name])  # see test_lora.py
def test_a_method_trains_what_it_says_and_detach_restores(name, kind):
    model = MODELS[kind]()
    model.patch_embed.proj.bias.requires_grad_(False)  # frozen before, frozen after
    found = trainable(model)
    vit = ViT(model)
    optimizer = make_optimizer(vit, lr=1e-2, weight_decay=0.1, device=torch.device("cpu"))
    settings = {"alast": {"alast": AlastConfig(**DROPPING | {"blocks": 2})}, "last-k": {"last_k": 2}}.get(name, {})
    method = make_method(vit, FinetuneConfig(method=name, **settings))
    if name == "alast":
        assert trainable(model) == found  # nothing is frozen before its first step, as data parallelism needs
    before = {key: value.clone() for key, value in model.state_dict().items()}
    described = method.describe()
    method.step(1e-2, optimizer, 0.0)
    if name == "alast":
        drawn = method.metrics()["trained"]
        assert len(drawn) == 2
        trains = {key for key in found if not key.startswith("blocks.") or int(key.split(".")[1]) in drawn}
    else:
        trains = expected(model, name) & found
    assert trainable(model) == trains
    numbers = [sum(p.numel() for key, p in model.named_parameters() if key in keys) for keys in (trains, before)]
    blocks = len({key.split(".")[1] for key in trains if key.startswith("blocks.")})
    assert described == training_share(*numbers, blocks, 4) and method.num_left(16) == (9 if name == "alast" else 16)
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == trains
    json.dumps(method.metrics())
    method.load_state_dict(json.loads(json.dumps(method.state_dict())))
    method.detach()
    assert trainable(model) == found
    assert all("forward" not in vars(block) for block in model.blocks)


def test_head_with_distillation_token_trains_both_heads():
    model = tiny_deit()
    make_method(ViT(model), FinetuneConfig(method="head"))
    assert trainable(model) == HEAD | {"head_dist.weight", "head_dist.bias"}


def test_last_k_of_all_blocks_leaves_only_the_embeddings_frozen():
    model = tiny_vit()
    make_method(ViT(model), FinetuneConfig(method="last-k", last_k=4))
    frozen = {name for name, _ in model.named_parameters()} - trainable(model)
    assert frozen == {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_last_k_beyond_the_depth_is_refused():
    model = tiny_vit()
    with pytest.raises(ConfigError, match=r"--last-k must be in 1\.\.4 .*got 5"):
        make_method(ViT(model), FinetuneConfig(method="last-k", last_k=5))
    assert all(p.requires_grad for p in model.parameters())


def test_alast_names_the_flag_that_does_not_fit():
    with pytest.raises(ConfigError, match=r"^blocks must be in 1\.\.4 .*got 5$") as error:
        make_method(ViT(tiny_vit()), FinetuneConfig(alast=AlastConfig(blocks=5)))
    assert error.value.for_command_line == f"--alast.{error.value}"


def test_alast_takes_every_setting_from_the_config():
    settings = AlastConfig(
        blocks=2,
        start_budget=0.8,
        min_budget=0.6,
        alpha=0.5,
        draw="softmax",
        temperature=0.3,
        adapt="difference",
        drop_at="block-end",
        rule="merge",
        merge_blocks=(1, 3),
        train_embeddings=False,
        full_tail=0.25,
        token_multiple=4,
        optimizer_state="release",
    )
    model = tiny_vit()
    alast = make_method(ViT(model), FinetuneConfig(alast=settings, seed=7))
    assert alast.config == settings
    assert alast.num_blocks == 2 and alast.budgets == [1.0, 0.8, 1.0, 0.8]
    assert not model.cls_token.requires_grad
    assert alast._generator.initial_seed() == 7


@pytest.mark.parametrize(("tail", "dropped"), [(0.0, [1, 1, 1, 1]), (0.5, [1, 1, 0, 0]), (1.0, [0, 0, 0, 0])])
def test_the_tail_drops_no_tokens(tail, dropped):
    model = tiny_vit()
    settings = AlastConfig(full_tail=tail, start_budget=0.5)
    method = make_method(ViT(model), FinetuneConfig(alast=settings, exact_savings=False))
    lengths = []
    model.norm.register_forward_hook(lambda m, a, y: lengths.append(y.shape[1]))
    for step in range(4):
        method.step(1e-3, torch.optim.SGD(model.parameters()), step / 4)
        model(torch.randn(2, 3, 16, 16))
    assert [length < 17 for length in lengths] == [bool(value) for value in dropped]


@pytest.mark.filterwarnings("error::snello.errors.SnelloWarning")
@pytest.mark.slow
def test_our_own_loop_puts_the_model_into_training_mode_before_the_first_step(small):
    pytest.importorskip("transformers").ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=48, patch_size=16
    ).save_pretrained(small.out / "model")  # what transformers makes is in eval mode
    for name, settings in (("test_vit", {"compare": True}), (str(small.out / "model"), {"split": SplitConfig(cut=2)})):
        run = replace(small, model=name, method="alast", epochs=1, out=small.out / name.split("/")[-1] / "run")
        finetune(replace(run, **settings), QUIET)


def test_the_base_learning_rate_is_the_step_size_of_the_budgets():
    budgets = []
    for lr, alpha in ((0.02, None), (9.0, 0.02)):
        model = tiny_vit()
        method = make_method(ViT(model), FinetuneConfig(alast=AlastConfig(**DROPPING, alpha=alpha)))
        for seed in range(3):
            method.step(lr, torch.optim.SGD(model.parameters()), 0.0)
            torch.manual_seed(seed)
            model(torch.randn(2, 3, 16, 16))
        budgets.append(method.metrics()["budgets"])
    assert budgets[0] == budgets[1] != [0.9] * 4
