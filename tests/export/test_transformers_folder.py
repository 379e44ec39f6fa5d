"""Folders for transformers: what both libraries load is the model of the run, and pictures are prepared as it did."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import run_python
from helpers.run_folders import (
    blocks_of,
    edit,
    expected,
    make_run,
    make_transformers,
    picture,
    random_images,
    write_run,
)
from PIL import Image

transformers = pytest.importorskip("transformers")

from snello import cli  # noqa: E402
from snello.config import ExportConfig  # noqa: E402
from snello.errors import ModelError  # noqa: E402
from snello.export import export  # noqa: E402
from snello.files import load_tensors, save_tensors  # noqa: E402
from snello.inference import Predictor  # noqa: E402
from snello.models import create_model, preprocessing  # noqa: E402
from snello.runs.folder import RunFolder  # noqa: E402
from snello.vit import ViT  # noqa: E402

KINDS = {
    "ViT": {"intermediate_size": 64},
    "DeiT": {"intermediate_size": 64},
    "Dinov2": {"layerscale_value": 0.5},
    "Dinov2WithRegisters": {"num_register_tokens": 2},
}


@pytest.fixture(scope="module")
def of_timm(tmp_path_factory, pictures) -> Path:
    return make_run(pictures, tmp_path_factory.mktemp("runs") / "run", model="test_vit", image_size=48)


@pytest.fixture(scope="module")
def native(tmp_path_factory, pictures) -> Path:
    """A run of a model of transformers, whose folder is gone."""
    path = tmp_path_factory.mktemp("native")
    folder = make_transformers(path / "tiny", **KINDS["ViT"])
    run = make_run(pictures, path / "run", model=str(folder), weights="pretrained")
    shutil.rmtree(folder)
    return run


def exported(run: Path, out: Path) -> Path:
    done = export(ExportConfig(run, format="transformers", out=out))
    assert (done.path, done.card) == (out, out / "README.md") and not list(out.parent.glob(".*"))
    return out


def load(folder: Path) -> Any:
    model, info = transformers.AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return model.eval()


@torch.no_grad()
def logits(model: Any, images: torch.Tensor) -> torch.Tensor:
    output = model(images)
    return output if isinstance(output, torch.Tensor) else output.logits


# ---------------------------------------------------------------------------------------------------- models of timm


def test_a_model_of_timm_is_loaded_by_both_libraries(of_timm, tmp_path):
    folder = exported(of_timm, tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    images = random_images(48)
    wrapper, own = load(folder), timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert type(wrapper) is transformers.TimmWrapperForImageClassification
    for model in (wrapper, own):
        assert (logits(model, images) - expected(of_timm, images)).abs().max() <= 1e-5
    assert wrapper.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert wrapper.config.label2id == {"blue": 0, "green": 1, "red": 2}
    assert own.pretrained_cfg["label_names"] == ["blue", "green", "red"]


@pytest.mark.parametrize("crop_pct", [0.94, 0.9, 48 / 53])
def test_both_libraries_prepare_pictures_of_a_model_of_timm_as_the_run_does(of_timm, tmp_path, crop_pct):
    run = shutil.copytree(of_timm, tmp_path / "run")
    edit(run, {"preprocessing": Predictor(run, "cpu").preprocessing.__dict__ | {"crop_pct": crop_pct}})
    folder, path = exported(run, tmp_path / "out"), picture(tmp_path)
    predictor, image = Predictor(run, "cpu"), Image.open(path)
    ours = predictor.normalize(predictor.transform(image)[None])
    theirs = transformers.AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    of_timm_itself = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(image)[None]
    for prepared in (theirs, of_timm_itself):
        assert prepared.shape == ours.shape and (prepared - ours).abs().max() <= 1e-6


@pytest.mark.slow
def test_a_distillation_model_of_timm(tmp_path):
    write_run(tmp_path / "run", "deit_tiny_distilled_patch16_224", 32)
    folder, images = exported(tmp_path / "run", tmp_path / "out"), random_images(32)
    for model in (load(folder), timm.create_model(f"local-dir:{folder}", pretrained=True).eval()):
        assert (logits(model, images) - expected(tmp_path / "run", images)).abs().max() <= 1e-5


@pytest.mark.slow
def test_the_shipped_model_is_loaded_with_snello(tmp_path):
    """By the card's own code, in a process that knows nothing else."""
    write_run(tmp_path / "run", "vit_micro_patch4_32")
    done = export(ExportConfig(tmp_path / "run", format="transformers"))
    assert done.path == tmp_path / "run" / "export" and done.line.startswith("import snello, transformers; ")
    path, names = picture(done.path), [f"class {i}" for i in range(3)]
    answer = names[int(expected(tmp_path / "run", path).argmax())]
    scripts = blocks_of(done.card)
    assert len(scripts) == 2
    ran = run_python("-c", "\n".join([f"import os; os.chdir({str(done.path)!r})", *scripts]))
    assert ran.stdout.split("\n") == [answer, answer, ""], ran.stderr


def test_snello_goes_on_with_an_exported_model_of_timm(of_timm, tmp_path):
    folder, images = exported(of_timm, tmp_path / "out"), random_images(48)
    model = create_model("test_vit", str(folder), 3, 48).eval()
    assert torch.equal(logits(model, images), expected(of_timm, images))


