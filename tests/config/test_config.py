"""Settings: their rules, YAML, and what wins over what."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from snello import cli
from snello.config import AlastConfig, AugmentConfig, EvaluateConfig, FinetuneConfig, PredictConfig
from snello.config.values import flag, from_dict, read_yaml, to_dict
from snello.errors import ConfigError


def parse(*args: str) -> FinetuneConfig:
    """The config that `snello finetune ARGS` would run with."""
    return cli._parse(FinetuneConfig, args, "finetune", cli._default(args))


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    text = caught.value.for_command_line
    assert text and "\n" not in text
    return text


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# ----------------------------------------------------------------------------------------------------------- rules

WRONG = [
    (AlastConfig, "blocks", 0, "--alast.blocks"),
    (AlastConfig, "start_budget", 0.0, "--alast.start-budget"),
    (AlastConfig, "start_budget", 1.01, "--alast.start-budget"),
    (AlastConfig, "min_budget", 0.0, "--alast.min-budget"),
    (AlastConfig, "min_budget", 1.5, "--alast.min-budget"),
    (AlastConfig, "min_budget", 0.95, "--alast.min-budget"),  # above start_budget
    (AlastConfig, "alpha", -0.1, "--alast.alpha"),
    (AlastConfig, "temperature", 0.0, "--alast.temperature"),
    (AlastConfig, "full_tail", -0.1, "--alast.full-tail"),
    (AlastConfig, "full_tail", 1.1, "--alast.full-tail"),
    (AlastConfig, "flops", 0.0, "--alast.flops"),
    (AlastConfig, "flops", 1.01, "--alast.flops"),
    (AlastConfig, "token_multiple", 0, "--alast.token-multiple"),
    (AugmentConfig, "crop_scale", 0.0, "--augment.crop-scale"),
    (AugmentConfig, "crop_scale", 1.1, "--augment.crop-scale"),
    (AugmentConfig, "rand_ops", -1, "--augment.rand-ops"),
    (AugmentConfig, "rand_magnitude", -1, "--augment.rand-magnitude"),
    (AugmentConfig, "rand_magnitude", 31, "--augment.rand-magnitude"),
    (FinetuneConfig, "last_k", 0, "--last-k"),
    (FinetuneConfig, "batch_size", 0, "--batch-size"),
    (FinetuneConfig, "accumulate", 0, "--accumulate"),
    (FinetuneConfig, "epochs", 0, "--epochs"),
    (FinetuneConfig, "eval_epochs", 0, "--eval-epochs"),
    (FinetuneConfig, "clip_norm", -1.0, "--clip-norm"),
    (FinetuneConfig, "weight_decay", -0.1, "--weight-decay"),
    (FinetuneConfig, "workers", -1, "--workers"),
    (FinetuneConfig, "patience", -1, "--patience"),
    (FinetuneConfig, "checkpoint_steps", -1, "--checkpoint-steps"),
    (FinetuneConfig, "seed", -1, "--seed"),
    (FinetuneConfig, "seed", 2**63, "--seed"),  # torch's generators take no more
    (FinetuneConfig, "lr", 0.0, "--lr"),
    (FinetuneConfig, "lr", -1e-3, "--lr"),
    (FinetuneConfig, "lr", float("nan"), "--lr"),
    (FinetuneConfig, "layer_decay", 0.0, "--layer-decay"),
    (FinetuneConfig, "layer_decay", 1.1, "--layer-decay"),
    (FinetuneConfig, "warmup", -0.1, "--warmup"),
    (FinetuneConfig, "warmup", 1.0, "--warmup"),
    (FinetuneConfig, "label_smoothing", -0.1, "--label-smoothing"),
    (FinetuneConfig, "label_smoothing", 1.0, "--label-smoothing"),
    (FinetuneConfig, "val_share", 0.0, "--val-share"),
    (FinetuneConfig, "val_share", 1.0, "--val-share"),
    (FinetuneConfig, "image_size", 0, "--image-size"),
    (FinetuneConfig, "method", "lorax", "--method"),
    (EvaluateConfig, "batch_size", 0, "--batch-size"),
    (EvaluateConfig, "workers", -1, "--workers"),
    (PredictConfig, "paths", (), "PATHS"),
    (PredictConfig, "top_k", 0, "--top-k"),
    (PredictConfig, "batch_size", 0, "--batch-size"),
]
NEEDED = {EvaluateConfig: {"run": Path("r")}, PredictConfig: {"run": Path("r"), "paths": (Path("p"),)}}


@pytest.mark.parametrize(("cls", "name", "value", "flag"), WRONG, ids=lambda value: getattr(value, "__name__", None))
def test_value_out_of_range_names_its_flag(cls, name, value, flag):
    text = error_of(cls, **{**NEEDED.get(cls, {}), name: value})
    assert text.startswith(f"{flag} must be ")
    assert text.endswith(f"got {value}") or value == ()


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (AlastConfig, {"blocks": 1, "start_budget": 1.0, "min_budget": 1.0, "alpha": 0.0, "full_tail": 1.0}),
        (AlastConfig, {"full_tail": 0.0, "token_multiple": 1, "temperature": 1e-9}),
        (AugmentConfig, {"crop_scale": 1.0, "rand_ops": 0, "rand_magnitude": 0}),
        (AugmentConfig, {"rand_magnitude": 30}),
        (FinetuneConfig, {"last_k": 1, "batch_size": 1, "accumulate": 1, "epochs": 1, "seed": 2**63 - 1}),
        (FinetuneConfig, {"clip_norm": 0.0, "weight_decay": 0.0, "workers": 0, "patience": 0, "checkpoint_steps": 0}),
        (FinetuneConfig, {"layer_decay": 1.0, "warmup": 0.0, "label_smoothing": 0.0, "image_size": 1}),
    ],
)
def test_values_at_the_edge_are_allowed(cls, values):
    config = cls(**values)
    assert {name: getattr(config, name) for name in values} == values


def test_every_field_has_a_default_and_help():
    FinetuneConfig()
    assert flag("batch_size") == "--batch-size"
    for name in (field.name for field in dataclasses.fields(FinetuneConfig)):
        assert name in to_dict(FinetuneConfig())


# ------------------------------------------------------------------------------------------------------------ YAML


def test_round_trip():
    config = FinetuneConfig(
        config=Path("a.yaml"),
        data=Path("d"),
        alast=AlastConfig(blocks=3, alpha=1e-5, draw="softmax"),
        augment=AugmentConfig(flip=False, crop_scale=0.25),
        lr=1e-3,
        image_size=64,
        compare=False,
        out=Path("runs/x"),
    )
    values = to_dict(config)
    assert values["data"] == "d" and values["alast"]["blocks"] == 3 and values["augment"]["flip"] is False
    assert from_dict(FinetuneConfig, yaml.safe_load(yaml.safe_dump(values))) == config
    assert from_dict(FinetuneConfig, to_dict(FinetuneConfig())) == FinetuneConfig()
    predict = PredictConfig(Path("r"), (Path("a"), Path("b")))
    assert to_dict(predict)["paths"] == ["a", "b"]


def test_values_that_yaml_gives_otherwise():
    config = from_dict(FinetuneConfig, {"lr": "1e-3", "weight_decay": 0, "data": "x", "image_size": None, "seed": "7"})
    assert (config.lr, config.weight_decay, config.data, config.image_size) == (1e-3, 0.0, "x", None)
    assert config.seed == 7 and isinstance(config.weight_decay, float)
    assert from_dict(FinetuneConfig, {"alast": {"alpha": "5e-2"}}).alast == AlastConfig(alpha=0.05)
    assert from_dict(FinetuneConfig, {}) == FinetuneConfig()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"learning_rate": 1}, "unknown setting learning_rate; known: config, model"),
        ({1: 2, "foo": 3}, "unknown setting 1, foo"),
        ({"alast": {"budget": 1}}, "alast: unknown setting budget; known: blocks"),
        ({"alast": 3}, "alast must be a mapping"),
        ({"epochs": 2.5}, "epochs must be of type int, got 2.5"),
        ({"epochs": 2.0}, "epochs must be of type int"),
        ({"epochs": True}, "epochs must be of type int, got True"),
        ({"epochs": None}, "epochs must be of type int, got None"),
        ({"epochs": "two"}, "epochs must be of type int, got 'two'"),
        ({"epochs": [1]}, "epochs must be of type int"),
        ({"lr": "fast"}, "lr must be of type float, got 'fast'"),
        ({"lr": {}}, "lr must be of type float"),
        ({"compare": "yes please"}, "compare must be of type bool"),
        ({"compare": 1}, "compare must be of type bool"),
        ({"data": ["a"]}, "data must be of type str"),
        ({"image_size": "big"}, "image_size must be of type int"),
        ({"method": "lorax"}, "method must be one of auto, alast, full, head, last-k, lora, alast+lora, got 'lorax'"),
        ({"precision": 16}, "precision must be one of auto, fp32, bf16, fp16, got 16"),
        ({"alast": {"draw": "coin"}}, "alast: draw must be one of proportional, softmax, lowest-first"),
    ],
)
def test_yaml_that_is_wrong(values, told):
    text = error_of(from_dict, FinetuneConfig, values, "x.yaml")
    assert text.startswith("x.yaml: ") and told in text


def test_yaml_out_of_range_names_the_flag():
    assert error_of(from_dict, FinetuneConfig, {"lr": -1}).startswith("--lr must be above 0")
    assert "--alast.blocks" in error_of(from_dict, FinetuneConfig, {"alast": {"blocks": 0}})


def test_files_that_are_no_settings(tmp_path):
    assert read_yaml(Path(write(tmp_path / "empty.yaml", "# nothing\n"))) == {}
    for content, told in (("a: [1", "not valid YAML"), ("- 1\n", "must hold settings"), ("x", "must hold settings")):
        text = error_of(read_yaml, Path(write(tmp_path / "bad.yaml", content)))
        assert text.startswith("--config ") and "bad.yaml" in text and told in text
    (tmp_path / "latin.yaml").write_bytes(b"model: \xff\xfe\n")
    assert "not valid YAML" in error_of(read_yaml, tmp_path / "latin.yaml")
    assert "No such file" in error_of(read_yaml, tmp_path / "none.yaml")
    assert "directory" in error_of(read_yaml, tmp_path)


# ------------------------------------------------------------------------------------------------- what wins


def test_flag_wins_over_yaml_wins_over_default(tmp_path):
    file = write(
        tmp_path / "a.yaml",
        "lr: 1e-3\nepochs: 7\ncompare: false\nskip_bad: true\nalast:\n  blocks: 5\n  alpha: 0.5\n"
        "augment: {flip: false, rand_ops: 1}\n",
    )
    config = parse("--config", file, "--epochs", "2", "--alast.alpha", "0.25", "--compare", "--augment.flip")
    assert (config.epochs, config.alast.alpha, config.compare, config.augment.flip) == (2, 0.25, True, True)
    assert (config.lr, config.alast.blocks, config.skip_bad, config.augment.rand_ops) == (1e-3, 5, True, 1)
    assert (config.batch_size, config.alast.min_budget) == (FinetuneConfig.batch_size, AlastConfig.min_budget)
    assert config.config == Path(file)
    assert parse("--epochs", "2", f"--config={file}", "--no-skip-bad") == dataclasses.replace(
        from_dict(FinetuneConfig, read_yaml(Path(file))), config=Path(file), epochs=2, skip_bad=False
    )
    assert parse() == FinetuneConfig()


def test_yaml_may_set_the_run_folder(tmp_path):
    file = write(tmp_path / "a.yaml", "out: runs/here\ndata: pictures\n")
    assert parse("--config", file).out == Path("runs/here")
    assert parse("--config", file, "--out", "there").out == Path("there")


def test_wrong_yaml_through_the_flag(tmp_path):
    assert "unknown setting foo" in error_of(parse, "--config", write(tmp_path / "a.yaml", "foo: 1"))
    assert "--lr must be above 0" in error_of(parse, "--config", write(tmp_path / "b.yaml", "lr: 0"))
    assert "No such file" in error_of(parse, "--config", str(tmp_path / "c.yaml"))


def test_wrong_flags_name_the_flag():
    assert "--lr must be above 0 and finite, got -1.0" in error_of(parse, "--lr", "-1")
    assert "--alast.min-budget" in error_of(parse, "--alast.min-budget", "2")
    assert "--epochs" in error_of(parse, "--epochs", "x")
    assert "--bogus" in error_of(parse, "--bogus", "1")
    assert "--method" in error_of(parse, "--method", "lorax")


def test_config_of_a_run_is_a_config(small, tmp_path):
    """A run's own config.yaml starts a new run with the same settings, elsewhere."""
    from snello.runs.folder import RunFolder

    run = RunFolder(small.out)
    run.write_config(dataclasses.replace(small, resume=True, config=Path("x")), {"precision": "fp32"})
    assert run.read_config() == (small, {"precision": "fp32"})
    again = parse("--config", str(run.config_file))
    assert again == dataclasses.replace(small, out=None, config=run.config_file)
    elsewhere = parse("--config", str(run.config_file), "--out", str(tmp_path / "b"), "--seed", "3")
    assert elsewhere == dataclasses.replace(small, out=tmp_path / "b", config=run.config_file, seed=3)


def test_resume_takes_the_settings_of_the_run(small):
    from snello.runs.folder import RunFolder

    run = RunFolder(small.out)
    run.write_config(small, {})
    config = parse("--out", str(small.out), "--resume")
    assert config == dataclasses.replace(small, resume=True)
    assert parse("--resume", "--out", str(small.out), "--lr", "0.5").lr == 0.5
