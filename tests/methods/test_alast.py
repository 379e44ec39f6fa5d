"""ALaST, trap by trap: what moves budgets, what is drawn, what is frozen, what is dropped, and what resumes."""

import copy
import json
import math
import os
import re
import warnings
from collections import Counter
from dataclasses import replace
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_deit, tiny_vit
from helpers.budgets import DROPPING, dropping
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from snello.config import AlastConfig
from snello.config.methods import DropAt
from snello.config.registry import RULES
from snello.errors import ConfigError, SnelloWarning
from snello.methods.alast import PAPER_LR, ALaST
from snello.methods.budgets import decided
from snello.vit import ViT


def batch(seed: int, n: int = 4, size: int = 16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=generator), torch.randint(5, (n,), generator=generator)


def backward(model, seed: int, n: int = 4) -> float:
    x, labels = batch(seed, n)
    loss = nn.functional.cross_entropy(model(x), labels)
    loss.backward()
    return loss.item()


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, "weight_decay": 0.1, **options})


def watch(model) -> list[list[float]]:
    """Delta of every block, one row per forward in training mode, computed apart from snello."""
    rows: list[list[float]] = []

    def hook(module, args, y):
        if module is model.blocks[0]:
            rows.append([])
        rows[-1].append((y[:, 0] - args[0][:, 0]).double().square().sum(-1).mean().item())

    for block in model.blocks:
        block.register_forward_hook(hook)
    return rows


def draws(alast: ALaST, times: int) -> list[list[int]]:
    result = []
    for _ in range(times):
        alast.step()
        result.append(alast.trained)
    return result


def inclusion(alast: ALaST, times: int = 3000) -> list[float]:
    counts = Counter(block for trained in draws(alast, times) for block in trained)
    return [counts[block] / times for block in range(alast.vit.depth)]


# Budgets


def test_budgets_move_by_the_change_of_delta_and_are_clipped():
    model = tiny_vit()
    rows = watch(model)
    alast = dropping(model, blocks=4, start_budget=0.8, min_budget=0.75, alpha=2.0)
    expected = [0.8] * 4
    ends = set()
    for step in range(8):
        alast.step()
        if step >= 2:
            old, new = rows[step - 2], rows[step - 1]
            expected = [min(1, max(0.75, b + 2.0 * (n - o))) for b, n, o in zip(expected, new, old, strict=True)]
        assert alast.budgets == pytest.approx(expected, abs=1e-5)  # sums of float32, in another order
        ends |= {b for b in expected if b in (0.75, 1)}
        backward(model, step)
    assert len(rows) == 8
    assert ends == {0.75, 1} and len({round(b, 6) for b in expected}) > 1  # it moved, and met both ends


def test_delta_is_a_mean_over_the_batch():
    x, _ = batch(0)
    deltas = []
    for images in (x, torch.cat((x, x))):
        alast = ALaST(tiny_vit())
        alast.step()
        alast.vit.model(images)
        alast.step()
        deltas.append(alast.state_dict()["deltas"])
    assert deltas[0] == pytest.approx(deltas[1], rel=1e-5)


def test_first_step_only_records():
    model = tiny_vit()
    alast = dropping(model, alpha=10.0)
    alast.step()
    assert alast.state_dict()["deltas"] is None
    backward(model, 0)
    alast.step()
    assert alast.budgets == [0.9] * 4 and all(delta > 0 for delta in alast.state_dict()["deltas"])
    backward(model, 1)
    alast.step()
    assert alast.budgets != [0.9] * 4


def test_hooks_only_record():
    model = tiny_vit()
    alast = dropping(model, alpha=10.0, blocks=2)
    for seed in range(3):
        alast.step()
        before = alast.summary()
        backward(model, seed)
        assert alast.summary() == before


def test_eval_mode_neither_records_nor_drops_nor_moves():
    model = tiny_vit()
    alast = dropping(model, alpha=10.0, start_budget=0.5)
    for seed in range(2):
        alast.step()
        backward(model, seed)
    state = alast.state_dict()
    model.eval()
    lengths = []
    model.norm.register_forward_hook(lambda m, a, y: lengths.append(y.shape[1]))
    with torch.no_grad():
        model(batch(5)[0])
    assert lengths == [17] and alast.state_dict() == state
    model.train()(batch(5)[0])
    assert lengths == [17, 2]


