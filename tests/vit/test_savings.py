"""Exact savings: the same gradients, up to rounding, for less."""

import copy
from unittest.mock import patch

import pytest
import torch
from helpers.vits import VARIANTS, make
from torch import nn

from snello.measure.step import saved_bytes, storages_of
from snello.vit import ViT, logits_of, savings

X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def run(model, x=X, seed=0, **autocast):
    torch.manual_seed(seed)
    model.zero_grad()
    with torch.autocast("cpu", enabled=bool(autocast), **autocast):
        out = logits_of(model(x)).float()
    nn.functional.cross_entropy(out, torch.tensor([0, 1, 2])).backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model, plain, tolerance=1e-6, **options):
    (out, grads), (expected, others) = run(model, **options), run(plain, **options)
    assert grads.keys() == others.keys() and len(grads) > 10
    norm = torch.stack([other.norm() for other in others.values()]).norm()
    for own, other in [(out, expected), *((grads[name], others[name]) for name in grads)]:
        assert (own - other).norm() <= tolerance * norm


def both(variant="plain", path="fused"):
    model = make(variant, path).train()
    plain = copy.deepcopy(model)
    vit = ViT(model)
    vit.set_exact_savings(True)
    return model, plain, vit


def saved(model):
    return saved_bytes(lambda: logits_of(model(X)).sum(), storages_of(model.parameters()))


