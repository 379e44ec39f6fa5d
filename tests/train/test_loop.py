"""The training loop: what it computes, what it writes, and when it stops."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import QUIET, finetune, flags, resumed, rows_of, with_method, write_pictures
from helpers.budgets import DROPPING
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from snello import cli, finetuning
from snello.assets.micro import WEIGHTS
from snello.config import AlastConfig, AugmentConfig, FinetuneConfig
from snello.data import splits_of
from snello.errors import ConfigError, TrainingError
from snello.files import load_tensors
from snello.models import create_model, preprocessing
from snello.runs.folder import RunFolder
from snello.seeds import mix, permutation
from snello.train import learner as learners
from snello.train.loop import Trainer
from snello.train.scoring import Score
from snello.vit import tokens

PLAIN = AugmentConfig(flip=False, crop_scale=1.0, rand_ops=0)


def weights_of(config: FinetuneConfig) -> dict[str, torch.Tensor]:
    """The weights after the last step."""
    tensors, _ = load_tensors(RunFolder(config.out).checkpoint_file)
    return {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}


def start_weights(config: FinetuneConfig) -> dict[str, torch.Tensor]:
    """The weights before the first step."""
    torch.manual_seed(mix(config.seed))
    return create_model(config.model, config.weights, 3, config.image_size).state_dict()


def moved(config: FinetuneConfig) -> set[str]:
    """The parameters that training has changed."""
    before, after = start_weights(config), weights_of(config)
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


# ------------------------------------------------------------------------------------------------------ it learns


@pytest.mark.parametrize("method", ["alast", "full", "last-k"])
def test_learns_an_easy_data_set(small, method):
    augment = AugmentConfig(rand_ops=0)  # it would take away the colours, by which the classes differ
    summary = finetune(with_method(small, method=method, epochs=4, augment=augment), QUIET)
    losses = [row["loss"] for row in rows_of(small.out, "step")]
    assert sum(losses[-7:]) < 0.7 * sum(losses[:7])
    assert summary["accuracy"] > 0.8  # chance is 1/3
    evaluated = [row["loss"] for row in rows_of(small.out, "eval")]
    assert evaluated[-1] < evaluated[0]


@pytest.mark.slow
def test_learns_the_shipped_pictures_with_the_shipped_model(tmp_path, monkeypatch):
    """A few steps on the 10 classes of Fashion-MNIST, from random weights: above chance."""
    load = finetuning.splits_of

    def fewer(*args, **kwargs):
        splits = load(*args, **kwargs)
        for pictures, num in ((splits.train, 160), (splits.val, 80)):
            order = permutation(len(pictures), 0)[:num]
            pictures.images, pictures.labels = pictures.images[order], [pictures.labels[i] for i in order]
        return splits

    monkeypatch.setattr(finetuning, "splits_of", fewer)
    config = FinetuneConfig(
        weights="none",
        epochs=2,
        batch_size=16,
        lr=1e-3,
        workers=0,
        device="cpu",
        precision="fp32",
        attention="explicit",
        compare=False,
        augment=PLAIN,
        out=tmp_path / "run",
    )
    summary = finetune(config, QUIET)
    assert (summary["steps"], summary["num_classes"], summary["method"]) == (20, 10, "alast")
    assert summary["accuracy"] > 0.2  # chance is 0.1, its standard deviation 0.034
    assert all(len(row["trained"]) == 12 for row in rows_of(config.out, "step"))


def test_the_head_alone_trains_the_head_alone(small):
    config = with_method(small, method="head", epochs=1)
    finetune(config, QUIET)
    assert moved(config) == {"head.weight", "head.bias"}


def test_last_k_trains_the_last_blocks_norm_and_head(small):
    config = with_method(small, method="last-k", last_k=2, epochs=1)
    finetune(config, QUIET)
    assert {name.split(".")[0] for name in moved(config)} == {"blocks", "norm", "head"}
    assert {name.split(".")[1] for name in moved(config) if name.startswith("blocks")} == {"4", "5"}


def test_full_trains_everything(small):
    config = replace(small, epochs=1)
    finetune(config, QUIET)
    assert moved(config) == set(dict(start_weights(config)))


def test_alast_trains_what_it_draws(small):
    config = with_method(small, method="alast", epochs=1, alast=AlastConfig(blocks=2, draw="lowest-first"))
    finetune(config, QUIET)
    assert {name.split(".")[1] for name in moved(config) if name.startswith("blocks")} == {"4", "5"}
    assert {"pos_embed", "cls_token", "patch_embed.proj.weight", "norm.weight", "head.weight"} <= moved(config)
    other = replace(config, out=config.out.with_name("b"), alast=replace(config.alast, train_embeddings=False))
    finetune(other, QUIET)
    assert {name.split(".")[0] for name in moved(other)} == {"blocks", "norm", "head"}


# -------------------------------------------------------------------------------------------------- what it computes


def test_first_step_against_a_loop_written_by_hand(small):
    """Loss, gradient norm, learning rate and weights of the first two steps, from timm and torch alone."""
    config = replace(small, augment=PLAIN, epochs=1, clip_norm=0.5, weight_decay=0.1, warmup=0.5)
    finetune(config, QUIET)
    torch.manual_seed(mix(config.seed))
    model = timm.create_model("test_vit", num_classes=3, img_size=48).train()
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and n not in ("pos_embed", "cls_token")]
    others = [p for p in model.parameters() if not any(p is d for d in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    pre = preprocessing(model, 48)
    train = splits_of(config, check=False).train
    order = permutation(len(train), mix(0, 0))
    for step, row in enumerate(rows_of(config.out, "step")):
        chosen = order[4 * step : 4 * step + 4]
        images = [train.open(i).resize((48, 48), getattr(Image.Resampling, pre.interpolation.upper())) for i in chosen]
        x = torch.stack([torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8) for i in images])
        x = x.view(-1, 48, 48, 3).permute(0, 3, 1, 2) / 255
        x = (x - torch.tensor(pre.mean).view(3, 1, 1)) / torch.tensor(pre.std).view(3, 1, 1)
        loss = cross_entropy(model(x), torch.tensor([train.labels[i] for i in chosen]), label_smoothing=0.1)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        rising = round(7 * 0.5)
        factor = (step + 1) / (rising + 1) if step < rising else 0.5 * (1 + math.cos(math.pi * (step - rising) / 3))
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * factor
        optimizer.step()
        optimizer.zero_grad()
        assert row["loss"] == pytest.approx(loss.item(), rel=2e-4)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=2e-3)
        assert row["lr"] == pytest.approx(5e-4 * factor, rel=1e-9)
        if step == 1:
            break


@pytest.mark.parametrize(("batch", "accumulate"), [(4, 2), (5, 2), (4, 3)])
def test_accumulated_batches_are_one_batch(small, batch, accumulate):
    """26 pictures, so that the last window is of 2; of 5 + 1; of 2 alone. No augmentation, no dropout."""
    one = replace(small, batch_size=batch * accumulate, augment=PLAIN, epochs=1)
    other = replace(one, batch_size=batch, accumulate=accumulate, out=small.out.with_name("other"))
    finetune(one, QUIET)
    finetune(other, QUIET)
    rows, others = rows_of(one.out, "step"), rows_of(other.out, "step")
    assert len(rows) == len(others) == math.ceil(26 / (batch * accumulate))
    for row, same in zip(rows, others, strict=True):
        assert row["loss"] == pytest.approx(same["loss"], abs=1e-6)
        assert row["grad_norm"] == pytest.approx(same["grad_norm"], rel=1e-4)
        assert (row["lr"], row["step"]) == (same["lr"], same["step"])


def test_augmented_pictures_do_not_depend_on_the_batch(small):
    one = replace(small, batch_size=26, epochs=1)
    other = replace(one, batch_size=5, accumulate=6, out=small.out.with_name("other"))
    finetune(one, QUIET)
    finetune(other, QUIET)
    assert rows_of(one.out, "step")[0]["loss"] == pytest.approx(rows_of(other.out, "step")[0]["loss"], abs=1e-6)


def test_layer_decay(small):
    config = replace(small, layer_decay=0.1, weight_decay=0.0, epochs=1, clip_norm=0.0)
    finetune(config, QUIET)
    before, after = start_weights(config), weights_of(config)

    def distance(name):
        return (after[name] - before[name]).abs().max().item()

    head, last, first = (distance(f"{name}weight") for name in ("head.", "blocks.5.mlp.fc1.", "blocks.0.mlp.fc1."))
    # AdamW moves a weight by about its learning rate at each step, whatever the gradient.
    assert last / head == pytest.approx(0.1, rel=0.6)
    assert first / head == pytest.approx(1e-6, rel=0.6)


def test_learning_rate_rises_and_falls(small):
    finetune(replace(small, warmup=0.3), QUIET)
    rates = [row["lr"] for row in rows_of(small.out, "step")]
    top = rates.index(max(rates))
    assert max(rates) == small.lr and top == 4
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] < 0.1 * small.lr


def test_clipping_limits_the_step_not_the_log(small):
    one, other = replace(small, clip_norm=1e-3, epochs=1), replace(small, clip_norm=0.0, epochs=1)
    other = replace(other, out=small.out.with_name("other"))
    finetune(one, QUIET)
    finetune(other, QUIET)
    first, second = (rows_of(config.out, "step") for config in (one, other))
    assert first[0]["grad_norm"] == second[0]["grad_norm"] > 0.1
    assert first[-1] != second[-1]


def test_full_tail_drops_no_tokens(small, monkeypatch):
    dropped: list[int] = []
    keep_top, step = tokens.keep_top, Trainer._step
    monkeypatch.setattr(tokens, "keep_top", lambda *args: (dropped.append(-1), keep_top(*args))[1])

    def counted(self):
        before = len(dropped)
        loss = step(self)
        counts.append(len(dropped) - before)
        return loss

    counts: list[int] = []
    monkeypatch.setattr(Trainer, "_step", counted)
    alast = AlastConfig(**DROPPING, alpha=0.0, full_tail=0.5)
    finetune(with_method(small, method="alast", alast=alast, exact_savings=False), QUIET)
    assert counts == [6] * 7 + [0] * 7  # six blocks drop; the second of two epochs is the tail
    assert len(rows_of(small.out, "step")[-1]["trained"]) == 4  # and it still trains only some blocks


# ----------------------------------------------------------------------------------------------------- determinism


def test_a_run_with_a_flop_target_logs_what_its_steps_drop_by(small):
    finetune(with_method(small, method="alast", alast=AlastConfig(**DROPPING, flops=0.5)), QUIET)
    rows = rows_of(small.out, "step")
    assert all(max(row["step_budgets"]) < min(row["budgets"]) for row in rows)
    with pytest.raises(ConfigError, match=r"^flops must be in 0\.\d+..0\.\d+ for this model with 2 of 6"):
        finetune(
            with_method(small, method="alast", out=None, alast=AlastConfig(**DROPPING | {"blocks": 2}, flops=0.9)),
            QUIET,
        )


@pytest.mark.parametrize("method", ["alast", "full"])
@pytest.mark.slow
def test_same_seed_same_run(small, method):
    one = with_method(small, method=method, epochs=1)
    other, third = replace(one, out=small.out.with_name("b")), replace(one, seed=1, out=small.out.with_name("c"))
    for config in (one, other, third):
        torch.manual_seed(hash(config.out.name) % 1000)  # the process's own random state is of no account
        finetune(config, QUIET)
    assert rows_of(one.out) == rows_of(other.out)
    same, same_too, another = weights_of(one), weights_of(other), weights_of(third)
    assert all(torch.equal(value, same_too[name]) for name, value in same.items())
    assert not torch.equal(same["head.weight"], another["head.weight"])
    assert rows_of(one.out, "step")[0]["loss"] != rows_of(third.out, "step")[0]["loss"]


@pytest.mark.slow
def test_workers_change_nothing(small):
    one, other = replace(small, epochs=1), replace(small, epochs=1, workers=2, out=small.out.with_name("b"))
    for config in (one, other):
        finetune(config, QUIET)
    assert rows_of(one.out) == rows_of(other.out)


def test_runs_of_different_precision_in_one_process(small):
    configs = [
        replace(small, epochs=1, precision=precision, out=small.out.with_name(name))
        for name, precision in (("a", "fp32"), ("b", "bf16"), ("c", "fp32"), ("d", "bf16"))
    ]
    summaries = [finetune(config, QUIET) for config in configs]
    assert [summary["precision"] for summary in summaries] == ["fp32", "bf16", "fp32", "bf16"]
    rows = [rows_of(config.out) for config in configs]
    assert rows[0] == rows[2] and rows[1] == rows[3] and rows[0] != rows[1]
    assert rows[0][0]["loss"] == pytest.approx(rows[1][0]["loss"], rel=0.02)
    assert all(value.dtype == torch.float32 for value in weights_of(configs[1]).values())


# ------------------------------------------------------------------------------------------ best, last, and the end


def with_accuracies(monkeypatch, *values: float) -> list[dict[str, torch.Tensor]]:
    """Pretends these held-out accuracies; the list fills with the weights after each epoch."""
    seen: list[dict[str, torch.Tensor]] = []

    def evaluate(self):
        seen.append({name: value.clone() for name, value in self.learner.modules["model"].state_dict().items()})
        return Score(values[len(seen) - 1], 1.0, (3, 3, 0), (3, 3, 3))

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    return seen


def test_best_and_last(small, monkeypatch):
    seen = with_accuracies(monkeypatch, 0.5, 0.875, 0.875, 0.25)
    summary = finetune(replace(small, epochs=4), QUIET)
    assert (summary["accuracy"], summary["best_epoch"], summary["last_accuracy"], summary["epochs"]) == (
        0.875,
        2,
        0.25,
        4,
    )
    assert summary["balanced_accuracy"] == pytest.approx(2 / 3)
    assert summary["per_class"][2] == {"class": "red", "pictures": 3, "accuracy": 0.0}
    best = load_file(small.out / "model.safetensors")
    assert all(torch.equal(value, seen[1][name]) for name, value in best.items())
    assert all(torch.equal(value, seen[3][name]) for name, value in weights_of(small).items())
    model = timm.create_model("test_vit", num_classes=3, img_size=48)
    model.load_state_dict(best, strict=True)


def test_patience(small, monkeypatch, capsys):
    with_accuracies(monkeypatch, 0.5, 0.75, 0.75, 0.5, 0.9, 0.9)
    summary = finetune(replace(small, epochs=6, patience=2))
    assert (summary["epochs"], summary["steps"], summary["best_epoch"]) == (4, 28, 2)
    assert "stopped early" in capsys.readouterr().err
    assert len(rows_of(small.out, "eval")) == 4


def test_patience_that_is_not_used_up(small, monkeypatch, capsys):
    with_accuracies(monkeypatch, 0.5, 0.4, 0.75, 0.5)
    assert finetune(replace(small, epochs=4, patience=2))["epochs"] == 4
    assert "stopped early" not in capsys.readouterr().err


def test_evaluation_every_other_epoch_and_after_the_last(small, monkeypatch):
    with_accuracies(monkeypatch, 0.5, 0.75, 0.25)
    summary = finetune(replace(small, epochs=5, eval_epochs=2), QUIET)
    assert [(row["epoch"], row["step"]) for row in rows_of(small.out, "eval")] == [(2, 14), (4, 28), (5, 35)]
    assert (summary["best_epoch"], summary["accuracy"], summary["last_accuracy"]) == (4, 0.75, 0.25)
    assert (summary["epochs"], summary["steps"]) == (5, 35)


def spoil_loss(monkeypatch, micro: int) -> None:
    """Makes the loss NaN from the `micro`-th micro-step (from 1) on."""
    original, count = learners.cross_entropy, 0

    def loss(*args, **kwargs):
        nonlocal count
        count += 1
        return original(*args, **kwargs) * (math.nan if count >= micro else 1)

    monkeypatch.setattr(learners, "cross_entropy", loss)


@pytest.mark.parametrize("method", ["full", "alast"])
def test_loss_that_is_not_finite(small, monkeypatch, method):
    spoil_loss(monkeypatch, 9)
    config = with_method(small, method=method, checkpoint_steps=4)
    with pytest.raises(TrainingError) as caught:
        finetune(config, QUIET)
    text = str(caught.value)
    assert "loss is not finite at step 9;" in text and str(config.out / "last.safetensors") in text
    assert "--lr" in text and "\n" not in text
    tensors, state = load_tensors(config.out / "last.safetensors")
    assert state["progressed"]["step"] == 8 and all(value.isfinite().all() for value in tensors.values())
    assert len(rows_of(config.out, "step")) == 8
    monkeypatch.undo()
    assert finetune(resumed(config), QUIET)["steps"] == 14


def test_loss_that_is_not_finite_before_any_checkpoint(small, monkeypatch, capfd):
    spoil_loss(monkeypatch, 2)
    assert cli.main(["finetune", *flags(small)]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("snello: error: the loss is not finite at step 2; no checkpoint had been saved yet")


def test_gradient_that_is_not_finite(small, monkeypatch):
    original = learners.cross_entropy

    def loss(*args, **kwargs):
        value = original(*args, **kwargs)
        value.register_hook(lambda grad: grad * math.inf)
        return value

    monkeypatch.setattr(learners, "cross_entropy", loss)
    with pytest.raises(TrainingError, match="the gradient is not finite at step 1"):
        finetune(small, QUIET)


def test_learning_rate_that_is_far_too_high(small):
    """Not a mock: weights that overflow."""
    with pytest.raises(TrainingError, match=r"is not finite at step \d+"):
        finetune(replace(small, lr=1e38, epochs=4, warmup=0.0), QUIET)


# ------------------------------------------------------------------------------------------------- what is written

SUMMARY = {
    "accuracy",
    "balanced_accuracy",
    "per_class",
    "last_accuracy",
    "best_epoch",
    "epochs",
    "steps",
    "train_time_s",
    "step_time_s",
    "full_step_time_s",
    "flops_per_sample",
    "full_flops_per_sample",
    "saved_bytes_per_sample",
    "full_saved_bytes_per_sample",
    "optimizer_bytes",
    "trainable_parameters",
    "method",
    "model",
    "seed",
    "device",
    "precision",
    "attention",
    "versions",
    "num_classes",
}


def test_run_folder_of_alast(small, capsys):
    summary = finetune(with_method(small, method="alast", seed=3))
    files = {"config.yaml", "metrics.jsonl", "model.safetensors", "last.safetensors"}
    assert {path.name for path in small.out.iterdir()} == files | {"alast.json", "summary.json", "budgets.png"}

    assert json.loads((small.out / "summary.json").read_text()) == summary
    assert summary.keys() >= SUMMARY
    assert (summary["method"], summary["model"], summary["seed"]) == ("alast", "test_vit", 3)
    assert (summary["device"], summary["precision"], summary["attention"]) == ("cpu", "fp32", "explicit")
    assert (summary["epochs"], summary["steps"], summary["num_classes"]) == (2, 14, 3)
    assert summary["step_time_s"] is None and summary["full_fits"] is None  # nothing was compared
    assert summary["versions"].keys() == {"snello", "torch", "torchvision", "timm", "accelerate"}
    assert summary["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__
    rows = list(RunFolder(small.out).rows("step"))
    assert summary["train_time_s"] == pytest.approx(sum(row["seconds"] for row in rows), abs=1e-3) and rows
    evaluated = rows_of(small.out, "eval")
    assert summary["accuracy"] == max(row["accuracy"] for row in evaluated)

    assert [row["step"] for row in rows] == list(range(1, 15))
    assert [row["epoch"] for row in rows] == [0] * 7 + [1] * 7
    assert [(row["step"], row["epoch"]) for row in evaluated] == [(7, 1), (14, 2)]
    for row in rows:
        assert row.keys() == {"kind", "step", "epoch", "loss", "lr", "grad_norm", "budgets", "trained", "seconds"}
        assert len(row["budgets"]) == 6 and all(0.5 <= budget <= 1 for budget in row["budgets"])
        assert len(row["trained"]) == 4 and row["trained"] == sorted(set(row["trained"]))
        assert row["loss"] > 0 and row["grad_norm"] > 0 and row["seconds"] > 0
    for row in evaluated:
        assert row.keys() == {"kind", "step", "epoch", "accuracy", "balanced_accuracy", "loss"}
    assert rows[0]["budgets"] == [0.9] * 6 != rows[-1]["budgets"]

    alast = json.loads((small.out / "alast.json").read_text())
    assert alast["budgets"] == rows[-1]["budgets"] and alast["trained"] == rows[-1]["trained"]
    with Image.open(small.out / "budgets.png") as image:
        image.load()
        assert image.format == "PNG" and min(image.size) > 300
        assert len(image.convert("RGB").resize((64, 64)).getcolors(maxcolors=4096)) > 20

    err = capsys.readouterr().err
    assert "26 pictures to train, 9 held out, 3 classes" in err and f"run folder: {small.out}" in err
    assert f"accuracy {summary['accuracy']:.2%}" in err


def test_config_of_a_run(small):
    config = with_method(small, "alast", attention="auto", precision="auto", device="auto", config=Path("x.yaml"))
    finetune(replace(config, epochs=1), QUIET)
    values = yaml.safe_load((small.out / "config.yaml").read_text())
    resolved = values["resolved"]
    assert resolved["classes"] == ["blue", "green", "red"]
    assert (resolved["num_train"], resolved["num_val"], resolved["num_skipped"]) == (26, 9, 0)
    assert resolved["precision"] in ("fp32", "bf16") and resolved["attention"] in ("fused", "explicit")
    assert resolved["device"].split(":")[0] in ("cpu", "cuda", "mps")
    pre = preprocessing(timm.create_model("test_vit"), 48)
    assert resolved["preprocessing"] == json.loads(json.dumps(asdict(pre)))
    assert resolved["preprocessing"]["size"] == 48
    assert resolved["versions"]["timm"] == timm.__version__
    assert values["precision"] == "auto" and values["config"] is None and values["resume"] is False
    assert values["alast"]["alpha"] == 5.0 and values["augment"]["rand_ops"] == 2


@pytest.mark.parametrize("method", ["full", "head"])
def test_run_folder_of_another_method(small, method):
    finetune(with_method(small, method=method, epochs=1), QUIET)
    names = {path.name for path in small.out.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "model.safetensors", "last.safetensors", "summary.json"}
    assert "budgets" not in rows_of(small.out, "step")[0]


def test_default_run_folder(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finetune(replace(small, out=None, epochs=1), QUIET)
    (run,) = Path("runs").iterdir()
    assert run.name.startswith("test_vit-full-2") and (run / "summary.json").exists()


def test_checkpoints_in_between(small, monkeypatch):
    steps: list[int] = []
    save = Trainer._save
    monkeypatch.setattr(Trainer, "_save", lambda self: (steps.append(self.progress.step), save(self))[1])
    finetune(replace(small, checkpoint_steps=3), QUIET)
    assert steps == [3, 6, 7, 9, 12, 14]


def test_bad_pictures_are_left_out_and_counted(small, tmp_path, capsys):
    data = write_pictures(tmp_path / "data", {"a": 6, "b": 6})
    (data / "a" / "003.png").write_bytes(b"no picture")
    summary = finetune(replace(small, data=data, skip_bad=True, epochs=1))
    assert "1 bad pictures left out" in capsys.readouterr().err
    resolved = yaml.safe_load((small.out / "config.yaml").read_text())["resolved"]
    assert (resolved["num_skipped"], resolved["num_train"] + resolved["num_val"]) == (1, 11)
    assert summary["num_classes"] == 2


@pytest.mark.slow
def test_shipped_model_with_its_weights(tmp_path, pictures):
    model = create_model("vit_micro_patch4_32", "pretrained", 3)
    saved = load_file(WEIGHTS)
    own = model.state_dict()
    assert {name.split(".")[0] for name in saved} == {name.split(".")[0] for name in own}
    assert all(torch.equal(value, own[name]) for name, value in saved.items() if not name.startswith("head"))
    few = {"epochs": 1, "batch_size": 8, "workers": 0, "compare": False}
    config = FinetuneConfig(data=pictures, model="vit_micro_patch4_32", out=tmp_path / "run", **few)
    assert finetune(config, QUIET)["accuracy"] > 1 / 3


@pytest.mark.parametrize(("side", "warned"), [(64, False), (70, True)])
def test_who_names_the_toy_for_large_pictures_is_warned(tmp_path, capsys, side, warned):
    write_pictures(tmp_path / "photos", {"a": 4, "b": 4}, size=side)
    few = {"epochs": 1, "batch_size": 8, "workers": 0, "compare": False, "method": "head", "device": "cpu"}
    finetune(FinetuneConfig(data=tmp_path / "photos", model="vit_micro_patch4_32", out=tmp_path / "run", **few))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == warned
    told = f"vit_micro_patch4_32 is a toy: it sees these pictures, of about {side} x {side}, at 32 x 32 pixels; for"
    assert all(told in line and "name a pretrained --model (docs/models.md)" in line for line in lines)
