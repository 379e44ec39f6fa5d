"""Settings: their rules, YAML, and what wins over what."""

import dataclasses
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from snello import cli
from snello.config import (
    AlastConfig,
    AugmentConfig,
    ColumnsConfig,
    DoctorConfig,
    EvaluateConfig,
    FinetuneConfig,
    JoinConfig,
    LoraConfig,
    PicturesConfig,
    PlanConfig,
    PredictConfig,
    ServeConfig,
    SplitConfig,
)
from snello.config.effect import changed, effective
from snello.config.values import flag, from_dict, read_yaml, to_dict
from snello.errors import ConfigError
from snello.models import Preprocessing
from snello.runs.resolved import Resolved

PRE = Preprocessing(48, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 1.0)
RESOLVED = Resolved(precision="fp32", classes=("a", "b"), preprocessing=PRE)


def parse(*args: str, cls: type = FinetuneConfig) -> Any:
    """The config that `snello finetune ARGS`, or the verb of another class, would run with."""
    return cli._parse(cls, args, "verb")


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
    (AugmentConfig, "mixup", -0.1, "--augment.mixup"),
    (AugmentConfig, "mixup", float("nan"), "--augment.mixup"),
    (AugmentConfig, "mixup", 0.009, "--augment.mixup"),  # torch's Beta in float32 is none there
    (AugmentConfig, "cutmix", -1.0, "--augment.cutmix"),
    (AugmentConfig, "cutmix", float("inf"), "--augment.cutmix"),
    (AugmentConfig, "cutmix", 100.1, "--augment.cutmix"),
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
        (AugmentConfig, {"mixup": 0.01, "cutmix": 100.0}),
        (
            FinetuneConfig,
            {"method": "last-k", "last_k": 1, "batch_size": 1, "accumulate": 1, "epochs": 1, "seed": 2**63 - 1},
        ),
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
        ({"learning_rate": 1}, "unknown setting learning_rate: snello calls it lr"),
        ({1: 2, "foo": 3}, "unknown setting 1, foo; known: config, model"),
        ({"alast": {"budget": 1}}, "alast: unknown setting budget; nearest: min_budget, start_budget"),
        ({"alast": 3}, "alast must be a mapping"),
        ({"epochs": 2.5}, "epochs must be of type int, got 2.5"),
        ({"epochs": 2.0}, "epochs must be of type int"),
        ({"epochs": True}, "epochs must be of type int, got True"),
        ({"batch_size": None}, "batch_size must be of type int, got None"),
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
        text = error_of(read_yaml, Path(write(tmp_path / "bad.yaml", content)), "--config bad.yaml")
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
    run.create(dataclasses.replace(small, resume=True, config=Path("x")), RESOLVED)
    assert run.read() == (small, RESOLVED)
    again = parse("--config", str(run.config_file))
    assert again == dataclasses.replace(small, out=None, config=run.config_file)
    elsewhere = parse("--config", str(run.config_file), "--out", str(tmp_path / "b"), "--seed", "3")
    assert elsewhere == dataclasses.replace(small, out=tmp_path / "b", config=run.config_file, seed=3)


def test_config_of_a_run_finds_its_pictures_from_another_folder(small, tmp_path, monkeypatch):
    """And a copy whose `out` was edited means it."""
    from snello.runs.folder import RunFolder

    (tmp_path / "photos").mkdir()
    (tmp_path / "other").mkdir()
    run = RunFolder(tmp_path / "runs" / "a")
    resolved = dataclasses.replace(RESOLVED, data=str(tmp_path / "photos"))
    run.create(dataclasses.replace(small, data="photos", out=Path("runs/a")), resolved)
    monkeypatch.chdir(tmp_path)
    assert parse("--config", "runs/a/config.yaml").data == "photos"
    monkeypatch.chdir(tmp_path / "other")
    config = parse("--config", "../runs/a/config.yaml")
    assert (config.data, config.out) == (str(tmp_path / "photos"), None)
    values = yaml.safe_load(run.config_file.read_text()) | {"out": "runs/b"}
    assert parse("--config", write(tmp_path / "c.yaml", yaml.safe_dump(values))).out == Path("runs/b")


