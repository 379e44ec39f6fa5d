"""ALaST in transformers.Trainer: every test is a real training on the CPU, of a ViT of 4 blocks."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_pictures
from helpers.ranks import run_ranks

pytest.importorskip("transformers")

from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification, ViTModel

from snello.errors import CheckpointError, ConfigError, ModelError
from snello.integrations.transformers import ALaSTCallback
from snello.methods.alast import ALaST

OPTIONS: dict[str, Any] = {"blocks": 2, "start_budget": 0.7, "alpha": 0.05}


def vit(dropout: float = 0.1, depth: int = 4) -> ViTForImageClassification:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": depth, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(**shape, image_size=16, patch_size=4, num_labels=5, hidden_dropout_prob=dropout)
    model = ViTForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def data(n: int = 26) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 5} for i in range(n)]


class Spy(TrainerCallback):
    """What each optimizer step ran with, and the logs that a callback after ours is told."""

    def __init__(self, ours: ALaSTCallback | None) -> None:
        self.ours = ours
        self.rows: list[Any] = []
        self.logs: list[dict[str, float]] = []
        self.stop_at = 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        model = kwargs["model"]
        grads = [name for name, p in model.named_parameters() if p.grad is not None]
        alast = self.ours and self.ours.alast
        self.rows.append({"grads": grads, "budgets": alast and list(alast.budgets), "trained": alast and alast.trained})
        if alast:
            self.rows[-1] |= {"dropping": alast.dropping, "forwards": len(alast.state_dict()["pending"])}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.stop_at:
            control.should_save = True
            control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs or {}))


def train(folder: Path, callback: ALaSTCallback | None, model=None, resume=None, stop_at=0, more=(), **options: Any):
    """A training of 2 epochs of 4 optimizer steps, each of 2 micro-batches of 4, the epochs' last of 2 pictures."""
    arguments = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
    }
    spy = Spy(callback)
    spy.stop_at = stop_at
    trainer = Trainer(
        model=vit() if model is None else model,
        args=TrainingArguments(output_dir=str(folder), **{**arguments, **options}),
        train_dataset=data(),
        eval_dataset=data(5),
        callbacks=[*([callback] if callback else []), spy, *more],
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer, spy


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def assert_same_weights(one: Any, other: Any) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_one_step_of_alast_per_optimizer_step(tmp_path):
    callback = ALaSTCallback(**OPTIONS)
    trainer, spy = train(tmp_path, callback)
    assert trainer.state.global_step == len(spy.rows) == 8
    assert [row["forwards"] for row in spy.rows] == [2, 2, 2, 1] * 2  # micro-batches since ALaST's last step
    for row in spy.rows:
        blocks = {int(name.split(".")[2]) for name in row["grads"] if name.startswith("vit.layers.")}
        assert blocks == set(row["trained"]) and len(blocks) == 2
        assert "classifier.weight" in row["grads"] and "vit.embeddings.cls_token" in row["grads"]
    assert len({tuple(row["trained"]) for row in spy.rows}) > 1
    assert spy.rows[0]["budgets"] == spy.rows[1]["budgets"] == [0.7, 0.7, 1.0, 1.0]  # nothing to compare with before
    assert len({tuple(row["budgets"]) for row in spy.rows}) == 7


def test_the_model_is_left_as_it_was_found(tmp_path):
    model = vit()
    model.vit.layers[1].attention.q_proj.weight.requires_grad_(False)
    found = {name: p.requires_grad for name, p in model.named_parameters()}
    train(tmp_path, ALaSTCallback(**OPTIONS, train_embeddings=False), model, max_steps=2)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == found
    assert not any("forward" in vars(block) for block in model.vit.layers)
    ALaST(model).detach()


def test_after_an_error_the_callback_trains_again(tmp_path):
    class Broken(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            raise RuntimeError("broken")

    model, callback = vit(), ALaSTCallback(**OPTIONS)
    with pytest.raises(RuntimeError, match="broken"):
        train(tmp_path, callback, model, more=[Broken()])
    assert "forward" in vars(model.vit.layers[0])  # the Trainer has no event that would say so
    callback.detach()
    assert "forward" not in vars(model.vit.layers[0]) and all(p.requires_grad for p in model.parameters())
    trainer, _ = train(tmp_path, callback, model, max_steps=2)
    assert trainer.state.global_step == 2


def test_the_base_learning_rate_is_the_step_size_not_the_scheduled_one(tmp_path):
    options = {**OPTIONS, "adapt": "difference", "alpha": None}
    _, ours = train(tmp_path, ALaSTCallback(**options), learning_rate=0.02)
    _, expected = train(tmp_path, ALaSTCallback(**{**options, "alpha": 0.02}), learning_rate=0.02)
    assert ours.rows == expected.rows and len({tuple(row["budgets"]) for row in ours.rows}) > 2


@pytest.mark.slow
def test_evaluation_in_between_changes_nothing(tmp_path):
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    one, rows = train(tmp_path, ALaSTCallback(**OPTIONS), vit(dropout=0.0))  # the Trainer's evaluation draws numbers
    other, others = train(tmp_path, ALaSTCallback(**OPTIONS), vit(dropout=0.0), **evaluating)
    assert any("eval_loss" in row for row in other.state.log_history)
    assert rows.rows == others.rows
    assert_same_weights(one.model, other.model)


def test_the_tail_drops_no_tokens(tmp_path):
    _, spy = train(tmp_path, ALaSTCallback(**OPTIONS, full_tail=0.25))
    assert [row["dropping"] for row in spy.rows] == [True] * 6 + [False] * 2


@pytest.mark.parametrize("log", ["blocks", "mean", "none"])
def test_budgets_and_trained_blocks_are_logged(log, tmp_path):
    trainer, spy = train(tmp_path, ALaSTCallback(**OPTIONS, log=log), max_steps=3)
    history = [row for row in trainer.state.log_history if "loss" in row]
    told = [row for row in spy.logs if "loss" in row]
    assert len(history) == len(told) == 3
    for row, heard, ran in zip(history, told, spy.rows, strict=True):
        ours = {key: value for key, value in row.items() if key.startswith("alast/")}
        assert ours == {key: value for key, value in heard.items() if key.startswith("alast/")}
        expected = {"alast/budget_mean": sum(ran["budgets"]) / 4, "alast/budget_min": min(ran["budgets"])}
        if log == "blocks":
            expected |= {f"alast/budget_{i}": ran["budgets"][i] for i in range(4)}
            expected |= {f"alast/trained_{i}": float(i in ran["trained"]) for i in range(4)}
        assert ours == (expected if log != "none" else {})
    assert not any(key.startswith("alast/") for row in spy.logs if "train_loss" in row for key in row)


# Resuming


@pytest.mark.parametrize("ours", [True, False], ids=["alast", "control"])
@pytest.mark.parametrize("stop_at", [3, 4], ids=["inside-an-epoch", "between-epochs"])
@pytest.mark.slow
def test_a_resumed_training_equals_an_uninterrupted_one(stop_at, ours, tmp_path):
    """The control, without ALaST, shows that the Trainer itself does so, dropout included, once it saves right."""
    options = {**OPTIONS, "full_tail": 0.25, "optimizer_state": "release"}
    make = (lambda **more: ALaSTCallback(**{**options, **more})) if ours else (lambda **more: None)
    model = vit()
    if not ours:
        model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    whole, spy = train(tmp_path / "whole", make())
    _, first = train(tmp_path / "run", make(), model, stop_at=stop_at)
    assert len(first.rows) == stop_at
    rest, second = train(tmp_path / "run", make(), resume=tmp_path / "run" / f"checkpoint-{stop_at}")
    assert first.rows + second.rows == spy.rows
    assert losses(rest) == losses(whole) and len(losses(rest)) == 8
    assert_same_weights(rest.model, whole.model)
    assert [{**row, "epoch": 0} for row in rest.state.log_history[:-1]] == [
        {**row, "epoch": 0} for row in whole.state.log_history[:-1]
    ]


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    """The Trainer's checkpoints of a ViT can be read back by the Trainer, and still by transformers."""
    model = vit()
    trainer, _ = train(
        tmp_path,
        ALaSTCallback(**OPTIONS),
        model,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    best = ViTForImageClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert_same_weights(model, best)
    assert "save_pretrained" not in vars(model)


@pytest.mark.slow
def test_the_trainers_own_restoring_of_callbacks_takes_the_checkpoints_settings(tmp_path):
    train(tmp_path, ALaSTCallback(**OPTIONS), stop_at=3)
    _, whole = train(tmp_path / "whole", ALaSTCallback(**OPTIONS))
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["ALaSTCallback"]["attributes"]["snello"]["settings"]["blocks"] == 2
    given = ALaSTCallback(blocks=1)
    trainer, _ = train(tmp_path, given, resume=tmp_path / "checkpoint-3", restore_callback_states_from_checkpoint=True)
    (used,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, ALaSTCallback)]
    assert used is not given and used.alast.num_blocks == 2
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["alast/budget_0"] for row in rows] == [row["budgets"][0] for row in whole.rows]


@pytest.mark.slow
def test_a_checkpoint_that_is_not_ours_is_refused_in_one_line(tmp_path):
    train(tmp_path / "without", None, stop_at=2)
    train(tmp_path / "with", ALaSTCallback(**OPTIONS), stop_at=2)
    model = vit()
    with pytest.raises(CheckpointError) as error:
        train(tmp_path / "without", ALaSTCallback(**OPTIONS), model, tmp_path / "without" / "checkpoint-2")
    assert str(error.value).startswith("the checkpoint holds no state of ALaST") and "\n" not in str(error.value)
    assert not any("forward" in vars(block) for block in model.vit.layers)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(CheckpointError) as error:
        other = ALaSTCallback(**{**OPTIONS, "start_budget": 0.8, "full_tail": 0.5})
        train(tmp_path / "with", other, resume=tmp_path / "with" / "checkpoint-2")
    assert str(error.value) == (
        "the checkpoint is of ALaST with full_tail=0.0, start_budget=0.7, "
        "but ALaSTCallback was given full_tail=0.5, start_budget=0.8"
    )


# Options, and the Trainer's own


def test_bad_options_and_models_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"ALaST has no option block; it has: blocks, start_budget"):
        ALaSTCallback(block=3)
    with pytest.raises(ConfigError, match=r"full_tail must be in \[0, 1\], got 2"):
        ALaSTCallback(full_tail=2)
    with pytest.raises(ConfigError, match=r"log must be blocks, mean or none, got all"):
        ALaSTCallback(log="all")
    with pytest.raises(ConfigError, match=r"blocks must be in 1\.\.4"):
        train(tmp_path, ALaSTCallback(blocks=5))
    model = vit()
    ALaST(model)
    with pytest.raises(ModelError, match="already attached"):
        train(tmp_path, ALaSTCallback(), model)


