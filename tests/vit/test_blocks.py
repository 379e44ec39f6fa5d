"""What blocks drop, keep, score and record; which models are refused; how parameters are told apart."""

import copy

import pytest
import timm
import torch
from conftest import tiny_deit, tiny_vit
from helpers.budgets import dropping
from helpers.vits import VARIANTS, assert_same, make, run
from timm.layers import Attention
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock, ResPostBlock

from snello import models
from snello.errors import ModelError
from snello.methods.alast import ALaST
from snello.vit import SUPPORTED, ViT, tokens
from snello.vit.rules import make_rule

PATHS = ["fused", "explicit"]


def images(n: int = 3, size: int = 16) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(7))


class Keep:
    """An observer that passes on `share` of the patch tokens in the blocks `where`, and writes down what it is told."""

    def __init__(self, share=0.5, drop_at="mid", where=range(99)):
        self.share, self.drop_at, self.where, self.rule = share, drop_at, where, make_rule("drop")
        self.asked, self.passes = [], []

    def num_keep(self, index, num_patches):
        self.asked.append((index, num_patches))
        return max(1, int(self.share * num_patches)) if index in self.where else num_patches

    def record(self, changes, num_samples):
        self.passes.append(changes)


def dense_scores(block, x, has_cls):
    """Attention each token gets, from the whole softmax matrix."""
    attn, (B, N, _) = block.attn, x.shape
    qkv = attn.qkv(block.norm1(x)).reshape(B, N, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(qkv[0]), attn.k_norm(qkv[1])
    weights = (q @ k.transpose(-2, -1) * attn.scale).softmax(-1)  # (B, H, N, N)
    return weights[:, :, 0].mean(1) if has_cls else weights.mean((1, 2))


# Off-switch parity


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_full_budget_changes_nothing_in_training(variant, path):
    model = make(variant, path)
    untouched = copy.deepcopy(model)
    alast = ALaST(model, blocks=4, start_budget=1.0)
    alast.step()
    assert_same(model, untouched, images())
    assert [len(changes) for changes in alast._records] == [4]  # it was on


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_eval_mode_changes_nothing_at_half_budget(variant, path):
    model = make(variant, path).eval()
    untouched = copy.deepcopy(model)
    ALaST(model, blocks=4, start_budget=0.5)
    assert_same(model, untouched, images())


def test_dynamic_image_size_drops_a_share_of_what_is_there():
    model = make("dinov2-like")
    observer = Keep(0.5)
    ViT(model).attach(observer)
    model(images(size=24))
    assert observer.asked == [(0, 36), (1, 18), (2, 9), (3, 4)]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_micro_patch4_32", None),
        ("deit_tiny_patch16_224", 48),
        ("deit_tiny_distilled_patch16_224", 48),
        ("vit_small_patch14_reg4_dinov2", 56),
    ],
)
def test_real_models_keep_their_output_and_drop_their_tokens(name, size):
    model = models.create_model(name, "none", 5, size).train()
    x = images(2, models.preprocessing(model, size).size)
    untouched = copy.deepcopy(model)
    alast = dropping(model, blocks=12, start_budget=1.0)
    assert_same(model, untouched, x)
    alast.budgets = [0.5] * 12
    lengths = []
    hooks = [block.register_forward_hook(lambda m, a, y: lengths.append(y.shape[1])) for block in model.blocks]
    run(model, x)
    patches, expected = model.patch_embed.num_patches, []
    for _ in range(12):
        patches = max(1, patches // 2)
        expected.append(model.num_prefix_tokens + patches)
    assert lengths == expected
    for hook in hooks:
        hook.remove()
    alast.detach()
    assert_same(model, untouched, x)


# Scores and dropping

SCORED = ["plain", "qk-norm", "registers", "layerscale", "no-cls", "avg-with-cls", "distilled", "head-dim", "swiglu"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("variant", SCORED)
def test_scores_equal_the_dense_attention(variant, path, monkeypatch):
    model = make(variant, path)
    untouched = copy.deepcopy(model)
    seen = []
    keep_top = tokens.keep_top
    monkeypatch.setattr(tokens, "keep_top", lambda scores, *a: seen.append(scores) or keep_top(scores, *a))
    vit = ViT(model)
    vit.attach(Keep())
    x = torch.randn(3, vit.num_prefix_tokens + 16, 32)
    model.blocks[0](x)
    expected = dense_scores(untouched.blocks[0], x, vit.has_cls)
    (scores,) = seen
    assert scores.shape == expected.shape and scores.dtype == torch.float32 and not scores.requires_grad
    assert (scores - expected).abs().max() <= 1e-6
    assert expected.std(dim=1).min() > 1e-4  # not uniform, or any order would do
    assert torch.allclose(scores.sum(1), torch.ones(3))


@pytest.mark.parametrize("drop_at", ["mid", "block-end"])
@pytest.mark.parametrize("variant", SCORED)
def test_dropping_block_equals_the_dense_block_and_its_gradient(variant, drop_at):
    model = make(variant)
    untouched = copy.deepcopy(model)
    vit, observer = ViT(model), Keep(0.3, drop_at)  # floor(0.3 * 16) = 4
    vit.attach(observer)
    prefix = vit.num_prefix_tokens
    x = torch.randn(3, prefix + 16, 32)
    ours, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    in_mlp = []
    model.blocks[1].mlp.register_forward_hook(lambda m, args, y: in_mlp.append(args[0].shape[1]))

    y = model.blocks[1](ours)
    block = untouched.blocks[1]
    best = dense_scores(block, reference, vit.has_cls)[:, prefix:].argsort(dim=1, descending=True)[:, :4]
    index = torch.cat((torch.arange(prefix).expand(3, -1), best.sort(1).values + prefix), 1)
    dense = block(reference)  # without dropout the MLP works on each token alone, so both places agree
    expected = dense[torch.arange(3)[:, None], index]

    assert y.shape == (3, prefix + 4, 32)
    assert (y - expected).abs().max() <= 1e-5
    assert in_mlp == [prefix + 4 if drop_at == "mid" else prefix + 16]
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    assert (ours.grad - reference.grad).abs().max() <= 1e-4
    for (name, p), q in zip(model.blocks[1].named_parameters(), block.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-4), name

    ((block, change),) = vit.context.changes.items()
    if vit.has_cls:
        delta = (dense[:, 0] - x[:, 0]).square().sum(-1).mean()
    else:  # the patch tokens that are there after the MLP
        delta = (dense - x).square().sum(-1)
        delta = delta.gather(1, index).mean() if drop_at == "mid" else delta.mean()
    assert block == 1 and change.shape == () and not change.requires_grad
    assert torch.allclose(change, delta.detach(), rtol=1e-5)


@pytest.mark.parametrize(
    ("drop_at", "options"),
    [
        ("mid", {"drop_path_rate": 0.5, "attn_drop_rate": 0.3}),
        ("block-end", {"drop_path_rate": 0.5, "attn_drop_rate": 0.3, "proj_drop_rate": 0.3}),
    ],
)
def test_dropping_block_applies_the_blocks_own_dropout(drop_at, options):
    model = tiny_vit(**options)
    untouched = copy.deepcopy(model)
    ViT(model).attach(Keep(0.5, drop_at))
    x = torch.randn(6, 17, 32)
    best = dense_scores(untouched.blocks[3], x, True)[:, 1:].argsort(dim=1, descending=True)[:, :8]
    index = torch.cat((torch.zeros(6, 1, dtype=torch.int64), best.sort(1).values + 1), 1)
    results = []
    for seed in range(4):
        torch.manual_seed(seed)
        y = model.blocks[3](x)
        torch.manual_seed(seed)
        expected = untouched.blocks[3](x)[torch.arange(6)[:, None], index]
        assert (y - expected).abs().max() <= 1e-5
        results.append(y.detach())
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("drop_at", ["mid", "block-end"])
def test_recomputation_under_gradient_checkpointing_tells_nothing(drop_at, share):
    model = make("plain")
    model.set_grad_checkpointing(True)
    observer, calls = Keep(share, drop_at), []
    ViT(model).attach(observer)
    model.blocks[1].attn.register_forward_hook(lambda *args: calls.append(1))
    model(images()).sum().backward()
    assert [len(changes) for changes in observer.passes] == [4]
    assert len(observer.asked) == 4 and calls == [1, 1]  # it did recompute


@pytest.mark.parametrize("drop_at", ["mid", "block-end"])
def test_dropping_compounds_over_depth_and_skips_full_blocks(drop_at):
    model = make("registers")
    observer = Keep(0.6, drop_at, where=(0, 2, 3))
    ViT(model).attach(observer)
    lengths = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, a, y: lengths.append(y.shape[1]))
    model(images())
    assert observer.asked == [(0, 16), (1, 9), (2, 9), (3, 5)]
    assert lengths == [3 + 9, 3 + 9, 3 + 5, 3 + 3]
    assert [len(changes) for changes in observer.passes] == [4]


def test_dropping_under_autocast():
    model = make("plain")
    ViT(model).attach(observer := Keep())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images()).float().square().sum()
    loss.backward()
    assert torch.isfinite(loss) and all(change.dtype == torch.float32 for change in observer.passes[0])


