"""Model cards: what they say is what the run's files say, and nothing that was not measured."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import QUIET, finetune
from helpers.run_folders import edit, make_run, write_run

from snello.config import AlastConfig, ExportConfig, LoraConfig, SplitConfig
from snello.export import export
from snello.export.card import base_model, card
from snello.export.trained import Trained, read
from snello.measure.comparison import not_measured
from snello.runs.folder import RunFolder


@pytest.fixture(scope="module")
def made(tmp_path_factory, pictures) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    return make_run(pictures, out, model="test_vit", image_size=48, method="alast", alast=AlastConfig(alpha=0.25))


@pytest.fixture
def run(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def trained(run: Path) -> Trained:
    config = ExportConfig(run)
    return read(config, None)


def text_of(model: Trained, library: str = "timm") -> str:
    return card(model, library, "export.safetensors", ["print('code')"])


def front_matter(text: str) -> dict[str, Any]:
    _, values, _ = text.split("---\n", 2)
    result: dict[str, Any] = yaml.safe_load(values)
    return result


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """The table below a heading, by its first column."""
    below = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [
        line.removeprefix("| ").removesuffix(" |").split(" | ") for line in below.splitlines() if line.startswith("| ")
    ]
    return {first: rest for first, *rest in lines[2:]}


def test_the_hub_reads_the_front_matter(run):
    from huggingface_hub import ModelCard

    done = export(ExportConfig(run))
    data = ModelCard.load(done.card).data
    assert (data.library_name, data.pipeline_tag, data.metrics) == ("timm", "image-classification", ["accuracy"])
    assert data.tags == ["image-classification", "snello", "alast"] and data.base_model is None


@pytest.mark.parametrize(
    "model, weights, architecture, base",
    [
        ("deit_small_patch16_224", "pretrained", None, "timm/deit_small_patch16_224.fb_in1k"),
        ("deit_small_patch16_224", "none", None, None),
        ("deit_small_patch16_224", "mine.safetensors", None, None),
        ("vit_micro_patch4_32", "pretrained", None, None),
        ("hf:facebook/dinov2-small", "pretrained", {"model_type": "dinov2"}, "facebook/dinov2-small"),
        ("hf:/home/me/dinov2", "pretrained", {"model_type": "dinov2"}, None),
        ("models/dinov2", "pretrained", {"model_type": "dinov2"}, None),
    ],
)
def test_the_base_model_is_that_on_the_hub(run, model, weights, architecture, base):
    known = trained(run)
    known = replace(
        known,
        settings=replace(known.settings, model=model, weights=weights),
        resolved=replace(known.resolved, architecture=architecture),
    )
    text = text_of(known)
    assert base_model(known) == front_matter(text).get("base_model") == base
    assert "/home/me" not in text and "mine" not in text and "models/" not in text


def test_it_says_how_the_model_was_made(run):
    summary = json.loads((run / "summary.json").read_text())
    text = export(ExportConfig(run)).card.read_text()
    assert "`test_vit` of timm, fine-tuned from random weights on 3 classes at 48 x 48 pixels" in text
    assert f"with snello {summary['versions']['snello']}, method ALaST" in text
    assert "3, in the order of the logits: `blue`, `green`, `red`." in text
    assert f"{summary['accuracy']:.2%} on the held-out pictures, after epoch 1 of 1" in text
    settings = rows(text, "Training")
    assert settings["alast.alpha"] == ["0.25"] and settings["batch_size"] == ["4"] and settings["lr"] == ["0.0005"]
    assert settings["version of timm"] == [f"`{summary['versions']['timm']}`"]
    assert str(run.parent) not in text


def test_costs_are_those_measured(run):
    file = run / "summary.json"
    summary = json.loads(file.read_text())
    assert summary.items() >= not_measured(RunFolder(run).read()[0]).items()
    assert "## Cost" not in text_of(trained(run))
    measured = {"step_time_s": 0.5, "full_step_time_s": 1.0, "flops_per_sample": 2e9, "full_flops_per_sample": 3e9}
    measured |= {"compared_batch_size": 4, "full_fits": True, "optimizer_bytes": 0, "full_optimizer_bytes": 2**20}
    file.write_text(json.dumps(summary | measured))
    text = text_of(trained(run))
    assert "(cpu), batch 4:" in text and "|  | alast | full | full / alast |" in text
    assert rows(text, "Cost of training") == {
        "step time, ms": ["500.0", "1000.0", "2.00x"],
        "training GFLOPs per picture": ["2.000", "3.000", "1.50x"],
        "optimizer state, MiB": ["0.0", "1.0", ""],
    }
    alone = {name: value for name, value in measured.items() if not name.startswith("full_")}
    file.write_text(json.dumps(summary | alone | {"full_fits": False}))
    assert rows(text_of(trained(run)), "Cost of training")["step time, ms"] == ["500.0", "does not fit", ""]


def test_a_run_that_has_not_ended_says_so(tmp_path):
    write_run(tmp_path / "run", "test_vit", 32)
    text = export(ExportConfig(tmp_path / "run")).card.read_text()
    assert "The run had not ended when this was exported." in text and "held-out" not in text


def test_methods_are_told_with_what_matters(run):
    known = trained(run)
    lora = replace(known.settings, method="alast+lora", lora=LoraConfig(r=4, alpha=8.0, target_modules=("qkv", "fc1")))
    text = text_of(replace(known, settings=lora))
    assert "arXiv:2408.08670) with LoRA (arXiv:2106.09685), r = 4, alpha = 8, merged." in text
    settings = rows(text, "Training")
    assert settings["lora.r"] == ["4"] and settings["lora.target_modules"] == ["`qkv, fc1`"]
    assert front_matter(text)["tags"][2:] == ["alast", "lora"]
    settings = replace(known.settings, method="last-k", last_k=2, alast=AlastConfig())
    last = text_of(replace(known, settings=settings))
    assert "method the last 2 blocks and the head." in last and "alast" not in last


def test_traffic_of_a_cut_is_that_counted(small):
    config = replace(small, epochs=1, split=SplitConfig(cut=2, codec="int8"))
    summary = finetune(config, QUIET)
    text = export(ExportConfig(config.out)).card.read_text()
    both = summary["uplink_bytes"] + summary["downlink_bytes"]
    assert f"after block 2: {summary['uplink_bytes'] / 1e6:.2f} MB up" in text
    assert f"{summary['uncompressed_bytes'] / both:.1f}x less than uncompressed" in text
    assert rows(text, "Training")["split.codec"] == ["`int8`"] and "## Cost" not in text


def test_names_of_classes_cannot_write_the_card(run):
    edit(run, {"classes": ["a`b", "c\n# d", "<img src=x>"]})
    text = text_of(trained(run))
    assert "`` a`b ``, `c?# d`, `<img src=x>`." in text


def test_a_card_of_many_classes_names_the_first(run):
    known = trained(run)
    names = [f"c{i}" for i in range(103)]
    text = text_of(replace(known, resolved=replace(known.resolved, classes=tuple(names))))
    assert "103, in the order of the logits: `c0`" in text and "`c99` and 3 more, which" in text and "c100" not in text
