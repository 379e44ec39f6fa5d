"""What the costs are: counted on small cases that can be counted by hand."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from snello.config import AlastConfig, FinetuneConfig
from snello.measure.process import Process, make_request
from snello.measure.step import (
    LiveBytes,
    Memory,
    TrainingStep,
    adamw_bytes,
    peak_memory,
    resident_memory,
    saved_bytes,
    storages_of,
)

CPU = torch.device("cpu")


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the optimizer's state takes now."""
    values = [value for entry in optimizer.state.values() for value in entry.values()]
    return sum(value.untyped_storage().nbytes() for value in values)


def make_step(method: str = "full", batch_size: int = 2, **settings) -> TrainingStep:
    names = ("alast", "grad_checkpointing", "model", "image_size", "exact_savings")
    chosen = {name: settings.pop(name) for name in names if name in settings}
    config = FinetuneConfig(**{"model": "test_vit", "weights": "none", "image_size": 48, "method": method, **chosen})
    options = {"num_classes": 3, "device": CPU, "precision": "fp32", "attention": "explicit"}
    return TrainingStep(config, **{**options, "batch_size": batch_size, **settings})


# -------------------------------------------------------------------------------------------------- bytes for backward


def test_linear_and_relu():
    """Linear keeps its input, ReLU its output: two storages, parameters apart."""
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
    x = torch.randn(7, 3)
    assert saved_bytes(lambda: model(x).sum(), storages_of(model.parameters())) == 4 * (7 * 3 + 7 * 5)


def test_a_storage_that_is_kept_twice_counts_once():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))  # keeps ReLU's output too
    x = torch.randn(7, 3)
    assert saved_bytes(lambda: model(x).sum(), storages_of(model.parameters())) == 4 * (7 * 3 + 7 * 5)
    a = torch.randn(10, requires_grad=True)
    assert saved_bytes(lambda: (a * a).sum(), set()) == 40
    b = torch.randn(4, 6, requires_grad=True)
    assert saved_bytes(lambda: (b @ b.t()).sum(), set()) == 4 * 24  # a view is its storage


def test_what_autograd_gives_up_on_the_way_does_not_count():
    a, b = torch.randn(10, requires_grad=True), torch.randn(7, requires_grad=True)

    def forward() -> torch.Tensor:
        (a * a).sum()
        return (b * b).sum()

    assert saved_bytes(forward, set()) == 28


def test_parameters_are_left_out_only_if_asked():
    model = nn.Linear(3, 5, bias=False)
    x = torch.randn(7, 3, requires_grad=True)  # for its gradient, Linear keeps its weight too
    assert saved_bytes(lambda: model(x).sum(), storages_of(model.parameters())) == 4 * 7 * 3
    assert saved_bytes(lambda: model(x).sum(), set()) == 4 * (7 * 3 + 5 * 3)


def test_a_slice_counts_with_its_whole_storage():
    """That is what stays in memory."""
    x = torch.randn(100, requires_grad=True)
    assert saved_bytes(lambda: x[:10].square().sum(), set()) == 400


def test_nothing_is_kept_without_gradients():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU()).requires_grad_(False)
    assert saved_bytes(lambda: model(torch.randn(2, 3)).sum(), storages_of(model.parameters())) == 0


def test_half_precision_counts_half():
    x = torch.randn(16, dtype=torch.bfloat16, requires_grad=True)
    assert saved_bytes(lambda: x.square().sum(), set()) == 32


def test_counting_leaves_nothing_behind():
    """ReLU keeps its own output, and a hook that hands that back as it is makes a cycle that is never collected."""
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
    left: list[StorageWeakRef] = []

    def forward():
        y = model(torch.randn(7, 3))
        left.append(StorageWeakRef(y.untyped_storage()))
        return y.sum()

    saved_bytes(forward, storages_of(model.parameters()))
    gc.collect()
    assert left[0].expired()


# --------------------------------------------------------------------------------------------------------- optimizer


