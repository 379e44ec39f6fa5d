"""Gradient checkpointing changes what is kept for the backward pass, and nothing that is computed."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import QUIET, assert_same_run, finetune, resumed, rows_of, with_method
from helpers.budgets import DROPPING
from helpers.resuming import cut_off, whole

from snello.config import AlastConfig, FinetuneConfig
from snello.files import load_tensors
from snello.train.loop import Trainer

pytestmark = pytest.mark.slow

METHODS = ("full", "alast", "head", "last-k", "lora", "alast+lora")
SHAPE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(params=["timm", "transformers"])
def config(request, small: FinetuneConfig, tmp_path: Path) -> FinetuneConfig:
    """The small run, with gradient checkpointing, of a model of each library."""
    model = small.model
    if request.param == "transformers":
        transformers = pytest.importorskip("transformers")
        transformers.ViTConfig(**SHAPE, image_size=48, patch_size=16).save_pretrained(tmp_path / "model")
        model = str(tmp_path / "model")
    return replace(small, model=model, grad_checkpointing=True, checkpoint_steps=3)


@pytest.mark.parametrize("method", METHODS)
def test_same_run_as_without_and_exact_resume(config, tmp_path, monkeypatch, method):
    if "lora" in method:
        pytest.importorskip("peft")
    alast = {"alast": AlastConfig(**DROPPING | {"blocks": 2}, alpha=5.0)} if "alast" in method else {}
    config = with_method(config, method, **alast)
    other = whole(config, tmp_path / "whole")
    plain = tmp_path / "plain"
    finetune(replace(config, out=plain, grad_checkpointing=False, checkpoint_steps=0), QUIET)
    assert rows_of(other) == rows_of(plain)
    ours, theirs = (load_tensors(run / "last.safetensors")[0] for run in (other, plain))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    cut_off(config, monkeypatch, Trainer, "_backward", 11)
    finetune(resumed(config), QUIET)
    assert_same_run(config.out, other)
