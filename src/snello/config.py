"""Every setting, once: these dataclasses are the flags, the YAML keys, the defaults and the help text.

Nothing heavy is imported here, so that ``snello --help`` answers at once. Values are checked when a config is made:
a run with a wrong setting fails before anything is loaded.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from snello.codecs import parse_codec
from snello.errors import ConfigError, require
from snello.split.link import Link, parse_address, parse_bytes

TRACKERS = ("tensorboard", "wandb", "mlflow")
METHODS = ("auto", "alast", "full", "head", "last-k", "lora", "alast+lora")
EXPORTS = ("timm", "transformers", "onnx")


@dataclass(frozen=True)
class AlastConfig:
    """ALaST: an adaptive compute budget for every block (arXiv:2408.08670)."""

    blocks: int | None = None
    """Blocks trained at each step; default: three quarters of the depth (9 of 12)."""
    start_budget: float = 0.9
    """Budget of every block at the start, in (0, 1]: the share of patch tokens that a block passes on."""
    min_budget: float = 0.5
    """Lowest budget a block can fall to, in (0, 1]."""
    alpha: float | None = None
    """Step size of the budgets, >= 0; default: the base learning rate (--lr)."""
    draw: Literal["proportional", "softmax", "lowest-first"] = "proportional"
    """Which blocks train: drawn in proportion to the budgets, by softmax of the budgets, or always all but the lowest
    (`lowest-first`, the cheapest: the backward pass ends early)."""
    temperature: float = 1.0
    """Temperature of the softmax draw, > 0; small values favour high budgets."""
    drop_at: Literal["mid", "block-end"] = "mid"
    """Where tokens are dropped: between attention and MLP (`mid`) or after the block (`block-end`, as published)."""
    rule: Literal["drop", "merge"] = "drop"
    """What happens to the tokens that a block does not pass on: discarded, those with the least attention (`drop`, as
    published), or averaged with the token that is most like them (`merge`)."""
    train_embeddings: bool = True
    """Train the patch, position and prefix embeddings too."""
    flops: float | None = None
    """What a step that drops tokens costs, as a share of full fine-tuning's FLOPs, in (0, 1]: all budgets are scaled by
    a common factor to meet it."""
    full_tail: float = 0.0
    """Last share of the training steps that drops no tokens, in [0, 1]."""
    token_multiple: int = 1
    """Round the number of kept patch tokens up to a multiple of this: fewer shapes for torch.compile, and in bf16 on a
    CPU fewer kernels to compile and keep (less memory and time with 8)."""
    optimizer_state: Literal["keep", "release"] = "keep"
    """Optimizer state (AdamW's moments) of a frozen block: kept (exact), or released to save memory."""

    def __post_init__(self) -> None:
        require(self.blocks is None or self.blocks >= 1, "--alast.blocks", "at least 1", self.blocks)
        require(0 < self.start_budget <= 1, "--alast.start-budget", "in (0, 1]", self.start_budget)
        require(0 < self.min_budget <= 1, "--alast.min-budget", "in (0, 1]", self.min_budget)
        require(
            self.min_budget <= self.start_budget,
            "--alast.min-budget",
            f"at most --alast.start-budget ({self.start_budget})",
            self.min_budget,
        )
        require(self.alpha is None or self.alpha >= 0, "--alast.alpha", "0 or more", self.alpha)
        require(self.temperature > 0, "--alast.temperature", "above 0", self.temperature)
        require(self.flops is None or 0 < self.flops <= 1, "--alast.flops", "in (0, 1]", self.flops)
        require(0 <= self.full_tail <= 1, "--alast.full-tail", "in [0, 1]", self.full_tail)
        require(self.token_multiple >= 1, "--alast.token-multiple", "at least 1", self.token_multiple)


@dataclass(frozen=True)
class LoraConfig:
    """LoRA: low-rank adapters beside frozen weights (arXiv:2106.09685), through peft: pip install 'snello[lora]'."""

    r: int = 8
    """Rank of the adapters."""
    alpha: float = 16.0
    """Scale of the adapters' output, divided by the rank."""
    dropout: float = 0.0
    """Dropout on the adapters' input, in [0, 1)."""
    target_modules: tuple[str, ...] = ("attention",)
    """Which linear layers of the blocks get adapters: `attention`, `mlp`, `all`, or names as in the block (`attn.qkv`,
    `fc1`, `q_proj`)."""
    start: Path | None = None
    """Start from the adapters in this folder, as a run leaves them in adapter/."""

    def __post_init__(self) -> None:
        require(self.r >= 1, "--lora.r", "at least 1", self.r)
        require(0 < self.alpha < math.inf, "--lora.alpha", "above 0 and finite", self.alpha)
        require(0 <= self.dropout < 1, "--lora.dropout", "in [0, 1)", self.dropout)
        require(len(self.target_modules) > 0, "--lora.target-modules", "at least one name", "none")


@dataclass(frozen=True)
class AugmentConfig:
    """What is done at random to every training picture."""

    flip: bool = True
    """Flip left to right with probability one half."""
    crop_scale: float = 0.6
    """Smallest share of the picture's area that a random crop keeps, in (0, 1]; 1 crops nothing."""
    rand_ops: int = 2
    """Operations of RandAugment per picture; 0 switches it off."""
    rand_magnitude: int = 9
    """Magnitude of RandAugment, 0 to 30."""

    def __post_init__(self) -> None:
        require(0 < self.crop_scale <= 1, "--augment.crop-scale", "in (0, 1]", self.crop_scale)
        require(self.rand_ops >= 0, "--augment.rand-ops", "0 or more", self.rand_ops)
        require(0 <= self.rand_magnitude <= 30, "--augment.rand-magnitude", "in 0..30", self.rand_magnitude)


@dataclass(frozen=True)
class SplitConfig:
    """Split learning: the model cut in two halves, with a codec between them (ADC: arXiv:2509.15058)."""

    cut: int = 0
    """Blocks in the client's half, in 1..depth-1; 0 does not cut."""
    codec: str = "auto"
    """What compresses activations and gradients at the cut, as `adc(0.1)` or `adc(samples=1, tokens=0.4)+int4`;
    `snello codecs` lists them; `auto` is the best measured one (docs/adc.md)."""
    eval_codec: str = "int8"
    """How activations travel in evaluation, where nothing is merged or dropped: none, bf16, fp16, int8, int4, int2."""
    labels: Literal["server", "client"] = "server"
    """Who has the labels: the server, with classifier and loss, or the client (U-shape: labels never leave it)."""
    alast: Literal["client", "server", "both"] = "both"
    """Which halves ALaST is attached to, where it is the method."""
    frames: bool = True
    """Pass everything through the bytes of the protocol, as over a network; off, they are only counted."""
    max_bytes: str | None = None
    """Train until this much training traffic, whatever --epochs says, as 500MB (10^6 bytes) or 2GiB."""
    link: str | None = None
    """Report the time that this link would add, as 10mbit/20ms: rate of each direction / time of a round trip."""
    prefetch: bool = False
    """Over a network: compute the next forward pass while waiting for the server. Gradients are then one step stale,
    and a resumed run is no longer the same bit for bit."""

    def __post_init__(self) -> None:
        require(self.cut >= 0, "--split.cut", "0 or more", self.cut)
        require(self.labels in ("server", "client"), "--split.labels", "server or client", self.labels)
        parse_codec(self.codec, "--split.codec")
        parse_codec(self.eval_codec, "--split.eval-codec")
        if self.max_bytes is not None:
            parse_bytes(self.max_bytes, "--split.max-bytes")
        if self.link is not None:
            Link.parse(self.link, "--split.link")
        if self.cut == 0:
            idle = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
            if idle:
                raise ConfigError(f"--split.{idle[0].replace('_', '-')} has no effect without --split.cut")


@dataclass(frozen=True)
class ColumnsConfig:
    """Columns of a table or Hugging Face dataset, where their names are not the usual ones."""

    image: str | None = None
    """Column of the pictures: of paths in a table; default: path, file, filename, image, image_path, ..."""
    label: str | None = None
    """Column of the classes; default: label, class, target, ..."""
    split: str | None = None
    """Column of a table that says train, val or test; default: split, where there is one."""


@dataclass(frozen=True)
class Recipe:
    """What a run computes: model, method and optimization, whoever has the pictures."""

    config: Path | None = None
    """YAML file with any of these settings; a flag wins over the file, the file over the default."""
    model: str = "vit_micro_patch4_32"
    """Name of a timm Vision Transformer; or of one of transformers: `hf:` and its name on the hub, or its folder."""
    weights: str = "pretrained"
    """`pretrained`, `none` (random), or the path of a safetensors file or of a folder with one."""
    method: Literal["auto", "alast", "full", "head", "last-k", "lora", "alast+lora"] = "auto"
    """What is trained: everything on an adaptive budget, everything, the head, the last blocks and the head, adapters
    and the head, or those on an adaptive budget; `auto` is alast, or full with --split.cut."""
    last_k: int = 3
    """Blocks trained by the method last-k."""
    alast: AlastConfig = field(default_factory=AlastConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    epochs: int = 5
    """Passes over the training pictures."""
    batch_size: int = 64
    """Pictures in one forward and backward pass of one process; a step has as many as this times --accumulate times the
    processes that torchrun started."""
    accumulate: int = 1
    """Forward and backward passes (micro-steps) per optimizer step."""
    lr: float = 5e-4
    """Base learning rate, reached after the warm-up, then following a cosine to zero."""
    weight_decay: float = 0.05
    """Weight decay of AdamW; biases, norms, position and prefix tokens have none."""
    layer_decay: float = 1.0
    """Factor on the learning rate per layer below the head, in (0, 1]; 1 gives all layers the same."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises from zero, in [0, 1)."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 clips nothing."""
    label_smoothing: float = 0.1
    """Label smoothing, in [0, 1)."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    image_size: int | None = None
    """Side of the pictures in pixels; default: the model's own."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the forward pass; `auto` is bf16 where the device computes in it natively."""
    attention: Literal["auto", "fused", "explicit"] = "auto"
    """How attention is computed; `auto` measures once which is faster here."""
    grad_checkpointing: bool = False
    """Keep only the inputs of the blocks for the backward pass and compute the rest again: less memory, more time."""
    eval_epochs: int = 1
    """Epochs between two evaluations on the held-out pictures; the last epoch is always evaluated."""
    patience: int = 0
    """Stop after this many epochs without a better accuracy; 0 never stops early."""
    checkpoint_steps: int = 200
    """Optimizer steps between two checkpoints (there is also one after every epoch); 0 for none in between."""
    out: Path | None = None
    """Run folder; default: runs/<model>-<method>-<time>."""
    resume: bool = False
    """Go on with the run in --out where it was cut off; settings come from its config.yaml."""

    def __post_init__(self) -> None:
        for name in ("last_k", "batch_size", "accumulate", "epochs", "eval_epochs"):
            require(getattr(self, name) >= 1, flag(name), "at least 1", getattr(self, name))
        for name in ("clip_norm", "weight_decay", "patience", "checkpoint_steps"):
            require(getattr(self, name) >= 0, flag(name), "0 or more", getattr(self, name))
        require(0 <= self.seed < 2**63, "--seed", "in 0..2**63-1", self.seed)
        require(0 < self.lr < math.inf, "--lr", "above 0 and finite", self.lr)
        require(0 < self.layer_decay <= 1, "--layer-decay", "in (0, 1]", self.layer_decay)
        require(0 <= self.warmup < 1, "--warmup", "in [0, 1)", self.warmup)
        require(0 <= self.label_smoothing < 1, "--label-smoothing", "in [0, 1)", self.label_smoothing)
        require(self.image_size is None or self.image_size >= 1, "--image-size", "at least 1", self.image_size)
        require(self.method in METHODS, "--method", f"one of {', '.join(METHODS)}", self.method)
        idle = LoraConfig()
        require("lora" in self.method or self.lora == idle, "--lora", "left out without --method lora", "settings")
        require(
            not (self.split.cut and "lora" in self.method),
            "--method",
            "without LoRA where --split.cut cuts",
            self.method,
        )
        if self.split.cut and self.alast.flops is not None:  # what full fine-tuning of a half costs is no target
            raise ConfigError(
                "--alast.flops does not go with --split.cut: the other half and the codec change the cost"
            )
        if self.split.cut and self.alast.rule == "merge":  # what crosses is named by where it stood
            raise ConfigError(
                "--alast.rule merge does not go with --split.cut: merged tokens have no place of their own"
            )
        if self.method == "auto":
            object.__setattr__(self, "method", "full" if self.split.cut else "alast")


@dataclass(frozen=True)
class FinetuneConfig(Recipe):
    """Fine-tune a Vision Transformer on labelled pictures."""

    data: str | None = None
    """Pictures: a folder with train/ and val/ (or test/), each with a folder per class, or with one folder per class; a
    .csv, .tsv or .parquet file of paths and labels; hf:PATH_OR_NAME[:CONFIG] for a Hugging Face dataset; or a
    torchvision set, as cifar100 (docs/data.md); default: the 2 500 Fashion-MNIST pictures that ship with snello."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    data_root: Path | None = None
    """Folder that holds torchvision sets; default: ~/.cache/snello/torchvision. Nothing is downloaded."""
    val_share: float = 0.2
    """Share of each class that is held out where the pictures come without val or test, in (0, 1)."""
    skip_bad: bool = False
    """Leave out pictures that cannot be read, and count them, instead of stopping."""
    check_pictures: bool = True
    """Decode every picture once before training, so that a bad one is found at the start."""
    workers: int = 2
    """Processes that load pictures; 0 loads in the main process."""
    compare: bool = True
    """After training, measure step time, FLOPs and memory against full fine-tuning on this machine."""
    track: tuple[str, ...] = ()
    """Show the run also in these trackers: tensorboard (in the run folder), wandb, mlflow."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_trackers(self.track)
        object.__setattr__(self, "data", _source(self.data))
        require(self.workers >= 0, "--workers", "0 or more", self.workers)
        require(0 < self.val_share < 1, "--val-share", "in (0, 1)", self.val_share)


@dataclass(frozen=True)
class ServeConfig(Recipe):
    """Be the server of split learning: train the upper half of a model with clients that keep their pictures."""

    split: SplitConfig = field(default_factory=lambda: SplitConfig(cut=3))
    num_classes: int | None = None
    """Classes; default: as many as each client has."""
    listen: str = "127.0.0.1:7443"
    """Address and port to listen on, as 0.0.0.0:7443; port 0 takes a free one and prints it."""
    certs: Path | None = None
    """Folder that `snello certs` made (or its server/ folder): TLS certificate and the clients' tokens."""
    auth: Literal["both", "certificate", "token"] = "both"
    """What a client must show: its certificate (mutual TLS), its token, or both."""
    insecure_loopback: bool = False
    """Without TLS and without credentials, for clients on this machine only."""
    insecure_plaintext_for_everyone_on_the_network_to_read: bool = False
    """Without TLS and without credentials on any address: everybody on the way can read and change everything."""
    sessions: Literal["independent", "shared"] = "independent"
    """Each client trains a server half of its own, or all of them one, in the order in which they arrive."""
    max_sessions: int = 16
    """Sessions that may be under way at the same time."""
    max_memory: str = "4GiB"
    """What all sessions together may hold in weights, gradients, optimizer state and messages, as 500MB or 4GiB."""
    idle_seconds: float = 600.0
    """A client that sends nothing for so long is disconnected; its session can be gone on with."""
    release_weights: bool = True
    """Give the trained server half to the client that trained it, when it asks (`snello export`)."""
    accept_weights: bool = False
    """Let clients replace the weights of their server half (averaging between rounds)."""
    metrics_port: int | None = None
    """Port on 127.0.0.1 for Prometheus metrics; default: none are served."""
    log_format: Literal["text", "json"] = "text"
    """How the log on stderr is written; serve.log in the run folder is always JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.split.cut >= 1, "--split.cut", "at least 1: the client has the embeddings and a block", 0)
        require(self.num_classes is None or self.num_classes >= 1, "--num-classes", "at least 1", self.num_classes)
        require(self.max_sessions >= 1, "--max-sessions", "at least 1", self.max_sessions)
        require(self.idle_seconds > 0, "--idle-seconds", "above 0", self.idle_seconds)
        ports = self.metrics_port is None or 0 <= self.metrics_port < 2**16
        require(ports, "--metrics-port", "in 0..65535", self.metrics_port)
        parse_bytes(self.max_memory, "--max-memory")
        parse_address(self.listen, "--listen")


@dataclass(frozen=True)
class JoinConfig:
    """Train with a server on pictures that stay here: it gives the settings and the starting weights."""

    address: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ADDRESS")]
    """The server, as server.example:7443."""
    data: str | None = None
    """Pictures, as for `snello finetune`; default: the 2 500 pictures that ship with snello."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    data_root: Path | None = None
    """Folder that holds torchvision sets; default: ~/.cache/snello/torchvision."""
    certs: Path | None = None
    """Folder that `snello certs` made, or the clients/NAME folder handed to you; not needed on loopback."""
    name: str | None = None
    """Which of the clients in --certs this is; default: the only one."""
    out: Path | None = None
    """Run folder; default: runs/client-<model>-<method>-<time>."""
    resume: bool = False
    """Go on with the run in --out where it was cut off."""
    val_share: float = 0.2
    """Share of each class that is held out where the pictures come without val or test, in (0, 1)."""
    skip_bad: bool = False
    """Leave out pictures that cannot be read, and count them, instead of stopping."""
    check_pictures: bool = True
    """Decode every picture once before training, so that a bad one is found at the start."""
    workers: int = 2
    """Processes that load pictures; 0 loads in the main process."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    attention: Literal["auto", "fused", "explicit"] = "auto"
    """How attention is computed; `auto` measures once which is faster here."""
    track: tuple[str, ...] = ()
    """Show the run also in these trackers: tensorboard (in the run folder), wandb, mlflow."""
    reconnect_seconds: float = 600.0
    """How long to try again where the connection breaks or the server restarts."""
    patience_seconds: float = 60.0
    """How long the server may be silent, beside what transfer and ten of its slowest steps take; then connect anew."""
    insecure_plaintext_for_everyone_on_the_network_to_read: bool = False
    """Without TLS to a server that is not on this machine: everybody on the way can read and change everything."""

    def __post_init__(self) -> None:
        parse_address(self.address, "ADDRESS")
        object.__setattr__(self, "data", _source(self.data))
        require(self.workers >= 0, "--workers", "0 or more", self.workers)
        require(0 < self.val_share < 1, "--val-share", "in (0, 1)", self.val_share)
        require(self.reconnect_seconds >= 0, "--reconnect-seconds", "0 or more", self.reconnect_seconds)
        require(self.patience_seconds > 0, "--patience-seconds", "above 0", self.patience_seconds)
        _require_trackers(self.track)


@dataclass(frozen=True)
class CertsConfig:
    """Make what a server and its clients need to trust each other: a small CA, certificates and join tokens."""

    folder: tyro.conf.Positional[Path]
    """Where to; with a CA in it already, clients are added."""
    host: tuple[str, ...] = ()
    """Names and IP addresses of the server, as server.example 192.0.2.7."""
    clients: tuple[str, ...] = ("client",)
    """Names of the clients, one certificate and token each."""
    days: int = 365
    """Days that the certificates are valid."""

    def __post_init__(self) -> None:
        require(1 <= self.days <= 36500, "--days", "in 1..36500", self.days)
        for name in self.clients:
            fits = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) is not None
            require(fits, "--clients", "names of letters, digits, dots, dashes and underscores", repr(name))


@dataclass(frozen=True)
class DoctorConfig:
    """Say what is wrong between here and a server: name, port, certificates, clock, version, token."""

    address: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ADDRESS")]
    """The server, as server.example:7443."""
    certs: Path | None = None
    """As for `snello join`."""
    name: str | None = None
    """Which of the clients in --certs this is; default: the only one."""
    format: Literal["text", "json"] = "text"
    """How the result is printed."""

    def __post_init__(self) -> None:
        parse_address(self.address, "ADDRESS")


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's model for other software, with a model card."""

    run: tyro.conf.Positional[Path]
    """Run folder of `snello finetune`, or of `snello join`."""
    format: Literal["timm", "transformers", "onnx"] = "timm"
    """`timm`: a safetensors file for `timm.create_model(..., checkpoint_path=...)`; `transformers`: a folder for
    `from_pretrained` and the hub, which timm loads too where the model is timm's; `onnx`: a file that takes any batch,
    checked with onnxruntime: pip install 'snello[onnx]'."""
    server_half: Path | None = None
    """For a run of `snello join`: the server's session folder or weights file; default: the server is asked for it."""
    out: Path | None = None
    """File to write, or folder for `transformers`; default: export.safetensors, export/ or export.onnx in the run
    folder. The model card is README.md in the folder, or beside the file under its name and .md."""

    def __post_init__(self) -> None:
        require(self.format in EXPORTS, "--format", f"one of {', '.join(EXPORTS)}", self.format)


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
        for name in ("batch_size", "cut", "num_classes"):
            require(getattr(self, name) >= 1, flag(name), "at least 1", getattr(self, name))
        for text in self.codecs:
            parse_codec(text, "CODECS")


@dataclass(frozen=True)
class PlanConfig:
    """Say what fits into a memory, the fastest first, each with its command."""

    memory: str
    """The memory there is, as 4GB (10^9) or 4GiB (2^30), of the GPU, or on a CPU of the process; `auto` is what is
    free now."""
    model: str = "vit_micro_patch4_32"
    """Name of a Vision Transformer, as for `snello finetune`."""
    num_classes: int = 10
    """Classes."""
    image_size: int | None = None
    """Side of the pictures in pixels; default: the model's own."""
    methods: tuple[Literal["alast", "full", "head", "last-k", "lora", "alast+lora"], ...] = ()
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
    """Run folder of `snello finetune`."""
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", _source(self.data))
        require(self.batch_size >= 1, "--batch-size", "at least 1", self.batch_size)
        require(self.workers >= 0, "--workers", "0 or more", self.workers)


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
        object.__setattr__(self, "source", _source(self.source))


@dataclass(frozen=True)
class PredictConfig:
    """Say what is on pictures, with the model of a run."""

    run: tyro.conf.Positional[Path]
    """Run folder of `snello finetune`."""
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
        require(len(self.paths) > 0, "PATHS", "at least one picture or folder", "none")
        require(self.top_k >= 1, "--top-k", "at least 1", self.top_k)
        require(self.batch_size >= 1, "--batch-size", "at least 1", self.batch_size)


def _require_trackers(names: tuple[str, ...]) -> None:
    for name in names:
        require(name in TRACKERS, "--track", f"some of {', '.join(TRACKERS)}", name)


def _source(data: str | Path | None) -> str | None:
    """The text of a source of pictures; `photos/` and `photos` are one, as a run that is resumed must know."""
    if data is None or str(data).startswith("hf:"):
        return None if data is None else str(data).rstrip("/")
    return str(Path(data))


def flag(name: str) -> str:
    """The flag of a field: `batch_size` is `--batch-size`."""
    return "--" + name.replace("_", "-")
