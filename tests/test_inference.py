"""Using a run: evaluate and predict."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
import torch
from conftest import QUIET, finetune, run_python, with_method, write_pictures
from PIL import Image

from snello import cli
from snello.config import AugmentConfig, EvaluateConfig, PredictConfig
from snello.data import open_picture
from snello.errors import CheckpointError, ConfigError, DataError
from snello.inference import Predictor, evaluate, predict
from snello.models import Preprocessing
from snello.runs.folder import RunFolder
from snello.runs.resolved import Resolved
from snello.train.loop import Trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory, pictures) -> Path:
    """A run whose best epoch is not its last one: of three, the second is said to be the best."""
    from snello.config import FinetuneConfig

    values = iter((0.125, 1.5, 0.25))
    evaluated = Trainer.evaluate
    accuracies: list[float] = []

    def evaluate(self):
        result = evaluated(self)
        accuracies.append(result.accuracy)
        return replace(result, accuracy=next(values))

    config = FinetuneConfig(
        data=pictures,
        model="test_vit",
        weights="none",
        image_size=48,
        method="full",
        epochs=3,
        batch_size=4,
        lr=2e-3,
        workers=0,
        device="cpu",
        precision="fp32",
        attention="explicit",
        compare=False,
        augment=AugmentConfig(rand_ops=0),
        out=tmp_path_factory.mktemp("runs") / "run",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "evaluate", evaluate)
        finetune(config, QUIET)
    (config.out / "accuracies").write_text(json.dumps(accuracies))
    return config.out


def expected_probabilities(run: Path, path: Path) -> torch.Tensor:
    """From timm and torch alone."""
    resolved = RunFolder(run).read()[1]
    model = timm.create_model("test_vit", num_classes=3, img_size=48, checkpoint_path=str(run / "model.safetensors"))
    pre = asdict(resolved.pictures)
    transform = timm.data.create_transform((3, 48, 48), mean=pre["mean"], std=pre["std"], crop_pct=pre["crop_pct"])
    with torch.no_grad():
        return model.eval()(transform(open_picture(path)).unsqueeze(0)).softmax(1)[0]


# --------------------------------------------------------------------------------------------------------- evaluate


@pytest.mark.parametrize("workers", [0, 1])
def test_accuracy_is_that_of_the_best_epoch(run, workers):
    result = evaluate(EvaluateConfig(run, workers=workers, device="cpu"))
    rows = list(RunFolder(run).rows("eval"))
    assert result["accuracy"] == json.loads((run / "accuracies").read_text())[1]
    assert result["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)
    assert abs(result["loss"] - rows[2]["loss"]) > 1e-3
    assert (result["pictures"], result["skipped"]) == (9, 0)


def test_accuracy_equals_the_summary(small):
    summary = finetune(with_method(small, method="alast", epochs=2), QUIET)
    assert evaluate(EvaluateConfig(small.out, device="cpu", workers=0))["accuracy"] == summary["accuracy"]


def test_held_out_share_is_the_same_pictures(small, tmp_path):
    """No val/ folder: what evaluate looks at is what the run held out."""
    data = write_pictures(tmp_path / "data", {"a": 10, "b": 10})
    summary = finetune(replace(small, data=data, val_share=0.3, seed=4, epochs=1), QUIET)
    result = evaluate(EvaluateConfig(small.out, device="cpu", workers=0))
    (row,) = RunFolder(small.out).rows("eval")
    assert (result["accuracy"], result["pictures"]) == (summary["accuracy"], 6)
    assert result["loss"] == pytest.approx(row["loss"], rel=1e-5)


def test_other_pictures(run, pictures, tmp_path):
    """Labels go by the name of the class folder, not by its position."""
    for name in ("green", "red"):
        shutil.copytree(pictures / "train" / name, tmp_path / name)
    right = evaluate(EvaluateConfig(run, data=tmp_path, device="cpu", workers=0))
    assert right["pictures"] == 17 and right["accuracy"] > 0.8
    (tmp_path / "red").rename(tmp_path / "x")
    (tmp_path / "green").rename(tmp_path / "red")
    (tmp_path / "x").rename(tmp_path / "green")
    assert evaluate(EvaluateConfig(run, data=tmp_path, device="cpu", workers=0))["accuracy"] < 0.2
    (tmp_path / "red").rename(tmp_path / "violet")
    with pytest.raises(DataError, match="class folders unknown to the model: violet; known: blue, green, red"):
        evaluate(EvaluateConfig(run, data=tmp_path, device="cpu", workers=0))


def test_evaluate_bad_picture(run, pictures, tmp_path):
    shutil.copytree(pictures / "val", tmp_path, dirs_exist_ok=True)
    bad = tmp_path / "red" / "000.png"
    bad.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"red/000\.png: cannot be read"):
        evaluate(EvaluateConfig(run, data=tmp_path, device="cpu", workers=0))
    result = evaluate(EvaluateConfig(run, data=tmp_path, device="cpu", workers=0, skip_bad=True))
    assert (result["pictures"], result["skipped"]) == (8, 1)


def test_evaluate_on_the_command_line(run, capsys):
    assert cli.main(["evaluate", str(run), "--device", "cpu", "--workers", "0", "--format", "json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() == {"accuracy", "balanced_accuracy", "loss", "pictures", "skipped", "notes", "per_class"}
    rows = result["per_class"]
    assert [(row["class"], row["pictures"]) for row in rows] == [("blue", 3), ("green", 3), ("red", 3)]
    assert sum(row["accuracy"] for row in rows) / 3 == pytest.approx(result["balanced_accuracy"])
    assert result["balanced_accuracy"] == pytest.approx(result["accuracy"])
    assert cli.main(["evaluate", str(run), "--device", "cpu", "--workers", "0"]) == 0
    text = f"accuracy {result['accuracy']:.2%}, balanced accuracy {result['balanced_accuracy']:.2%}, "
    text += f"loss {result['loss']:.4f} on 9 pictures\n"
    assert capsys.readouterr() == (text, "")
    assert cli.main(["evaluate", str(run), "--device", "cpu", "--workers", "0", "--per-class"]) == 0
    out = capsys.readouterr().out.removeprefix(text)
    assert out.splitlines()[0] == f"  blue   {rows[0]['accuracy']:>7.2%} of 3" and out.count("\n") == 3


# ---------------------------------------------------------------------------------------------------------- predict


def test_predict_is_what_the_model_says(run, pictures):
    path = pictures / "val" / "red" / "001.png"
    (row,) = predict(PredictConfig(run, (path,), device="cpu"))
    assert row["path"] == str(path)
    expected = expected_probabilities(run, path)
    got = {entry["class"]: entry["probability"] for entry in row["classes"]}
    assert [got[name] for name in ("blue", "green", "red")] == pytest.approx(expected.tolist(), abs=2e-3)
    values = [entry["probability"] for entry in row["classes"]]
    assert values == sorted(values, reverse=True) and len(values) == 3
    assert sum(values) == pytest.approx(1, abs=1e-5)
    assert row["classes"][0]["class"] == "red"


def test_probabilities_sum_to_one(run, pictures):
    predictor = Predictor(run, "cpu")
    images = torch.stack([predictor.transform(open_picture(p)) for p in sorted((pictures / "val").rglob("*.png"))])
    probabilities = predictor.probabilities(images)
    assert probabilities.shape == (9, 3) and probabilities.dtype == torch.float32
    assert torch.allclose(probabilities.sum(1), torch.ones(9), atol=1e-6)
    assert not predictor.model.training
    alone = torch.cat([predictor.probabilities(image.unsqueeze(0)) for image in images])
    assert torch.allclose(alone, probabilities, atol=1e-5)


def test_predict_folder_and_top_k(run, pictures):
    rows = list(predict(PredictConfig(run, (pictures / "val",), top_k=1, batch_size=4, device="cpu")))
    paths = sorted(str(path) for path in (pictures / "val").rglob("*.png"))
    assert [row["path"] for row in rows] == paths and all(len(row["classes"]) == 1 for row in rows)
    right = sum(Path(row["path"]).parent.name == row["classes"][0]["class"] for row in rows)
    assert right / 9 == json.loads((run / "accuracies").read_text())[1]


def test_predict_bad_picture(run, pictures, tmp_path):
    bad = [tmp_path / f"{i}.png" for i in range(3)]
    for path in bad:
        path.write_bytes(b"no picture")
    good = pictures / "val" / "red" / "000.png"
    with pytest.raises(DataError, match=r"0\.png: cannot be read as a picture"):
        list(predict(PredictConfig(run, (good, bad[0]), device="cpu")))
    config = PredictConfig(run, (*bad, good), device="cpu", skip_bad=True, batch_size=2)
    rows = list(predict(config))
    assert [row.get("path") for row in rows] == [str(good), None] and rows[-1] == {"skipped": 3}
    with pytest.raises(DataError, match="no such file or folder"):
        list(predict(PredictConfig(run, (tmp_path / "none.png",), device="cpu")))


def test_predict_on_the_command_line(run, pictures, tmp_path, capsys):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"")
    good = pictures / "val" / "green" / "000.png"
    args = ["predict", str(run), str(good), str(bad), "--device", "cpu", "--skip-bad"]
    assert cli.main([*args, "--top-k", "2", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [len(row["classes"]) for row in rows[:-1]] == [2] and rows[-1] == {"skipped": 1}
    assert cli.main(args) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{good}: green ") and out.count("%") == 3 and out.count("\n") == 1
    assert err == "1 bad pictures left out\n"
    assert cli.main(["predict", str(run), str(bad), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith(f"snello: error: {bad}: cannot be read as a picture: the file is empty")
        and err[:-1].count("\n") == 0
    )


def test_picture_of_any_size_and_mode(run, tmp_path):
    for mode, size in (("L", (200, 30)), ("RGBA", (7, 90)), ("P", (1, 1))):
        Image.new(mode, size).save(tmp_path / f"{mode}.png")
    rows = list(predict(PredictConfig(run, (tmp_path,), device="cpu")))
    assert len(rows) == 3


# ---------------------------------------------------------------------------------------------------- what is no run


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_folder_that_is_no_run(small, tmp_path, pictures, capsys, verb):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("- not\n- settings\n")
    RunFolder(small.out).create(
        small, Resolved(classes=("a", "b"), preprocessing=Preprocessing(48, (0.5,), (0.5,), "bicubic", 1.0))
    )
    paths = [str(pictures / "val" / "red" / "000.png")] if verb == "predict" else []
    for folder, told in (
        (tmp_path / "none", "is not a run folder"),
        (tmp_path / "empty", "is not a run folder"),
        (tmp_path / "other", "must hold settings"),
        (small.out, "holds no model yet"),
    ):
        assert cli.main([verb, str(folder), *paths, "--device", "cpu"]) == 2
        err = capsys.readouterr().err
        assert str(folder) in err and told in err and err.count("\n") == 1


def test_damaged_or_foreign_weights(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"could not read .*model\.safetensors"):
        Predictor(tmp_path / "run", "cpu")
    shutil.copy(run / "model.safetensors", file)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("image_size: 48", "image_size: 64"))
    with pytest.raises(CheckpointError, match="does not fit test_vit") as caught:
        Predictor(tmp_path / "run", "cpu")
    assert "\n" not in str(caught.value)


def test_device_that_is_not_there(run):
    with pytest.raises(ConfigError, match="--device"):
        Predictor(run, "cuda:77")


def test_a_run_in_bf16_is_used_in_bf16(small):
    finetune(replace(small, precision="bf16", epochs=1), QUIET)
    predictor = Predictor(small.out, "cpu")
    assert predictor.precision == "bf16"
    result = evaluate(EvaluateConfig(small.out, device="cpu", workers=0, batch_size=4))
    (row,) = RunFolder(small.out).rows("eval")
    assert result["loss"] == row["loss"], "the same batches, in the same precision: the same bits"


@pytest.mark.slow
def test_run_folder_may_be_moved_and_used_elsewhere(run, pictures, tmp_path):
    """In another process and another working directory, without the training pictures."""
    shutil.copytree(run, tmp_path / "moved")
    picture = pictures / "val" / "blue" / "002.png"
    result = run_python("-m", "snello.cli", "predict", str(tmp_path / "moved"), str(picture), "--top-k=1")
    assert result.returncode == 0 and result.stdout.startswith(f"{picture}: blue "), result.stderr
    assert result.stderr == ""
