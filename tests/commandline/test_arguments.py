"""Names of other tools are taken or answered, and what is misspelt is told with what is near."""

import pytest

from snello import cli
from snello.commandline.arguments import VERB_HINTS, with_own_names
from snello.config import EvaluateConfig, FinetuneConfig, PlanConfig
from snello.config.names import ALIASES
from snello.config.values import flag
from snello.errors import ConfigError


@pytest.fixture
def told(capsys):
    """The one line that a command is refused with."""

    def call(*args: str) -> str:
        assert cli.main(args) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err.removeprefix("snello: error: ").rstrip()

    return call


@pytest.mark.parametrize("alias", ALIASES)
def test_names_of_other_tools(alias):
    value = [] if ALIASES[alias] == "grad_checkpointing" else ["1"]
    for spelled in (f"--{alias}", flag(alias)):
        assert with_own_names(FinetuneConfig, [spelled, *value], "finetune") == [flag(ALIASES[alias]), *value]


def test_names_of_other_tools_give_the_setting():
    args = "--learning-rate 1e-3 --imgsz 64 --batch_size=8 --num-epochs 2 --weight_decay=0 --gradient_checkpointing"
    config = cli._parse(FinetuneConfig, args.split(), "finetune")
    assert config == FinetuneConfig(
        lr=1e-3, image_size=64, batch_size=8, epochs=2, weight_decay=0.0, grad_checkpointing=True
    )
    assert cli._parse(EvaluateConfig, ["run", "--batch", "3"], "evaluate").batch_size == 3


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ("--bogus 3", "unknown flag --bogus; snello finetune --help-all lists all that there are"),
        ("-e 3", "unknown flag -e; snello finetune --help-all lists all that there are"),
        ("--epo 3", "unknown flag --epo; nearest: --epochs"),
        ("--leraning-rate 3", "unknown flag --leraning-rate; nearest: --lr"),
        ("--image-szie=3", "unknown flag --image-szie; nearest: --image-size"),
        ("--no-compar", "unknown flag --no-compar; nearest: --no-compare, --compare"),
        ("--alast-blocks 3", "unknown flag --alast-blocks: snello calls it --alast.blocks"),
        ("--min-budget 0.3", "unknown flag --min-budget: snello calls it --alast.min-budget"),
        ("--cutmix 1", "unknown flag --cutmix: snello calls it --split.cutmix or --augment.cutmix"),
        ("--Epochs 1", "unknown flag --Epochs: snello calls it --epochs"),
        ("--project x", "unknown flag --project: --out is the run folder itself"),
        (
            "--pretrained",
            "unknown flag --pretrained: weights are pretrained unless --weights says none or names a file",
        ),
        ("--optimizer sgd", "unknown flag --optimizer: snello trains with AdamW"),
        ("--method lorax", "--method must be one of auto, alast, full, head, last-k, lora, alast+lora, got 'lorax'"),
        ("--precision=BF16", "--precision must be one of auto, fp32, bf16, fp16, got 'BF16'; nearest: bf16, fp16"),
        ("--track wandb mlfow", "--track must be one of tensorboard, wandb, mlflow, got 'mlfow'; nearest: mlflow"),
        ("--epochs many", "--epochs must be a whole number, got 'many'"),
        ("--alast.merge-blocks 0 x", "--alast.merge-blocks must be a whole number, got 'x'"),
        ("--lr=fast", "--lr must be a number, got 'fast'"),
        ("--epochs", "--epochs needs a value: say --epochs INT"),
        ("--out --lr 3", "--out needs a value: say --out PATH"),
        ("--compare False", "--compare takes no value: say --compare or --no-compare"),
        ("--augment.flip=0", "--augment.flip takes no value: say --augment.flip or --augment.no-flip"),
        ("photos/", "unexpected 'photos/': pictures are given with --data photos/"),
        ("batch=3", "unexpected 'batch=3': say --batch-size 3"),
        ("--resume again", "unexpected 'again': pictures are given with --data again"),
        ("--lr=-inf", "--lr must be above 0 and finite, got -inf (snello finetune --help-all lists the options)"),
    ],
)
def test_what_is_wrong_and_what_is_meant(told, args, line):
    assert told("finetune", *args.split()).startswith(line)


def test_flags_of_verbs_that_take_words(told):
    assert told("evaluate", "--model", "x") == "unknown flag --model: the run folder comes first, without a flag"
    assert told("evaluate", "--run", "x") == "unknown flag --run: snello calls it RUN, without a flag"
    assert told("join", "h:1", "--server", "x") == "unknown flag --server: the address comes first, without a flag"
    assert told("predict", "r", "p", "--topk", "3") == "unknown flag --topk; nearest: --top-k"
    assert told("certs", "--output-dir", "x").startswith("unknown flag --output-dir; snello certs --help-all")
    assert told("serve", "x") == "unexpected 'x'; settings are given as --name value"


def test_what_is_right_stays():
    args = ["--memory", "4GB", "--methods", "full", "lora", "--batch-sizes", "8", "16", "--seconds=1"]
    assert with_own_names(PlanConfig, args, "plan") == args
    args = ["--alast.blocks", "None", "--alast.adapt", "None", "--lr", "-inf", "--track", "--no-compare"]
    assert with_own_names(FinetuneConfig, args, "finetune") == args
    assert with_own_names(EvaluateConfig, ["a", "--part", "val", "--per-class"], "evaluate")[0] == "a"


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["fintune"], "unknown verb 'fintune'; nearest: finetune"),
        (["train"], "unknown verb 'train': snello calls it finetune"),
        (["help", "fintune"], "unknown verb 'fintune'; nearest: finetune"),
        (["x"], "unknown verb 'x'; known: finetune, evaluate, predict"),
        (["--data", "x"], "the first word is what to do, got --data: say for instance snello finetune --data ..."),
    ],
)
def test_verbs(told, args, line):
    assert told(*args).startswith(line)


def test_what_verbs_are_said_to_be_exists():
    assert set(VERB_HINTS.values()) <= set(cli.VERBS) and not set(VERB_HINTS) & set(cli.VERBS)


def test_the_error_is_a_config_error():
    with pytest.raises(ConfigError, match="unknown flag --bogus"):
        with_own_names(FinetuneConfig, ["--bogus"], "finetune")
