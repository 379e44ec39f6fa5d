"""Tokens that merge at the cut: the server counts each as often as the tokens that it stands for."""

import copy
from contextlib import nullcontext
from typing import Any, Literal

import pytest
import torch
from conftest import tiny_deit, tiny_vit
from helpers.budgets import DROPPING
from helpers.halves import LR, Cut, batch, make_cut, step
from helpers.vits import in_pairs
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from snello.config import AlastConfig, FinetuneConfig, SplitConfig
from snello.errors import ConfigError, ModelError, ProtocolError
from snello.vit import AttentionPath, Counting, ViT

HALF = "adc(samples=1, tokens=0.53, rule=merge)"
"""Leaves 8 of 16 patch tokens, or 9 of 17 tokens in all."""


def in_half() -> tuple[Tensor, Tensor]:
    """Pictures of which half the patches say all, and labels."""
    return in_pairs(4), torch.tensor([0, 1, 2, 4])


def without_positions(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.pos_embed.zero_()
    return model


def gradients(
    model: nn.Module, codec: str, path: AttentionPath = "fused", **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one step across a cut."""
    cut = make_cut(model, codec, **options)
    for half in (cut.client, cut.server):
        half.vit.set_attention_paths([path] * half.vit.depth)
    loss = step(cut, [in_half()], update=False)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: p.grad for p in cut.client.parameters() if p.grad is not None}
    pairs = zip(cut.server.parameters(), cut.link.steps._gradients, strict=True)
    return loss, found | {names[id(p)]: gradient for p, gradient in pairs if gradient is not None}


def assert_alike(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert (ours[0] - theirs[0]).abs() < 1e-5
    assert ours[1].keys() == theirs[1].keys() and len(ours[1]) > 20
    for name, gradient in ours[1].items():
        assert (gradient - theirs[1][name]).abs().max() <= 1e-3 * theirs[1][name].abs().max() + 1e-5, name


MODELS = {
    "plain": tiny_vit,
    "distilled": tiny_deit,
    "qk-norm": lambda: tiny_vit(qk_norm=True, init_values=0.5),
}


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("path", ["fused", "explicit"])
@pytest.mark.parametrize("model", MODELS)
def test_merging_equal_tokens_changes_neither_loss_nor_gradients(model, path, labels):
    model = without_positions(MODELS[model]())
    others = copy.deepcopy(model)
    codec = HALF if model.num_prefix_tokens == 1 else HALF.replace("0.53", "0.56")  # 10 of 18
    assert_alike(gradients(model, codec, labels=labels, path=path), gradients(others, "none", labels=labels, path=path))


def test_and_would_without_their_sizes(monkeypatch):
    model = without_positions(tiny_vit())
    others = copy.deepcopy(model)
    expected, _ = gradients(model, "none")
    tokens = ViT.tokens
    monkeypatch.setattr(ViT, "tokens", lambda self, x, sizes=None: tokens(self, x))
    loss, _ = gradients(others, HALF)
    assert (loss - expected).abs() > 1e-3


@pytest.mark.parametrize("path", ["fused", "explicit"])
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_token_counts_as_often_as_it_is_told(library, path):
    """The upper part on tokens with sizes, and on each of them so many times."""
    if library == "timm":
        model = tiny_vit()
    else:
        transformers = pytest.importorskip("transformers")
        shape = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**shape)).train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    _, upper = ViT(model).cut(2)
    upper.set_attention_paths([path] * 2)
    z, sizes = torch.randn(2, 5, 32), torch.tensor([1, 4, 1, 2, 3])
    with torch.no_grad():
        expected = upper.tokens(z.repeat_interleave(sizes, dim=1))
        with pytest.raises(ValueError, match="attach first"):
            upper.tokens(z, sizes.float().expand(2, 5))
        upper.attach(Counting())
        ours = upper.tokens(z, sizes.float().expand(2, 5))
        plain = upper.tokens(z)
    starts = sizes.cumsum(0) - sizes
    assert (ours - expected[:, starts]).abs().max() < 1e-5
    assert (plain - expected[:, starts]).abs().max() > 1e-2  # and nothing is left of a pass with sizes
    upper.model.eval()
    with torch.no_grad():
        in_eval = upper.tokens(z)
        upper.detach()
        assert torch.equal(in_eval, upper.tokens(z))


def test_two_halves_of_one_model_cannot_both_count():
    """The blocks would look at the sizes of one of them."""
    model = tiny_vit()
    make_cut(model, HALF)
    with pytest.raises(ModelError, match="already attached"):
        make_cut(model, HALF)


def test_a_pass_that_broke_off_leaves_no_sizes():
    model = tiny_vit()
    _, upper = ViT(model).cut(2)
    upper.attach(Counting())
    z = torch.randn(2, 5, 32)
    expected = upper.tokens(z)
    handle = upper.blocks[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        upper.tokens(z, torch.full((2, 5), 3.0))
    handle.remove()
    assert torch.equal(upper.family.tokens(z), expected)


# ALaST


def cut_with_alast(model: nn.Module, codec: str, where: Literal["client", "server", "both"], **alast: Any) -> Cut:
    """A cut of which the blocks on one side, or both, pass on half of their tokens."""
    settings = AlastConfig(**DROPPING | {"blocks": 4, "start_budget": 0.5, "min_budget": 0.2, **alast})
    split = SplitConfig(cut=2, codec=codec, alast=where)
    still = {"lr": LR, "warmup": 0.0, "clip_norm": 0.0, "exact_savings": False}  # the last block drops tokens too
    return Cut(model, FinetuneConfig(method="alast", alast=settings, split=split, **still))


@pytest.mark.parametrize("drop_at", ["mid", "block-end"])
def test_alast_on_the_server_drops_what_it_would_drop_of_unmerged_tokens(drop_at):
    """Of equal pairs both go or both stay: a merged one ranks by its share of the attention."""
    losses, sizes = [], []
    model = without_positions(tiny_vit())
    for codec in (HALF, "none"):
        cut = cut_with_alast(copy.deepcopy(model), codec, "server", drop_at=drop_at)
        losses.append(step(cut, [in_half()], update=False))
        sizes.append(cut.server.vit.context.sizes)
    assert (losses[0] - losses[1]).abs() < 1e-5
    assert sizes[1] is None and sizes[0].tolist() == [[1.0] + [2.0] * 2] * 4  # 8 patch tokens, then 4, then 2


def test_dropped_tokens_take_their_sizes_along():
    """Where sizes differ, those that are left are of the tokens that are left."""
    cut = cut_with_alast(tiny_vit(), "adc(samples=1, tokens=0.6, rule=merge)", "server")
    cut.begin(0, [batch(4)])
    frame = cut.client.start([batch(4)], step=0, micro=0, num_samples=4, seed=0)
    cut.server.answer(frame)
    context, sent = cut.server.vit.context, frame.arrays["indices.sizes.0"].float()
    assert torch.equal(context.sizes, sent.gather(1, context.positions)) and context.sizes.std() > 0


def test_attention_that_a_token_receives_counts_its_size():
    _, upper = ViT(tiny_vit()).cut(2)
    scores = []

    class Halving(Counting):
        def num_keep(self, index: int, num_patches: int) -> int:
            return num_patches // 2 if index == 0 else num_patches

    z, sizes = torch.randn(2, 5, 32), torch.tensor([1, 4, 1, 2, 3])
    upper.attach(Halving())
    for x, its in ((z, sizes.float().expand(2, 5)), (z.repeat_interleave(sizes, dim=1), None)):
        upper.tokens(x, its)
        scores.append(upper.context.scores)
    summed = torch.zeros(2, 5).index_add(1, torch.arange(5).repeat_interleave(sizes), scores[1])
    torch.testing.assert_close(scores[0], summed)


def test_alast_on_the_server_merges_on():
    cut = cut_with_alast(tiny_vit(), HALF, "server", rule="merge", alpha=0.0)
    for index in range(3):
        assert step(cut, [batch(8, seed=index)], index).isfinite()
    sizes = cut.server.vit.context.sizes  # of 8 patch tokens, then 4, then 2
    assert sizes.shape == (8, 1 + 2) and sizes.sum(1).tolist() == [17.0] * 8


@pytest.mark.parametrize("codec", [HALF, "adc(samples=0.5, tokens=0.53, rule=merge)+int4"])
@pytest.mark.parametrize("where", ["client", "both"])
def test_alast_on_the_client_leaves_fewer_tokens_to_merge(where, codec):
    cut = cut_with_alast(tiny_vit(), codec, where)
    frames = cut.frames(lambda: step(cut, [batch(8)]))
    sizes = frames[0].arrays["indices.sizes.0"]
    assert sizes.shape[1] == 2 and sizes.sum(1).eq(1 + 4).all()  # 16 patches, then 8, then 4, then 1


@pytest.mark.parametrize("where", ["client", "both"])
def test_alast_on_the_client_does_not_merge(where):
    with pytest.raises(ConfigError, match=r"^--alast.rule merge does not go with --split.cut: .* unless --split.alast"):
        cut_with_alast(tiny_vit(), HALF, where, rule="merge")


# Gradient checkpointing


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("method", ["full", "alast"])
def test_gradient_checkpointing_finds_the_sizes_again(method, moved):
    model = tiny_vit()
    losses, weights = [], []
    for checkpointing in (False, True):
        made = copy.deepcopy(model)
        cut = cut_with_alast(made, HALF, "server") if method == "alast" else make_cut(made, HALF)
        cut.server.vit.set_grad_checkpointing(checkpointing)
        with saved_tensors_hooks(torch.clone, lambda x: x) if moved and checkpointing else nullcontext():
            if moved and checkpointing:
                with pytest.raises(ModelError, match="use rule=drop"):
                    step(cut, [batch(4)])
                return
            losses.append(step(cut, [batch(4)]))
        weights.append(made.state_dict())
    assert torch.equal(*losses)
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


# Refusals


def test_sizes_of_more_tokens_than_the_model_has_are_refused():
    cut = make_cut(tiny_vit(), HALF)
    cut.begin()
    frame = cut.client.start([batch(4)], step=0, micro=0, num_samples=4, seed=0)
    sizes = frame.arrays["indices.sizes.0"].clone()
    assert sizes.sum(1).tolist() == [17] * 4
    sizes[2, 3] += 1
    refused = "sizes of merged tokens add up to more than the 17"
    for wrong in (sizes, sizes.int().fill_(2**31 - 1), sizes.new_full(sizes.shape, 255)):
        frame.arrays["indices.sizes.0"] = wrong
        with pytest.raises(ProtocolError, match=refused):
            cut.server.answer(frame)
    del frame.arrays["indices.sizes.0"]
    with pytest.raises(ProtocolError, match="must come with their sizes"):
        cut.server.answer(frame)


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_a_classifier_that_averages_patch_tokens_is_refused(pool):
    model = tiny_vit(global_pool=pool)
    with pytest.raises(ConfigError, match=r"^--split.codec adc\(0.3, rule=merge\): rule must be drop for this model"):
        make_cut(model, "adc(0.3, rule=merge)")
    assert not ViT(model).attached
    assert step(make_cut(model, "adc(0.3, rule=drop)"), [batch(8)]).isfinite()


def test_evaluation_merges_nothing():
    cut = make_cut(tiny_vit(), "adc(0.1, rule=merge)+int2", eval_codec="none")
    step(cut, [batch(8)])
    cut.evaluator.eval()
    images, _ = batch(6)
    with torch.no_grad():
        assert torch.equal(cut.evaluator(images), cut.vit.model.eval()(images))