def test_resume_takes_the_settings_of_the_run(small):
    from snello.runs.folder import RunFolder

    run = RunFolder(small.out)
    run.create(small, RESOLVED)
    config = parse("--out", str(small.out), "--resume")
    assert config == dataclasses.replace(small, resume=True)
    assert parse("--resume", "--out", str(small.out), "--lr", "0.5").lr == 0.5


# ------------------------------------------------------------------------- flag > file > default, nested too


def test_auto_is_resolved_when_it_is_read(tmp_path):
    """A file that says nothing of methods changes none: the flag --split.cut means the same with it and without."""
    file = write(tmp_path / "a.yaml", "epochs: 3\n")
    assert parse("--config", file).method_name == "alast"
    config = parse("--config", file, "--split.cut", "3")
    assert (config.method, config.method_name, config.epochs) == ("auto", "full", 3)
    assert config == replace(parse("--split.cut", "3"), epochs=3, config=Path(file))
    assert to_dict(config)["method"] == "auto" and replace(config, split=SplitConfig()).method_name == "alast"


@pytest.mark.parametrize("cls", [FinetuneConfig, ServeConfig])
def test_a_flag_completes_the_group_of_a_file(tmp_path, cls):
    file = write(tmp_path / "a.yaml", "split: {codec: int8}\n")
    config = parse("--config", file, "--split.cut", "2", "--split.labels", "client", cls=cls)
    assert config.split == SplitConfig(cut=2, codec="int8", labels="client")


def test_the_group_of_a_file_lies_over_the_defaults_of_its_config(tmp_path):
    file = write(tmp_path / "a.yaml", "split: {codec: int8}\n")
    assert parse("--config", file, cls=ServeConfig).split == SplitConfig(cut=3, codec="int8")
    assert from_dict(ServeConfig, {"split": {"codec": "int8"}}).split.cut == ServeConfig().split.cut == 3


FROZEN = ["--split.cut", "3", "--split.client", "frozen"]
SENDING = [*FROZEN, "--split.send-epochs", "2"]
FIRST = ["--split.cut", "3", "--split.client", "epochs:2"]
UNFIT = [
    (["--split.client", "frozen"], "--split.client has no effect without --split.cut"),
    (["--split.cut", "3", "--split.client", "epochs:0"], "--split.client must be trains, frozen or epochs:N, got 'ep"),
    (["--split.cut", "3", "--split.client", "epochs:x"], "--split.client must be trains, frozen or epochs:N"),
    (["--split.cut", "3", "--split.client", "epochs:"], "--split.client must be trains, frozen or epochs:N"),
    (["--split.cut", "3", "--split.client", "Frozen"], "--split.client must be trains, frozen or epochs:N"),
    (["--split.cut", "3", "--split.client", "epochs:1 "], "--split.client must be trains, frozen or epochs:N"),
    ([*FROZEN, "--split.send-epochs", "0"], "--split.send-epochs must be at least 1, got 0"),
    ([*SENDING, "--split.replay", "-1"], "--split.replay must be 0 or more, got -1"),
    ([*FROZEN, "--split.cutmix", "1.1"], "--split.cutmix must be in [0, 1], got 1.1"),
    ([*FROZEN, "--split.cutmix", "nan"], "--split.cutmix must be in [0, 1], got nan"),
    (["--split.cut", "3", "--split.send-epochs", "2"], "--split.send-epochs has no effect without --split.client froz"),
    (["--split.cut", "3", "--split.replay", "2"], "--split.replay has no effect without --split.send-epochs"),
    ([*FROZEN, "--split.replay", "2"], "--split.replay has no effect without --split.send-epochs"),
    (
        ["--split.cut", "3", "--split.labels", "client", "--split.cutmix", "0.5"],
        "--split.cutmix has no effect with --split.labels client",
    ),
    ([*FROZEN, "--split.labels", "client"], "--split.client frozen does not go with --split.labels client"),
    ([*FIRST, "--split.labels", "client"], "--split.client epochs:2 does not go with --split.labels client"),
    ([*SENDING, "--split.labels", "client"], "--split.client frozen does not go with --split.labels client"),
    ([*FROZEN, "--split.max-bytes", "5MB"], "--split.client frozen does not go with --split.max-bytes: say --split.s"),
    (
        [*FROZEN, "--method", "alast", "--split.alast", "client"],
        "--split.client frozen does not go with --split.alast client",
    ),
    ([*SENDING, "--epochs", "1"], "--epochs 1 is less than --split.send-epochs 2 needs: raise it to 2"),
    ([*FIRST, "--epochs", "2"], "--epochs 2 is less than --split.client epochs:2 needs: raise it to 3"),
    (
        [*FIRST, "--split.send-epochs", "3", "--epochs", "4"],
        "--epochs 4 is less than --split.client epochs:2 and --split.send-epochs 3 need together: raise it to 5",
    ),
    (
        [*SENDING, "--split.replay", "2", "--epochs", "5"],
        "--epochs 5 is too few: 2 epochs sent and --split.replay 2 take 6; raise it, or lower --split.replay",
    ),
    (
        [*FIRST, "--split.send-epochs", "1", "--split.replay", "3"],
        "--epochs 5 is too few: 2 epochs trained, 1 sent and --split.replay 3 take 6",
    ),
]