def test_an_optimizer_without_the_blocks_is_refused(tmp_path):
    model = vit()
    head = torch.optim.AdamW(model.classifier.parameters())
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
        train_dataset=data(),
        callbacks=[ALaSTCallback(**OPTIONS)],
        optimizers=(head, None),
    )
    with pytest.raises(ConfigError, match=r"the optimizer lacks parameters of blocks \[0, 1, 2, 3\]"):
        trainer.train()
    assert not any("forward" in vars(block) for block in model.vit.layers)


def test_gradient_checkpointing_gives_the_same(tmp_path):
    _, plain = train(tmp_path, ALaSTCallback(**OPTIONS))
    _, recomputed = train(tmp_path, ALaSTCallback(**OPTIONS), activation_checkpointing=True)
    for one, other in zip(plain.rows, recomputed.rows, strict=True):
        assert other["trained"] == one["trained"] and other["forwards"] == one["forwards"]
        assert other["budgets"] == pytest.approx(one["budgets"], abs=1e-4)


def test_bf16_trains(tmp_path):
    trainer, spy = train(tmp_path, ALaSTCallback(**OPTIONS), bf16=True, max_steps=3)
    assert len(set(losses(trainer))) == 3 and [row["forwards"] for row in spy.rows] == [2, 2, 2]