def test_capture_is_let_go():
    model = make("plain")
    vit = ViT(model)
    vit.attach(Keep())
    model(images())
    assert vit.context.attention == {}


@pytest.mark.parametrize("options", [{"attn_mask": torch.ones(1, 1, 17, 17, dtype=torch.bool)}, {"is_causal": True}])
def test_attention_masks_are_refused_while_dropping(options):
    model = make("plain")
    vit = ViT(model)
    vit.attach(Keep())
    with pytest.raises(ModelError, match=r"attention masks are not supported.*detach"):
        model(images(), **options)
    model.eval()
    masked = model(images(), **options)
    vit.detach()
    assert torch.equal(masked, model(images(), **options))


# What is refused


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (lambda: timm.create_model("resnet18"), "model ResNet"),
        (lambda: torch.nn.Linear(2, 2), "model Linear"),
        (lambda: timm.create_model("vit_relpos_small_patch16_224"), "model VisionTransformerRelPos"),
        (lambda: tiny_vit(global_pool="map", class_token=False), "pooling 'map'"),
        (lambda: tiny_vit(global_pool=""), "pooling ''"),
        (lambda: tiny_vit(block_fn=ResPostBlock, init_values=1e-3), "block ResPostBlock"),
        (lambda: tiny_vit(block_fn=ParallelScalingBlock), "block ParallelScalingBlock"),
        (lambda: tiny_vit(block_fn=DiffParallelScalingBlock), "block DiffParallelScalingBlock"),
        (lambda: tiny_vit(attn_layer="diff"), "attention DiffAttention"),
        (lambda: tiny_vit(attn_layer=Gated), "attention with a gate"),
        (lambda: tiny_vit(scale_attn_norm=True), "attention with scale_norm"),
    ],
)
def test_unsupported_is_refused_by_name(model, name):
    model = model().train()
    forwards = [block.forward for block in getattr(model, "blocks", [])]
    with pytest.raises(ModelError) as error:
        ALaST(model)
    assert name in str(error.value) and SUPPORTED in str(error.value)
    assert [block.forward for block in getattr(model, "blocks", [])] == forwards  # and left alone