@pytest.mark.parametrize("cls", [FinetuneConfig, ServeConfig])
@pytest.mark.parametrize(("args", "message"), UNFIT, ids=lambda value: str(value)[-60:])
def test_what_does_not_go_with_a_frozen_client(cls, args, message):
    if cls is ServeConfig and "without --split.cut" in message:
        args = [*args, "--split.cut", "0"]
        message = "--split.cut must be at least 1"
    assert message in error_of(parse, *args, cls=cls)


def test_a_store_belongs_to_one_half():
    args = [*SENDING, "--sessions", "shared"]
    assert "--split.send-epochs does not go with --sessions shared" in error_of(parse, *args, cls=ServeConfig)
    parse(*FROZEN, "--sessions", "shared", cls=ServeConfig)
    assert "--max-disk has no effect without --split.send-epochs" in error_of(
        parse, *FROZEN, "--max-disk", "1GB", cls=ServeConfig
    )
    assert "--max-disk" in error_of(parse, *SENDING, "--max-disk", "much", cls=ServeConfig)


@pytest.mark.parametrize(
    ("epochs", "options", "sent"),
    [
        (5, {}, 5),
        (5, {"client": "frozen"}, 5),
        (12, {"client": "frozen", "send_epochs": 2}, 2),
        (12, {"client": "frozen", "send_epochs": 12}, 12),
        (12, {"client": "frozen", "send_epochs": 2, "replay": 5}, 2),
        (12, {"client": "epochs:4", "send_epochs": 2}, 6),
        (6, {"client": "epochs:4", "send_epochs": 2}, 6),
    ],
)
def test_what_a_frozen_client_sends(epochs, options, sent):
    assert FinetuneConfig(epochs=epochs, split=SplitConfig(cut=3, **options)).split.sent_epochs(epochs) == sent