def test_step_takes_the_mean_over_the_samples_since_the_last():
    model = tiny_vit()
    rows = watch(model)
    alast = dropping(model, alpha=0.1)
    for seeds in [(0, 1, 2), (3,), (4, 5)]:
        alast.step()
        for seed in seeds:
            backward(model, seed, n=2 + seed)
        del rows[: -len(seeds)]
        pending = alast.state_dict()["pending"]
        assert [x for row in pending for x in row] == pytest.approx([x for row in rows for x in row], rel=1e-4)
    before, deltas = alast.budgets.copy(), alast.state_dict()["deltas"]
    alast.step()
    now = [(6 * one + 7 * other) / 13 for one, other in zip(*rows, strict=True)]
    assert alast.state_dict()["deltas"] == pytest.approx(now, rel=1e-4)
    moved = [min(1, max(0.5, b + 0.1 * (n - o))) for b, n, o in zip(before, now, deltas, strict=True)]
    assert alast.budgets == pytest.approx(moved, rel=1e-4)
    assert alast.state_dict()["pending"] == []


def test_micro_batches_are_one_batch():
    """Of different sizes too, and with one that counts for nothing."""
    x, _ = batch(0, n=9)
    deltas = []
    for parts in ([x], x.split(7), [*x.split(2), x[:1]]):
        alast = ALaST(tiny_vit())
        alast.step()
        for part in parts:
            alast.vit.model(part)
        if len(parts) == 6:
            alast.discount()
        alast.step()
        deltas.append(alast.state_dict()["deltas"])
    assert deltas[1] == pytest.approx(deltas[0], rel=1e-5) and deltas[2] == pytest.approx(deltas[0], rel=1e-5)


@pytest.mark.parametrize(
    ("alpha", "lr", "used"), [(None, None, PAPER_LR), (None, 2e-3, 2e-3), (3e-3, 2e-3, 3e-3), (0.0, 2e-3, 0.0)]
)
def test_alpha_defaults_to_the_learning_rate(alpha, lr, used):
    model = tiny_vit()
    alast = dropping(model, alpha=alpha)
    deltas = []
    for seed in range(3):
        alast.step(lr=lr)
        backward(model, seed)
        deltas.append(alast.state_dict()["deltas"])
    before = alast.budgets.copy()
    alast.step(lr=lr)
    now = alast.state_dict()["deltas"]
    moved = [b + used * (n - o) for b, n, o in zip(before, now, deltas[-1], strict=True)]
    assert alast.budgets == pytest.approx(moved, abs=1e-9) and (moved != before) == (used > 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_delta_that_is_not_finite_is_ignored(value):
    model = tiny_vit()
    alast = dropping(model, alpha=1.0)
    for seed in range(2):
        alast.step()
        backward(model, seed)
    alast.step()
    budgets, deltas = alast.budgets.copy(), alast.state_dict()["deltas"]
    x, _ = batch(2)
    x[0, 0, 0, 0] = value
    model(x)
    alast.step()
    assert (alast.budgets, alast.state_dict()["deltas"]) == (budgets, deltas)
    assert alast.state_dict()["pending"] == []


@pytest.mark.parametrize("kinds", ["wb", "bw", "wbw", "bbwbw"])
def test_a_forward_that_broke_off_does_not_count(kinds):
    model = tiny_vit()
    reference = tiny_vit()
    rows = watch(reference)
    alast, whole = ALaST(model), ALaST(reference)
    alast.step()
    whole.step()
    broken = False

    def fail(module, args):
        if broken:
            raise KeyboardInterrupt

    model.blocks[2].mlp.register_forward_pre_hook(fail)
    for seed, kind in enumerate(kinds):
        broken = kind == "b"
        try:
            model(batch(seed)[0])
        except KeyboardInterrupt:
            assert broken
        if kind == "w":
            reference(batch(seed)[0])
    alast.step()
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    assert alast.state_dict()["deltas"] == pytest.approx(mean, rel=1e-5)


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for float32 values, which is what deltas and activations are."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.float32
        return function(*args, **(kwargs or {}))

    def spy(self, original):
        def counted(tensor, *args, **kwargs):
            self.count += tensor.dtype == torch.float32
            return original(tensor, *args, **kwargs)

        return counted


@pytest.mark.parametrize("drop_at", ["mid", "block-end"])
def test_at_most_one_host_sync_per_step(drop_at, monkeypatch):
    model = tiny_vit()
    alast = ALaST(model, alpha=0.1, drop_at=drop_at, blocks=2)
    optimizer = adamw(model)
    with Reads() as reads:
        for name in ("tolist", "cpu", "numpy"):
            monkeypatch.setattr(torch.Tensor, name, reads.spy(getattr(torch.Tensor, name)))
        torch.ones(1).item(), torch.ones(1).tolist()
        assert reads.count == 2  # it does see them
        for step in range(4):
            reads.count = 0
            alast.step(optimizer=optimizer)
            assert reads.count == (0 if step == 0 else 1)
            for micro in range(3):
                model(batch(3 * step + micro)[0]).sum().backward()
            assert reads.count == (0 if step == 0 else 1)


# Draws


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_proportional_draw_follows_the_budgets(num_blocks):
    alast = dropping(tiny_vit(), blocks=num_blocks, seed=1)
    alast.budgets = [1.0, 0.5, 0.7, 0.3]
    p = [b / 2.5 for b in alast.budgets]
    expected = list(p)
    if num_blocks == 2:
        expected = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)]
    assert inclusion(alast) == pytest.approx(expected, abs=0.03)


