"""Exported models: what timm loads is the model of the run, whole or joined from two halves."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import QUIET, finetune
from helpers.run_folders import blocks_of, edit, expected, make_run, picture, write_run
from safetensors import safe_open
from torch import Tensor

from snello.config import ExportConfig, SplitConfig
from snello.errors import CheckpointError, ConfigError, ModelError, SnelloError
from snello.export import METADATA, export
from snello.files import load_tensors, save_tensors
from snello.inference import Predictor
from snello.models import create_model
from snello.runs.folder import RunFolder
from snello.vit import ViT


@pytest.fixture(scope="module")
def made(tmp_path_factory, pictures) -> Path:
    """A run of `small` (see conftest), with the fused attention that timm has by itself."""
    return make_run(pictures, tmp_path_factory.mktemp("runs") / "run", model="test_vit", image_size=48)


@pytest.fixture
def run(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def part(run: Path, cut: int = 2, labels: str = "server") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Makes of a run one of `snello join`, which has the client's half; returns both halves."""
    config, resolved = RunFolder(run).read()
    state = load_tensors(run / "model.safetensors")[0]
    model = create_model(config.model, "none", len(resolved.classes), config.image_size)
    model.load_state_dict(state)
    halves = [half.model.state_dict() for half in ViT(model).cut(cut, head_below=labels == "client")]
    assert halves[0].keys() | halves[1].keys() == state.keys() and all(halves)
    split = {"cut": cut, "labels": labels}
    edit(run, {"server": {"address": "server.example:7443", "session": "abc"}, "codec": "none"}, split=split)
    save_tensors(run / "model.safetensors", halves[0])
    return halves[0], halves[1]


def load(line: str) -> torch.nn.Module:
    values: dict[str, Any] = {}
    exec(line, values)
    return values["model"]


def overlaid(path: Path) -> torch.nn.Module:
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[METADATA])
    overlay = {"file": str(path), "num_classes": about["num_classes"], "custom_load": False}
    return timm.create_model(
        about["model"],
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        num_classes=about["num_classes"],
        img_size=about["image_size"],
    ).eval()


def logits(model: torch.nn.Module, size: int = 48) -> Tensor:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(images)


# ------------------------------------------------------------------------------------------------------- whole runs


def test_timm_computes_what_the_run_does(run):
    before = set(run.iterdir())
    done = export(ExportConfig(run))
    assert (done.path, done.card) == (run / "export.safetensors", run / "export.safetensors.md")
    assert set(run.iterdir()) == before | {done.path, done.card}
    computed = logits(Predictor(run, "cpu").model)
    assert computed.shape == (2, 3)
    for model in (load(done.line), overlaid(done.path)):
        assert torch.equal(logits(model), computed)


@pytest.mark.parametrize("crop_pct", [0.9, 0.94, 0.875, 1.0, 48 / 53])
def test_the_card_prepares_a_picture_as_the_run_does(run, monkeypatch, crop_pct):
    """Whatever timm rounds: it brings pictures to floor(size / crop_pct), the run to the nearest."""
    edit(run, {"preprocessing": Predictor(run, "cpu").preprocessing.__dict__ | {"crop_pct": crop_pct}})
    done = export(ExportConfig(run))
    monkeypatch.chdir(run)
    (block,) = blocks_of(done.card)
    names: dict[str, Any] = {}
    path = picture(run)
    exec(block, names)
    assert (names["logits"] - expected(run, path)).abs().max() <= 1e-6


def test_the_file_says_what_the_model_wants(tmp_path):
    write_run(tmp_path / "run", "test_vit", 32, 2)
    done = export(ExportConfig(tmp_path / "run", out=tmp_path / "it's.safetensors"))
    path = done.path
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", METADATA}
    assert json.loads(metadata[METADATA]) == {
        "model": "test_vit",
        "num_classes": 2,
        "classes": ["class 0", "class 1"],
        "image_size": 32,
        "resize": 43,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "interpolation": "bilinear",
        "crop_pct": 0.75,
    }
    assert done.line == (
        "import timm; model = timm.create_model('test_vit', num_classes=2, img_size=32, "
        f'checkpoint_path="{path}").eval()'
    )
    load(done.line)


def test_what_is_exported_can_be_fine_tuned_and_is_no_checkpoint(run):
    path = export(ExportConfig(run)).path
    tensors, state = load_tensors(path)
    assert state == {}
    model = create_model("test_vit", str(path), 3, 48)
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())