def test_a_flag_mends_what_is_out_of_range_in_a_file(tmp_path):
    file = write(tmp_path / "a.yaml", "lr: 0\nalast: {start_budget: 0.9, min_budget: 0.95}\n")
    assert "--alast.min-budget must be in (0, 0.9]" in error_of(parse, "--config", file)
    assert "--lr must be above 0" in error_of(parse, "--config", file, "--alast.start-budget", "1")
    assert parse("--config", file, "--lr", "1e-3", "--alast.start-budget", "1").alast.min_budget == 0.95


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("split: {codec: int8}\n", "--split.codec has no effect without --split.cut"),
        ("alast: {blocks: two}\n", "a.yaml: alast: blocks must be of type float, got 'two'"),
        ("split: 3\n", "a.yaml: split must be a mapping of settings, got 3"),
    ],
)
def test_a_file_that_is_wrong_by_itself(tmp_path, text, message):
    assert message in error_of(parse, "--config", write(tmp_path / "a.yaml", text))


# ------------------------------------------------------------------------------------- settings without effect

ACROSS = "with --split.cut, where --split.cutmix mixes tokens at the server"
IDLE = [
    (FinetuneConfig, ["--method", "full", "--alast.flops", "0.5"], "--alast.flops", "without --method alast"),
    (FinetuneConfig, ["--method", "head", "--alast.no-train-embeddings"], "--alast.train-embeddings", "without --me"),
    (FinetuneConfig, ["--split.cut", "3", "--alast.alpha", "1"], "--alast.alpha", "without --method alast"),  # auto
    (FinetuneConfig, ["--last-k", "2"], "--last-k", "without --method last-k"),
    (FinetuneConfig, ["--alast.temperature", "2"], "--alast.temperature", "without --alast.draw softmax"),
    (
        FinetuneConfig,
        ["--method", "alast+lora", "--alast.no-train-embeddings"],
        "--alast.train-embeddings",
        "with LoRA, which freezes them anyway",
    ),
    (FinetuneConfig, ["--lora.r", "4"], "--lora.r", "without --method lora"),
    (FinetuneConfig, ["--split.link", "10mbit/20ms"], "--split.link", "without --split.cut"),
    (FinetuneConfig, ["--split.cut", "3", "--split.alast", "client"], "--split.alast", "without --method alast"),
    (
        FinetuneConfig,
        ["--augment.rand-ops", "0", "--augment.rand-magnitude", "3"],
        "--augment.rand-magnitude",
        "without --augment.rand-ops",
    ),
    (FinetuneConfig, ["--split.cut", "3", "--augment.mixup", "0.2"], "--augment.mixup", ACROSS),
    (FinetuneConfig, ["--split.cut", "3", "--augment.cutmix", "1"], "--augment.cutmix", ACROSS),
    (ServeConfig, ["--augment.mixup", "0.2"], "--augment.mixup", ACROSS),
    (ServeConfig, ["--augment.cutmix", "1"], "--augment.cutmix", ACROSS),
    (FinetuneConfig, ["--batch-size", "1", "--augment.mixup", "0.2"], "--augment.mixup", "with --batch-size 1"),
    (FinetuneConfig, ["--batch-size", "1", "--augment.cutmix", "1"], "--augment.cutmix", "with --batch-size 1"),
    (ServeConfig, ["--split.no-frames"], "--split.frames", "over a network"),
    (ServeConfig, ["--insecure-loopback", "--auth", "token"], "--auth", "without --certs"),
    (ServeConfig, ["--alast.blocks", "3"], "--alast.blocks", "without --method alast"),  # `auto` is full across a cut
    (FinetuneConfig, ["--columns.label", "kind"], "--columns.label", "without --data"),
    (JoinConfig, ["localhost:1", "--data-root", "sets"], "--data-root", "without --data"),
    (
        JoinConfig,
        ["localhost:1", "--certs", "certs", "--insecure-plaintext-for-everyone-on-the-network-to-read"],
        "--insecure-plaintext-for-everyone-on-the-network-to-read",
        "with --certs",
    ),
    (JoinConfig, ["localhost:1", "--name", "ward-3"], "--name", "without --certs"),
    (DoctorConfig, ["localhost:1", "--name", "ward-3"], "--name", "without --certs"),
    (EvaluateConfig, ["run", "--columns.label", "kind"], "--columns.label", "without --data"),
]


