"""What --preset fills in, what wins over it, and where it is refused."""

from dataclasses import fields, replace

import pytest
import yaml
from conftest import finetune, flags

from snello import cli
from snello.config import AlastConfig, FinetuneConfig, ServeConfig, SplitConfig
from snello.config.effect import effective
from snello.config.presets import PRESETS
from snello.config.values import from_dict, to_dict
from snello.errors import ConfigError
from snello.runs.folder import RunFolder

LOWEST = {"draw": "lowest-first", "train_embeddings": False}


def parse(*args: str, cls: type = FinetuneConfig):
    return cli._parse(cls, args, "verb")


def test_the_best_is_the_default_and_fills_in_nothing():
    assert FinetuneConfig().preset == "best" and FinetuneConfig(preset="best") == FinetuneConfig()


def test_what_each_fills_in():
    fast, small, accurate = (parse("--preset", name) for name in ("fast", "small-memory", "accurate"))
    usual = FinetuneConfig()
    assert fast == replace(usual, preset="fast", alast=AlastConfig(blocks=0.75, **LOWEST))
    assert small.alast == AlastConfig(blocks=0.5, **LOWEST) and small.grad_checkpointing
    assert (accurate.alast, accurate.time_budget, accurate.epochs) == (AlastConfig(), 5.0, None)
    assert parse("--preset", "accurate", "--epochs", "3").time_budget == 3.0


def test_none_of_them_names_what_alast_does_not_have():
    names = {field.name for field in fields(AlastConfig)}
    assert all(preset.alast.keys() <= names for preset in PRESETS.values())


def test_what_is_given_wins():
    config = parse("--preset", "small-memory", "--alast.blocks", "4", "--alast.draw", "softmax")
    assert (config.alast.blocks, config.alast.draw, config.alast.train_embeddings) == (4, "softmax", False)
    assert parse("--preset", "accurate", "--time-budget", "2").time_budget == 2.0


def test_what_a_file_gives_wins_too(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("preset: fast\nalast: {blocks: 2}\n")
    assert parse("--config", str(file)).alast == AlastConfig(blocks=2, **LOWEST)


@pytest.mark.parametrize("preset", ["fast", "accurate", "small-memory", "published"])
@pytest.mark.parametrize("args", [["--method", "full"], ["--method", "lora"], ["--split.cut", "3"]])
def test_without_alast_they_are_refused(preset, args):
    with pytest.raises(ConfigError, match="--preset has no effect without --method alast or alast"):
        parse("--preset", preset, *args)


def test_a_time_budget_does_not_cross_a_cut():
    args = ("--method", "alast", "--split.cut", "3", "--preset")
    for cls in (FinetuneConfig, ServeConfig):
        with pytest.raises(ConfigError, match=r"--preset has no effect with --split\.cut: raise --epochs"):
            parse(*args, "accurate", cls=cls)
        assert parse(*args, "fast", cls=cls).alast.blocks == 0.75


def test_lora_freezes_the_embeddings_by_itself():
    config = FinetuneConfig(method="alast+lora", preset="small-memory")
    assert config.alast == AlastConfig(blocks=0.5, draw="lowest-first") and config.grad_checkpointing


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_stays_what_it_is(preset):
    config = FinetuneConfig(preset=preset)
    assert replace(config) == from_dict(FinetuneConfig, to_dict(config)) == config
    assert parse(*flags(config)) == config
    values = effective(FinetuneConfig, to_dict(config) | {"method": "full"}, "x")
    assert from_dict(FinetuneConfig, values).preset == "best"


@pytest.mark.parametrize("preset", ["fast", "small-memory"])
def test_a_run_by_a_preset_says_its_settings_and_freezes_the_lower_blocks(small, preset):
    finetune(replace(small, method="alast", preset=preset, epochs=1))
    config, _ = RunFolder(small.out).read()
    values = yaml.safe_load((small.out / "config.yaml").read_text())
    assert values["preset"] == preset and values["alast"]["draw"] == "lowest-first"
    lowest = {"fast": 2, "small-memory": 3}[preset]  # of six blocks
    rows = list(RunFolder(small.out).rows("step"))
    assert all(row["trained"] == list(range(lowest, 6)) for row in rows)
    assert config.grad_checkpointing is (preset == "small-memory")
    assert finetune(replace(config, resume=True))["steps"] == 7


def test_across_a_cut(small):
    split = SplitConfig(cut=2, codec="none", alast="server")
    finetune(replace(small, method="alast", preset="fast", epochs=1, split=split))
    assert RunFolder(small.out).read()[0].alast.draw == "lowest-first"
