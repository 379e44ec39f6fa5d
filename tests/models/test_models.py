"""Building models by name, their weights and what can go wrong."""

import re

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file

from snello.errors import ModelError
from snello.models import create_model, preprocessing
from snello.vit import SUPPORTED

NAME = "test_vit"  # timm's smallest: 6 blocks of width 64, patches of 16


def build(weights="none", num_classes=5, image_size=32, name=NAME):
    return create_model(name, str(weights), num_classes, image_size)


def equal(one, other, leave_out=()) -> bool:
    return all(torch.equal(value, other[key]) for key, value in one.items() if not key.startswith(leave_out))


@pytest.fixture
def weights(tmp_path):
    """A file of random weights and what it holds."""
    path = tmp_path / "weights.safetensors"
    state = {key: torch.randn_like(value) for key, value in build().state_dict().items()}
    save_file(state, path)
    return path, state


@pytest.fixture
def no_download(monkeypatch):
    """Fails where anything is asked of timm's pretrained weights."""
    create = timm.create_model

    def spy(name, pretrained=False, **options):
        assert not pretrained, "asked for pretrained weights"
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", spy)


# Names and sizes


@pytest.mark.parametrize(
    ("typo", "near"),
    [
        ("vit_micro_patch4_23", "vit_micro_patch4_32"),
        ("deit_tny_patch16_224", "deit_tiny_patch16_224"),
        ("vit_smal_patch16_224.augreg_in21k", "vit_small_patch16_224"),
        ("vit_smal_patch14_dinov2", "vit_small_patch14_dinov2"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(typo, near):
    with pytest.raises(ModelError) as error:
        build(name=typo)
    text = str(error.value)
    assert text.startswith(f"unknown model {typo!r}; nearest: ") and near in text and SUPPORTED in text


@pytest.mark.parametrize("name", ["", "xyz", ".tag", "hf-hub:timm/vit_tiny_patch16_224"])
def test_nonsense_is_an_unknown_model(name):
    with pytest.raises(ModelError, match="unknown model"):
        build(name=name)


def test_an_unknown_tag_names_the_known_ones():
    with pytest.raises(
        ModelError, match=r"unknown pretrained tag in .*bogus'; known: .*deit_tiny_patch16_224\.fb_in1k"
    ):
        build(name="deit_tiny_patch16_224.bogus")


def test_a_known_tag_is_taken():
    assert build(name="test_vit.r160_in1k").pretrained_cfg["tag"] == "r160_in1k"


@pytest.mark.parametrize("size", [1, 8, 30, 33])
def test_an_image_size_that_is_no_multiple_of_the_patch_is_refused(size):
    with pytest.raises(
        ModelError, match=f"--image-size for {NAME} must be a multiple of its patch size 16, got {size}"
    ):
        build(image_size=size)


@pytest.mark.parametrize(("size", "patches"), [(16, 1), (48, 9), (None, 100)])
def test_image_size_and_classes_are_those_asked_for(size, patches):
    model = build(num_classes=3, image_size=size)
    assert model.patch_embed.num_patches == patches
    assert model(torch.randn(2, 3, size or 160, size or 160)).shape == (2, 3)
    assert preprocessing(model, size).size == (size or 160)


def test_random_weights_are_real_and_follow_the_seed():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build().state_dict())
    assert all(value.device.type == "cpu" for value in states[0].values())
    assert equal(states[0], states[1]) and not equal(states[0], states[2])


def test_preprocessing_is_the_models_own():
    micro = preprocessing(build(name="vit_micro_patch4_32"))
    assert (micro.size, micro.crop_pct, micro.interpolation) == (32, 1.0, "bicubic")
    assert micro.mean == (0.4914, 0.4822, 0.4465) and micro.std == (0.2470, 0.2435, 0.2616)
    deit = preprocessing(build(name="deit_tiny_patch16_224"))
    assert (deit.size, deit.mean) == (224, (0.485, 0.456, 0.406))


@pytest.mark.parametrize("weights", ["none", "pretrained", "missing.safetensors"])
@pytest.mark.parametrize(
    "name",
    ["resnet18", "vit_base_patch16_siglip_224", "vit_relpos_small_patch16_224", "swin_tiny_patch4_window7_224"],
)
def test_an_unsupported_model_is_refused_by_name_before_anything_is_downloaded(name, weights, no_download):
    with pytest.raises(ModelError) as error:
        build(weights, image_size=None, name=name)
    assert "not supported" in str(error.value) and SUPPORTED in str(error.value)


# Weights files


def test_a_weights_file_loads_exactly(weights):
    path, state = weights
    assert equal(state, build(path).state_dict())


def test_a_saved_model_round_trips(tmp_path):
    model = build()
    save_file(model.state_dict(), tmp_path / "saved.safetensors")
    again = build(tmp_path / "saved.safetensors").state_dict()
    assert again.keys() == model.state_dict().keys() and equal(model.state_dict(), again)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 3}])
def test_a_pytorch_file_of_tensors_loads(weights, tmp_path, wrap):
    _, state = weights
    torch.save(wrap(state), tmp_path / "weights.pth")
    assert equal(state, build(tmp_path / "weights.pth").state_dict())


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    torch.save({"head.weight": Evil()}, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match="cannot be read"):
        build(tmp_path / "weights.pth")
    assert "executed" not in capsys.readouterr().out