@pytest.mark.parametrize(("cls", "args", "flag", "reason"), IDLE, ids=lambda value: str(value)[:40])
def test_a_setting_without_effect_is_refused(cls, args, flag, reason):
    assert f"{flag} has no effect {reason}" in error_of(parse, *args, cls=cls)


@pytest.mark.parametrize(
    "args",
    [
        ["--alast.flops", "0.5"],
        ["--method", "alast+lora", "--alast.draw", "softmax", "--alast.temperature", "2", "--lora.r", "4"],
        ["--method", "last-k", "--last-k", "2"],
        ["--augment.mixup", "0.8", "--augment.cutmix", "1", "--batch-size", "2"],
        ["--method", "alast", "--split.cut", "3", "--split.alast", "client", "--split.link", "10mbit/20ms"],
        ["--method", "full", "--alast.temperature", "1"],  # the default
    ],
)
def test_a_setting_with_effect_is_not(args):
    parse(*args)


def test_every_need_names_a_setting():
    """A need whose setting was renamed would never be asked for."""
    for cls in (FinetuneConfig, ServeConfig, JoinConfig, DoctorConfig, EvaluateConfig):
        for need in cls.NEEDS:
            group, _, name = need.setting.rpartition(".")
            classes = {"alast": AlastConfig, "split": SplitConfig, "augment": AugmentConfig, "": cls}
            assert name in {field.name for field in fields(classes[group])}, need.setting


def test_what_differs_from_the_defaults():
    config = FinetuneConfig(seed=3, alast=AlastConfig(blocks=2), data="x.csv", columns=ColumnsConfig(image="x"))
    assert list(changed(config)) == ["alast.blocks", "seed", "data", "columns.image"]
    assert list(changed(FinetuneConfig())) == list(changed(ServeConfig())) == []
    assert list(changed(AlastConfig(blocks=2), AlastConfig(blocks=3, alpha=0.1))) == ["blocks", "alpha"]


def test_settings_of_another_method_are_left_out():
    config = FinetuneConfig(method="alast+lora", alast=AlastConfig(alpha=5.0), lora=LoraConfig(r=4))
    values = to_dict(config)
    assert from_dict(FinetuneConfig, effective(FinetuneConfig, values | {"method": "full"}, "x")) == FinetuneConfig(
        method="full"
    )
    lora = from_dict(FinetuneConfig, effective(FinetuneConfig, values | {"method": "lora"}, "x"))
    assert lora == FinetuneConfig(method="lora", lora=LoraConfig(r=4))
    assert values == to_dict(config)


# ----------------------------------------------------------------------------------- runs of earlier versions


def old_run(config: FinetuneConfig, **changes: Any) -> Path:
    """The run folder of `config` as an earlier version wrote it: `auto` resolved, with prefetch, with idle settings."""
    from snello.runs.folder import RunFolder

    run = RunFolder(config.out)
    run.create(config, RESOLVED)
    run.release()
    values = yaml.safe_load(run.config_file.read_text())
    values["split"]["prefetch"] = False
    for name, value in changes.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    run.config_file.write_text(yaml.safe_dump(values))
    return run.config_file


def test_a_run_that_says_alast_goes_on_as_auto(small):
    from snello.runs.folder import RunFolder, require_same_config

    auto = replace(small, method="auto")
    old_run(auto, method="alast")
    saved, _ = RunFolder(small.out).read()
    assert (saved.method, saved.method_name) == ("alast", "alast")
    config = parse("--out", str(small.out), "--resume")
    require_same_config(saved, config, small.out)
    require_same_config(saved, replace(auto, resume=True), small.out)
    message = error_of(require_same_config, saved, replace(small, resume=True), small.out)
    assert "method was alast, now full" in message


