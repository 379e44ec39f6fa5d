"""The analytic cost of a step against torch's counter, on models of every kind."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_deit, tiny_vit
from helpers.budgets import dropping
from timm.layers import SwiGLU
from torch.utils.flop_counter import FlopCounterMode

from snello import models
from snello.config import AlastConfig, FinetuneConfig, LoraConfig
from snello.methods import make_method
from snello.methods.alast import ALaST
from snello.vit import ViT, logits_of
from snello.vit.flops import StepFlops, Tokens

VARIANTS = {
    "plain": tiny_vit,
    "registers": lambda: tiny_vit(reg_tokens=2),
    "no-cls": lambda: tiny_vit(class_token=False, global_pool="avg"),
    "swiglu": lambda: tiny_vit(mlp_layer=SwiGLU),
    "narrow-heads": lambda: tiny_vit(num_heads=4, qkv_bias=False),
    "distilled": tiny_deit,
}


def explicit(model: torch.nn.Module) -> ViT:
    """With attention that torch's counter knows: it counts no fused kernel on a CPU."""
    vit = ViT(model.train())
    vit.set_attention_paths(["explicit"] * vit.depth)
    return vit


def counted(model: torch.nn.Module, images: torch.Tensor) -> float:
    """FLOPs of a step, of one picture, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        logits_of(model(images)).sum().backward()
    model.zero_grad()
    return counter.get_total_flops() / len(images)


def tokens_of(alast: ALaST) -> list[Tokens]:
    """The tokens that ALaST's budgets leave to every block, worked out apart from it."""
    patches, result = alast.vit.num_patches, []
    for budget in alast.budgets:
        keep = max(1, int(budget * patches + 1e-6))
        present, passed = (alast.vit.num_prefix_tokens + n for n in (patches, keep))
        result.append(Tokens(present, passed if alast.drop_at == "mid" else present, scored=keep < patches))
        patches = keep
    return result


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("train_embeddings", [True, False])
@pytest.mark.parametrize("drop_at", ["mid", "block-end"])
def test_a_step_costs_what_torch_counts(variant, train_embeddings, drop_at):
    model = VARIANTS[variant]()
    flops, images = StepFlops(explicit(model)), torch.randn(2, 3, 16, 16)
    assert counted(model, images) == flops.full(16)
    alast = dropping(model, blocks=2, start_budget=0.7, drop_at=drop_at, train_embeddings=train_embeddings)
    for _ in range(3):
        alast.step()
        expected = flops.step(tokens_of(alast), 16, alast.trained, train_embeddings)
        assert counted(model, images) == expected < 0.8 * flops.full(16)


READING = {
    "plain": (tiny_vit, 1),
    "registers": (lambda: tiny_vit(reg_tokens=2), 1),
    "swiglu": (lambda: tiny_vit(mlp_layer=SwiGLU), 1),
    "narrow-heads": (lambda: tiny_vit(num_heads=4, qkv_bias=False), 1),
    "qk-norm": (lambda: tiny_vit(qk_norm=True, init_values=0.1), 1),
    "distilled": (tiny_deit, 2),
}


@pytest.mark.parametrize("variant", READING)
@pytest.mark.parametrize("train_embeddings", [True, False])
@pytest.mark.parametrize("trained", [[0, 1, 2, 3], [1, 3], [1, 2], [3]])
def test_a_last_block_for_what_is_read_costs_what_torch_counts(variant, trained, train_embeddings):
    make, reads = READING[variant]
    model, images = make(), torch.randn(2, 3, 16, 16)
    vit = explicit(model)
    flops = StepFlops(vit)
    vit.set_exact_savings(True)
    N = 16 + vit.num_prefix_tokens
    tokens = [Tokens(N, N, scored=False)] * 3 + [Tokens(N, reads, scored=False, queries=reads)]
    for index, block in enumerate(model.blocks):
        block.requires_grad_(index in trained)
    for parameter in vit.embedding_parameters():
        parameter.requires_grad_(train_embeddings)
    assert counted(model, images) == flops.step(tokens, 16, trained, train_embeddings) < flops.full(16)


@pytest.mark.parametrize("targets", ["attention", "qkv", "all", "mlp"])
@pytest.mark.parametrize("trained", [[0, 1, 2, 3], [1, 3], [1, 2]])
def test_a_last_block_with_adapters_saves_what_torch_counts(targets, trained):
    """The queries of a layer with adapters are not computed apart from its keys and values."""
    pytest.importorskip("peft")
    images, found, expected = torch.randn(2, 3, 16, 16), [], []
    for savings in (False, True):
        model = tiny_vit()
        vit = explicit(model)
        settings = AlastConfig(rule="drop", start_budget=1.0, min_budget=1.0, blocks=len(trained))
        lora = LoraConfig(target_modules=(targets,))
        config = FinetuneConfig(method="alast+lora", alast=settings, lora=lora, exact_savings=savings)
        method = make_method(vit, config)
        flops = StepFlops(vit)
        method._draw = lambda: trained
        method.step(1e-3, torch.optim.SGD(model.parameters()), 0.0)
        queries, reads = vit.last_rows
        last = Tokens(17, reads or 17, scored=False, queries=queries)
        expected.append(flops.step([Tokens(17, 17, scored=False)] * 3 + [last], 16, trained, False))
        found.append(counted(model, images))
    assert reads == 1 and queries == (1 if targets == "mlp" else None)
    assert found[0] - found[1] == expected[0] - expected[1] > 0
    if targets != "mlp":  # nothing of the lowest block's attention would have to be known backward
        assert found == expected


@pytest.mark.parametrize("kind", ["ViT", "Dinov2WithRegisters"])
def test_a_step_of_a_transformers_model_costs_what_torch_counts(kind):
    transformers = pytest.importorskip("transformers")
    shape = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = getattr(transformers, f"{kind}ForImageClassification")(getattr(transformers, f"{kind}Config")(**shape))
    flops, images = StepFlops(explicit(model)), torch.randn(2, 3, 16, 16)
    assert counted(model, images) == flops.full(16)
    alast = dropping(model, blocks=2, start_budget=0.7)
    alast.step()
    assert counted(model, images) == flops.step(tokens_of(alast), 16, alast.trained, True)


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_adapters_count_and_full_fine_tuning_has_none(targets):
    pytest.importorskip("peft")
    model = tiny_vit()
    vit = explicit(model)
    full = counted(model, torch.randn(2, 3, 16, 16))
    config = FinetuneConfig(method="alast+lora", lora=LoraConfig(target_modules=(targets,)))
    method = make_method(vit, replace(config, alast=AlastConfig(blocks=3, alpha=0.1, flops=0.5)))
    optimizer = torch.optim.SGD(model.parameters())
    costs = []
    for _ in range(6):
        method.step(1e-3, optimizer, 0.0)
        costs.append(counted(model, torch.randn(2, 3, 16, 16)))
    assert sum(costs) / len(costs) / full == pytest.approx(0.5, rel=0.03)


@pytest.mark.slow
def test_it_holds_at_the_size_of_a_real_model():
    model = models.create_model("deit_small_patch16_224", "none", 10, None)
    flops, images = StepFlops(explicit(model)), torch.randn(1, 3, 224, 224)
    assert counted(model, images) == flops.full(196)
    alast = ALaST(model, flops=0.5, token_multiple=1)
    alast.step()
    assert counted(model, images) / flops.full(196) == pytest.approx(0.5, rel=0.01)
