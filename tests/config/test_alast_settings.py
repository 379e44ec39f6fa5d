"""ALaST's settings as flags, in YAML and in a run's folder: which blocks merge, shares, and the paper's preset."""

from dataclasses import fields, replace

import pytest
import yaml
from conftest import finetune, flags

from snello import cli
from snello.config import AlastConfig, FinetuneConfig, ServeConfig, SplitConfig
from snello.config.methods import PUBLISHED
from snello.config.values import from_dict, to_dict
from snello.errors import ConfigError
from snello.runs.folder import RunFolder
from snello.runs.resolved import Resolved

PAPER = ("--preset", "published")


def parse(*args: str, cls: type = FinetuneConfig):
    """The config that `snello finetune ARGS`, or the verb of another class, would run with."""
    return cli._parse(cls, args, "verb")


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    text = caught.value.for_command_line
    assert text and "\n" not in text
    return text


def reloaded(config: FinetuneConfig) -> FinetuneConfig:
    """What a run's config.yaml says of the config that it was made with."""
    run = RunFolder(config.out)
    run.create(config, Resolved(classes=("a", "b")))
    run.release()
    return RunFolder(config.out).read()[0]


# What is left open


def test_the_defaults_leave_to_the_model_what_depends_on_it():
    config = AlastConfig()
    left = {"blocks", "start_budget", "min_budget", "alpha", "merge_blocks", "flops", "time", "token_multiple"}
    left |= {"adapt", "draw", "drop_at"}
    assert {field.name for field in fields(config) if getattr(config, field.name) is None} == left
    assert config.rule == "auto"


def test_what_is_left_open_stays_open_in_the_folder_of_a_run(small):
    config = replace(small, method="alast")
    assert reloaded(config) == config
    assert yaml.safe_load((small.out / "config.yaml").read_text())["alast"]["merge_blocks"] is None


@pytest.mark.parametrize("blocks", [0.5, 0.75, 3])
def test_blocks_are_a_number_or_a_share(small, blocks):
    config = parse("--alast.blocks", str(blocks))
    assert config.alast.blocks == blocks and type(config.alast.blocks) is type(blocks)
    assert parse(*flags(config)).alast == config.alast
    kept = reloaded(replace(small, method="alast", alast=config.alast)).alast.blocks
    assert kept == blocks and type(kept) is type(blocks)


@pytest.mark.parametrize("blocks", ["0", "-1", "2.5", "1.5", "nan", "inf"])
def test_blocks_that_are_neither_are_refused(blocks):
    assert "--alast.blocks must be a number of blocks, or a share in (0, 1)" in error_of(
        parse, "--alast.blocks", blocks
    )


@pytest.mark.parametrize("min_budget", [0.91, 1.0])
def test_the_lowest_budget_is_at_most_the_first(min_budget):
    with pytest.raises(ConfigError, match=r"^min_budget must be in \(0, 0\.9\] \(start_budget\), got "):
        AlastConfig(start_budget=0.9, min_budget=min_budget)
    assert AlastConfig(min_budget=min_budget).min_budget == min_budget


# Which blocks


def test_blocks_that_merge_from_flags_yaml_and_the_folder_of_a_run(tmp_path, small):
    config = parse("--alast.merge-blocks", "0", "1")
    assert config.alast.merge_blocks == (0, 1)
    assert parse(*flags(config)) == config
    file = tmp_path / "a.yaml"
    file.write_text("alast: {merge_blocks: [2, 0]}\n")
    assert parse("--config", str(file)).alast.merge_blocks == (2, 0)
    assert parse("--config", str(file), "--alast.merge-blocks", "4").alast.merge_blocks == (4,)
    config = replace(small, method="alast", alast=AlastConfig(merge_blocks=(0, 1)))
    assert reloaded(config) == config


@pytest.mark.parametrize("blocks", ["two", "0.5", "-1"])
def test_flags_that_are_no_blocks_are_refused(blocks):
    assert "--alast.merge-blocks" in error_of(parse, "--alast.merge-blocks", blocks)


@pytest.mark.parametrize("blocks", ["0 1", "0, 1", "two", ["two"], [0, "1 2"], [0.5], [True], 1.5, []])
def test_yaml_that_names_no_blocks_is_refused(blocks):
    assert "merge" in error_of(from_dict, FinetuneConfig, {"alast": {"merge_blocks": blocks}})