def test_a_run_with_settings_without_effect_stays_usable(small, tmp_path):
    from snello.runs.folder import RunFolder, require_same_config

    file = old_run(small, alast={"alpha": 5.0}, last_k=2)
    saved, _ = RunFolder(small.out).read()
    assert saved == small
    require_same_config(saved, parse("--out", str(small.out), "--resume"), small.out)
    assert parse("--config", str(file)) == replace(small, out=None, config=file)


def test_a_run_from_before_few_blocks_merged_goes_on_as_it_began(small):
    """Its config.yaml has no `adapt`, and an open `blocks` was three quarters of them."""
    from snello.runs.folder import RunFolder

    file = old_run(replace(small, method="alast"))
    values = yaml.safe_load(file.read_text())
    values["alast"] = {"blocks": None, "start_budget": 0.9, "min_budget": 0.5, "rule": "drop", "token_multiple": 1}
    file.write_text(yaml.safe_dump(values))
    alast = RunFolder(small.out).read()[0].alast
    assert (alast.adapt, alast.blocks) == ("difference", 0.75)


# ------------------------------------------------------------------------------------------- one home for each fact


def test_finetune_and_join_share_the_settings_of_pictures():
    assert issubclass(FinetuneConfig, PicturesConfig) and issubclass(JoinConfig, PicturesConfig)
    for cls in (FinetuneConfig, JoinConfig):
        assert cls(**{"address": "a:1"} if cls is JoinConfig else {}, data="photos/").data == "photos"
        given = {"address": "a:1"} if cls is JoinConfig else {}
        for name, value in (("workers", -1), ("val_share", 1.0), ("track", ("paper",))):
            assert error_of(cls, **given, **{name: value}).startswith("--" + name.replace("_", "-") + " must be ")


def test_an_address_of_the_web_stays_as_it_was_typed():
    assert FinetuneConfig(data="https://x/y").data == "https://x/y"


def test_names_come_from_the_registry(capsys):
    from snello.config.registry import EXPORTS, METHODS, TRACKERS

    for verb, flags in (
        ("finetune", {"--method": ("auto", *METHODS), "--track": TRACKERS}),
        ("plan", {"--methods": METHODS}),
        ("export", {"--format": EXPORTS}),
    ):
        assert cli.main([verb, "--help-all"]) == 0
        out = capsys.readouterr().out
        assert all("{" + ",".join(names) + "}" in out for names in flags.values()), verb


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: FinetuneConfig(precision="fp8"), "--precision"),
        (lambda: FinetuneConfig(track=("tensorbored",)), "--track"),
        (lambda: SplitConfig(cut=3, alast="no"), "--split.alast"),
        (lambda: ServeConfig(split=SplitConfig(cut=3), sessions="sharred"), "--sessions"),
        (lambda: EvaluateConfig(Path("run"), part="vall"), "--part"),
        (lambda: PlanConfig("2GB", precisions=("fp8",)), "--precisions"),
    ],
)
def test_choices_are_checked_from_python_too(make, name):
    with pytest.raises(ConfigError, match=rf"^{name} must be one of "):
        make()


def test_a_choice_that_may_be_left_open_is_read_from_a_file_and_checked(tmp_path):
    made = from_dict(AlastConfig, {"adapt": "difference", "draw": None, "merge_blocks": [0, 2]})
    assert (made.adapt, made.draw, made.merge_blocks) == ("difference", None, (0, 2))
    with pytest.raises(ConfigError, match="adapt must be one of share, difference, got 'no'"):
        from_dict(AlastConfig, {"adapt": "no"})
    with pytest.raises(ConfigError, match="adapt must be one of share, difference, got no"):
        AlastConfig(adapt="no")


def test_what_is_given_wins_over_a_preset():
    made = FinetuneConfig(preset="published", alast=AlastConfig(drop_at="mid", draw="proportional", blocks=5)).alast
    assert (made.drop_at, made.draw, made.blocks, made.rule, made.adapt) == (
        "mid",
        "proportional",
        5,
        "drop",
        "difference",
    )
