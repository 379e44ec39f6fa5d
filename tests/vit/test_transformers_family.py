"""transformers' models through the same battery as timm's: parity, dropping, scores, cut, refusals, real runs."""

import copy
import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import assert_same_run
from helpers.budgets import dropping
from helpers.resuming import stopped_and_resumed
from helpers.vits import assert_same, run

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from snello.config import AlastConfig, EvaluateConfig, SplitConfig  # noqa: E402
from snello.errors import ModelError  # noqa: E402
from snello.finetuning import finetune  # noqa: E402
from snello.inference import evaluate  # noqa: E402
from snello.methods.alast import ALaST  # noqa: E402
from snello.models import create_model, preprocessing  # noqa: E402
from snello.vit import ViT, logits_of  # noqa: E402

SHAPE = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
MLP = {"intermediate_size": 64}
KINDS = {
    "vit": (ViTConfig, ViTForImageClassification, MLP),
    "vit-dropout": (
        ViTConfig,
        ViTForImageClassification,
        MLP | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "qkv_bias": False},
    ),
    "deit": (DeiTConfig, DeiTForImageClassification, MLP),
    "deit-teacher": (DeiTConfig, DeiTForImageClassificationWithTeacher, MLP),
    "dinov2": (Dinov2Config, Dinov2ForImageClassification, {"layerscale_value": 0.5}),
    "dinov2-swiglu-droppath": (
        Dinov2Config,
        Dinov2ForImageClassification,
        {"use_swiglu_ffn": True, "drop_path_rate": 0.2},
    ),
    "registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification, {"num_register_tokens": 2}),
}
PREFIX = {"deit": 2, "deit-teacher": 2, "registers": 3}
PATHS = ["fused", "explicit"]


def make(kind, path="fused"):
    config, model, options = KINDS[kind]
    torch.manual_seed(0)
    made = model(config(**SHAPE, num_labels=5, **options))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    vit = ViT(made)
    vit.set_attention_paths([path] * vit.depth)
    assert vit.attention_paths == [path] * 4
    return made.train()


def images(n=3):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def folder(tmp_path):
    """A model's folder, as `save_pretrained` makes it."""

    def save(kind, processor=None):
        path = tmp_path / kind
        make(kind).save_pretrained(path)
        if processor is not None:
            (path / "preprocessor_config.json").write_text(json.dumps(processor))
        return path

    return save


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_full_budget_changes_nothing_in_training(kind, path):
    model = make(kind, path)
    untouched = copy.deepcopy(model)
    alast = ALaST(model, blocks=4, start_budget=1.0)
    alast.step()
    assert_same(model, untouched, images())
    assert [len(changes) for changes in alast._records] == [4]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_eval_mode_changes_nothing_and_detach_restores_everything(kind, path):
    model = make(kind, path).eval()
    untouched, before = copy.deepcopy(model), model.config.to_json_string()
    configs = [block.attention.config for block in ViT(model).blocks]
    alast = ALaST(model, blocks=4, start_budget=0.5)
    assert_same(model, untouched, images())
    alast.detach()
    assert [block.attention.config for block in ViT(model).blocks] == configs
    assert model.config.to_json_string() == before
    assert_same(model.train(), untouched.train(), images())