def test_softmax_draw_is_nearly_uniform_and_temperature_sharpens_it():
    shares = {}
    for temperature in (1.0, 0.1):
        alast = dropping(tiny_vit(), blocks=1, draw="softmax", temperature=temperature)
        alast.budgets = [1.0, 0.5, 0.75, 0.5]
        weights = [math.exp(b / temperature) for b in alast.budgets]
        shares[temperature] = inclusion(alast)
        assert shares[temperature] == pytest.approx([w / sum(weights) for w in weights], abs=0.03)
    assert max(shares[1.0]) / min(shares[1.0]) < math.exp(0.5) * 1.2
    assert shares[0.1][0] > 0.85


def test_the_draw_follows_the_budgets_of_this_step():
    model = tiny_vit()
    alast = dropping(model, blocks=1, start_budget=1.0, min_budget=1e-9)
    deltas = iter([[5.0] * 4, [4.0, 4.0, 5.0, 4.0]])  # only block 2 keeps its budget
    alast.step(lr=1.0)
    for row in deltas:
        alast.record([torch.tensor(delta) for delta in row])
        alast.step(lr=1.0)
    assert alast.budgets == [1e-9, 1e-9, 1.0, 1e-9] and alast.trained == [2]


def test_lowest_first_freezes_exactly_the_lowest():
    model = tiny_vit()
    alast = ALaST(model, blocks=3, draw="lowest-first")
    alast.budgets = [1.0, 0.5, 0.5, 0.5]
    assert draws(alast, 3) == [[1, 2, 3]] * 3
    assert not any(p.requires_grad for p in model.blocks[0].parameters())
    assert all(p.requires_grad for p in model.blocks[1:].parameters())


def test_draws_depend_on_the_seed_and_on_nothing_else():
    results = []
    for seed, disturb in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(disturb)
        results.append(draws(ALaST(tiny_vit(), blocks=2, seed=seed), 20))
    assert results[0] == results[1] != results[2]
    assert all(len(set(trained)) == 2 and trained == sorted(trained) for trained in results[0])


@pytest.mark.parametrize(
    ("depth", "blocks", "expected"),
    [*[(depth, None, depth) for depth in (1, 4, 12)], (1, 0.75, 1), (4, 0.75, 3), (12, 0.75, 9), (12, 0.01, 1)],
)
def test_all_blocks_train_by_default_or_a_share_of_them(depth, blocks, expected):
    alast = ALaST(tiny_vit(depth=depth), blocks=blocks)
    alast.step()
    assert len(alast.trained) == alast.num_blocks == expected


# Freezing


@pytest.mark.parametrize("zero_grad", [None, True, False])
@pytest.mark.parametrize("make", [adamw, lambda m: torch.optim.SGD(m.parameters(), 0.01, 0.9, weight_decay=0.1)])
def test_a_frozen_block_is_bit_identical_after_the_step_and_a_drawn_one_moves(make, zero_grad):
    model = tiny_vit()
    alast = ALaST(model, blocks=2)
    optimizer = make(model)
    backward(model, 99)  # all blocks hold gradients and momentum when the first draw comes
    optimizer.step()
    seen = set()
    for seed in range(6):
        alast.step(optimizer=optimizer)
        frozen = [i for i in range(4) if i not in alast.trained]
        seen |= set(frozen)
        assert all(p.grad is None for i in frozen for p in model.blocks[i].parameters())
        if zero_grad is not None:
            optimizer.zero_grad(set_to_none=zero_grad)
        before = copy.deepcopy(model.blocks).state_dict()
        backward(model, seed)
        optimizer.step()
        for name, value in model.blocks.state_dict().items():
            same = torch.equal(value, before[name])
            assert same == (int(name[0]) in frozen), name
    assert len(seen) > 2