def test_the_shipped_model_is_loaded_with_snello(tmp_path):
    write_run(tmp_path / "run", "vit_micro_patch4_32.cifar5")
    line = export(ExportConfig(tmp_path / "run")).line
    assert line.startswith("import snello, timm; ")
    assert torch.equal(logits(load(line), 32), logits(Predictor(tmp_path / "run", "cpu").model, 32))


def test_a_run_cut_in_one_process_has_the_whole_model(run):
    edit(run, {"codec": "int8"}, split={"cut": 2, "codec": "int8"})
    tensors = load_tensors(export(ExportConfig(run)).path)[0]
    assert tensors.keys() == load_tensors(run / "model.safetensors")[0].keys()


# ----------------------------------------------------------------------------------------------------------- halves


@pytest.mark.parametrize("how", ["file", "folder", "fetch"])
@pytest.mark.parametrize("cut, labels", [(1, "server"), (5, "server"), (1, "client")])
def test_halves_are_joined(run, tmp_path, cut, labels, how):
    computed = logits(Predictor(run, "cpu").model)
    _, server = part(run, cut, labels)
    assert ("head.weight" in server) == (labels == "server")
    save_tensors(tmp_path / "model.safetensors", server)
    half = {"file": tmp_path / "model.safetensors", "folder": tmp_path, "fetch": None}[how]
    asked: list[Path] = []

    def fetch(path: Path) -> dict[str, Tensor]:
        asked.append(path)
        return server

    done = export(ExportConfig(run, server_half=half), fetch)
    assert asked == ([run] if how == "fetch" else [])
    assert torch.equal(logits(load(done.line)), computed)
    assert torch.equal(logits(Predictor(run, "cpu").model), computed)  # the run no longer needs its server


def test_weights_that_came_in_one_message_are_joined(run):
    whole = load_tensors(run / "model.safetensors")[0]
    _, server = part(run)
    buffer = torch.cat([value.flatten() for value in server.values()])
    sizes = [value.numel() for value in server.values()]
    views = {n: v.view(server[n].shape) for n, v in zip(server, buffer.split(sizes), strict=True)}
    got = load_tensors(export(ExportConfig(run), lambda path: views).path)[0]
    assert got.keys() == whole.keys() and all(torch.equal(got[name], whole[name]) for name in got)


@pytest.mark.parametrize("labels", [None, "server", "client"])
def test_a_distillation_model(tmp_path, labels):
    state = write_run(tmp_path / "run", "deit_tiny_distilled_patch16_224", 32)
    model = create_model("deit_tiny_distilled_patch16_224", "none", 3, 32)
    model.load_state_dict(state)
    server = part(tmp_path / "run", 1, labels)[1] if labels else {}
    done = export(ExportConfig(tmp_path / "run"), lambda path: server)
    for loaded in (load(done.line), overlaid(done.path)):
        assert torch.equal(logits(loaded, 32), logits(model.eval(), 32))


# ----------------------------------------------------------------------------------------------------------- errors


def refused(
    config: ExportConfig, kind: type[SnelloError], *parts: str, server: dict[str, Tensor] | None = None
) -> None:
    """The error is one line that has these parts; nothing is written."""
    before = sorted(config.run.parent.rglob("*"))
    with pytest.raises(kind) as error:
        export(config, None if server is None else lambda path: server)
    assert "\n" not in str(error.value)
    for text in parts:
        assert text in str(error.value)
    assert sorted(config.run.parent.rglob("*")) == before


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    refused(ExportConfig(tmp_path), CheckpointError, "not a run folder")
    refused(ExportConfig(tmp_path / "none"), CheckpointError, "not a run folder")
    (tmp_path / "config.yaml").write_text("model: test_vit\n")
    refused(ExportConfig(tmp_path), CheckpointError, "resolved")
    (tmp_path / "config.yaml").write_text("model: test_vit\nresolved:\n")
    refused(ExportConfig(tmp_path), CheckpointError, "resolved")
    (tmp_path / "config.yaml").write_text("model: [\n")
    refused(ExportConfig(tmp_path), CheckpointError, "YAML")


def test_a_run_without_a_finished_epoch_is_refused(run):
    (run / "model.safetensors").unlink()
    refused(ExportConfig(run), CheckpointError, "holds no model yet")


