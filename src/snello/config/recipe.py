"""What a run computes: model, method, cut and optimization; with its pictures, `snello finetune`."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from snello.config.codec_text import parse_codec
from snello.config.default_model import TOY
from snello.config.effect import Need, require_effect
from snello.config.methods import AlastConfig, LoraConfig
from snello.config.pictures import PICTURES_NEEDS, PicturesConfig
from snello.config.presets import Preset, fill
from snello.config.registry import FROZEN_GOALS, GOALS, RULES, MethodChoice, find
from snello.config.units import Link, parse_bytes
from snello.config.values import flag, require_choices
from snello.errors import ConfigError, require

USUAL_EPOCHS = 5
LEAST_MIX, MOST_MIX = 0.01, 100.0
"""Bounds of alpha: not far below, torch's Beta gives 1/2 instead of 0 or 1, in float32; above, all is about 1/2."""


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
    mixup: float = 0.0
    """Mixup (arXiv:1710.09412): alpha, in 0.01..100, of Beta(alpha, alpha), from which is drawn in which shares two
    pictures of a batch, and their labels, are added up; 0 switches it off."""
    cutmix: float = 0.0
    """CutMix (arXiv:1905.04899): the same for the share of a picture that a rectangle of another one leaves; 0
    switches it off. With both, each batch takes one of them, with probability one half."""

    def __post_init__(self) -> None:
        require(0 < self.crop_scale <= 1, "--augment.crop-scale", "in (0, 1]", self.crop_scale)
        require(self.rand_ops >= 0, "--augment.rand-ops", "0 or more", self.rand_ops)
        require(0 <= self.rand_magnitude <= 30, "--augment.rand-magnitude", "in 0..30", self.rand_magnitude)
        for name in ("mixup", "cutmix"):
            alpha, rule = getattr(self, name), f"0 (off) or in {LEAST_MIX:g}..{MOST_MIX:g}"
            require(alpha == 0 or LEAST_MIX <= alpha <= MOST_MIX, flag(f"augment.{name}"), rule, alpha)

    @property
    def mixes(self) -> bool:
        """Whether pictures of a batch are mixed with one another."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class SplitConfig:
    """Split learning: the model cut in two halves, with a codec between them (ADC: arXiv:2509.15058)."""

    cut: int = 0
    """Blocks in the client's half, in 1..depth-1; 0 does not cut."""
    codec: str = "auto"
    """What compresses activations and gradients at the cut, as `pca(2)` or `adc(0.1)+int8`; `snello codecs` lists them.
    Best of those measured: `auto` costs half a point, `small` one, `smallest` two on the benchmark (docs/codecs.md)."""
    eval_codec: str = "pca(0.5)"
    """How activations travel in evaluation, where nothing is merged or dropped: pca(...), none, bf16, fp16, int8, int4
    or int2."""
    labels: Literal["server", "client"] = "server"
    """Who has the labels: the server, with classifier and loss, or the client (U-shape: labels never leave it)."""
    alast: Literal["client", "server", "both"] = "both"
    """Which halves ALaST is attached to, where it is the method."""
    frames: bool = True
    """Pass everything through the bytes of the protocol, as over a network; off, they are only counted."""
    max_bytes: str | None = None
    """Train until this much training traffic, whatever --epochs says, as 500MB (10^6 bytes) or 2GiB."""
    client: str = "trains"
    """The client's half `trains`; or it is `frozen`, so that nothing comes down and the server can train on what it has
    stored; or it trains for some epochs and is then frozen, as `epochs:2`."""
    send_epochs: int | None = None
    """Of --epochs, those whose activations a frozen client sends; the server trains the others on what it has stored.
    Default: all."""
    replay: int = 0
    """Steps on stored samples after each one that is sent; what is left of --epochs follows when all is sent, which is
    better: samples are then drawn from all that there is."""
    cutmix: float | None = None
    """Share of the samples, in [0, 1], into which the server puts a part of another one's patches, with as much of its
    label: of those that are drawn from what is stored, by default 0.8, since few views would be learned by heart; and
    of those that a client sends that trains, by default none."""
    link: str | None = None
    """Report the time that this link would add, as 10mbit/20ms: rate of each direction / time of a round trip."""

    def __post_init__(self) -> None:
        require(self.cut >= 0, "--split.cut", "0 or more", self.cut)
        require_choices(self, "split.")
        parse_codec(self.codec, "--split.codec")
        parse_codec(self.eval_codec, "--split.eval-codec")
        if self.max_bytes is not None:
            parse_bytes(self.max_bytes, "--split.max-bytes")
        fits = re.fullmatch(r"trains|frozen|epochs:[1-9]\d{0,8}", self.client) is not None
        require(fits, "--split.client", "trains, frozen or epochs:N", repr(self.client))
        require(
            self.send_epochs is None or self.send_epochs >= 1, "--split.send-epochs", "at least 1", self.send_epochs
        )
        require(self.replay >= 0, "--split.replay", "0 or more", self.replay)
        require(self.cutmix is None or 0 <= self.cutmix <= 1, "--split.cutmix", "in [0, 1]", self.cutmix)
        if self.link is not None:
            Link.parse(self.link, "--split.link")

    @property
    def codec_text(self) -> str | None:
        """The codec at the cut, a goal as `auto` resolved; None without a cut."""
        goals = FROZEN_GOALS if self.client == "frozen" else GOALS
        return None if self.cut == 0 else goals.get(self.codec.strip(), self.codec)

    @property
    def freezes(self) -> bool:
        """Whether the client's half is frozen at the start or later."""
        return self.client != "trains"

    @property
    def trained_epochs(self) -> int:
        """Epochs in which a client trains that is frozen after them."""
        return int(self.client.removeprefix("epochs:")) if self.client.startswith("epochs:") else 0

    @property
    def stores(self) -> bool:
        """Whether the server keeps what a frozen client sends, to train on it again."""
        return self.send_epochs is not None

    def sent_epochs(self, epochs: int) -> int:
        """Of so many epochs, those whose activations are sent."""
        return epochs if self.send_epochs is None else self.trained_epochs + self.send_epochs

    def require_epochs(self, epochs: int) -> None:
        """Raises a ConfigError where so many epochs are too few for what is sent and replayed."""
        trained, sent = self.trained_epochs, self.send_epochs or int(self.freezes)
        if epochs < trained + sent:
            parts = [f"--split.client {self.client}"] if trained else []
            parts += [f"--split.send-epochs {sent}"] if self.stores else []
            need = " and ".join(parts) + (" need together" if len(parts) == 2 else " needs")
            raise ConfigError(f"--epochs {epochs} is less than {need}: raise it to {trained + sent}")
        least = trained + sent * (1 + self.replay)
        if epochs < least:
            what = f"{trained} epochs trained, {sent} sent" if trained else f"{sent} epochs sent"
            why = f"{what} and --split.replay {self.replay} take {least}"
            raise ConfigError(f"--epochs {epochs} is too few: {why}; raise it, or lower --split.replay")


