"""Tokens that are merged instead of dropped: which, into what, how often they count, and where that is refused."""

import copy
from typing import get_args

import pytest
import torch
from conftest import tiny_deit, tiny_vit
from helpers.vits import in_pairs
from torch.nn.functional import cosine_similarity

from snello.config.methods import DropAt
from snello.config.registry import RULES
from snello.errors import ConfigError
from snello.measure.step import saved_bytes, storages_of
from snello.methods.alast import ALaST
from snello.vit import ViT, logits_of, tokens
from snello.vit.rules import make_rule

MERGING = ("merge", "merge-even")
VARIANTS = {
    "plain": {},
    "registers": {"reg_tokens": 2},
    "qk-norm": {"qk_norm": True, "init_values": 0.5},
    "distilled": {"cls": "deit"},
}


def merged_by_hand(x, sizes, num_keep, prefix):
    """One picture at a time, one pair after the other."""
    result = []
    for row, row_sizes in zip(x, sizes.tolist(), strict=True):
        own, others = range(prefix, len(row), 2), range(prefix + 1, len(row), 2)
        pairs = []
        for i in own:
            alike = [cosine_similarity(row[i], row[j], dim=0).item() for j in others]
            pairs.append((max(alike), i, others[alike.index(max(alike))]))
        pairs = sorted(pairs, reverse=True)[: len(row) - prefix - num_keep]
        groups = {i: [i] for i in range(len(row)) if i not in [i for _, i, _ in pairs]}
        for _, i, j in pairs:
            groups[j].append(i)
        total = [sum(row_sizes[i] for i in group) for group in groups.values()]
        means = [sum(row[i] * row_sizes[i] for i in g) / n for g, n in zip(groups.values(), total, strict=True)]
        result.append((torch.stack(means), torch.tensor(total)))
    return torch.stack([means for means, _ in result]), torch.stack([total for _, total in result])


@pytest.mark.parametrize(("num_patches", "num_keep"), [(2, 1), (9, 5), (9, 8), (16, 8), (16, 12)])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_the_most_similar_pairs_become_their_mean(num_patches, num_keep, prefix):
    x, sizes = torch.randn(3, prefix + num_patches, 8), torch.randint(1, 5, (3, prefix + num_patches)).float()
    ours, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, merged = tokens.merge_alike(ours, sizes, num_keep, prefix)
    expected, its_sizes = merged_by_hand(reference, sizes, num_keep, prefix)
    assert y.shape == (3, prefix + num_keep, 8)
    assert (y - expected).abs().max() < 1e-5 and torch.equal(merged, its_sizes)
    assert torch.equal(y[:, :prefix], x[:, :prefix])
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    assert (ours.grad - reference.grad).abs().max() < 1e-5


@pytest.mark.parametrize("num_keep", [0, 3, 8])
def test_more_than_half_cannot_be_merged(num_keep):
    with pytest.raises(ValueError, match=r"num_keep must be in 4\.\.7, got"):
        tokens.merge_alike(torch.randn(2, 9, 4), None, num_keep, 1)