@pytest.mark.parametrize("drop_at", ["mid", "block-end"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "dropout" not in kind])
def test_tokens_that_stay_are_those_with_most_attention_from_the_cls_token(kind, path, drop_at):
    """Against the whole softmax matrix that transformers itself gives out."""
    model = make(kind, path)
    prefix = PREFIX.get(kind, 1)
    eager = copy.deepcopy(model)
    ViT(eager).set_attention_paths(["explicit"] * 4)
    seen = []
    ViT(eager).blocks[0].attention.register_forward_hook(lambda m, args, out: seen.append(out[1]))
    eager(images())
    expected = seen[0].mean(1)[:, 0, prefix:].topk(8).indices.sort(1).values + prefix
    alast = dropping(model, blocks=4, start_budget=0.5, drop_at=drop_at)
    alast.step()
    model(images())
    kept = alast.vit.context.kept
    assert torch.equal(kept[0][:, :prefix], torch.arange(prefix).expand(3, -1))
    assert torch.equal(kept[0][:, prefix:], expected)
    assert [kept[block].shape[1] - prefix for block in range(4)] == [8, 4, 2, 1]


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_the_block_that_drops_is_the_block_on_fewer_tokens(kind):
    """`mid`: attention sees all tokens, the MLP those that stay."""
    model = make(kind)
    alast = dropping(model, blocks=4, start_budget=0.5, drop_at="mid")
    adapter = alast.vit.adapters[1]
    x = torch.randn(3, 9, 32)
    y = adapter.block(x)
    whole = adapter.attend(x)
    index = alast.vit.context.kept[1].unsqueeze(-1).expand(-1, -1, 32)
    assert torch.allclose(y, adapter.feed(whole.gather(1, index)), atol=1e-6)


def test_drawn_blocks_train_and_frozen_ones_do_not():
    model = make("vit")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    alast = ALaST(model, blocks=2)
    for _ in range(3):
        alast.step()
        before = copy.deepcopy(model.state_dict())
        run(model, images())
        optimizer.step()
        optimizer.zero_grad()
        after = model.state_dict()
        for index in range(4):
            names = [name for name in after if name.startswith(f"vit.layers.{index}.")]
            moved = [name for name in names if not torch.equal(before[name], after[name])]
            assert moved == (names if index in alast.trained else [])


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_gradient_checkpointing_recomputes_the_same(kind):
    model = make(kind)
    alast = ALaST(model, blocks=4, start_budget=0.5)
    alast.step()
    plain = run(model, images())
    ViT(model).set_grad_checkpointing(True)
    checkpointed = run(model, images())
    assert torch.equal(plain[0], checkpointed[0])
    for name, grad in plain[1].items():
        assert torch.allclose(grad, checkpointed[1][name], atol=1e-6), name
    assert [len(changes) for changes in alast._records] == [4, 4]  # one per forward, none for what was computed again


def test_two_models_of_one_config_do_not_see_each_other():
    config = ViTConfig(**SHAPE, **MLP, num_labels=5)
    one, other = (ViTForImageClassification(config).train() for _ in range(2))
    alast = ALaST(one, blocks=4, start_budget=0.5)
    alast.step()
    other(images())
    assert alast._records == []
    assert all(block.attention.config is config for block in ViT(other).blocks)


@pytest.mark.parametrize("path", PATHS)
def test_another_vit_of_the_model_changes_paths_without_ending_the_observation(path):
    model = make("vit", "explicit" if path == "fused" else "fused")
    alast = dropping(model, blocks=4, start_budget=0.5)
    other = ViT(model)
    other.set_attention_paths([path] * other.depth)
    assert other.attention_paths == ViT(model).attention_paths == [path] * 4
    alast.step()
    run(model, images())
    assert [kept.shape[1] - 1 for kept in alast.vit.context.kept.values()] == [8, 4, 2, 1]
    alast.detach()
    assert ViT(model).attention_paths == [path] * 4
    assert {layer.attention.config._attn_implementation for layer in model.vit.layers} == {
        "sdpa" if path == "fused" else "eager"
    }


def test_two_vits_look_at_the_same_attention():
    model = make("vit")
    config, one, other = model.vit.layers[1].attention.config, ViT(model), ViT(model)
    one.watch(1)
    other.watch(1)
    run(model, images())
    assert torch.equal(one.cls_attention(1), other.cls_attention(1))
    alast = dropping(model, blocks=4, start_budget=0.5)
    alast.step()
    run(model, images())
    assert one.cls_attention(1).shape == (3, 9)
    alast.detach()
    run(model, images())
    assert torch.equal(one.cls_attention(1), other.cls_attention(1))
    assert model.vit.layers[1].attention.config is not config
    assert model.vit.layers[0].attention.config is model.config