# -------------------------------------------------------------------------------------------- models of transformers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_model_of_transformers_is_saved_as_itself(kind, pictures, tmp_path):
    model = make_transformers(tmp_path / "tiny", kind, **KINDS[kind])
    run = make_run(pictures, tmp_path / "run", model=str(model), weights="pretrained", image_size=24)
    folder, images = exported(run, tmp_path / "out"), random_images(24)
    loaded = load(folder)
    assert type(loaded).__name__ == f"{kind}ForImageClassification"
    assert (logits(loaded, images) - expected(run, images)).abs().max() <= 1e-5
    assert loaded.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert loaded.config.label2id == {"blue": 0, "green": 1, "red": 2}
    assert loaded.config.image_size == 24
    for file in folder.glob("*"):
        assert str(tmp_path).encode() not in file.read_bytes(), f"{file.name} says where the run was"


def test_the_image_processor_prepares_pictures_as_the_run_does(native, tmp_path):
    """The same size and crop; transformers resizes tensors, whose rounding differs, unless told to use Pillow."""
    folder, path = exported(native, tmp_path / "out"), picture(tmp_path)
    predictor, image = Predictor(native, "cpu"), Image.open(path)
    ours = predictor.normalize(predictor.transform(image)[None])
    assert (predictor.preprocessing.size, predictor.preprocessing.crop_pct) == (16, 16 / 24)
    level = 1 / 255 / min(predictor.preprocessing.std)
    for options, levels in (({}, 1.01), ({"backend": "pil"}, 0.01)):
        processor = transformers.AutoImageProcessor.from_pretrained(folder, **options)
        theirs = processor(image, return_tensors="pt")["pixel_values"]
        assert theirs.shape == ours.shape and (theirs - ours).abs().max() <= levels * level, options
    with torch.no_grad():
        apart = (load(folder)(theirs).logits - expected(native, path)).abs().max()
    assert apart <= 1e-5


def test_a_pipeline_takes_the_folder(native, of_timm, tmp_path):
    path = picture(tmp_path)
    for run in (native, of_timm):
        folder = exported(run, tmp_path / run.parent.name)
        best = transformers.pipeline("image-classification", str(folder))(str(path))
        probabilities = expected(run, path).softmax(1)[0]
        got = {entry["label"]: entry["score"] for entry in best}
        assert [got[name] for name in ("blue", "green", "red")] == pytest.approx(probabilities.tolist(), abs=2e-3)


def test_snello_goes_on_with_an_exported_model_of_transformers(native, tmp_path):
    folder, images = exported(native, tmp_path / "out"), random_images(16)
    model = create_model(str(folder), "pretrained", 3).eval()
    assert torch.equal(logits(model, images), expected(native, images))
    assert preprocessing(model) == Predictor(native, "cpu").preprocessing


def test_halves_of_a_model_of_transformers_are_joined(native, tmp_path):
    run = shutil.copytree(native, tmp_path / "run")
    images = random_images(16)
    before = expected(run, images)
    config, resolved = RunFolder(run).read()
    model = create_model(config.model, "none", 3, None, resolved.architecture)
    model.load_state_dict(load_tensors(run / "model.safetensors")[0])
    lower, upper = (half.model.state_dict() for half in ViT(model).cut(1))
    save_tensors(run / "model.safetensors", lower)
    edit(run, {"server": {"address": "server.example:7443", "session": "abc"}, "codec": "none"}, split={"cut": 1})
    done = export(ExportConfig(run, format="transformers"), lambda path: dict(upper))
    assert torch.equal(logits(load(done.path), images), before)
    assert torch.equal(expected(run, images), before)  # the run no longer needs its server


def test_timm_has_no_place_for_a_model_of_transformers(native, capsys):
    with pytest.raises(ModelError, match="of transformers, not of timm: use --format transformers"):
        export(ExportConfig(native))
    assert not list(native.glob("export*"))
    assert cli.main(["export", str(native)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_says_what_was_written(native, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["export", str(native), "--format", "transformers", "--out", str(out)]) == 0
    shown, line = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert shown.split("\n") == [str(out), str(out / "README.md")]
    names: dict[str, Any] = {}
    exec(line, names)
    images = random_images(16)
    assert torch.equal(logits(names["model"], images), expected(native, images))


@pytest.mark.slow
def test_a_run_with_adapters_leaves_a_plain_model(pictures, tmp_path):
    pytest.importorskip("peft")
    folder = make_transformers(tmp_path / "tiny", **KINDS["ViT"])
    run = make_run(pictures, tmp_path / "run", model=str(folder), weights="pretrained", method="lora")
    out, images = exported(run, tmp_path / "out"), random_images(16)
    assert not any("lora" in name for name in load_tensors(out / "model.safetensors")[0])
    assert (logits(load(out), images) - expected(run, images)).abs().max() <= 1e-5
    card = (out / "README.md").read_text()
    assert "LoRA (arXiv:2106.09685), r = 8, alpha = 16, merged" in card and "| lora.r | 8 |" in card


def test_what_cannot_be_written_leaves_nothing(native, tmp_path, monkeypatch):
    from snello.errors import CheckpointError

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("snello.export.transformers_folder._write_json", full)
    with pytest.raises(CheckpointError, match=r"No space left.*nothing was written"):
        exported(native, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out is there already"):
        exported(native, tmp_path / "out")


def test_config_json_is_what_the_hub_has_of_timm(of_timm, tmp_path):
    values = json.loads((exported(of_timm, tmp_path / "out") / "config.json").read_text())
    assert values.keys() >= {"architecture", "num_classes", "num_features", "label_names", "pretrained_cfg"}
    assert values["architecture"] == "test_vit" and values["pretrained_cfg"]["input_size"] == [3, 48, 48]