def test_a_run_merges_in_the_blocks_that_flags_name(small, capfd):
    config = replace(small, method="alast", alast=AlastConfig(merge_blocks=(0, 1)), epochs=1)
    assert cli.main(["finetune", *flags(config)]) == 0
    assert RunFolder(small.out).read()[0].alast.merge_blocks == (0, 1)
    args = flags(replace(config, out=small.out.with_name("other"), alast=AlastConfig(merge_blocks=(0, 6))))
    assert cli.main(["finetune", *args]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert "--alast.merge-blocks must be in 0..5 (the model's depth less 1), got 6" in last


def test_a_rule_for_places_before_attention_is_refused_by_a_run(small, capfd):
    config = replace(small, method="alast", alast=AlastConfig(rule="drop", drop_at="start"))
    assert cli.main(["finetune", *flags(config)]) == 2
    assert "--alast.rule must be merge or merge-even with drop_at start" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("rule", ["merge", "merge-even"])
def test_tokens_without_places_do_not_cross_a_cut(rule):
    args = ["--method", "alast", "--split.cut", "3", "--alast.rule", rule]
    assert f"--alast.rule {rule} does not go with --split.cut: its tokens have no place" in error_of(parse, *args)
    assert parse(*args, "--split.alast", "server").alast.rule == rule
    assert parse("--method", "alast", "--split.cut", "3").alast.rule == "auto"


# The paper's


def test_the_preset_is_the_papers_settings_and_the_defaults_of_the_others():
    assert AlastConfig().published() == AlastConfig(**PUBLISHED) == FinetuneConfig(preset="published").alast
    assert parse(*PAPER).alast == AlastConfig(**PUBLISHED)
    assert FinetuneConfig().alast == FinetuneConfig(preset="best").alast == AlastConfig()
    assert AlastConfig(**PUBLISHED).published() == AlastConfig(**PUBLISHED)


def test_the_preset_is_what_the_paper_says():
    """arXiv:2408.08670 and its released code."""
    expected = {"blocks": 0.75, "start_budget": 0.9, "min_budget": 0.5, "adapt": "difference", "draw": "softmax"}
    assert expected | {"drop_at": "block-end", "rule": "drop", "token_multiple": 1} == PUBLISHED
    usual = AlastConfig()
    assert all(value != getattr(usual, name) for name, value in PUBLISHED.items())  # or the preset would say nothing


@pytest.mark.parametrize(
    "given",
    [
        {"blocks": 3},
        {"rule": "merge", "merge_blocks": (0, 2)},
        {"start_budget": 0.95, "min_budget": 0.2},
        {"draw": "lowest-first", "token_multiple": 8},
        {"drop_at": "start", "rule": "merge-even"},
        {"alpha": 0.1, "full_tail": 0.5, "flops": 0.7, "train_embeddings": False, "optimizer_state": "release"},
    ],
)
def test_what_is_given_wins(given):
    expected = AlastConfig(**PUBLISHED | given)
    assert AlastConfig(**given).published() == expected
    config = FinetuneConfig(preset="published", alast=AlastConfig(**given))
    assert config.alast == expected and parse(*flags(FinetuneConfig(alast=AlastConfig(**given))), *PAPER) == config


def test_what_is_given_wins_in_yaml_too(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("preset: published\nalast: {blocks: 2, alpha: 1e-3}\n")
    config = parse("--config", str(file), "--alast.rule", "merge")
    assert config.alast == AlastConfig(**PUBLISHED | {"blocks": 2, "alpha": 1e-3, "rule": "merge"})
    assert parse("--config", str(file), "--preset", "best").alast == AlastConfig(blocks=2, alpha=1e-3)


@pytest.mark.parametrize(("name", "value"), [("drop_at", "mid"), ("draw", "proportional"), ("adapt", "share")])
def test_what_is_given_wins_where_it_is_the_default_of_the_best(name, value):
    assert getattr(parse(*PAPER, f"--alast.{name.replace('_', '-')}", value).alast, name) == value


def test_the_papers_draw_has_a_temperature():
    config = parse(*PAPER, "--alast.temperature", "0.5")
    assert (config.alast.draw, config.alast.temperature) == ("softmax", 0.5)


@pytest.mark.parametrize("start_budget, least", [(0.4, 0.4), (0.5, 0.5), (0.7, 0.5)])
def test_a_start_below_the_papers_lowest_budget_lowers_that(start_budget, least):
    assert parse(*PAPER, "--alast.start-budget", str(start_budget)).alast.min_budget == least


@pytest.mark.parametrize("args", [["--method", "full"], ["--method", "lora"], ["--split.cut", "3"]])
def test_the_preset_needs_the_method(args):
    told = error_of(parse, *args, *PAPER)
    assert "--preset has no effect without --method alast or alast+lora" in told
    assert parse("--method", "alast+lora", *PAPER).alast.draw == "softmax"


@pytest.mark.parametrize("given", [{}, {"blocks": 3, "alpha": 0.1}, {"rule": "merge", "merge_blocks": (1,)}])
def test_the_folder_of_a_run_says_the_same_again(small, given):
    config = replace(small, method="alast", preset="published", alast=AlastConfig(**given))
    kept = reloaded(config)
    assert kept == config and kept.alast == AlastConfig(**PUBLISHED | given)
    values = yaml.safe_load((small.out / "config.yaml").read_text())
    assert values["preset"] == "published" and values["alast"]["draw"] == "softmax"
    assert from_dict(FinetuneConfig, to_dict(config)) == config
    again = parse("--config", str(small.out / "config.yaml"))
    assert again.alast == config.alast and replace(config, preset="best").alast == config.alast


def test_a_run_by_the_preset_says_its_settings(small):
    finetune(replace(small, method="alast", preset="published", epochs=1))
    config, _ = RunFolder(small.out).read()
    assert config.preset == "published" and config.alast == AlastConfig(**PUBLISHED)
    rows = list(RunFolder(small.out).rows("step"))
    assert rows[0]["budgets"] == [0.9] * 6 and len(rows[0]["trained"]) == 4
    assert finetune(replace(config, resume=True))["steps"] == 7


@pytest.mark.parametrize("where", ["client", "server", "both"])
def test_the_preset_across_a_cut(where):
    config = FinetuneConfig(method="alast", preset="published", split=SplitConfig(cut=2, alast=where))
    assert config.alast == AlastConfig(**PUBLISHED)
    args = ["--method", "alast", *PAPER, "--split.cut", "2", "--split.alast", where]
    assert parse(*args).alast == parse(*args, cls=ServeConfig).alast == config.alast