MIXED_ACROSS = "with --split.cut, where --split.cutmix mixes tokens at the server"

RECIPE_NEEDS: tuple[Need, ...] = (
    Need("last_k", lambda c: c.method_name == "last-k", "without --method last-k"),
    Need("alast", lambda c: "alast" in c.method_name, "without --method alast or alast+lora"),
    Need("time_budget", lambda c: c.split.cut == 0, "with --split.cut"),
    Need("preset", lambda c: "alast" in c.method_name, "without --method alast or alast+lora"),
    Need("preset", lambda c: c.preset != "accurate" or c.split.cut == 0, "with --split.cut: raise --epochs"),
    Need("alast.temperature", lambda c: c.alast.draw == "softmax", "without --alast.draw softmax"),
    Need("alast.train_embeddings", lambda c: "lora" not in c.method_name, "with LoRA, which freezes them anyway"),
    Need("lora", lambda c: "lora" in c.method_name, "without --method lora or alast+lora"),
    Need("split", lambda c: c.split.cut > 0, "without --split.cut"),
    Need("split.alast", lambda c: c.method_name == "alast", "without --method alast"),
    Need("split.send_epochs", lambda c: c.split.freezes, "without --split.client frozen or epochs:N"),
    Need("split.replay", lambda c: c.split.stores, "without --split.send-epochs"),
    Need("split.cutmix", lambda c: c.split.labels == "server", "with --split.labels client"),
    Need("augment.rand_magnitude", lambda c: c.augment.rand_ops > 0, "without --augment.rand-ops"),
    Need("augment.mixup", lambda c: c.split.cut == 0, MIXED_ACROSS),
    Need("augment.cutmix", lambda c: c.split.cut == 0, MIXED_ACROSS),
    Need("augment.mixup", lambda c: c.batch_size > 1, "with --batch-size 1"),
    Need("augment.cutmix", lambda c: c.batch_size > 1, "with --batch-size 1"),
)


