"""Names that settings may have, and where what they mean is found; no torch, so that flags are checked at once."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
TRACKERS = get_args(TrackerName)
ExportFormat = Literal["timm", "transformers", "onnx"]
EXPORTS = get_args(ExportFormat)
METHODS = {
    "alast": "snello.methods.alast:AlastMethod",
    "full": "snello.methods.fixed:Full",
    "head": "snello.methods.fixed:Head",
    "last-k": "snello.methods.fixed:LastK",
    "lora": "snello.methods.lora:Lora",
    "alast+lora": "snello.methods.lora:AlastLora",
}
RULES = {
    "drop": "snello.vit.rules.drop:Drop",
    "merge": "snello.vit.rules.merge:Merge",
    "merge-even": "snello.vit.rules.merge_even:MergeEven",
}
CODECS = {
    "none": "snello.codecs.floats:Float32",
    "bf16": "snello.codecs.floats:BFloat16",
    "fp16": "snello.codecs.floats:Float16",
    "int8": "snello.codecs.integers:Int8",
    "int4": "snello.codecs.integers:Int4",
    "int2": "snello.codecs.integers:Int2",
    "adc": "snello.codecs.adc:ADC",
    "topk": "snello.codecs.topk:TopK",
    "randtopk": "snello.codecs.topk:RandTopK",
    "c3sl": "snello.codecs.c3sl:C3SL",
    "bottlenet": "snello.codecs.bottlenet:BottleNet",
    "fedlite": "snello.codecs.fedlite:FedLite",
    "pca": "snello.codecs.pca:PCA",
}
# Measured, see docs/codecs.md: as good as uncompressed, within a point of it, and within two.
GOALS = {"auto": "pca(1)", "small": "pca(1.5, down=1)", "smallest": "pca(2)"}
"""What a codec is chosen for: the best measured one."""
FROZEN_GOALS = {"auto": "pca(2)", "small": "pca(3)", "smallest": "pca(4.5)"}
"""The same where the client's half is frozen, and its activations are sent once or a few times."""

METHOD_CHOICES, RULE_CHOICES = ("auto", *METHODS), ("auto", *RULES)
if TYPE_CHECKING:  # a type checker cannot read names out of a tuple
    MethodName: TypeAlias = str
    MethodChoice: TypeAlias = str
    RuleChoice: TypeAlias = str
else:
    MethodName = Literal[tuple(METHODS)]
    MethodChoice = Literal[METHOD_CHOICES]
    RuleChoice = Literal[RULE_CHOICES]


def find(where: str) -> Any:
    """What is called `name` in a module, of `module:name`."""
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)