def test_optimizer_bytes_of_adamw():
    """Two float32 moments per parameter and a float32 step count per tensor."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(1, 3)).sum().backward()
    optimizer.step()
    assert adamw_bytes(model.parameters()) == held_bytes(optimizer) == 8 * (3 * 5 + 5 + 5 * 2 + 2) + 4 * 4


@pytest.mark.parametrize(("method", "blocks"), [("full", 6), ("head", 0), ("alast", 2)])
def test_optimizer_and_trainable_parameters_of_a_method(method, blocks):
    options = {"alast": AlastConfig(blocks=2, draw="lowest-first")} if method == "alast" else {}
    step = make_step(method, **options)
    step.run()
    costs = step.costs(draws=1)
    named = dict(step.model.named_parameters())
    in_block = [p for name, p in named.items() if name.startswith("blocks.5.")]
    head = [named["head.weight"], named["head.bias"]]
    outside = [p for name, p in named.items() if not name.startswith("blocks.")]
    trained = head if method == "head" else in_block * blocks + outside
    assert costs.trainable_parameters == sum(p.numel() for p in trained)
    assert costs.optimizer_bytes == 8 * sum(p.numel() for p in trained) + 4 * len(trained) == held_bytes(step.optimizer)
    assert costs.gradient_bytes == 4 * sum(p.numel() for p in trained)
    assert costs.weight_bytes == 4 * sum(p.numel() for p in named.values())


@pytest.mark.parametrize("optimizer_state", ["keep", "release"])
def test_optimizer_state_that_is_held_at_once(optimizer_state):
    """Kept, it grows to that of all blocks; released, it stays that of the blocks drawn."""
    step = make_step("alast", alast=AlastConfig(blocks=2, optimizer_state=optimizer_state))
    most = 0
    for _ in range(12):
        step.run()
        most = max(most, held_bytes(step.optimizer))
    costs = step.costs(draws=1)
    in_block = list(step.vit.blocks[0].parameters())
    outside = [p for name, p in step.model.named_parameters() if not name.startswith("blocks.")]
    blocks = 6 if optimizer_state == "keep" else 2
    assert most == costs.optimizer_bytes == blocks * adamw_bytes(in_block) + adamw_bytes(outside)
    assert costs.gradient_bytes == 4 * sum(p.numel() for p in in_block * 2 + outside)


# ------------------------------------------------------------------------------------------------- where memory goes


def test_live_bytes_from_birth_to_death():
    with LiveBytes() as live:
        a = torch.ones(1000)
        b = a + 1  # 8 000 bytes live
        view = b[:10]
        del a
        c = view * 2  # 40 more
        b.add_(1)
        del b, view
        d = torch.zeros(500)
    assert live.peak == 8000 and c.numel() + d.numel() == 510


def test_working_memory_of_checkpointing_and_of_the_head():
    """What is computed again for one block, or passes through a frozen model, is neither saved nor a gradient."""
    pytest.importorskip("peft")
    plain = make_step("lora", batch_size=64).memory()
    checkpointed = make_step("lora", batch_size=64, grad_checkpointing=True).memory()
    assert checkpointed.saved_bytes < plain.saved_bytes / 3
    assert checkpointed.working_bytes > plain.saved_bytes / 6
    assert checkpointed.total_bytes < plain.total_bytes
    head = make_step("head", batch_size=64).memory()
    assert head.working_bytes > head.saved_bytes
    assert head.total_bytes == sum(vars(head).values())


@pytest.mark.parametrize("method", ["full", "alast", "head", "lora", "alast+lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("grad_checkpointing", [False, True])
@pytest.mark.slow
def test_memory_without_data_is_that_of_a_real_step(method, precision, grad_checkpointing):
    if "lora" in method:
        pytest.importorskip("peft")
    options = {"precision": precision, "grad_checkpointing": grad_checkpointing}
    estimated, real = (make_step(method, **options, without_data=fake) for fake in (True, False))
    memories = [estimated.memory() for _ in range(2)]
    assert memories == [real.memory() for _ in range(2)], "again and again, in the same draws"
    assert memories[0].saved_bytes > 0 and memories[0].gradient_bytes > 0


def test_memory_without_data_of_a_transformers_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.ViTConfig(**shape, image_size=32, patch_size=8).save_pretrained(tmp_path)
    for method in ("full", "alast"):
        options = {"model": str(tmp_path), "image_size": None}
        estimated, real = (make_step(method, **options, without_data=fake).memory() for fake in (True, False))
        assert estimated == real


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize(("method", "options"), [("full", []), ("alast", []), ("full", ["--grad-checkpointing"])])
@pytest.mark.slow
def test_counted_memory_is_near_the_peak_of_a_process(method, options):
    """On a model of DeiT-T's size, in a process of its own."""
    config = FinetuneConfig(
        model="deit_tiny_patch16_224", weights="none", method=method, grad_checkpointing=bool(options), batch_size=8
    )
    request = make_request(config, num_classes=10, device="cpu", precision="fp32", attention="explicit")
    with Process(request) as process:
        process.ask("step")
        process.ask("step")
        counted = process.ask("memory")
    peak = counted.pop("peak_memory_bytes")
    counted.pop("process_bytes")
    assert 0.85 < Memory(**counted).total_bytes / peak < 1.15


# ------------------------------------------------------------------------------------------------------------- FLOPs


def multiply_adds(tokens: int, dim: int, patch: int, classes: int) -> dict[str, int]:
    """Multiply-adds of one picture forward, in the matrix products and the convolution, the MLP apart."""
    patches = tokens - 1
    return {
        "patch_embed": patches * dim * 3 * patch * patch,
        "qkv": tokens * dim * 3 * dim,
        "attention": 2 * tokens * tokens * dim,
        "proj": tokens * dim * dim,
        "head": dim * classes,
    }


