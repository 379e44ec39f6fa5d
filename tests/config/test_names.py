"""What other tools call a setting, and what is near a misspelt name."""

import pytest

from snello import cli
from snello.config import FinetuneConfig
from snello.config.names import _RUN_HINTS, ALIASES, HINTS, advice, near_text, nearest, plain
from snello.config.values import flag, from_dict
from snello.errors import ConfigError

KNOWN = ["lr", "epochs", "batch_size", "alast.blocks", "alast.min_budget", "split.cutmix", "augment.cutmix"]
FIELDS = {name for run in cli.VERBS.values() for name in run.__annotations__["config"].__dataclass_fields__}


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("learning_rate", ": snello calls it lr"),
        ("learning-rate", ": snello calls it lr"),
        ("--Num_Epochs", ": snello calls it epochs"),
        ("lerning_rate", "; nearest: lr"),
        ("epoch", "; nearest: epochs"),
        ("blocks", ": snello calls it alast.blocks"),
        ("alast_min_budget", ": snello calls it alast.min_budget"),
        ("cutmix", ": snello calls it split.cutmix or augment.cutmix"),
        ("imgsz", ""),
        ("optimizer", ""),
        ("zzz", ""),
    ],
)
def test_advice(name, end):
    assert advice(name, KNOWN) == end


def test_advice_is_spelled_as_asked():
    assert advice("learning_rate", KNOWN, flag) == ": snello calls it --lr"
    assert advice("alast_blocks", KNOWN, flag) == ": snello calls it --alast.blocks"


def test_nearest():
    assert nearest("BF16", ["fp32", "bf16"]) == ["bf16"] and nearest("x", ["fp32"]) == []
    assert near_text("lorax", ["lora", "full"]) == "; nearest: lora" and near_text("x", ["lora"]) == ""


def test_what_is_said_is_of_settings_that_exist():
    own = {plain(name) for name in FIELDS}
    assert set(ALIASES.values()) <= FIELDS and {setting for setting, _ in HINTS.values()} <= FIELDS
    assert not set(ALIASES) & own and not set(ALIASES) & set(HINTS)
    assert set(_RUN_HINTS) <= set(HINTS) | own


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"learning_rate": 1}, "x.yaml: unknown setting learning_rate: snello calls it lr"),
        ({"batch-size": 1}, "x.yaml: unknown setting batch-size: snello calls it batch_size"),
        ({"epoch": 1, "imgsz": 2}, "x.yaml: unknown setting epoch; nearest: epochs, imgsz: snello calls it image_size"),
        ({"min_budget": 1}, "x.yaml: unknown setting min_budget: snello calls it alast.min_budget"),
        ({"alast": {"budget": 1}}, "x.yaml: alast: unknown setting budget; nearest: "),
        ({"optimizer": "sgd"}, "x.yaml: unknown setting optimizer: snello trains with AdamW"),
        ({"zzz": 1}, "x.yaml: unknown setting zzz; known: config, model"),
        ({"method": "lorax"}, "x.yaml: method must be one of auto, alast, full, head, last-k, lora, alast+lora, got "),
        ({"precision": "bf61"}, "x.yaml: precision must be one of auto, fp32, bf16, fp16, got 'bf61'; nearest: bf16"),
    ],
)
def test_files(values, line):
    with pytest.raises(ConfigError) as caught:
        from_dict(FinetuneConfig, values, "x.yaml")
    assert str(caught.value).startswith(line)
