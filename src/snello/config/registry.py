"""Names that settings may have, and where what they mean is found; no torch, so that flags are checked at once."""

from typing import TYPE_CHECKING, Literal, TypeAlias

TRACKERS = ("tensorboard", "wandb", "mlflow")
METHODS = ("auto", "alast", "full", "head", "last-k", "lora", "alast+lora")
EXPORTS = ("timm", "transformers", "onnx")
CODECS = {
    "none": "snello.codecs.floats:Float32",
    "bf16": "snello.codecs.floats:BFloat16",
    "fp16": "snello.codecs.floats:Float16",
    "int8": "snello.codecs.integers:Int8",
    "int4": "snello.codecs.integers:Int4",
    "int2": "snello.codecs.integers:Int2",
    "adc": "snello.codecs.adc:ADC",
    "topk": "snello.codecs.topk:TopK",
    "randtopk": "snello.codecs.randtopk:RandTopK",
    "c3sl": "snello.codecs.c3sl:C3SL",
    "bottlenet": "snello.codecs.bottlenet:BottleNet",
    "fedlite": "snello.codecs.fedlite:FedLite",
}
# Measured, see docs/adc.md: a nineteenth of the bytes and less than half of the server's compute for 2 points, and
# nothing trained beside the model.
AUTO = "adc(samples=1, tokens=0.4)+int4"

METHOD_NAMES = tuple(name for name in METHODS if name != "auto")
METHOD_CHOICES = ("auto", *METHOD_NAMES)

if TYPE_CHECKING:  # a type checker cannot read names out of a tuple
    MethodName: TypeAlias = str
    MethodChoice: TypeAlias = str
    TrackerName: TypeAlias = str
    ExportFormat: TypeAlias = str
else:
    MethodName = Literal[METHOD_NAMES]
    MethodChoice = Literal[METHOD_CHOICES]
    TrackerName = Literal[TRACKERS]
    ExportFormat = Literal[EXPORTS]