def test_a_damaged_model_is_refused(run):
    (run / "model.safetensors").write_bytes(b"damaged")
    refused(ExportConfig(run), CheckpointError, "could not read", "model.safetensors")


def test_a_model_of_other_settings_is_refused(run):
    edit(run, {"classes": ["one", "two"]})
    refused(
        ExportConfig(run), CheckpointError, "does not fit the model: head.weight is (3, 64), the model's is (2, 64)"
    )


def test_a_file_that_is_there_is_not_overwritten(run, tmp_path):
    out = tmp_path / "mine"
    out.write_text("mine")
    refused(ExportConfig(run, out=out), ConfigError, "--out", "mine is there already")
    assert out.read_text() == "mine"
    refused(ExportConfig(run, out=out / "below"), ConfigError, "--out", "no folder")
    refused(ExportConfig(run, out=tmp_path / "no" / "below"), ConfigError, "--out", "no folder")
    export(ExportConfig(run))
    refused(ExportConfig(run), ConfigError, "export.safetensors is there already")


def test_what_cannot_be_written_leaves_nothing(run, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("snello.export.timm_file.save_file", full)
    refused(ExportConfig(run), CheckpointError, "No space left", "nothing was written")


def test_a_server_half_of_no_use_is_refused(run, tmp_path):
    refused(ExportConfig(run, server_half=tmp_path), ConfigError, "--server-half has no effect")


def test_a_trained_codec_is_refused(small):
    config = replace(small, epochs=1, split=SplitConfig(cut=2, codec="bottlenet(0.5)"))
    finetune(config, QUIET)
    refused(ExportConfig(config.out), ModelError, "bottlenet(0.5)")


def test_a_trained_codec_of_the_server_is_refused(run, tmp_path):
    _, server = part(run)
    save_tensors(tmp_path / "codec.safetensors", {"x": torch.zeros(1)})
    refused(ExportConfig(run, server_half=tmp_path), ModelError, "codec", str(tmp_path))
    server["codec.0.decoder.weight"] = torch.zeros(1)
    refused(ExportConfig(run), ModelError, "codec none", "the server gave", server=server)


def test_a_half_that_is_missing_is_refused(run, tmp_path):
    part(run)
    refused(ExportConfig(run), ConfigError, "--server-half")
    refused(ExportConfig(run, server_half=tmp_path / "no"), CheckpointError, "could not read", "no")
    refused(ExportConfig(run, server_half=tmp_path), CheckpointError, "could not read", "model.safetensors")


def test_halves_that_do_not_make_the_model_are_refused(run):
    client, server = part(run)
    config = ExportConfig(run)
    refused(
        config, CheckpointError, "client's half in", "server's half that the server gave both have cls_token",
        server=server | {"cls_token": client["cls_token"]},
    )  # fmt: skip
    without = {name: value for name, value in server.items() if not name.startswith("blocks.3.")}
    refused(
        config, CheckpointError, "the server's half that the server gave lacks blocks.3.norm1.weight", "more)",
        server=without,
    )  # fmt: skip
    name = "forged\nname"
    refused(config, CheckpointError, "the server's half", "has 'forged\\nname'", server=server | {name: torch.zeros(1)})
    refused(
        config, CheckpointError, "the server's half", "norm.weight is (1,), the model's is (64,)",
        server=server | {"norm.weight": torch.zeros(1)},
    )  # fmt: skip
    save_tensors(run / "model.safetensors", {name: value for name, value in client.items() if name != "pos_embed"})
    refused(config, CheckpointError, "the client's half in", str(run), "lacks pos_embed", server=server)


def test_halves_of_another_cut_are_refused(run):
    _, server = part(run, 2)
    save_tensors(run / "model.safetensors", {name: torch.zeros(1) for name in ("blocks.2.norm1.weight",)})
    del server["blocks.2.norm1.weight"]
    refused(ExportConfig(run), CheckpointError, "the client's half", "lacks", server=server)


def test_a_card_that_is_there_is_not_overwritten(run):
    (run / "export.safetensors.md").write_text("mine")
    refused(ExportConfig(run), ConfigError, "--out", "export.safetensors.md", "there already")


def test_an_unknown_format_is_refused(run):
    with pytest.raises(ConfigError, match="--format must be one of timm, transformers, onnx, got pickle"):
        ExportConfig(run, format="pickle")
