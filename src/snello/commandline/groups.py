"""Which settings come first in a verb's help, and the groups of all. A new setting stands in one group here."""

from typing import Any, NamedTuple

from snello.config import AlastConfig, AugmentConfig, LoraConfig, SplitConfig

FIRST: dict[str, tuple[str, ...]] = {
    "finetune": (
        "data", "model", "method", "preset", "epochs", "time_budget", "batch_size", "lr", "image_size", "out", "resume",
    ),
    "serve": (
        "listen", "certs", "insecure_loopback", "model", "split.cut", "split.codec", "epochs", "batch_size", "lr",
        "sessions", "out", "resume",
    ),
    "join": ("address", "data", "certs", "name", "val_share", "device", "out", "resume"),
}  # fmt: skip
"""By verb, what a first run needs; a verb that is not here has few settings, which its help shows all."""


class Group(NamedTuple):
    """Settings of one purpose."""

    name: str
    title: str
    settings: tuple[str, ...]
    """Their names; `alast` stands for all of that group's own dataclass."""


def _said(cls: type[Any]) -> str:
    """What a dataclass says that it is."""
    return " ".join(str(cls.__doc__).split()).removesuffix(".")


GROUPS = (
    Group(
        "data", "Where the pictures come from, how they are read and checked",
        ("data", "columns", "data_root", "val_share", "skip_bad", "check_pictures", "workers"),
    ),
    Group("model", "Which model, and what of it is trained", ("model", "weights", "image_size", "method", "last_k")),
    Group(
        "training", "Epochs, batches, learning rate, when to stop",
        (
            "epochs", "time_budget", "batch_size", "accumulate", "lr", "weight_decay", "layer_decay", "warmup",
            "clip_norm", "label_smoothing", "eval_epochs", "patience", "seed",
        ),
    ),
    Group("augment", _said(AugmentConfig), ("augment",)),
    Group("alast", _said(AlastConfig), ("preset", "alast")),
    Group("lora", _said(LoraConfig), ("lora",)),
    Group("split", _said(SplitConfig), ("split",)),
    Group(
        "device", "Device, precision, memory against time",
        ("device", "precision", "attention", "exact_savings", "grad_checkpointing"),
    ),
    Group(
        "network", "Address, certificates, how long to wait",
        (
            "address", "listen", "certs", "name", "auth", "insecure_loopback",
            "insecure_plaintext_for_everyone_on_the_network_to_read", "reconnect_seconds", "patience_seconds",
            "idle_seconds",
        ),
    ),
    Group(
        "server", "Sessions and their limits, metrics, log",
        (
            "num_classes", "sessions", "max_sessions", "max_memory", "max_disk", "release_weights", "accept_weights",
            "metrics_port", "log_format",
        ),
    ),
    Group(
        "run", "Run folder, resuming, settings from a file, checkpoints, reports",
        ("out", "resume", "config", "checkpoint_steps", "track", "compare", "report"),
    ),
)  # fmt: skip


def group_of(setting: str) -> Group | None:
    """The group of a setting."""
    holds = (group for group in GROUPS if {setting, setting.partition(".")[0]} & set(group.settings))
    return next(holds, None)
