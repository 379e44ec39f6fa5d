"""What a forward pass knows of its tokens: nothing of one pass is left in another, a recomputation finds its own."""

import copy
import gc
from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_vit
from helpers.budgets import dropping
from torch.autograd.graph import saved_tensors_hooks

from snello.config.registry import RULES
from snello.errors import ModelError
from snello.measure.step import saved_bytes, storages_of
from snello.methods.alast import ALaST
from snello.vit import ViT, logits_of


def tiny_hf():
    transformers = pytest.importorskip("transformers")
    shape = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**shape, intermediate_size=64)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


MODELS = {"timm": tiny_vit, "transformers": tiny_hf}


def pictures(seed: int, n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def set_checkpointing(model, reentrant: bool, monkeypatch) -> None:
    monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: reentrant)
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
    else:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("library", MODELS)
def test_several_forwards_before_one_backward_are_each_recomputed_with_their_own_tokens(
    library, rule, reentrant, monkeypatch
):
    gradients = []
    for checkpointing in (False, True):
        model = MODELS[library]()
        alast = ALaST(model, blocks=4, start_budget=0.6, rule=rule)
        if checkpointing:
            set_checkpointing(model, reentrant, monkeypatch)
        losses = [logits_of(model(pictures(seed))).square().sum() for seed in range(3)]
        (losses[1] * 2).backward()  # not the last one first
        (losses[0] + losses[2]).backward()
        assert len(alast.state_dict()["pending"]) == 3  # what was computed again is not told again
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys() and len(plain) > 20
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-5, msg=name)  # sums in other orders


@pytest.mark.parametrize("rule", RULES)
def test_a_forward_can_be_recomputed_twice(rule, monkeypatch):
    model = tiny_vit()
    ALaST(model, blocks=4, start_budget=0.6, rule=rule)
    set_checkpointing(model, False, monkeypatch)
    loss, gradients = model(pictures(0)).square().sum(), []
    for _ in range(2):
        model.zero_grad()
        loss.backward(retain_graph=True)
        gradients.append(model.blocks[1].mlp.fc1.weight.grad)
    assert torch.equal(*gradients)


def test_a_block_called_alone_is_no_forward_pass():
    model = tiny_vit()
    alast = ALaST(model, blocks=4, start_budget=0.6)
    model.blocks[3](torch.randn(2, 17, 32))
    model(pictures(0))
    assert [len(row) for row in alast.state_dict()["pending"]] == [4]


@pytest.mark.parametrize("budget", [0.6, 1.0])
@pytest.mark.parametrize("library", MODELS)
def test_gradient_checkpointing_saves_memory_while_tokens_are_dropped(library, budget, monkeypatch):
    """transformers' layers checkpoint in their own forward, which an attached one replaces."""
    saved = []
    for checkpointing in (False, True):
        model = MODELS[library]()
        ALaST(model, blocks=4, start_budget=budget)
        if checkpointing:
            set_checkpointing(model, False, monkeypatch)
        calls, block = [], ViT(model).blocks[1]
        attention = block.get_submodule("attn" if library == "timm" else "attention")
        attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        x, parameters = pictures(0, 8), storages_of(model.parameters())
        saved.append(saved_bytes(lambda model=model, x=x: logits_of(model(x)), parameters))
        logits_of(model(x)).sum().backward()
        assert len(calls) == 2 + checkpointing
    assert saved[1] < 0.5 * saved[0]


@pytest.mark.parametrize("rule", RULES)
def test_a_forward_that_broke_off_leaves_nothing(rule):
    model = tiny_vit()
    alast = ALaST(model, blocks=4, start_budget=0.6, rule=rule)
    expected = model(pictures(0))
    handle = model.blocks[2].attn.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(pictures(1))
    handle.remove()
    assert torch.equal(model(pictures(0)), expected)
    context = alast.vit.context
    assert list(context.changes) == [0, 1, 2, 3] and len(alast.state_dict()["pending"]) == 2
    assert (context.sizes is None) == (rule == "drop") and context.attention == {}
    model.eval()
    untouched = copy.deepcopy(model)
    alast.detach()
    assert torch.equal(model(pictures(0)), untouched(pictures(0))) and alast.vit.context.positions is None


@pytest.mark.parametrize("rule", RULES)
def test_an_input_that_was_moved_before_it_is_computed_again(rule, monkeypatch):
    """As hooks that offload activations do: dropping ranks the tokens anew, merging would need their sizes."""
    gradients = []
    for moving in (False, True):
        model = tiny_vit()
        ALaST(model, blocks=4, start_budget=0.6, rule=rule)
        set_checkpointing(model, False, monkeypatch)
        with saved_tensors_hooks(torch.clone, lambda x: x) if moving else nullcontext():
            loss = model(pictures(0)).square().sum()
        if moving and rule != "drop":
            with pytest.raises(ModelError, match="use rule=drop"):
                loss.backward()
            return
        loss.backward()
        gradients.append(model.blocks[1].mlp.fc1.weight.grad)
    assert torch.equal(*gradients)


def test_contexts_go_with_the_tensors_that_they_are_kept_for():
    model = tiny_vit()
    alast = ALaST(model, blocks=4, start_budget=0.6)
    for seed in range(3):
        model(pictures(seed)).sum().backward()
    gc.collect()
    assert len(alast.vit._passes._found) == 0


@pytest.mark.parametrize("drop_at", ["mid", "block-end"])
def test_positions_say_where_the_tokens_stood(drop_at):
    model = tiny_vit()
    alast = dropping(model, blocks=4, start_budget=0.8, drop_at=drop_at)
    x = torch.randn(2, 17, 32)
    x[:, :, 0] = torch.arange(17.0)
    for parameter in model.blocks.parameters():
        parameter.data.zero_()  # a block that adds nothing shows whose token is where
    for block in model.blocks:
        x = block(x)
    positions = alast.vit.context.positions
    assert positions.shape == (2, 6) and torch.equal(x[:, :, 0].long(), positions)


@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_what_the_caller_passes_beside_the_tokens_reaches_the_blocks_attention(budget):
    model = tiny_hf()
    ALaST(model, blocks=4, start_budget=budget)
    seen = []
    layer = model.vit.layers[0]
    layer.attention.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    layer(torch.randn(2, 17, 32), None, marker=3)
    assert seen[0]["marker"] == 3
    with pytest.raises(ModelError, match="attention masks are not supported"):
        layer(torch.randn(2, 17, 32), torch.ones(2, 1, 17, 17), marker=3)