def test_every_drawn_block_below_a_frozen_one_gets_gradient(monkeypatch):
    model = tiny_vit()
    alast = dropping(model)
    monkeypatch.setattr(alast, "_draw", lambda: [0, 2])
    alast.step()
    backward(model, 0)
    for index, block in enumerate(model.blocks):
        for name, parameter in block.named_parameters():
            assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == (index in (0, 2)), name
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0 and model.cls_token.grad.abs().sum() > 0


def test_only_what_was_trainable_at_the_start_is_switched_and_detach_restores_it():
    model = tiny_vit(reg_tokens=1)
    for name, parameter in model.named_parameters():  # as with adapters: one small part of each block trains
        parameter.requires_grad_("attn.proj" in name or name in ("reg_token", "pos_embed", "head.weight"))
    model.blocks[1].mlp.fc1.bias.requires_grad_(True)
    found = {name: p.requires_grad for name, p in model.named_parameters()}
    keys, contents, paths = list(model.state_dict()), [dict(vars(b)) for b in model.blocks], model.blocks[0].attn
    fused = paths.fused_attn
    alast = dropping(model, blocks=2, train_embeddings=False, start_budget=0.5)
    assert list(model.state_dict()) == keys
    for seed in range(4):
        alast.step()
        for name, parameter in model.named_parameters():
            top, index = name.split(".")[0], name.split(".")[1] if "." in name else ""
            switched_off = top in ("reg_token", "pos_embed") or (top == "blocks" and int(index) not in alast.trained)
            assert parameter.requires_grad == (found[name] and not switched_off), name
        backward(model, seed)
    alast.detach()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == found
    assert list(model.state_dict()) == keys and [dict(vars(b)) for b in model.blocks] == contents
    assert not any(b.attn.qkv._forward_hooks for b in model.blocks) and paths.fused_attn == fused
    lengths = []
    model.norm.register_forward_hook(lambda m, a, y: lengths.append(y.shape[1]))
    model.train()(batch(0)[0])
    assert lengths == [18]


def test_embeddings_can_stay_frozen():
    model = tiny_deit(pre_norm=True)
    optimizer = adamw(model)
    alast = ALaST(model, train_embeddings=False)
    embeddings = ("cls_token", "dist_token", "pos_embed", "patch_embed.proj.weight", "norm_pre.weight", "norm_pre.bias")
    before = {name: model.get_parameter(name).detach().clone() for name in embeddings}
    for seed in range(3):
        alast.step(optimizer=optimizer)
        backward(model, seed)
        optimizer.step()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad and not name.startswith("blocks.")}
    assert frozen == set(embeddings)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
    alast.detach()
    assert all(p.requires_grad for p in model.parameters())


def test_an_optimizer_of_what_trains_now_is_refused():
    model = tiny_vit()
    alast = ALaST(model, blocks=2)
    alast.step()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    lacking = [i for i in range(4) if i not in alast.trained]
    with pytest.raises(ConfigError) as error:
        alast.step(optimizer=optimizer)
    assert f"blocks {lacking}" in str(error.value) and "build it from all parameters" in str(error.value)


@pytest.mark.parametrize("optimizer_state", ["keep", "release"])
def test_moments_of_a_frozen_block_are_kept_or_released(optimizer_state, monkeypatch):
    model = tiny_vit()
    alast = dropping(model, optimizer_state=optimizer_state)
    optimizer = adamw(model)
    plan = iter([[0, 1, 2, 3], [0, 3], [0, 3], [0, 1, 2, 3]])
    monkeypatch.setattr(alast, "_draw", lambda: next(plan))
    history = []
    for seed in range(4):
        alast.step(optimizer=optimizer)
        backward(model, seed)
        optimizer.step()
        history.append({name: copy.deepcopy(optimizer.state.get(p, {})) for name, p in model.blocks.named_parameters()})
    first, _, frozen, last = history
    for name in first:
        if name[0] in "03":
            assert last[name]["step"] == 4
        elif optimizer_state == "keep":
            assert torch.equal(frozen[name]["exp_avg"], first[name]["exp_avg"])
            assert torch.equal(frozen[name]["exp_avg_sq"], first[name]["exp_avg_sq"])
            assert frozen[name]["step"] == 1 and last[name]["step"] == 2
        else:
            assert frozen[name] == {} and last[name]["step"] == 1
    assert all(optimizer.state[p] for p in [model.cls_token, model.head.weight])


def test_releasing_moments_needs_the_optimizer():
    alast = ALaST(tiny_vit(), optimizer_state="release")
    with pytest.raises(
        ConfigError, match=r'optimizer_state="release" needs the optimizer: call step\(optimizer=optimizer\)'
    ):
        alast.step()


