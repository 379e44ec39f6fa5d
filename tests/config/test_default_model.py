"""The model that a run takes where none is named, and its first line."""

from dataclasses import replace

import pytest
from conftest import finetune, flags

from snello import cli
from snello.config import FinetuneConfig, SplitConfig, default_model
from snello.config.default_model import ROOM, SMALLER, TOY, USUAL
from snello.runs.folder import RunFolder


def test_own_pictures_get_a_pretrained_model_and_shipped_ones_the_toy():
    assert FinetuneConfig().model == FinetuneConfig(data="photos").model == "auto"
    own, shipped = default_model.default_model(True, "pretrained"), default_model.default_model(False, "pretrained")
    assert own.name in (USUAL, SMALLER) and shipped.name == TOY
    assert "pretrained on ImageNet" in own.line and "another: --model NAME" in own.line and TOY in own.line
    assert "a toy" in shipped.line and "--data FOLDER" in shipped.line
    assert "pretrained" not in default_model.default_model(True, "none").line.partition(";")[0]


@pytest.mark.parametrize(
    ("memory", "name", "why"),
    [
        (ROOM, USUAL, "22 M parameters: the usual for pictures of your own"),
        (ROOM - 1, SMALLER, "6 M parameters: the small one, since this machine has 6.0 GiB of memory, less than 6"),
        (4 * 2**30, SMALLER, "since this machine has 4.0 GiB"),
        (None, USUAL, "the usual"),
    ],
)
def test_what_fits_decides_and_says_so(monkeypatch, memory, name, why):
    monkeypatch.setattr(default_model, "total_memory", lambda: memory)
    chosen = default_model.default_model(True, "pretrained")
    assert chosen.name == name and chosen.line.startswith(f"model: {name}, ") and why in chosen.line


@pytest.fixture
def known(monkeypatch):
    """The default models, replaced by timm's test ViT, whose weights are not asked for."""
    monkeypatch.setattr(default_model, "USUAL", "test_vit")
    monkeypatch.setattr(default_model, "SMALLER", "test_vit")


def test_a_run_says_its_model_first_and_keeps_its_name(small, known, capfd):
    config = replace(small, model="auto", epochs=1)
    assert cli.main(["finetune", *flags(config)]) == 0
    first, second = capfd.readouterr().err.splitlines()[:2]
    assert first.startswith("model: test_vit, 22 M parameters") and second.startswith("test_vit, full")
    assert RunFolder(small.out).read()[0].model == "test_vit"
    assert cli.main(["finetune", "--out", str(small.out), "--resume"]) == 0
    assert "model: " not in capfd.readouterr().err, "it has its name by now"
    again = small.out.with_name("again")
    assert cli.main(["finetune", "--config", str(small.out / "config.yaml"), "--out", str(again)]) == 0
    assert RunFolder(again).read()[0].model == "test_vit"


def test_a_model_that_is_named_is_not_explained(small, capfd):
    finetune(replace(small, epochs=1))
    assert capfd.readouterr().err.startswith("test_vit, full")


def test_a_cut_run_takes_it_too(small, known):
    config = replace(small, model="auto", epochs=1, split=SplitConfig(cut=2, codec="none"))
    assert finetune(config)["model"] == "test_vit"


def test_pictures_that_ship_are_called_a_toy(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(cli, "_prepare", lambda config: None)
    args = ["--model", "test_vit", "--weights", "none", "--image-size", "32", "--batch-size", "500", "--epochs", "1"]
    args += ["--method", "head", "--no-compare", "--workers", "0", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert cli.main(["finetune", *args]) == 0
    err = capfd.readouterr().err.splitlines()
    assert err[0] == "the pictures are those that ship with snello, to try it with; for your own: --data FOLDER"
    assert err[1].startswith("warning: --method head on random weights (--weights none): ")


@pytest.mark.parametrize(("method", "warned"), [("head", True), ("last-k", False), ("full", False)])
def test_what_stays_random_is_warned_of(small, capfd, method, warned):
    finetune(replace(small, method=method, epochs=1))
    assert ("on random weights (--weights none)" in capfd.readouterr().err) is warned


def test_weights_that_cannot_be_had_are_one_line(small, capfd):
    """The tests run offline (HF_HUB_OFFLINE=1, see conftest.py)."""
    config = replace(small, model="auto", weights="pretrained", image_size=None)
    assert cli.main(["finetune", *flags(config)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("snello: error: ") and err.count("\n") == 1
    name = next(name for name in (USUAL, SMALLER) if name in err)
    assert f"run `hf download timm/{name}.fb_in1k model.safetensors`, and give the file: --weights FILE" in err
    assert f"--model {TOY} is a toy" in err and not small.out.exists()