def test_a_model_under_observation_can_be_freed():
    model = make("vit")
    alast, watching = ALaST(model), ViT(model)
    watching.watch(1)
    run(model, images())
    gone = weakref.ref(model.vit.layers[1].attention)
    del model, alast, watching
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("head_below", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "drop" not in kind])
def test_the_parts_of_a_cut_are_the_whole(kind, head_below):
    model = make(kind)
    lower, upper = ViT(model).cut(2, head_below=head_below)
    features = upper.features(upper.tokens(lower.tokens(images())))
    assert features.shape[1:] == upper.features_shape
    head = lower if head_below else upper
    assert torch.allclose(head.head(features), model(images()).logits, atol=1e-6)
    names = [*lower.model.state_dict(), *upper.model.state_dict()]
    assert sorted(names) == sorted(model.state_dict())
    assert ViT(model).layer_of(upper.family.block_prefix + "2.mlp.fc1.weight") == upper.layer_of(
        upper.family.block_prefix + "2.mlp.fc1.weight"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_told_apart(kind):
    vit = ViT(make(kind))
    layers = [vit.layer_of(name) for name, _ in vit.model.named_parameters()]
    assert set(layers) == {0, 1, 2, 3, 4, 5}
    embeddings, heads = list(vit.embedding_parameters()), list(vit.head_parameters())
    assert sum(layer == 0 for layer in layers) == len(embeddings) and heads
    flat = [name for name, p in vit.model.named_parameters() if not vit.decays(name, p) and p.ndim > 1]
    assert all(name.rsplit(".", 1)[1].endswith(("token", "tokens", "embeddings")) for name in flat) and flat


@pytest.mark.parametrize("wrapper", ["timm", "bare", "swin"])
def test_other_models(wrapper):
    if wrapper == "timm":
        config = transformers.TimmWrapperConfig(architecture="test_vit", num_labels=3)
        model = transformers.TimmWrapperForImageClassification(config)
        assert ViT(model).model is model.timm_model
        return
    if wrapper == "bare":
        with pytest.raises(ModelError, match="model ViTModel has no classification head: load it with"):
            ALaST(ViTModel(ViTConfig(**SHAPE, **MLP)))
        return
    config = SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1], num_heads=[1], window_size=2)
    with pytest.raises(ModelError, match=r"model SwinForImageClassification is not supported; supported: .*DINOv2"):
        ALaST(SwinForImageClassification(config))


# By name


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_folder_gives_its_own_weights_and_a_new_head(folder, prefix):
    path = folder("vit")
    original = make("vit").eval()
    model = create_model(f"{prefix}{path}", "pretrained", 5).eval()
    assert torch.equal(logits_of(model(images())), original(images()).logits)
    other = create_model(f"{prefix}{path}", "pretrained", 3)
    assert other.classifier.weight.shape == (3, 32)
    assert torch.equal(other.vit.embeddings.cls_token, original.vit.embeddings.cls_token)
    random = create_model(f"{prefix}{path}", "none", 3)
    assert not torch.equal(
        random.vit.layernorm.weight + random.vit.layers[0].mlp.fc1.weight[0, 0], original.vit.layernorm.weight
    )


def test_the_image_processor_says_how_pictures_are_wanted(folder):
    processor = {
        "size": {"shortest_edge": 20},
        "do_center_crop": True,
        "crop_size": {"height": 16, "width": 16},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "resample": 2,
    }
    pre = preprocessing(create_model(str(folder("vit", processor)), "pretrained", 3))
    assert (pre.size, pre.crop_pct, pre.interpolation) == (16, 0.8, "bilinear")
    assert pre.mean == (0.1, 0.2, 0.3) and pre.std == (0.4, 0.5, 0.6)
    pre = preprocessing(create_model(str(folder("deit")), "pretrained", 3))
    assert (pre.size, pre.crop_pct, pre.mean) == (16, 1.0, (0.5, 0.5, 0.5))