def test_summary_counts_what_trains():
    model = tiny_vit()
    alast = dropping(model, blocks=1)
    total, block = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.blocks[0].parameters())
    alast.step()
    summary = alast.summary()
    assert summary["parameters"] == total and summary["trainable_parameters"] == total - 3 * block
    assert summary["trained"] == alast.trained and summary["budgets"] == [0.9] * 4


# Tokens


@pytest.mark.parametrize(
    ("budget", "multiple", "patches", "expected"),
    [
        (0.7, 1, 10, 7),
        (0.58, 1, 50, 29),  # 0.58 * 50 is 28.999...
        (0.9, 1, 196, 176),
        (0.5, 1, 1, 1),
        (0.5, 1, 3, 1),
        (1.0, 1, 16, 16),
        (0.5, 8, 16, 7),  # with the CLS token 8, the nearest to 9
        (0.6, 8, 16, 7),
        (0.7, 8, 16, 15),  # 16, the nearest to 12: of two as near the even multiple
        (0.9, 8, 196, 175),
        (0.95, 8, 196, 183),
        (0.99, 8, 196, 191),
        (1.0, 8, 196, 196),  # all of them
        (0.5, 64, 16, 16),  # there are not so many
        (0.1, 64, 196, 63),  # at least one multiple
    ],
)
def test_number_of_kept_patch_tokens(budget, multiple, patches, expected):
    alast = dropping(tiny_vit(), start_budget=budget, min_budget=budget, token_multiple=multiple)
    assert alast.num_keep(0, patches) == expected


@pytest.mark.parametrize("drop_at", ["mid", "block-end"])
def test_budgets_decide_over_the_tokens_and_dropping_switches_it_off(drop_at):
    model = tiny_vit()
    alast = dropping(model, start_budget=0.5, drop_at=drop_at)
    alast.budgets = [0.75, 1.0, 0.5, 0.5]
    lengths = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, a, y: lengths.append(y.shape[1]))
    in_mlp = []
    model.blocks[0].mlp.register_forward_hook(lambda m, a, y: in_mlp.append(y.shape[1]))
    model(batch(0)[0])
    alast.dropping = False
    model(batch(0)[0])
    assert lengths == [13, 13, 7, 4, 17, 17, 17, 17]
    assert in_mlp == [13 if drop_at == "mid" else 17, 17]


def test_forward_features_and_forward_head_are_the_forward():
    models = [tiny_vit(), tiny_vit()]
    for model in models:
        dropping(model, start_budget=0.5).step()
    x, _ = batch(0)
    whole = models[0](x)
    features = models[1].forward_features(x)
    assert features.shape[1] == 2 and torch.equal(models[1].forward_head(features), whole)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("rule", "drop_at"),
    [(rule, at) for rule in RULES for at in get_args(DropAt) if rule != "drop" or at in ("mid", "block-end")],
)
def test_gradient_checkpointing_keeps_the_same_tokens_and_records_once(drop_at, rule, reentrant, monkeypatch):
    monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: reentrant)
    results, calls = [], Counter()
    for checkpointing in (False, True):
        model = tiny_vit(proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2)
        alast = dropping(model, start_budget=0.6, drop_at=drop_at, rule=rule, blocks=2, alpha=0.1)
        model.set_grad_checkpointing(checkpointing)
        model.blocks[1].mlp.register_forward_hook(lambda m, a, y, key=checkpointing: calls.update([key]))
        optimizer = adamw(model)
        for seed in range(3):
            alast.step(optimizer=optimizer)
            optimizer.zero_grad()
            torch.manual_seed(seed)
            loss = backward(model, seed)
            pending = alast.state_dict()["pending"]
            assert len(pending) == 1
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            results.append((loss, pending, alast.summary(), copy.deepcopy(grads)))
            optimizer.step()
    assert calls[True] > calls[False]  # it did recompute
    for plain, recomputed in zip(results[:3], results[3:], strict=True):
        assert recomputed[0] == pytest.approx(plain[0], abs=1e-6)
        assert recomputed[1][0] == pytest.approx(plain[1][0], rel=1e-5)
        assert recomputed[2]["trained"] == plain[2]["trained"]
        assert recomputed[2]["budgets"] == pytest.approx(plain[2]["budgets"], abs=1e-6)
        assert recomputed[3].keys() == plain[3].keys()
        for name, grad in recomputed[3].items():
            assert (grad - plain[3][name]).abs().max() <= 1e-5, name