@pytest.mark.slow
def test_torch_compile_traces_the_attached_model(tmp_path, monkeypatch):
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.delenv(name, raising=False)  # the Trainer sets them; this takes them away again
    torch._dynamo.reset()
    results = []
    for backend in (None, "eager"):
        model = vit(dropout=0.0, depth=2)
        callback = ALaSTCallback(blocks=1, start_budget=0.7, alpha=0.0, draw="lowest-first")  # few things to trace
        options = {"max_steps": 2, "gradient_accumulation_steps": 1, "torch_compile_backend": backend}
        results.append(train(tmp_path, callback, model, **options))
    (plain, eager), (compiled, spy) = results
    torch._dynamo.reset()
    assert hasattr(compiled.model_wrapped, "_orig_mod")
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    for one, other in zip(eager.rows, spy.rows, strict=True):
        assert one["grads"] == other["grads"] and one["budgets"] == pytest.approx(other["budgets"], abs=1e-4)


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("DISTRIBUTED", {}, r"set TrainingArguments\(ddp_find_unused_parameters=True\)"),
        ("DISTRIBUTED", {"ddp_find_unused_parameters": False}, r"set TrainingArguments\(ddp_find_unused_parameters"),
        ("DISTRIBUTED", {"ddp_find_unused_parameters": True, "ddp_static_graph": True}, "without ddp_static_graph"),
        ("NOT_DISTRIBUTED", {}, "does not work under nn.DataParallel"),
    ],
)
def test_what_would_drift_apart_in_parallel_is_refused(mode, options, message, tmp_path, monkeypatch):
    from transformers.training_args import ParallelMode

    monkeypatch.setattr(TrainingArguments, "parallel_mode", ParallelMode[mode])
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)
    model = vit()
    with pytest.raises(ConfigError, match=message):
        ALaSTCallback().on_train_begin(args, None, None, model=model)
    assert "forward" not in vars(model.vit.layers[0])
    if mode == "DISTRIBUTED":
        good = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, ddp_find_unused_parameters=True)
        from snello.integrations.transformers import _check_parallelism

        _check_parallelism(good)


