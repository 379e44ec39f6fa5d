"""Settings of the verbs that use runs and models: evaluate, predict, export, plan, codecs, check-data."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from snello.config.codec_text import parse_codec
from snello.config.effect import Need, require_effect
from snello.config.pictures import ColumnsConfig, source_text
from snello.config.registry import ExportFormat, MethodName
from snello.config.units import parse_bytes
from snello.config.values import flag, require_choices
from snello.errors import require


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's model for other software, with a model card."""

    run: tyro.conf.Positional[Path]
    """Run folder of `snello finetune`, or of `snello join`."""
    format: ExportFormat = "timm"
    """`timm`: a safetensors file for `timm.create_model(..., checkpoint_path=...)`; `transformers`: a folder for
    `from_pretrained` and the hub, which timm loads too where the model is timm's; `onnx`: a file that takes any batch,
    checked with onnxruntime: pip install 'snello[onnx]'."""
    server_half: Path | None = None
    """For a run of `snello join`: the server's session folder or weights file; default: the server is asked for it."""
    out: Path | None = None
    """File to write, or folder for `transformers`; default: export.safetensors, export/ or export.onnx in the run
    folder. The model card is README.md in the folder, or beside the file under its name and .md."""

    def __post_init__(self) -> None:
        require_choices(self)


@dataclass(frozen=True)
class ReportConfig:
    """Draw the report of a run, or of several side by side."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders of `snello finetune` or `snello join`."""
    out: Path | None = None
    """File to write; default: report.html in the run folder, or comparison.html here for several runs."""
    refresh: bool = False
    """Look at the pictures again with the run's model, even where the folder knows what there is to see."""

    def __post_init__(self) -> None:
        require(len(self.runs) > 0, "RUNS", "one run folder or more", "none")


@dataclass(frozen=True)
class CodecsConfig:
    """List the codecs with their options, sources, and exact bytes at a cut."""

    codecs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Codecs to look at, as "adc(0.1)+int8"; default: one of each."""
    model: str = "vit_micro_patch4_32"
    """Name of a Vision Transformer, as for `snello finetune`."""
    batch_size: int = 128
    """Pictures in one exchange."""
    cut: int = 3
    """Blocks in the client's half."""
    num_classes: int = 10
    """Classes, for the size of the labels."""
    image_size: int | None = None
    """Side of the pictures in pixels; default: the model's own."""
    labels: Literal["server", "client"] = "server"
    """Who has the labels."""
    format: Literal["text", "json"] = "text"
    """How the result is printed."""

    def __post_init__(self) -> None:
        require_choices(self)
        for name in ("batch_size", "cut", "num_classes"):
            require(getattr(self, name) >= 1, flag(name), "at least 1", getattr(self, name))
        for text in self.codecs:
            parse_codec(text, "CODECS")


@dataclass(frozen=True)
class PlanConfig:
    """Say what fits into a memory, the fastest first, each with its command."""

    memory: str
    """Memory of the GPU, or on a CPU of the process, as 4GB (10^9) or 4GiB (2^30); `auto` is what is free now."""
    model: str = "vit_micro_patch4_32"
    """Name of a Vision Transformer, as for `snello finetune`."""
    num_classes: int = 10
    """Classes."""
    image_size: int | None = None
    """Side of the pictures in pixels; default: the model's own."""
    methods: tuple[MethodName, ...] = ()
    """Methods to try; default: all."""
    batch_sizes: tuple[int, ...] = (8, 16, 32, 64, 128)
    """Batch sizes to try."""
    precisions: tuple[Literal["auto", "fp32", "bf16", "fp16"], ...] = ("auto", "fp32")
    """Precisions to try."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    seconds: float = 120.0
    """Stop measuring after this long."""
    format: Literal["text", "json"] = "text"
    """How the result is printed."""

    def __post_init__(self) -> None:
        require_choices(self)
        if self.memory != "auto":
            parse_bytes(self.memory, "--memory")
        require(self.num_classes >= 1, "--num-classes", "at least 1", self.num_classes)
        require(self.image_size is None or self.image_size >= 1, "--image-size", "at least 1", self.image_size)
        require(len(self.batch_sizes) > 0, "--batch-sizes", "at least one", "none")
        require(min(self.batch_sizes, default=1) >= 1, "--batch-sizes", "at least 1", min(self.batch_sizes, default=1))
        require(len(self.precisions) > 0, "--precisions", "at least one", "none")
        require(self.seconds >= 0, "--seconds", "0 or more", self.seconds)


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure the accuracy of a run's model."""

    run: tyro.conf.Positional[Path]
    """Run folder of `snello finetune` or `snello join`."""
    data: str | None = None
    """Pictures, as for `snello finetune`; default: the held-out pictures of the run."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    data_root: Path | None = None
    """Folder that holds torchvision sets; default: the run's, else ~/.cache/snello/torchvision."""
    part: Literal["auto", "train", "val", "test"] = "auto"
    """Part of the pictures; `auto`: val, else test, else all there are."""
    per_class: bool = False
    """Print the accuracy of every class (JSON always has it)."""
    batch_size: int = 64
    """Pictures in one forward pass."""
    workers: int = 2
    """Processes that load pictures."""
    skip_bad: bool = False
    """Leave out pictures that cannot be read, and count them."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    format: Literal["text", "json"] = "text"
    """How the result is printed."""

    NEEDS = (Need("columns", lambda c: c.data is not None, "without --data"),)

    def __post_init__(self) -> None:
        require_choices(self)
        object.__setattr__(self, "data", source_text(self.data))
        require(self.batch_size >= 1, "--batch-size", "at least 1", self.batch_size)
        require(self.workers >= 0, "--workers", "0 or more", self.workers)
        require_effect(self)


@dataclass(frozen=True)
class CheckDataConfig:
    """Read every picture of a source once, and list what is broken."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """Pictures, as --data of `snello finetune`."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    data_root: Path | None = None
    """Folder that holds torchvision sets; default: ~/.cache/snello/torchvision."""
    format: Literal["text", "json"] = "text"
    """How the result is printed."""

    def __post_init__(self) -> None:
        require_choices(self)
        object.__setattr__(self, "source", source_text(self.source))


@dataclass(frozen=True)
class PredictConfig:
    """Say what is on pictures, with the model of a run."""

    run: tyro.conf.Positional[Path]
    """Run folder of `snello finetune` or `snello join`."""
    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Pictures, or folders of pictures."""
    top_k: int = 5
    """Classes named for each picture, most probable first."""
    batch_size: int = 64
    """Pictures in one forward pass."""
    skip_bad: bool = False
    """Leave out pictures that cannot be read, and count them."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    format: Literal["text", "json"] = "text"
    """How the result is printed."""

    def __post_init__(self) -> None:
        require_choices(self)
        require(len(self.paths) > 0, "PATHS", "at least one picture or folder", "none")
        require(self.top_k >= 1, "--top-k", "at least 1", self.top_k)
        require(self.batch_size >= 1, "--batch-size", "at least 1", self.batch_size)