@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2", "registers"])
def test_another_size_resamples_the_positions(folder, kind):
    path = folder(kind)
    model = create_model(str(path), "pretrained", 5, 24).eval()
    assert ViT(model).num_patches == 36 and preprocessing(model).size == 24
    x = torch.randn(2, 3, 24, 24)
    own = make(kind).eval()
    if kind.startswith("dinov2") or kind == "registers":
        expected = own(x).logits
    else:
        expected = own(x, interpolate_pos_encoding=True).logits
    assert (logits_of(model(x)) - expected).abs().max() < 0.2 * expected.abs().max()  # other resampling, alike


def test_weights_of_a_file_or_folder(folder):
    path = folder("vit")
    for weights in (path, path / "model.safetensors"):
        model = create_model(f"hf:{path}", str(weights), 5).eval()
        assert torch.equal(model(images()).logits, make("vit").eval()(images()).logits)
    with pytest.raises(ModelError, match=r"model.safetensors do not fit the model: no dinov2|no vit"):
        create_model(str(path), str(folder("dinov2")), 5)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "hf:google/vit-base-patch16-224",
            r"model hf:google/vit-base-patch16-224 could not be loaded \(.*\); offline\? on a machine with a "
            r"connection run `hf download google/vit-base-patch16-224 --local-dir FOLDER`, copy the folder",
        ),
        ("hf:", "the name of a model is missing in 'hf:'"),
    ],
)
@pytest.mark.parametrize("weights", ["pretrained", "none"])
def test_offline_and_not_in_the_cache_is_one_line(name, said, weights, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=said) as error:
        create_model(name, weights, 3)
    assert "\n" not in str(error.value)


def test_folders_that_cannot_be_used(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty holds no model of transformers"):
        create_model(str(tmp_path / "empty"), "pretrained", 3)
    config = SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1], num_heads=[1], window_size=2)
    SwinForImageClassification(config).save_pretrained(tmp_path / "swin")
    with pytest.raises(ModelError, match="swin is a swin, which is not supported; supported: "):
        create_model(str(tmp_path / "swin"), "pretrained", 3)
    path = folder("vit")
    with pytest.raises(ModelError, match="must be a multiple of its patch size 4, got 18"):
        create_model(str(path), "pretrained", 3, 18)
    (path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"the weights in .* could not be loaded"):
        create_model(str(path), "pretrained", 3)


def test_weights_that_lack_something_are_refused(folder):
    from safetensors.torch import load_file, save_file

    path = folder("vit")
    state = load_file(path / "model.safetensors")
    del state["vit.layernorm.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"do not fit the model: no vit.layernorm.weight of its size"):
        create_model(str(path), "pretrained", 3)


# Runs


@pytest.fixture
def run_config(small, folder):
    return replace(
        small,
        model=f"hf:{folder('vit')}",
        weights="pretrained",
        image_size=None,
        method="alast",
        alast=AlastConfig(blocks=2, alpha=5.0),
    )


def test_a_run_resumes_exactly_and_needs_its_folder_no_more(run_config, tmp_path, monkeypatch):
    import shutil

    whole = replace(run_config, out=tmp_path / "whole")
    summary = finetune(whole)
    cut = replace(run_config, out=tmp_path / "cut", checkpoint_steps=3)
    stopped_and_resumed(cut, monkeypatch, 5)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(run_config.model.removeprefix("hf:"))
    result = evaluate(EvaluateConfig(run=tmp_path / "whole", workers=0, device="cpu"))
    assert result["accuracy"] == pytest.approx(summary.accuracy)


def test_cut_in_one_process_equals_the_whole(run_config, tmp_path):
    plain = replace(run_config, method="full", alast=AlastConfig())
    whole = finetune(replace(plain, out=tmp_path / "whole"))
    split = SplitConfig(cut=2, codec="none", eval_codec="none")
    halves = finetune(replace(plain, out=tmp_path / "halves", split=split))
    assert halves.accuracy == whole.accuracy


def test_default_run_folder_has_no_slashes(run_config):
    from snello.runs.folder import RunFolder

    assert RunFolder.of(replace(run_config, model="hf:google/vit-base", out=None)).path.name.startswith(
        "hf-google-vit-base-alast-"
    )
