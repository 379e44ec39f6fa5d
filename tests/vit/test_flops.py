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
    alast = ALaST(model, flops=0.5)
    alast.step()
    assert counted(model, images) / flops.full(196) == pytest.approx(0.5, rel=0.01)