def test_a_head_of_another_number_of_classes_is_left_out(weights):
    path, state = weights
    model = build(path, num_classes=7)
    assert equal(state, model.state_dict(), ("head.",)) and model.head.weight.shape[0] == 7
    assert model.head.weight.std() < 0.5  # it starts as timm starts it


def test_both_heads_of_another_number_of_classes_are_left_out(tmp_path):
    name, path = "deit_tiny_distilled_patch16_224", tmp_path / "weights.safetensors"
    state = build(name=name).state_dict()
    save_file(state, path)
    model = build(path, num_classes=7, name=name)
    assert equal(state, model.state_dict(), ("head",)) and model.head_dist.weight.shape[0] == 7


def test_position_embeddings_of_another_size_are_resampled(weights):
    path, state = weights
    model = build(path, image_size=64)
    assert equal(state, model.state_dict(), ("pos_embed",))
    assert model.pos_embed.shape[1] == 1 + 16
    assert torch.equal(model.pos_embed[:, :1], state["pos_embed"][:, :1])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s.pop("norm.weight"), r"norm\.weight is missing"),
        (
            lambda s: s.update({"blocks.0.norm1.weight": torch.zeros(3)}),
            r"blocks\.0\.norm1\.weight is \(3,\), the model's",
        ),
        (
            lambda s: s.update({"cls_token": torch.zeros(1, 1, 8)}),
            r"cls_token is \(1, 1, 8\), the model's is \(1, 1, 64\)",
        ),
        (lambda s: s.update({"blocks.9.norm1.weight": torch.zeros(64)}), r"blocks\.9\.norm1\.weight is unknown"),
        (
            lambda s: [s.pop(k) for k in list(s) if k.startswith("blocks.3.")],
            r"blocks\.3\.\S+ is missing;.*\(\+9 more\)",
        ),
        (lambda s: s.clear() or s.update({"x": torch.zeros(1)}), r"is missing;.*more\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(weights, change, problem):
    path, state = weights
    change(state)
    save_file(state, path)
    with pytest.raises(ModelError, match=problem) as error:
        build(path)
    assert str(path) in str(error.value) and "does not fit the model" in str(error.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin", ""])
@pytest.mark.parametrize("content", [b"", b"not weights at all", bytes(range(256)) * 8])
def test_garbage_is_one_line(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=f"the weights file {re.escape(str(path))} cannot be read: .") as error:
        build(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [[1, 2], {"model": 3}, torch.zeros(2), {"cls_token": "text"}, {"pos_embed": 1.0}])
def test_a_pytorch_file_of_something_else_is_refused(tmp_path, value):
    path = tmp_path / "weights.pth"
    torch.save(value, path)
    with pytest.raises(ModelError, match=r"the weights file .* (cannot be read|does not fit)"):
        build(path)


def test_a_truncated_file_is_refused(weights):
    path, _ = weights
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cannot be read"):
        build(path)


@pytest.mark.parametrize(
    ("name", "file"),
    [("missing.safetensors",) * 2, (".", "model.safetensors"), ("Pretrained", "Pretrained")],
)
def test_a_file_that_is_not_there_is_named(tmp_path, name, file):
    with pytest.raises(ModelError, match=f"there is no file {re.escape(file)}"):
        build(name)


# Pretrained weights


@pytest.mark.parametrize("error", [OSError("no route\nto host"), RuntimeError(""), ConnectionError("x" * 999)])
def test_pretrained_weights_that_fail_name_the_way_out(error, monkeypatch):
    create = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise error
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ModelError, match=r"could not be loaded \(.+\); offline\?.*--weights FILE.*--weights none") as e:
        build("pretrained")
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("deit_small_patch16_224", "run `hf download timm/deit_small_patch16_224.fb_in1k model.safetensors`"),
        ("vit_base_patch16_224.dino", "run `hf download timm/vit_base_patch16_224.dino model.safetensors`"),
        ("vit_base_patch16_gap_224", "get the safetensors file of the model"),
    ],
)
def test_the_file_to_get_is_named(name, told, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=re.escape(f"on a machine with a connection {told}, and give the file: --w")):
        build("pretrained", image_size=None, name=name)


def test_offline_and_not_in_the_cache_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=f"pretrained weights of {NAME} could not be loaded.*--weights FILE"):
        build("pretrained")


@pytest.mark.parametrize("name", ["vit_medium_patch16_gap_240", "vit_small_patch32_224", "vit_small_patch8_224"])
def test_pretrained_never_means_random(name, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("download"))
    with pytest.raises(ModelError, match="could not be loaded"):
        build("pretrained", image_size=None, name=name)


def test_the_toy_takes_pictures_of_other_sizes() -> None:
    small, large = (create_model("vit_micro_patch4_32", "pretrained", 10, size) for size in (None, 64))
    assert small.pos_embed.shape[1] == 65 and large.pos_embed.shape[1] == 257
    assert torch.equal(small.blocks[3].mlp.fc1.weight, large.blocks[3].mlp.fc1.weight)
