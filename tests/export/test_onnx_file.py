"""ONNX: onnxruntime computes what the model does, on any batch; or there is no file."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.run_folders import blocks_of, edit, expected, make_run, make_transformers, picture, random_images

from snello import cli
from snello.config import ExportConfig
from snello.errors import ConfigError, ModelError
from snello.export import METADATA, export, onnx_file

pytestmark = pytest.mark.slow

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

PATHS = ["fused", "explicit"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, pictures) -> Path:
    return make_run(pictures, tmp_path_factory.mktemp("runs") / "run", model="test_vit", image_size=48)


@pytest.fixture(scope="module")
def program(run, tmp_path_factory) -> Any:
    """What PyTorch's exporter makes of the run's model, which takes seconds."""
    exporter = torch.onnx.export
    made: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", lambda *args, **kwargs: made.append(exporter(*args, **kwargs)) or made[0])
        export(ExportConfig(run, format="onnx", out=tmp_path_factory.mktemp("onnx") / "model.onnx"))
    return made[0]


@pytest.fixture
def exported_before(program, monkeypatch) -> None:
    """Spares a test the exporter."""
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: program)


def session(path: Path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def assert_computes(path: Path, run: Path, size: int) -> None:
    made = session(path)
    for num in (1, 2, 7):
        images = random_images(size, num)
        (logits,) = made.run(["logits"], {"images": images.numpy()})
        assert (torch.from_numpy(logits) - expected(run, images)).abs().max() <= 1e-4


@pytest.mark.parametrize("attention", PATHS)
def test_onnxruntime_computes_what_the_run_does(run, tmp_path, capfd, attention):
    run = shutil.copytree(run, tmp_path / "run")
    edit(run, {"attention": attention})
    done = export(ExportConfig(run, format="onnx", out=tmp_path / "model.onnx"))
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.md", "run"]
    assert_computes(done.path, run, 48)
    (images,), (logits,) = session(done.path).get_inputs(), session(done.path).get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(float)", ["batch", 3, 48, 48])
    assert (logits.name, logits.shape) == ("logits", ["batch", 3])


@pytest.mark.usefixtures("exported_before")
def test_the_file_says_classes_and_preprocessing_and_the_card_uses_them(run, tmp_path, monkeypatch):
    done = export(ExportConfig(run, format="onnx", out=tmp_path / "model.onnx"))
    about = json.loads(session(done.path).get_modelmeta().custom_metadata_map[METADATA])
    assert (about["classes"], about["image_size"], about["resize"]) == (["blue", "green", "red"], 48, 51)
    monkeypatch.chdir(tmp_path)
    (block,) = blocks_of(done.card)
    assert "torch" not in block and "timm" not in block
    names: dict[str, Any] = {}
    path = picture(tmp_path)
    exec(block, names)
    assert (torch.from_numpy(names["logits"]) - expected(run, path)).abs().max() <= 1e-4


@pytest.mark.parametrize("kind, path", [("DeiT", "fused"), ("Dinov2WithRegisters", "explicit")])
def test_models_of_transformers(kind, path, pictures, tmp_path):
    pytest.importorskip("transformers")
    model = make_transformers(tmp_path / "tiny", kind)
    run = make_run(pictures, tmp_path / "run", model=str(model), weights="pretrained", attention=path)
    done = export(ExportConfig(run, format="onnx"))
    assert done.path == run / "export.onnx"
    assert_computes(done.path, run, 16)
    assert str(tmp_path).encode() not in done.path.read_bytes()


@pytest.mark.usefixtures("exported_before")
def test_weights_beyond_what_a_file_holds_come_beside_it(run, tmp_path, monkeypatch):
    """2 GiB is ONNX's limit; PyTorch's exporter decides, here earlier."""
    from torch.onnx._internal.exporter import _onnx_program

    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 1000)
    done = export(ExportConfig(run, format="onnx", out=tmp_path / "model.onnx"))
    names = ["model.onnx", "model.onnx.data", "model.onnx.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert_computes(done.path, run, 48)
    done.path.unlink()
    done.card.unlink()
    with pytest.raises(ConfigError, match=r"model\.onnx\.data"):
        export(ExportConfig(run, format="onnx", out=tmp_path / "model.onnx"))


@pytest.mark.usefixtures("exported_before")
def test_a_file_that_computes_something_else_is_not_left(run, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "TOLERANCE", -1.0)
    with pytest.raises(ModelError, match=r"on a batch of 1 the logits are up to .* apart.*nothing was written"):
        export(ExportConfig(run, format="onnx", out=tmp_path / "model.onnx"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_takes_one_batch_only_is_not_left(run, tmp_path, monkeypatch):
    exporter = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *args, dynamic_shapes, **kwargs: exporter(*args, **kwargs))
    with pytest.raises(ModelError, match=r"onnxruntime cannot run the ONNX file: .*nothing was written"):
        export(ExportConfig(run, format="onnx", out=tmp_path / "model.onnx"))
    assert list(tmp_path.iterdir()) == []


def test_an_exporter_that_fails_is_one_line(run, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no such operator\nand a page of reasons")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ModelError, match=r"^test_vit could not be exported to ONNX: no such operator$"):
        export(ExportConfig(run, format="onnx", out=tmp_path / "model.onnx"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_without_the_extra_the_error_says_what_to_install(run, monkeypatch, capsys, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(["export", str(run), "--format", "onnx"]) == 2
    assert capsys.readouterr().err == f"snello: error: --format onnx needs {missing}: pip install 'snello[onnx]'\n"
    assert not list(run.glob("export*"))


@pytest.mark.usefixtures("exported_before")
def test_the_commands_of_the_docs_run(run, tmp_path, monkeypatch):
    docs = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    commands = [line.split("#")[0].split() for line in docs.split("```bash\n")[1].split("```")[0].splitlines()]
    shutil.copytree(run, tmp_path / "runs" / "photos")
    monkeypatch.chdir(tmp_path)
    for command in commands:
        assert command[0] == "snello" and cli.main(command[1:]) == 0, command
    made = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert [path for path in made if "export" in path or "README" in path] == [
        "photos-vit/README.md",
        "runs/photos/export",
        "runs/photos/export.onnx",
        "runs/photos/export.onnx.md",
        "runs/photos/export.safetensors",
        "runs/photos/export.safetensors.md",
        "runs/photos/export/README.md",
        "runs/photos/export/config.json",
        "runs/photos/export/model.safetensors",
    ]