def test_flops_of_full_fine_tuning():
    """Backward costs twice the forward, less the gradient for the pictures."""
    step = make_step(batch_size=2, exact_savings=False)
    model = step.model
    tokens, dim, depth = step.vit.num_patches + step.vit.num_prefix_tokens, step.vit.embed_dim, step.vit.depth
    hidden = model.blocks[0].mlp.fc1.out_features
    counts = multiply_adds(tokens, dim, model.patch_embed.patch_size[0], 3)
    block = counts["qkv"] + counts["attention"] + counts["proj"] + 2 * tokens * dim * hidden
    forward = 2 * (counts["patch_embed"] + depth * block + counts["head"])
    expected = 3 * forward - 2 * counts["patch_embed"]
    assert step.costs(draws=2).flops_per_sample == expected


def test_flops_of_full_fine_tuning_with_exact_savings():
    """Of the last block the keys and values are of all tokens, the rest of the CLS token alone."""
    plain, saving = (make_step(batch_size=2, exact_savings=on) for on in (False, True))
    vit = saving.vit
    tokens, dim, hidden = vit.num_patches + 1, vit.embed_dim, saving.model.blocks[0].mlp.fc1.out_features
    spared = (tokens - 1) * (2 * dim * dim + 2 * dim * hidden + 2 * tokens * dim)
    costs = [step.costs(draws=1) for step in (plain, saving)]
    assert costs[0].flops_per_sample - costs[1].flops_per_sample == 3 * 2 * spared
    assert costs[1].saved_bytes_per_sample < 0.8 * costs[0].saved_bytes_per_sample


@pytest.mark.parametrize("attention", ["explicit", "fused"])
def test_flops_do_not_depend_on_the_attention_path(attention):
    step = make_step(attention=attention)
    assert step.costs(draws=1).flops_per_sample == make_step().costs(draws=1).flops_per_sample
    assert step.vit.attention_paths == [attention] * 6  # and counting leaves it as it was


def test_flops_of_the_head_alone():
    step = make_step("head")
    full = make_step().costs(draws=1)
    costs = step.costs(draws=1)
    head = 2 * step.vit.embed_dim * 3
    forward = (full.flops_per_sample + 2 * 9 * step.vit.embed_dim * 3 * 16 * 16) / 3
    assert costs.flops_per_sample == pytest.approx(forward + head)  # the gradient of the weight, none for the input
    assert costs.saved_bytes_per_sample < 0.05 * full.saved_bytes_per_sample


def test_counts_per_sample_do_not_depend_on_the_batch():
    small, large = (make_step(batch_size=size).costs(draws=1) for size in (2, 8))
    assert small.flops_per_sample == large.flops_per_sample
    assert small.saved_bytes_per_sample == pytest.approx(large.saved_bytes_per_sample, rel=0.02)


def test_alast_costs_less_and_its_budgets_count():
    full = make_step().costs(draws=1)
    previous = full
    for budget in (0.9, 0.5):
        alast = make_step("alast", alast=AlastConfig(blocks=3, start_budget=budget, min_budget=budget)).costs(draws=4)
        assert alast.flops_per_sample < previous.flops_per_sample
        assert alast.saved_bytes_per_sample < previous.saved_bytes_per_sample
        previous = alast


@pytest.mark.slow
def test_state_of_a_run_is_what_is_measured():
    start = make_step("alast", alast=AlastConfig(min_budget=0.2))
    state = start.method.state_dict() | {"budgets": [0.2] * 6}
    low = make_step("alast", alast=AlastConfig(min_budget=0.2), state=state)
    assert low.costs(draws=4).flops_per_sample < start.costs(draws=4).flops_per_sample
    for _ in range(3):
        low.run()
    assert low.method.metrics()["budgets"] == [0.2] * 6, "budgets must not move while they are measured"


def test_steps_are_real_but_small():
    step = make_step()
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    assert step.run() > 0
    after = step.model.state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    assert max((value - after[name]).abs().max().item() for name, value in before.items()) < 1e-5
    assert all(p.grad is None for p in step.model.parameters())


def test_counting_changes_no_weights():
    step = make_step()
    step.run()
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    step.costs(draws=2)
    assert all(torch.equal(value, before[name]) for name, value in step.model.state_dict().items())
    assert all(p.grad is None for p in step.model.parameters())


def test_memory_of_this_process():
    assert peak_memory(CPU) >= resident_memory(CPU) > 10 * 2**20
    held = torch.ones(16 * 2**20)  # 64 MiB
    assert resident_memory(CPU) >= 64 * 2**20 and peak_memory(CPU) >= 64 * 2**20
    del held


def test_config_is_not_changed():
    config = FinetuneConfig(model="test_vit", weights="none", image_size=48, method="alast")
    before = replace(config)
    TrainingStep(config, num_classes=3, batch_size=1, device=CPU, precision="fp32", attention="explicit")
    assert config == before