@pytest.mark.parametrize("path", ["fused", "explicit"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_those_of_the_plain_model(variant, path):
    model, plain, _ = both(variant, path)
    assert_equal(model, plain)
    assert_equal(model.double(), plain.double(), tolerance=1e-14, x=X.double())


@pytest.mark.parametrize("variant", ["plain", "distilled", "registers", "layerscale", "qk-norm"])
def test_less_is_kept(variant):
    model, plain, _ = both(variant)
    assert saved(model) < 0.85 * saved(plain)


def test_the_last_block_works_on_what_is_read():
    model, _, vit = both()
    seen = []
    vit.blocks[-1].norm2.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    run(model)
    assert seen == [1] and vit.last_rows == (1, 1)
    model.eval()
    run(model)
    assert seen == [1, 17]


@pytest.mark.parametrize("variant", ["avg-with-cls", "no-cls", "max", "stochastic"])
def test_all_tokens_where_patches_are_pooled_or_noise_is_drawn(variant):
    model, _, vit = both(variant)
    assert vit.last_rows == (None, None)
    assert model.forward_features(X).shape[1] > 2


def test_both_tokens_where_a_distillation_token_is_read():
    _, _, vit = both("distilled")
    assert vit.last_rows == (2, 2)


def test_all_tokens_where_somebody_watches():
    model, plain, vit = both()
    vit.watch(vit.depth - 1)
    assert vit.last_rows == (None, None)
    assert_equal(model, plain)
    seen = []
    model, plain, vit = both()
    hook = vit.blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    run(model)
    assert seen == [17]
    hook.remove()
    assert vit.last_rows == (1, 1)


@pytest.mark.parametrize("where", ["attn", "attn.qkv"])
def test_the_whole_attention_where_somebody_listens_to_it(where):
    model, plain, vit = both()
    seen = []
    vit.blocks[-1].get_submodule(where).register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    assert_equal(model, plain)
    assert seen == [17] and vit.last_rows == (None, 1)


def test_half_precision_keeps_its_digits():
    model, plain, _ = both()
    assert_equal(model, plain, tolerance=2e-2, dtype=torch.bfloat16)
    assert_equal(model, copy.deepcopy(plain), tolerance=1e-6)


def test_an_mlp_honours_autocast():
    model, plain, _ = both()
    kinds = {}
    for name, one in (("own", model), ("plain", plain)):
        with torch.autocast("cpu", torch.bfloat16):
            kinds[name] = one.blocks[0].mlp(torch.randn(2, 5, one.embed_dim)).dtype
    assert kinds == {"own": torch.bfloat16, "plain": torch.bfloat16}


def test_frozen_blocks_get_no_gradient_and_no_products_for_one():
    model, plain, _ = both()
    for one in (model, plain):
        one.blocks[1].requires_grad_(False)
    assert_equal(model, plain)
    mlp = model.blocks[1].mlp
    x = torch.randn(2, 5, model.embed_dim, requires_grad=True)
    with patch.object(savings, "gelu", wraps=savings.gelu) as counted:
        mlp(x).sum().backward()
    assert counted.call_count == 1  # not again for the weights


def test_nothing_to_do_below_what_trains():
    model, plain, _ = both()
    for one in (model, plain):
        one.requires_grad_(False)
        one.blocks[0].mlp.fc2.requires_grad_(True)
    run(model), run(plain)
    assert model.blocks[0].mlp.fc1.weight.grad is None
    assert torch.allclose(model.blocks[0].mlp.fc2.weight.grad, plain.blocks[0].mlp.fc2.weight.grad, atol=1e-6)


def test_switched_off_the_model_is_as_it_was():
    model, plain, vit = both()
    vit.set_exact_savings(False)
    assert not any("forward" in vars(part) for part in model.modules())
    assert saved(model) == saved(plain)


def test_a_copy_computes_with_its_own_weights():
    model, plain, _ = both()
    made = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_equal(made, plain)


@pytest.mark.parametrize("variant", ["plain", "distilled"])
def test_under_gradient_checkpointing(variant):
    model, plain, vit = both(variant)
    vit.set_grad_checkpointing(True)
    assert_equal(model, plain)


def test_only_the_upper_part_of_a_cut_has_a_last_block():
    model, plain, _ = both()
    lower, upper = ViT(model).cut(1)
    lower.set_exact_savings(True)
    upper.set_exact_savings(True)
    assert lower.last_rows == (None, None) and upper.last_rows == (1, 1)
    model.train(), plain.train()
    z = lower.tokens(X)
    assert z.shape[1] == 17
    out = upper.head(upper.features(upper.tokens(z)))
    assert torch.allclose(out, plain(X), atol=1e-5)


def test_another_attachment_is_still_refused():
    from snello import ALaST
    from snello.errors import ModelError

    model, _, vit = both()
    alast = ALaST(vit)
    with pytest.raises(ModelError, match="already attached"):
        ALaST(model)
    alast.detach()
    assert vit.last_rows == (1, 1)
    assert saved(model) < saved(copy.deepcopy(make("plain")).train())


@pytest.mark.parametrize("rule", ["drop", "merge"])
def test_alast_with_nothing_dropped_is_the_plain_model(rule):
    from snello import ALaST

    model, plain, vit = both()
    with ALaST(vit, blocks=vit.depth, start_budget=1.0, rule=rule) as alast:
        alast.step()
        assert_equal(model, plain)
        alast.step()
        assert alast.budgets != [1.0] * vit.depth or all(b == 1.0 for b in alast.budgets)


@pytest.mark.parametrize("targets", ["attention", "mlp", "all"])
def test_adapters_that_come_later_are_not_passed_by(targets):
    pytest.importorskip("peft")
    from snello.config import FinetuneConfig, LoraConfig
    from snello.methods import make_method

    model, plain, _ = both()
    for one, savings_on in ((model, True), (plain, False)):
        torch.manual_seed(3)
        config = FinetuneConfig(method="lora", lora=LoraConfig(target_modules=(targets,)), exact_savings=savings_on)
        make_method(ViT(one), config)
        for name, parameter in one.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    assert_equal(model, plain)
    assert ViT(model).blocks[-1] is model.blocks[-1]


@pytest.mark.parametrize("variant", ["plain", "distilled", "registers", "stochastic", "no-cls"])
def test_what_is_dropped_after_a_block_is_not_given_to_its_mlp(variant):
    from snello import ALaST

    model, plain, vit = both(variant)
    sizes = {True: [], False: []}
    attached = []
    for one, exact in ((vit, True), (ViT(plain), False)):
        one.blocks[0].norm2.register_forward_hook(
            lambda module, args, out, exact=exact: sizes[exact].append(out.shape[1])
        )
        attached.append(
            ALaST(one, blocks=one.depth, start_budget=0.5, rule="drop", drop_at="block-end", token_multiple=1)
        )
        attached[-1].step()
    assert_equal(model, plain)
    early = variant not in ("stochastic", "no-cls")
    assert sizes[True] == ([sizes[False][0] - 8] if early else sizes[False])
    changes = [torch.stack(list(one._records[0])) for one in attached]
    assert torch.allclose(*changes, rtol=1e-4)


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "DeiT with teacher", "Dinov2", "Dinov2WithRegisters"])
@pytest.mark.parametrize("path", ["fused", "explicit"])
def test_transformers_models_give_the_same_gradients(kind, path):
    transformers = pytest.importorskip("transformers")
    name, _, teacher = kind.partition(" ")
    shape = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    shape |= {"intermediate_size": 64, "num_labels": 5}
    config = getattr(transformers, f"{name}Config")(**shape)
    ending = "ForImageClassificationWithTeacher" if teacher else "ForImageClassification"
    model = getattr(transformers, name + ending)(config).train()
    plain = copy.deepcopy(model)
    for one in (model, plain):
        ViT(one).set_attention_paths([path] * 3)
    vit = ViT(model)
    vit.set_exact_savings(True)
    assert vit.last_rows == ((None, None) if name.startswith("Dino") else (2, 2) if teacher else (1, 1))
    assert_equal(model, plain)
    assert saved(model) < 0.9 * saved(plain)
    vit.set_grad_checkpointing(True)
    assert_equal(model, plain)


def test_transformers_dropout_needs_all_tokens():
    transformers = pytest.importorskip("transformers")
    shape = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**shape, num_labels=5, **{name: 0.1}))
        plain = copy.deepcopy(model.train())
        vit = ViT(model)
        vit.set_exact_savings(True)
        assert vit.last_rows == (None, None)
        assert_equal(model, plain)