def merged_into_by_hand(x, sizes, num_keep, prefix):
    """One picture and one token at a time."""
    num_patches, result = x.shape[1] - prefix, []
    stay = [prefix + i * num_patches // num_keep - 1 for i in range(1, num_keep + 1)]
    for row, row_sizes in zip(x, sizes.tolist(), strict=True):
        groups = {i: [i] for i in (*range(prefix), *stay)}
        for i in set(range(len(row))) - groups.keys():
            alike = [cosine_similarity(row[i], row[j], dim=0).item() for j in stay]
            groups[stay[alike.index(max(alike))]].append(i)
        total = [sum(row_sizes[i] for i in group) for group in groups.values()]
        means = [sum(row[i] * row_sizes[i] for i in g) / n for g, n in zip(groups.values(), total, strict=True)]
        result.append((torch.stack(means), torch.tensor(total)))
    return torch.stack([means for means, _ in result]), torch.stack([total for _, total in result])


@pytest.mark.parametrize(("num_patches", "num_keep"), [(n, k) for n in (2, 3, 9, 16) for k in range(1, n)])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_every_other_token_goes_into_the_most_similar_of_those_evenly_spaced(num_patches, num_keep, prefix):
    x, sizes = torch.randn(3, prefix + num_patches, 8), torch.randint(1, 5, (3, prefix + num_patches)).float()
    ours, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, merged = tokens.merge_into(ours, sizes, num_keep, prefix)
    expected, its_sizes = merged_into_by_hand(reference, sizes, num_keep, prefix)
    assert y.shape == (3, prefix + num_keep, 8)
    assert (y - expected).abs().max() < 1e-5 and torch.equal(merged, its_sizes)
    assert torch.equal(y[:, :prefix], x[:, :prefix])
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    assert (ours.grad - reference.grad).abs().max() < 1e-5


def test_without_sizes_each_counts_once():
    x = torch.randn(2, 10, 4)
    for merge, ones in ((tokens.merge_into, torch.ones(2, 10)), (tokens.merge_alike, torch.ones(2, 10))):
        (y, sizes), (expected, its_sizes) = merge(x, None, 6, 1), merge(x, ones, 6, 1)
        assert torch.equal(y, expected) and torch.equal(sizes, its_sizes) and sizes.sum(1).tolist() == [10.0] * 2


@pytest.mark.parametrize(("num_patches", "num_keep"), [(196, 98), (196, 95), (16, 5), (7, 3)])
def test_those_that_stay_are_evenly_spaced(num_patches, num_keep):
    x = torch.eye(num_patches)[None]  # none is like another, so the first of them takes all the others
    y, _ = tokens.merge_into(x, None, num_keep, 0)
    stay = y[0, 1:].argmax(dim=1)  # the others stay as they are
    gaps = set((stay[1:] - stay[:-1]).tolist())
    assert gaps <= {num_patches // num_keep, -(-num_patches // num_keep)} and stay[-1] == num_patches - 1


@pytest.mark.parametrize("num_keep", [-1, 0, 8, 9])
def test_at_least_one_stays_and_one_goes(num_keep):
    with pytest.raises(ValueError, match=rf"num_keep must be in 1\.\.7, got {num_keep}$"):
        tokens.merge_into(torch.randn(2, 9, 4), None, num_keep, 1)


class Merge:
    """An observer that merges half of the patch tokens in the blocks `where`."""

    def __init__(self, where, drop_at="mid", rule="merge"):
        self.where, self.drop_at, self.rule = where, drop_at, make_rule(rule)

    def num_keep(self, index, num_patches):
        return num_patches // 2 if index in self.where else num_patches

    def record(self, changes, num_samples):
        pass


@pytest.mark.parametrize("path", ["fused", "explicit"])
@pytest.mark.parametrize("drop_at", get_args(DropAt))
@pytest.mark.parametrize("rule", MERGING)
@pytest.mark.parametrize("variant", VARIANTS)
def test_merging_equal_tokens_changes_nothing(variant, rule, drop_at, path):
    options = {**VARIANTS[variant]}
    model = (tiny_deit if options.pop("cls", None) else tiny_vit)(**options)
    with torch.no_grad():
        model.pos_embed.zero_()
    untouched, vit = copy.deepcopy(model), ViT(model)
    vit.set_attention_paths([path] * 4)
    vit.attach(Merge((1,), drop_at, rule))
    x, lengths = in_pairs(), []
    model.norm.register_forward_hook(lambda m, a, y: lengths.append(y.shape[1]))
    out, expected = model(x), untouched(x)
    assert lengths == [vit.num_prefix_tokens + 8]
    assert (out - expected).abs().max() < 1e-4  # each counts twice in the softmax of the blocks above
    assert vit.context.sizes.sum(1).tolist() == [vit.num_prefix_tokens + 16] * 3
    out.square().sum().backward()
    expected.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), untouched.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-3 * q.grad.abs().max() + 1e-5, name


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("rule", MERGING)
def test_merging_equal_tokens_changes_nothing_in_a_transformers_model(rule, implementation):
    transformers = pytest.importorskip("transformers")
    shape = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = transformers.ViTConfig(**shape, attn_implementation=implementation)
    model = transformers.ViTForImageClassification(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.vit.embeddings.position_embeddings.zero_()
    untouched, vit = copy.deepcopy(model), ViT(model)
    vit.attach(Merge((1,), rule=rule))
    out, expected = logits_of(model(in_pairs())), logits_of(untouched(in_pairs()))
    assert vit.context.sizes.shape == (3, 9)
    assert (out - expected).abs().max() < 1e-4


@pytest.mark.parametrize("rule", MERGING)
def test_in_eval_mode_and_after_a_step_with_all_tokens_nothing_is_left_of_it(rule):
    model = tiny_vit()
    untouched = copy.deepcopy(model)
    alast = ALaST(model, start_budget=0.6, rule=rule, blocks=4)
    alast.step()
    x = torch.randn(2, 3, 16, 16)
    assert (model(x) - untouched(x)).abs().max() > 1e-3
    model.eval(), untouched.eval()
    assert torch.equal(model(x), untouched(x))
    model.train(), untouched.train()
    alast.dropping = False
    assert torch.equal(model(x), untouched(x))
    alast.detach()
    assert alast.vit.context.sizes is None


@pytest.mark.parametrize("rule", RULES)
def test_autocast_leaves_what_is_passed_on_its_digits(rule):
    model = tiny_vit()
    ALaST(model, start_budget=0.6, rule=rule)
    dtypes = []
    model.blocks[3].register_forward_hook(lambda m, args, y: dtypes.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 16, 16)).float().sum().backward()
    assert dtypes == [torch.float32]


@pytest.mark.parametrize("path", ["fused", "explicit"])
def test_it_saves_no_more_for_backward_than_dropping_as_many(path):
    saved = {}
    for rule in RULES:
        model = tiny_vit(img_size=32, embed_dim=128, num_heads=4)
        alast = ALaST(model, start_budget=0.8, rule=rule, merge_blocks=(0, 1, 2, 3))
        alast.vit.set_attention_paths([path] * 4)
        parameters = storages_of(model.parameters())
        with torch.autocast("cpu", torch.bfloat16):
            saved[rule] = saved_bytes(lambda model=model: model(torch.randn(8, 3, 32, 32)), parameters)
    assert all(saved[rule] < 1.03 * saved["drop"] for rule in MERGING)


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("rule", MERGING)
def test_a_classifier_that_averages_patch_tokens_is_refused(rule, pool):
    model = tiny_vit(global_pool=pool)
    with pytest.raises(ConfigError, match=r"^rule must be drop for this model: its classifier averages"):
        ALaST(model, rule=rule)
    assert not ViT(model).attached