@dataclass(frozen=True)
class Recipe:
    """What a run computes: model, method and optimization, whoever has the pictures."""

    config: Path | None = None
    """YAML file with any of these settings; a flag wins over the file, the file over the default."""
    model: str = TOY
    """Name of a timm Vision Transformer; or of one of transformers: `hf:` and its name on the hub, or its folder."""
    weights: str = "pretrained"
    """`pretrained`, `none` (random), or the path of a safetensors file or of a folder with one."""
    method: MethodChoice = "auto"
    """What is trained: everything on an adaptive budget, everything, the head, the last blocks and the head, adapters
    and the head, or those on an adaptive budget; `auto` is alast, or full with --split.cut."""
    last_k: int = 3
    """Blocks trained by the method last-k."""
    alast: AlastConfig = field(default_factory=AlastConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    epochs: int | None = None
    """Passes over the training pictures; default: 5 or, without a cut and with few pictures, as many more as make 250
    steps, at most 50."""
    time_budget: float | None = None
    """Train for as long as so many epochs of plain full fine-tuning would take here, whatever --epochs says: steps of
    both are timed at the start, and the number of epochs follows."""
    batch_size: int = 64
    """Pictures in one pass of one process; a step has this times --accumulate times the processes of torchrun."""
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
    preset: Preset = "best"
    """What settings have that are left at their default: the `best` measured; `fast`, the lowest quarter of the blocks
    frozen; `accurate`, as many epochs as fit into the time of --epochs of full fine-tuning; `small-memory`, the lower
    half frozen, activations computed again; or `published`, as in ALaST's paper (docs/alast.md)."""
    exact_savings: bool = True
    """Compute and keep less in a step for the same gradients, up to rounding: the last block only for the tokens that
    the classifier reads, and the MLPs without GELU's output, which the backward pass computes again."""
    grad_checkpointing: bool = False
    """Keep only the inputs of the blocks for the backward pass and compute the rest again: less memory, more time."""
    eval_epochs: int | None = None
    """Epochs between two evaluations on the held-out pictures; the last epoch is always evaluated. Default: 1, or with
    --split.send-epochs only at the end."""
    patience: int = 0
    """Stop after this many epochs without a better accuracy; 0 never stops early."""
    checkpoint_steps: int = 200
    """Optimizer steps between two checkpoints (there is also one after every epoch); 0 for none in between."""
    out: Path | None = None
    """Run folder; default: runs/<model>-<method>-<time>."""
    resume: bool = False
    """Resume the run in --out where it was cut off; settings come from its config.yaml."""

    NEEDS = RECIPE_NEEDS

    def __post_init__(self) -> None:
        for name in ("last_k", "batch_size", "accumulate"):
            require(getattr(self, name) >= 1, flag(name), "at least 1", getattr(self, name))
        require(self.epochs is None or self.epochs >= 1, "--epochs", "at least 1", self.epochs)
        require(self.eval_epochs is None or self.eval_epochs >= 1, "--eval-epochs", "at least 1", self.eval_epochs)
        for name in ("clip_norm", "weight_decay", "patience", "checkpoint_steps"):
            require(getattr(self, name) >= 0, flag(name), "0 or more", getattr(self, name))
        budget = self.time_budget
        require(budget is None or 0 < budget < math.inf, "--time-budget", "above 0 and finite", budget)
        require(0 <= self.seed < 2**63, "--seed", "in 0..2**63-1", self.seed)
        require(0 < self.lr < math.inf, "--lr", "above 0 and finite", self.lr)
        require(0 < self.layer_decay <= 1, "--layer-decay", "in (0, 1]", self.layer_decay)
        require(0 <= self.warmup < 1, "--warmup", "in [0, 1)", self.warmup)
        require(0 <= self.label_smoothing < 1, "--label-smoothing", "in [0, 1)", self.label_smoothing)
        require(self.image_size is None or self.image_size >= 1, "--image-size", "at least 1", self.image_size)
        require_choices(self)
        for name in ("flops", "time"):  # what full fine-tuning of a half costs is no target
            if self.split.cut and getattr(self.alast, name) is not None:
                reason = "does not go with --split.cut: the other half and the codec change the cost"
                raise ConfigError(f"--alast.{name} {reason}")
        if "alast" in self.method_name and not (self.preset == "accurate" and self.split.cut):
            for name, value in fill(self).items():
                object.__setattr__(self, name, value)
        require_effect(self)
        if not self.split.cut:
            return
        refused, rule = "does not go with --split.cut", self.alast.rule
        self._require_freezing()
        if "lora" in self.method:
            raise ConfigError(f"--method {self.method} {refused}: LoRA trains an uncut model")
        # What crosses is named by where it stood; the default does, so torch is not needed here.
        if rule != "auto" and self.split.alast != "server" and not find(RULES[rule]).has_places:
            reason = "its tokens have no place of their own, unless --split.alast server keeps it off the client"
            raise ConfigError(f"--alast.rule {rule} {refused}: {reason}")

    def _require_freezing(self) -> None:
        """Raises a ConfigError where something does not go with a client's half that is frozen."""
        split = self.split
        if not split.freezes:
            return
        split.require_epochs(self.num_epochs)
        frozen = f"--split.client {split.client}"
        if split.labels == "client":
            raise ConfigError(f"{frozen} does not go with --split.labels client: the classifier there would not train")
        if split.max_bytes is not None:
            raise ConfigError(f"{frozen} does not go with --split.max-bytes: say --split.send-epochs")
        if self.method_name == "alast" and split.alast == "client":
            raise ConfigError(f"{frozen} does not go with --split.alast client: nothing is left to budget there")

    @property
    def evaluates_every(self) -> int:
        """Epochs between two evaluations."""
        return self.eval_epochs or (self.num_epochs if self.split.stores else 1)

    @property
    def num_epochs(self) -> int:
        """Passes over the training pictures, where their number does not matter."""
        return self.epochs or USUAL_EPOCHS

    @property
    def method_name(self) -> str:
        """The method that trains: `method`, or what `auto` means here."""
        return self.method if self.method != "auto" else "full" if self.split.cut else "alast"


@dataclass(frozen=True)
class FinetuneConfig(PicturesConfig, Recipe):
    """Fine-tune a Vision Transformer on labelled pictures."""

    model: str = "auto"
    """Name of a timm Vision Transformer; or of one of transformers: `hf:` and its name on the hub, or its folder.
    `auto` with --data is a pretrained DeiT (deit_small_patch16_224, or tiny where memory is scarce), else a toy that
    ships with snello."""
    compare: bool = True
    """After training, measure a linear probe, and step time, FLOPs and memory against full fine-tuning on this
    machine."""

    NEEDS = RECIPE_NEEDS + PICTURES_NEEDS

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        PicturesConfig.__post_init__(self)
