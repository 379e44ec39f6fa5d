"""Where patches go: against assignments made by hand, for every rule, family and place, and nothing is left behind."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_deit, tiny_vit
from helpers.vits import in_pairs, make
from typing_extensions import override

from snello.config.registry import RULES
from snello.methods.alast import ALaST
from snello.vit import Counting, ViT
from snello.vit.rules import TokenRule
from snello.vit.trace import DROPPED, compose, origins, trace, tracing

PREFIXES = {0: {"class_token": False, "global_pool": "avg"}, 1: {}, 2: {"reg_tokens": 1}}


def pictures(n=3, size=16, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def seen_by(rule, calls):
    """The rule, which notes what it was given and what it made of that."""

    class Seen(type(rule)):
        @override
        def reduce(self, x, context, keep):
            before = context.sizes
            y = super().reduce(x, context, keep)
            calls[context.block] = SimpleNamespace(x=x, y=y, before=before, after=context.sizes)
            return y

    return Seen()


def attached(model, rule, **options):
    options = {"start_budget": 0.75, "token_multiple": 1, "rule": rule, "merge_blocks": (0, 1, 3), **options}
    return ALaST(model, **options)


class Fixed(TokenRule):
    """Tokens 0 and 2 become one, 1 goes, and so do all from 5 on but for a little of the last, which 3 gets too."""

    needs_scores = has_places = False

    def reduce(self, x, context, keep):
        P = context.num_prefix_tokens
        patches = x[:, P:]
        last = 0.9 * patches[:, 3] + 0.1 * patches[:, -1]
        kept = torch.stack([patches[:, 4], last, (patches[:, 0] + patches[:, 2]) / 2], dim=1)
        return torch.cat([x[:, :P], kept], dim=1)


@pytest.mark.parametrize("width", [2, 3, 8])  # features, fewer and more than there are tokens
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_says_what_went_where(width, prefix, dtype):
    x = torch.randn(2, prefix + 7, width, dtype=dtype, requires_grad=True)
    y = Fixed().reduce(x, SimpleNamespace(num_prefix_tokens=prefix), 3)
    assert origins(x, y, prefix).tolist() == [[2, DROPPED, 2, 1, 0, DROPPED, 1]] * 2
    assert x.grad is None


def test_steps_follow_each_other():
    first = torch.tensor([[0, 1, DROPPED, 1], [2, 0, 1, DROPPED]])
    second = torch.tensor([[DROPPED, 0, 1], [1, 0, 0]])
    whole = compose(compose(torch.arange(4)[None], first), second)
    assert whole.tolist() == [[DROPPED, 0, DROPPED, 0], [0, 1, 0, DROPPED]]


@pytest.mark.parametrize("prefix", [1, 2])
def test_a_rule_that_nobody_knows_yet(prefix):
    alast = attached(tiny_vit(**PREFIXES[prefix]), "drop", merge_blocks=(1,), start_budget=3 / 16)
    alast.rule = Fixed()
    groups = trace(alast.vit, pictures(2)).groups
    assert groups[0].tolist() == [list(range(16))]
    expected = [2, DROPPED, 2, 1, 0, *[DROPPED] * 10, 1]
    assert all(rows.tolist() == [expected] * 2 for rows in groups[1:]) and len(groups) == 4


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("drop_at", ["mid", "block-end"])
def test_dropped_patches_are_those_that_training_drops(prefix, drop_at):
    alast, x = attached(tiny_vit(**PREFIXES[prefix]), "drop", drop_at=drop_at), pictures()
    groups = trace(alast.vit, x).groups
    alast.vit.model(x)
    for block, kept in ((0, 12), (1, 9), (2, 9), (3, 6)):
        expected = torch.full((3, 16), DROPPED)
        known = [alast.vit.context.kept[i] - prefix for i in (0, 1, 3) if i <= block and i in alast.vit.context.kept]
        for row, there in enumerate(expected):
            left = list(range(16))
            for step in known:
                left = [left[i] for i in step[row].tolist() if i >= 0]
            there[left] = torch.arange(len(left))
            assert len(left) == kept
        assert torch.equal(groups[block], expected), block


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("drop_at", ["start", "queries", "mid", "block-end"])
@pytest.mark.parametrize("rule", ["merge", "merge-even"])
def test_merged_patches_make_the_tokens_that_training_makes(prefix, rule, drop_at):
    """The means of the tokens that a trace puts together are the tokens that there are, block by block."""
    alast, x, calls = attached(tiny_vit(**PREFIXES[prefix]), rule, drop_at=drop_at), pictures(), {}
    found = trace(alast.vit, x)
    alast.rule = seen_by(alast.rule, calls)
    alast.vit.model(x)
    assert sorted(found.steps) == sorted(calls) == [0, 1, 3]
    for block, call in calls.items():
        before = torch.ones(call.x.shape[:2]) if call.before is None else call.before
        for row in range(3):
            parts = torch.nn.functional.one_hot(found.steps[block][row]).float().T * before[row, prefix:]
            means = parts / parts.sum(1, keepdim=True) @ call.x[row, prefix:]
            assert torch.allclose(means, call.y[row, prefix:], atol=1e-5)
            counts = found.groups[block][row].bincount()
            assert torch.equal(counts.float(), call.after[row, prefix:])  # patches that each token stands for


def test_pairs_that_are_equal_are_merged():
    model = tiny_vit()
    with torch.no_grad():
        model.pos_embed.zero_()
    for rule in ("merge", "merge-even"):
        alast = attached(model, rule, drop_at="start", merge_blocks=(0,), start_budget=0.5)
        groups = trace(alast.vit, in_pairs()).groups
        assert groups[0].tolist() == [[i // 2 for i in range(16)]] * 3
        alast.detach()


@pytest.mark.parametrize(
    ("kind", "rule"),  # the classifiers of the last two average patch tokens
    [("ViT", "drop"), ("ViT", "merge-even"), ("DeiT", "merge"), ("Dinov2", "drop"), ("Dinov2WithRegisters", "drop")],
)
def test_models_of_transformers(kind, rule):
    transformers = pytest.importorskip("transformers")
    shape = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = getattr(transformers, f"{kind}ForImageClassification")(getattr(transformers, f"{kind}Config")(**shape))
    alast, x, calls = attached(model.train(), rule), pictures(), {}
    found = trace(alast.vit, x)
    alast.rule = seen_by(alast.rule, calls)
    model(pixel_values=x)
    prefix = alast.vit.num_prefix_tokens
    assert [int(rows.max()) + 1 for rows in found.groups] == [
        call.y.shape[1] - prefix for call in (calls[0], calls[1], calls[1], calls[3])
    ]
    for block, call in calls.items():
        for row in range(3):
            parts = torch.nn.functional.one_hot(found.steps[block][row] + 1, call.y.shape[1] - prefix + 1).float()
            weights = torch.ones(call.x.shape[1] - prefix) if call.before is None else call.before[row, prefix:]
            parts = parts.T[1:] * weights
            means = parts / parts.sum(1, keepdim=True) @ call.x[row, prefix:]
            assert torch.allclose(means, call.y[row, prefix:], atol=1e-5)


@pytest.mark.parametrize("variant", ["stochastic", "patch-dropout", "distilled", "dinov2-like"])
def test_no_noise_is_drawn_and_the_model_stays_as_it_was(variant):
    model = make(variant)
    vit = ViT(model)
    vit.set_exact_savings(True)
    alast = ALaST(vit, rule="drop", token_multiple=1)
    model.blocks[1].eval()
    x = pictures()
    torch.manual_seed(0)
    model(x).sum().backward()
    modes = [module.training for module in model.modules()]
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    state, context, noise = alast.state_dict(), vit.context, torch.get_rng_state()
    first, second = trace(vit, x), trace(vit, x)
    assert all(torch.equal(a, b) for a, b in zip(first.groups, second.groups, strict=True))
    assert first.groups[0].shape[1] == 16 and len(first.steps) > 0
    assert [module.training for module in model.modules()] == modes and vit.observer is alast
    assert alast.state_dict() == state and vit.context is context and torch.equal(torch.get_rng_state(), noise)
    assert vit.last_rows[1] == vit.family.reads or variant == "stochastic"
    assert grads.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters() if name in grads)


def test_the_last_block_shows_all_its_tokens_with_exact_savings():
    vit = ViT(tiny_vit())
    vit.set_exact_savings(True)
    ALaST(vit, rule="merge-even", merge_blocks=(3,), start_budget=0.5, token_multiple=1)
    assert trace(vit, pictures()).groups[3].max() == 7


def test_gradients_of_a_checkpointed_pass_survive_a_trace():
    """The blocks are computed again in the backward pass, after the trace has been there."""
    gradients = []
    for looks in (False, True):
        model = tiny_vit()
        model.set_grad_checkpointing(True)
        alast = attached(model, "merge")
        loss = model(pictures()).square().sum()
        if looks:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                trace(alast.vit, pictures(2, seed=5))
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_model_in_eval_mode_and_in_inference_mode_shows_what_training_does():
    alast, x = attached(tiny_vit(), "drop"), pictures()
    expected = trace(alast.vit, x).groups
    alast.vit.model.eval()
    with torch.inference_mode():
        groups = trace(alast.vit, x).groups
    assert all(torch.equal(a, b) for a, b in zip(groups, expected, strict=True))
    assert not alast.vit.model.training


def test_a_failing_pass_leaves_the_model_as_it_was():
    alast = attached(tiny_vit(), "drop")
    with pytest.raises(AssertionError):
        trace(alast.vit, pictures(size=20))
    assert alast.vit.observer is alast and all(module.training for module in alast.vit.model.modules())


@pytest.mark.parametrize("attach", [False, True])
def test_blocks_that_pass_on_all_change_nothing(attach):
    vit = ViT(tiny_deit())
    if attach:
        vit.attach(Counting())
    found = trace(vit, pictures())
    assert found.steps == {} and [rows.tolist() for rows in found.groups] == [[list(range(16))]] * 4


def test_an_upper_part_counts_from_the_tokens_it_gets():
    model = tiny_vit()
    lower, upper = ViT(model).cut(2)
    alast = ALaST(upper, rule="merge-even", merge_blocks=(1,), start_budget=0.5, token_multiple=1)
    with tracing(lower):
        z = lower.tokens(pictures())[:, : 1 + 10]
    found = trace(alast.vit, z, torch.full(z.shape[:2], 2.0))
    assert found.num_patches == 10 and [int(rows.max()) + 1 for rows in found.groups] == [10, 5]


def test_every_rule_that_there_is():
    for rule in RULES:
        alast = attached(tiny_vit(), rule, start_budget=0.5)
        kept = [int(rows.max()) + 1 for rows in trace(alast.vit, pictures()).groups]
        assert kept == [8, 4, 4, 2]
