"""What a run decided from model, data and machine: written into its config.yaml once, and read from there ever on."""

from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from snello.models import Preprocessing
from snello.vit.times import Times

VERSION = 1


@dataclass(frozen=True)
class Machine:
    """Where and how a run computes; a server of split learning decides no more than that."""

    device: str = "cpu"
    precision: str = "fp32"
    attention: str = "fused"
    threads: int = 1
    versions: dict[str, str] = field(default_factory=dict)
    version: int = VERSION
    """Of these fields."""


@dataclass(frozen=True)
class ServerAddress:
    """The server that has the other half of a run of `snello join`; fields as in `JoinConfig`."""

    address: str
    session: str
    """The run's name there."""
    certs: str | None = None
    name: str | None = None
    insecure_plaintext_for_everyone_on_the_network_to_read: bool = False
    reconnect_seconds: float = 600.0
    patience_seconds: float = 60.0


@dataclass(frozen=True)
class Resolved(Machine):
    """All that a run decided; a resumed run takes it from here instead of deciding again."""

    classes: tuple[str, ...] = ()
    """Names, in the order of the logits."""
    preprocessing: Preprocessing | None = None
    architecture: dict[str, Any] | None = None
    """What a transformers model is made of; None for timm's."""
    num_train: int = 0
    num_val: int = 0
    num_skipped: int = 0
    fingerprint: str | None = None
    """What tells the pictures from others of the same number; None where an older version has not noted it."""
    processes: int = 1
    times: Times | None = None
    """What a block takes here, where --alast.time asks for it."""
    codec: str | None = None
    """The codec at the cut, `auto` resolved; None without a cut."""
    server: ServerAddress | None = None
    """Where the other half is; None where the run has the whole model."""
    data: str | None = None
    """Absolute path of the pictures, where --data is a path."""
    data_root: str | None = None
    """Absolute path of --data-root, where it was given."""

    @property
    def pictures(self) -> Preprocessing:
        """How the model wants its pictures."""
        assert self.preprocessing is not None
        return self.preprocessing


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {name: version(name) for name in ("snello", "torch", "torchvision", "timm", "accelerate")}


def machine(device: str, precision: str, attention: str) -> dict[str, Any]:
    """The fields of `Machine` for this process."""
    options = {"device": device, "precision": precision, "attention": attention}
    return options | {"threads": torch.get_num_threads(), "versions": versions()}