@pytest.mark.parametrize("settings", [DROPPING, {}])
@pytest.mark.slow
def test_compiling_after_attaching_gives_the_same(settings):
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = tiny_vit(depth=2)
        alast = ALaST(model, **settings | {"blocks": 1, "start_budget": 0.6, "alpha": 0.05})
        optimizer = adamw(model)
        forward = torch.compile(model, backend="eager") if compiled else model
        losses = []
        for step in range(3):
            alast.step(optimizer=optimizer)
            optimizer.zero_grad()
            losses += [backward(forward, 2 * step + micro) for micro in range(2)]
            optimizer.step()
        results.append((losses, alast.state_dict()["deltas"], alast.budgets, alast.trained))
    torch._dynamo.reset()
    for plain, ours in zip(*results, strict=True):
        assert ours == pytest.approx(plain, abs=1e-5)


# Resuming


def train(model, alast, optimizer, steps, first=0):
    log = []
    for step in range(first, first + steps):
        alast.step(optimizer=optimizer)
        optimizer.zero_grad()
        losses = [backward(model, 2 * step + micro) for micro in range(2)]
        optimizer.step()
        log.append((losses, alast.budgets.copy(), alast.trained, alast.state_dict()["deltas"]))
    return log


@pytest.mark.parametrize("draw", ["proportional", "softmax"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(draw):
    options = {"blocks": 2, "draw": draw, "alpha": 0.05, "seed": 5}
    model = tiny_vit()
    alast, optimizer = ALaST(model, **options), adamw(model)
    train(model, alast, optimizer, 3)
    state = json.loads(json.dumps(alast.state_dict()))
    assert len(state["pending"]) == 2  # saved after backward, before the next step
    weights, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = train(model, alast, optimizer, 4, first=3)

    other = tiny_vit(seed=1)
    other.load_state_dict(weights)
    resumed, its_optimizer = ALaST(other, **{**options, "seed": 6}), adamw(other)
    its_optimizer.load_state_dict(moments)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert all(p.requires_grad == (i in state["trained"]) for i in range(4) for p in other.blocks[i].parameters())
    assert train(other, resumed, its_optimizer, 4, first=3) == expected
    assert len({tuple(row[1]) for row in expected}) == 4 and len({tuple(row[2]) for row in expected}) > 1


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_resumed_run_meets_the_flop_target_by_the_same_tokens(micro_batches):
    model, options = tiny_vit(dynamic_img_size=True), {"blocks": 2, "alpha": 0.05, "flops": 0.6}
    alast = dropping(model, **options)
    for step in range(3):
        alast.step()
        for micro in range(micro_batches):
            model(batch(2 * step + micro, size=24)[0])
    other = tiny_vit(dynamic_img_size=True)
    resumed = dropping(other, **options)
    resumed.load_state_dict(json.loads(json.dumps(alast.state_dict())))
    assert resumed.step_budgets == alast.step_budgets != alast.budgets
    for one in (alast, resumed):
        one.step()
    assert resumed.state_dict() == alast.state_dict() and alast.target.num_patches == 36


def test_resuming_between_two_micro_batches_keeps_the_first_ones_deltas():
    model = tiny_vit()
    alast = dropping(model, alpha=0.05)
    backward(model, 0)
    alast.step()
    backward(model, 1)
    alast.dropping = False
    other = tiny_vit()
    resumed = dropping(other, alpha=0.05)
    resumed.load_state_dict(json.loads(json.dumps(alast.state_dict())))
    assert resumed.dropping is False
    for one, its_model in ((alast, model), (resumed, other)):
        backward(its_model, 2)
        one.step()
    assert alast.state_dict() == resumed.state_dict() and alast.budgets != [0.9] * 4


def test_a_state_of_another_depth_is_refused():
    state = ALaST(tiny_vit(depth=2)).state_dict()
    with pytest.raises(ConfigError, match="of a model of 4 blocks, got 2"):
        ALaST(tiny_vit()).load_state_dict(state)


# A FLOP target


def counted(model, seed: int = 0) -> float:
    """FLOPs of a forward and backward pass, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        backward(model, seed)
    model.zero_grad()
    return counter.get_total_flops()


TARGETED = [
    {"blocks": 4},
    {"blocks": 3, "draw": "softmax", "drop_at": "block-end"},
    {"blocks": 3, "draw": "lowest-first", "train_embeddings": False},
    {"blocks": 4, "token_multiple": 2},
    {"blocks": 4, "rule": "merge"},
    {"blocks": 3, "rule": "merge", "drop_at": "block-end"},
]


@pytest.mark.parametrize(
    ("share", "options"),  # merging halves the tokens of a block at most, so that 0.4 is out of its reach
    [(share, options) for share in (0.4, 0.6, 0.7) for options in TARGETED if share > 0.5 or "rule" not in options],
)
@pytest.mark.slow
def test_a_flop_target_is_held_while_the_budgets_move(share, options):
    model = tiny_vit()
    ViT(model).set_attention_paths(["explicit"] * 4)  # torch's counter knows no fused kernel on a CPU
    full = counted(model)
    alast = dropping(model, flops=share, alpha=0.05, **options)
    costs, budgets = [], set()
    for step in range(12):
        alast.step()
        costs.append(counted(model, step) / full)
        budgets.add(tuple(alast.budgets))
        factors = [s / b for s, b in zip(alast.step_budgets, alast.budgets, strict=True) if s < 1]
        assert max(factors) == pytest.approx(min(factors))
    assert sum(costs) / len(costs) == pytest.approx(share, rel=0.03)
    assert len(budgets) > 5


def test_steps_with_all_tokens_leave_the_flop_target_alone():
    model = tiny_vit()
    alast = dropping(model, flops=0.5, blocks=4)
    alast.dropping = False
    alast.step()
    assert alast.step_budgets == alast.budgets == [0.9] * 4 and alast.num_keep(0, 16) == 16


@pytest.mark.parametrize("share", [0.01, 0.95, 1.0])
def test_a_flop_target_out_of_reach_names_what_is_within_it(share):
    model = tiny_vit()
    with pytest.raises(ConfigError) as error:
        dropping(model, flops=share, blocks=3)
    low, high = map(float, re.findall(r"0\.\d+", str(error.value))[:2])
    assert f"flops must be in {low}..{high} for this model with 3 of 4 blocks trained, got {share}" == str(error.value)
    assert not ViT(model).attached
    for reachable in (low, high):
        dropping(model, flops=reachable, blocks=3).detach()
    dropping(model, flops=1.0, blocks=4)


# Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("blocks", value) for value in (-1, 0, 5)],
        *[("start_budget", value) for value in (0, -0.1, 1.01, math.nan)],
        *[("min_budget", value) for value in (0, -0.1, 0.91, math.nan)],
        *[("alpha", value) for value in (-1e-9, math.nan)],
        *[("temperature", value) for value in (0, -1.0, math.nan)],
        *[("token_multiple", value) for value in (0, -8)],
        *[(name, value) for name in ("flops", "time") for value in (0, 1.01, math.nan)],
        *[("draw", "uniform"), ("drop_at", "end"), ("rule", "mix"), ("adapt", "never"), ("optimizer_state", "offload")],
    ],
)
def test_a_setting_out_of_range_is_refused_and_the_model_left_alone(name, value):
    model = tiny_vit()
    with pytest.raises(ConfigError) as error:
        ALaST(model, **{name: value})
    assert str(error.value).startswith(f"{name} must be") and str(error.value).endswith(f"got {value}")
    assert "forward" not in vars(model.blocks[0])
    ALaST(model)


def test_options_and_a_config_are_the_same_thing():
    options = {"blocks": 2, "start_budget": 0.8, "draw": "softmax", "rule": "merge", "full_tail": 0.5}
    one, other = ALaST(tiny_vit(), **options), ALaST(tiny_vit(), AlastConfig(**options))
    assert one.config == other.config == decided(AlastConfig(**options), one.vit)
    assert {name: getattr(one.config, name) for name in options} == options
    assert ALaST(tiny_vit(), AlastConfig(**options), blocks=3).config == replace(one.config, blocks=3)
    with pytest.raises(ConfigError, match=r"^ALaST has no option block, heads; it has: blocks, start_budget, "):
        ALaST(tiny_vit(), block=2, heads=3)


def test_as_a_context_manager_it_detaches_at_the_end_also_by_an_error():
    model = tiny_vit()
    with ALaST(model, blocks=1) as alast:
        alast.step()
        assert sum(all(p.requires_grad for p in block.parameters()) for block in model.blocks) == 1
    assert all(p.requires_grad for p in model.parameters()) and not alast.vit.attached
    with pytest.raises(ZeroDivisionError), ALaST(model):
        raise ZeroDivisionError
    assert not ViT(model).attached


def test_printed_it_says_what_trains():
    model = tiny_vit(embed_dim=128)
    alast = ALaST(model, blocks=3, train_embeddings=False)
    before = str(alast)
    alast.step()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert str(alast) == before == f"ALaST trains {trained / 1e6:.1f} of {total / 1e6:.1f} M parameters, 3 of 4 blocks"


def test_the_tail_needs_to_know_how_far_training_is():
    alast = ALaST(tiny_vit(), full_tail=0.5)
    with pytest.raises(ConfigError, match=r"^full_tail needs .*call step\(progress=\.\.\.\)$"):
        alast.step()
    dropping = []
    for progress in (0.0, 0.49, 0.5, 0.9):
        alast.step(progress=progress)
        dropping.append(alast.dropping)
    assert dropping == [True, True, False, False]


def test_a_model_in_eval_mode_at_the_first_step_is_warned_of_once():
    alast = ALaST(tiny_vit().eval())
    with pytest.warns(SnelloWarning, match=r"in eval mode, in which ALaST does nothing: call its train\(\)"):
        alast.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alast.step()
        ALaST(tiny_vit()).step()


# Data parallelism


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    model = tiny_vit(depth=3)
    rows = watch(model)
    alast = dropping(model, blocks=1, alpha=0.05)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = adamw(model)
    log = []
    for step in range(5):
        alast.step(optimizer=optimizer, process_group=dist.group.WORLD)
        log.append({"budgets": alast.budgets.copy(), "trained": alast.trained, "deltas": alast._deltas})
        optimizer.zero_grad()
        del rows[:]
        for micro in range(2):
            backward(parallel, 100 * rank + 2 * step + micro)
        log[-1]["own"] = [sum(column) / 2 for column in zip(*rows, strict=True)]
        optimizer.step()
    sharded = [_sharded(rank, shard) for shard in (False, True)]
    saved = alast.state_dict(process_group=dist.group.WORLD)
    alone = alast.state_dict() if rank == 0 else None  # would wait for ever if it were collective
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        own = dropping(tiny_vit())
        for seed in range(2):
            own.step()
            backward(own.vit.model, 100 * rank + seed)
    result = {"log": log, "weights": model.state_dict(), "sharded": sharded, "saved": saved, "alone": alone}
    torch.save({**result, "warned": [str(one.message) for one in caught]}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # a gloo thread that lets go of a tensor while the interpreter ends would abort the process


def _sharded(rank: int, shard: bool) -> tuple[dict[str, torch.Tensor], list]:
    """A few steps under FSDP2, attached before the blocks are sharded, or else under DDP."""
    model = tiny_vit(depth=3)
    alast, log = dropping(model, blocks=1, alpha=0.05), []
    forward = model if shard else DistributedDataParallel(model, find_unused_parameters=True)
    if shard:
        mesh = init_device_mesh("cpu", (2,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    for step in range(5):
        alast.step(optimizer=optimizer, process_group=dist.group.WORLD)
        optimizer.zero_grad()
        backward(forward, 100 * rank + step)
        moving = [i for i, block in enumerate(model.blocks) if any(p.grad is not None for p in block.parameters())]
        log.append((alast.trained, moving, alast.budgets.copy()))
        optimizer.step()
    state = {name: value.full_tensor() if shard else value for name, value in model.state_dict().items()}
    return state, log


@pytest.mark.slow
def test_ranks_stay_equal_and_average_their_deltas(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in one["weights"].items():
        assert torch.equal(value, other["weights"][name]), name
    assert one["saved"] == other["saved"] and one["saved"]["pending_samples"] == [8, 8]  # of both ranks
    assert one["alone"]["pending_samples"] == [4, 4] and one["alone"]["budgets"] == one["saved"]["budgets"]
    for rank in (one, other):
        assert (
            len(rank["warned"]) == 1 and "call step(process_group=torch.distributed.group.WORLD)" in rank["warned"][0]
        )
    for rank in (one, other):  # FSDP2 gives what DDP does
        (weights, log), (sharded, its_log) = rank["sharded"]
        for (trained, _, budgets), (its_trained, moving, its_budgets) in zip(log, its_log, strict=True):
            assert trained == its_trained == moving and its_budgets == pytest.approx(budgets, abs=1e-4)
        for name, value in weights.items():
            torch.testing.assert_close(sharded[name], value, rtol=1e-4, atol=1e-6)
    for step, (a, b) in enumerate(zip(one["log"], other["log"], strict=True)):
        assert (a["budgets"], a["trained"], a["deltas"]) == (b["budgets"], b["trained"], b["deltas"])
        assert a["own"] != b["own"]  # their data differ
        if step:
            before = [log[step - 1]["own"] for log in (one["log"], other["log"])]
            assert a["deltas"] == pytest.approx([(x + y) / 2 for x, y in zip(*before, strict=True)], rel=1e-4)
    assert len({tuple(row["trained"]) for row in one["log"]}) > 1
    assert len({tuple(row["budgets"]) for row in one["log"]}) == 4  # the first two steps have nothing to compare
