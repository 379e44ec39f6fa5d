"""Where adapters go, what trains, what is saved and merged, and what is refused."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from conftest import assert_same_run, tiny_deit, tiny_vit, with_method
from helpers.budgets import DROPPING, dropping
from helpers.resuming import stopped_and_resumed

peft = pytest.importorskip("peft")

from snello.config import AlastConfig, EvaluateConfig, FinetuneConfig, LoraConfig  # noqa: E402
from snello.errors import CheckpointError, ConfigError, ModelError  # noqa: E402
from snello.files import load_tensors  # noqa: E402
from snello.finetuning import finetune  # noqa: E402
from snello.inference import evaluate  # noqa: E402
from snello.methods import make_method  # noqa: E402
from snello.methods.alast import ALaST  # noqa: E402
from snello.methods.lora import Adapters, merged_state, target_layers  # noqa: E402
from snello.models import create_model  # noqa: E402
from snello.train.optim import make_optimizer  # noqa: E402
from snello.vit import ViT  # noqa: E402


def tiny_transformers():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    shape = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**shape, intermediate_size=64, num_labels=5)).train()


MODELS = {"timm": tiny_vit, "distilled": tiny_deit, "transformers": tiny_transformers}


def images(n=3):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def logits(model, x):
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def trained(model, config, steps=3, **alast):
    """The model after some steps, and its method."""
    vit = ViT(model)
    method = make_method(vit, FinetuneConfig(method=config, alast=AlastConfig(**alast)))
    optimizer = make_optimizer(vit, lr=1e-2, weight_decay=0.1, device=torch.device("cpu"))
    for step in range(steps):
        method.step(1e-2, optimizer, step / steps)
        logits(model, images()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return method


@pytest.mark.parametrize("kind", MODELS)
def test_fresh_adapters_change_nothing_and_only_adapters_and_head_train(kind):
    model = MODELS[kind]()
    untouched = copy.deepcopy(model)
    Adapters(ViT(model), LoraConfig())
    assert torch.equal(logits(model, images()), logits(untouched, images()))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    heads = {name for name in names if ViT(model).family.is_head(name)}
    assert heads and names - heads == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert all(name.startswith(ViT(model).family.block_prefix) for name in names - heads)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", ["lora", "alast+lora"])
def test_training_moves_adapters_and_head_alone(kind, method):
    model = MODELS[kind]()
    before = copy.deepcopy(model.state_dict())
    trained(model, method)
    moved = 0
    for name, value in model.state_dict().items():
        plain = name.replace(".base_layer.", ".")
        if ".lora_" in name:
            moved += bool(value.any()) and "lora_B" in name
        elif ViT(model).family.is_head(name):
            assert not torch.equal(value, before[plain])
        else:
            assert torch.equal(value, before[plain]), name
    assert moved > 3


def test_alast_draws_whose_adapters_train():
    model = tiny_vit()
    method = trained(model, "alast+lora", steps=0, **DROPPING | {"blocks": 2})
    method.step(1e-3, torch.optim.SGD(model.parameters(), lr=1e-3), 0.0)
    drawn = method.metrics()["trained"]
    trains = {int(n.split(".")[1]) for n, p in model.named_parameters() if n.startswith("blocks.") and p.requires_grad}
    assert trains == set(drawn) and len(drawn) == 2
    lengths = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, y: lengths.append(y.shape[1]))
    model(images())
    assert lengths == [15, 13, 11, 10]  # of 16 patches 14, 12, 10 and 9, and the CLS token


def test_the_attention_that_ranks_tokens_is_that_with_the_adapters():
    """Else tokens would be kept by what the base model looks at."""
    model = tiny_vit()
    vit = ViT(model)
    Adapters(vit, LoraConfig())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_()
    plain = tiny_vit()
    plain.load_state_dict(merged_state(model))
    kept = []
    for one in (model, plain):
        alast = dropping(one, blocks=4, start_budget=0.5)
        alast.step()
        one(images())
        kept.append(list(alast.vit.context.kept.values()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*kept, strict=True))
    assert not torch.equal(kept[0][0], _kept_without_adapters())


def _kept_without_adapters():
    model = tiny_vit()
    alast = dropping(model, blocks=4, start_budget=0.5)
    alast.step()
    model(images())
    return alast.vit.context.kept[0]


@pytest.mark.parametrize("kind", MODELS)
def test_merged_weights_are_the_plain_model(kind):
    model = MODELS[kind]()
    names = set(model.state_dict())
    method = trained(model, "lora")
    expected = logits(model.eval(), images())
    state = merged_state(model)
    assert set(state) == names
    plain = MODELS[kind]()
    plain.load_state_dict(state)
    assert torch.allclose(logits(plain.eval(), images()), expected, atol=1e-5)
    method.detach()
    assert set(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())


TARGETS = [
    (("attention",), ["attn.qkv", "attn.proj"]),
    (("mlp",), ["mlp.fc1", "mlp.fc2"]),
    (("all",), ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]),
    (("proj",), ["attn.proj"]),
    (("qkv", "mlp.fc2"), ["attn.qkv", "mlp.fc2"]),
]


@pytest.mark.parametrize(("wanted", "found"), TARGETS)
def test_targets_are_in_blocks_only(wanted, found):
    vit = ViT(tiny_vit())
    assert target_layers(vit, wanted) == [f"blocks.{i}.{name}" for i in range(4) for name in found]
    Adapters(vit, LoraConfig(target_modules=wanted))
    with_adapters = [name for name, module in vit.model.named_modules() if hasattr(module, "lora_A")]
    assert sorted(with_adapters) == sorted(f"blocks.{i}.{name}" for i in range(4) for name in found)


def test_block_one_is_not_block_eleven():
    vit = ViT(tiny_vit(depth=12))
    Adapters(vit, LoraConfig(target_modules=("qkv",)))
    assert sum(hasattr(module, "lora_A") for module in vit.model.modules()) == 12


def test_presets_for_transformers():
    vit = ViT(tiny_transformers())
    first = [name for name in target_layers(vit, ("attention",)) if ".0." in name]
    assert first == [f"vit.layers.0.attention.{name}_proj" for name in "qkvo"]


def test_a_target_that_matches_nothing_lists_what_there_is():
    said = (
        r"--lora.target-modules query matches no linear layer of the blocks; there are: attention, mlp, all, "
        r"attn.qkv, attn.proj, mlp.fc1, mlp.fc2"
    )
    with pytest.raises(ConfigError, match=said):
        target_layers(ViT(tiny_vit()), ("qkv", "query"))


def test_lora_after_alast_is_refused():
    model = tiny_vit()
    ALaST(model)
    with pytest.raises(ModelError, match="apply LoRA first, then attach"):
        Adapters(ViT(model), LoraConfig())
    other = tiny_vit()
    Adapters(ViT(other), LoraConfig())
    with pytest.raises(ModelError, match="has adapters already"):
        Adapters(ViT(other), LoraConfig())


def test_peft_after_alast_is_found_at_the_next_step():
    model = tiny_vit()
    alast = ALaST(model)
    alast.step()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv"]), model)
    with pytest.raises(ModelError, match="given adapters after ALaST was attached: apply peft first, then attach"):
        alast.step()


def test_a_peft_model_of_ones_own_is_seen_through():
    model = peft.get_peft_model(tiny_vit(), peft.LoraConfig(target_modules=["qkv"], modules_to_save=["head"]))
    alast = ALaST(model, blocks=2)
    alast.step()
    drawing = {
        int(n.split("blocks.")[1].split(".")[0])
        for n, p in model.named_parameters()
        if ".lora_" in n and p.requires_grad
    }
    assert drawing == set(alast.trained)
    model(images()).sum().backward()
    alast.detach()


# Runs


@pytest.fixture
def lora(small):
    return with_method(small, method="alast+lora", alast=AlastConfig(alpha=5.0, blocks=3), lora=LoraConfig(r=4))


@pytest.mark.slow
def test_a_run_resumes_exactly_and_its_weights_are_merged(lora, tmp_path, monkeypatch):
    whole = replace(lora, out=tmp_path / "whole")
    summary = finetune(whole)
    cut = replace(lora, out=tmp_path / "cut", checkpoint_steps=3)
    stopped_and_resumed(cut, monkeypatch, 5)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    state, _ = load_tensors(tmp_path / "whole" / "model.safetensors")
    assert set(state) == set(create_model("test_vit", "none", 3, 48).state_dict())
    result = evaluate(EvaluateConfig(run=tmp_path / "whole", workers=0, device="cpu"))
    assert result["accuracy"] == pytest.approx(summary.accuracy)
    assert (tmp_path / "whole" / "budgets.png").exists() and (tmp_path / "whole" / "alast.json").exists()


def test_peft_reads_the_adapters_of_a_run(lora, tmp_path):
    base = create_model("test_vit", "none", 3, 48)
    from safetensors.torch import save_file

    save_file(base.state_dict(), tmp_path / "base.safetensors")
    finetune(replace(lora, weights=str(tmp_path / "base.safetensors")))
    merged = create_model("test_vit", str(lora.out / "model.safetensors"), 3, 48).eval()
    adapted = peft.PeftModel.from_pretrained(base, lora.out / "adapter").eval()
    x = torch.randn(2, 3, 48, 48)
    assert torch.allclose(adapted(x), merged(x), atol=1e-5)
    assert json.loads((lora.out / "adapter" / "adapter_config.json").read_text())["r"] == 4


def test_starting_from_adapters(lora, tmp_path):
    model = tiny_vit()
    first = Adapters(ViT(model), LoraConfig(r=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_()
    first.save(tmp_path / "adapter")
    again = tiny_vit()
    Adapters(ViT(again), LoraConfig(r=4, start=tmp_path / "adapter"))
    assert torch.equal(again(images()), model(images()))
    with pytest.raises(CheckpointError, match="belong to other weights than those of this model"):
        Adapters(ViT(tiny_vit(seed=1)), LoraConfig(r=4, start=tmp_path / "adapter"))
    with pytest.raises(ConfigError, match=r"--lora.r must be that of the adapters in .*: 4"):
        Adapters(ViT(tiny_vit()), LoraConfig(r=8, start=tmp_path / "adapter"))
    with pytest.raises(ConfigError, match=r"--lora.target-modules must be those of the adapters"):
        Adapters(ViT(tiny_vit()), LoraConfig(r=4, target_modules=("qkv",), start=tmp_path / "adapter"))
    with pytest.raises(CheckpointError, match=r"--lora.start .* holds no adapters"):
        Adapters(ViT(tiny_vit()), LoraConfig(start=tmp_path / "nothing"))
    other_classes = tiny_vit(num_classes=3)
    with torch.no_grad():
        for (name, ours), theirs in zip(
            other_classes.state_dict().items(), tiny_vit().state_dict().values(), strict=True
        ):
            if not name.startswith("head"):
                ours.copy_(theirs)
    Adapters(ViT(other_classes), LoraConfig(r=4, start=tmp_path / "adapter"))


def test_settings_of_lora_need_the_method():
    with pytest.raises(ConfigError, match=r"^--lora\.r has no effect without --method lora or alast\+lora$"):
        FinetuneConfig(lora=LoraConfig(r=4))