def _rank(rank: int, folder: Path) -> dict[str, Any]:
    parallel = {"ddp_find_unused_parameters": True, "ddp_backend": "gloo", "per_device_train_batch_size": 2}
    whole, spy = train(folder / "whole", ALaSTCallback(**OPTIONS), **parallel)
    _, first = train(folder / "run", ALaSTCallback(**OPTIONS), stop_at=3, **parallel)
    checkpoint = folder / "run" / "checkpoint-3"
    rest, second = train(folder / "run", ALaSTCallback(**OPTIONS), resume=checkpoint, **parallel)
    assert_same_weights(rest.model, whole.model)
    assert first.rows + second.rows == spy.rows and isinstance(whole.model_wrapped, DistributedDataParallel)
    return {"weights": whole.model.state_dict(), "rows": spy.rows}


@pytest.mark.slow
def test_two_processes_stay_equal_and_resume_exactly(tmp_path):
    one, other = run_ranks(_rank, tmp_path)
    assert one["rows"] == other["rows"] and len(one["rows"]) == 8
    assert len({tuple(row["trained"]) for row in one["rows"]}) > 1
    assert len({tuple(row["budgets"]) for row in one["rows"]}) == 7
    for name, value in one["weights"].items():
        assert torch.equal(value, other["weights"][name]), name


def test_only_the_adapters_of_drawn_blocks_train(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    base = vit()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = peft.get_peft_model(base, config)
    callback = ALaSTCallback(**OPTIONS)
    trainer, spy = train(tmp_path, callback, model)
    for row in spy.rows:
        blocks = [name for name in row["grads"] if ".layers." in name]
        assert all("lora_" in name for name in blocks)
        assert {int(name.split(".layers.")[1].split(".")[0]) for name in blocks} == set(row["trained"])
    assert len({tuple(row["trained"]) for row in spy.rows}) > 1
    after = model.get_base_model().state_dict()
    for name, value in before.items():
        if ".layers." in name:
            assert any(
                torch.equal(value, after[key])
                for key in (name, name.replace("proj.", "proj.base_layer."))
                if key in after
            )
    assert losses(trainer)[-1] != losses(trainer)[0]


@pytest.mark.slow
def test_adapters_resume_exactly(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted():
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
        return peft.get_peft_model(vit(), config)

    whole, spy = train(tmp_path / "whole", ALaSTCallback(**OPTIONS), adapted())
    _, first = train(tmp_path / "run", ALaSTCallback(**OPTIONS), adapted(), stop_at=3)
    rest, second = train(
        tmp_path / "run", ALaSTCallback(**OPTIONS), adapted(), resume=tmp_path / "run" / "checkpoint-3"
    )
    assert first.rows + second.rows == spy.rows
    assert losses(rest) == losses(whole)
    assert_same_weights(rest.model, whole.model)


@pytest.mark.filterwarnings("error::snello.errors.SnelloWarning")  # from_pretrained gives a model in eval mode
@pytest.mark.slow
def test_the_code_in_the_docs_runs(tmp_path, monkeypatch):
    write_pictures(tmp_path / "photos" / "train", {"blue": 9, "green": 9, "red": 8})
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=12, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4
    )
    ViTModel(config).save_pretrained(tmp_path / "google" / "vit-base-patch16-224-in21k")
    text = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, flags=re.S)[0]
    assert "snello.integrations.transformers" in code
    monkeypatch.chdir(tmp_path)
    exec(code, names := {"__name__": "docs"})
    assert names["trainer"].state.global_step == 12
    assert (tmp_path / "runs" / "photos" / "final" / "model.safetensors").exists()