class Gated(Attention):
    """Made by `_create_attn`, then turned into a plain `Attention` with a gate."""

    def __init__(self, *args, depth=0, **kwargs):
        super().__init__(*args, gated=True, **kwargs)
        self.__class__ = Attention


def test_attached_twice_is_refused_and_the_first_goes_on():
    model = make("plain")
    first = ALaST(model)
    with pytest.raises(ModelError, match=r"already attached.*detach"):
        ALaST(model)
    model(images())
    assert [len(changes) for changes in first._records] == [4]
    first.detach()
    ALaST(model).detach()


@pytest.mark.parametrize("how", ["wrapped", "in place", "block"])
def test_compiled_before_attaching_is_refused(how):
    model = make("plain")
    if how == "wrapped":
        model = torch.compile(model, backend="eager")
    else:
        (model if how == "in place" else model.blocks[2]).compile(backend="eager")
    with pytest.raises(ModelError, match="already compiled: attach first"):
        ALaST(model)


def test_detach_gives_everything_back():
    model = make("registers")
    untouched, keys = copy.deepcopy(model), list(model.state_dict())
    vit = ViT(model)
    vit.detach()  # of nothing
    vit.attach(Keep())
    assert list(model.state_dict()) == keys
    vit.detach()
    for block, other in zip(model.blocks, untouched.blocks, strict=True):
        assert "forward" not in vars(block)
        assert not block.attn.qkv._forward_hooks
        assert vars(block).keys() == vars(other).keys()
    assert_same(model, untouched, images())


# Parts of a model


def test_attention_paths_are_read_and_set():
    vit = ViT(make("plain"))
    paths = ["fused", "explicit", "explicit", "fused"]
    vit.set_attention_paths(paths)
    assert vit.attention_paths == paths
    assert [block.attn.fused_attn for block in vit.blocks] == [True, False, False, True]


def test_parameters_of_embeddings_head_and_layers():
    vit = ViT(tiny_deit(pre_norm=True))
    names = {id(p): name for name, p in vit.model.named_parameters()}
    embeddings = {names[id(p)] for p in vit.embedding_parameters()}
    assert embeddings == {
        *("cls_token", "dist_token", "pos_embed", "patch_embed.proj.weight", "norm_pre.weight", "norm_pre.bias")
    }
    assert {names[id(p)] for p in vit.head_parameters()} == {
        *("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")
    }
    layers = {name: vit.layer_of(name) for name in names.values()}
    assert {name for name, layer in layers.items() if layer == 0} == embeddings
    assert layers["blocks.0.attn.qkv.weight"] == 1 and layers["blocks.3.norm1.bias"] == 4
    assert layers["norm.weight"] == layers["head.weight"] == layers["head_dist.bias"] == 5
