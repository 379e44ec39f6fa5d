"""Settings of `snello serve`, `join`, `certs` and `doctor`."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from snello.config.effect import Need, require_effect
from snello.config.pictures import PICTURES_NEEDS, PicturesConfig
from snello.config.recipe import RECIPE_NEEDS, Recipe, SplitConfig
from snello.config.units import parse_address, parse_bytes
from snello.config.values import require_choices
from snello.errors import ConfigError, require

NAME_NEEDS_CERTS = Need("name", lambda c: c.certs is not None, "without --certs")


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
    max_disk: str = "10GiB"
    """What all sessions together may store of frozen clients (--split.send-epochs), as 500MB or 10GiB."""
    idle_seconds: float = 600.0
    """A client that sends nothing for so long is disconnected; its session can be resumed."""
    release_weights: bool = True
    """Give the trained server half to the client that trained it, when it asks (`snello export`)."""
    accept_weights: bool = False
    """Let clients replace the weights of their server half (averaging between rounds)."""
    metrics_port: int | None = None
    """Port on 127.0.0.1 for Prometheus metrics; default: none are served."""
    log_format: Literal["text", "json"] = "text"
    """How the log on stderr is written; serve.log in the run folder is always JSON."""

    NEEDS = (
        *RECIPE_NEEDS,
        Need("split.frames", lambda c: False, "over a network, which nothing crosses but frames"),
        Need("auth", lambda c: c.certs is not None, "without --certs"),
        Need("max_disk", lambda c: c.split.stores, "without --split.send-epochs"),
    )

    def __post_init__(self) -> None:
        require(self.split.cut >= 1, "--split.cut", "at least 1: the client has the embeddings and a block", 0)
        super().__post_init__()
        require(self.num_classes is None or self.num_classes >= 1, "--num-classes", "at least 1", self.num_classes)
        require(self.max_sessions >= 1, "--max-sessions", "at least 1", self.max_sessions)
        require(self.idle_seconds > 0, "--idle-seconds", "above 0", self.idle_seconds)
        port = self.metrics_port
        require(port is None or 0 <= port < 2**16, "--metrics-port", "in 0..65535", port)
        parse_bytes(self.max_memory, "--max-memory")
        parse_bytes(self.max_disk, "--max-disk")
        if self.sessions == "shared" and self.split.stores:
            raise ConfigError("--split.send-epochs does not go with --sessions shared: a half learns from one store")
        parse_address(self.listen, "--listen", any_port=True)


@dataclass(frozen=True)
class JoinConfig(PicturesConfig):
    """Train with a server on pictures that stay here: it gives the settings and the starting weights."""

    address: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ADDRESS")]
    """The server, as server.example:7443."""
    certs: Path | None = None
    """Folder that `snello certs` made, or the clients/NAME folder handed to you; not needed on loopback."""
    name: str | None = None
    """Which of the clients in --certs this is; default: the only one."""
    out: Path | None = None
    """Run folder; default: runs/client-<model>-<method>-<time>."""
    resume: bool = False
    """Resume the run in --out where it was cut off."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    attention: Literal["auto", "fused", "explicit"] = "auto"
    """How attention is computed; `auto` measures once which is faster here."""
    reconnect_seconds: float = 600.0
    """How long to try again where the connection breaks or the server restarts."""
    patience_seconds: float = 60.0
    """How long the server may be silent, beside what transfer and ten of its slowest steps take; then connect anew."""
    insecure_plaintext_for_everyone_on_the_network_to_read: bool = False
    """Without TLS to a server that is not on this machine: everybody on the way can read and change everything."""

    NEEDS = (
        *PICTURES_NEEDS,
        NAME_NEEDS_CERTS,
        Need("insecure_plaintext_for_everyone_on_the_network_to_read", lambda c: c.certs is None, "with --certs"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_address(self.address, "ADDRESS")
        require(self.reconnect_seconds >= 0, "--reconnect-seconds", "0 or more", self.reconnect_seconds)
        require(self.patience_seconds > 0, "--patience-seconds", "above 0", self.patience_seconds)
        require_effect(self)


@dataclass(frozen=True)
class CertsConfig:
    """Make what a server and its clients need to trust each other: a small CA, certificates and join tokens."""

    folder: tyro.conf.Positional[Path]
    """Folder to write to; where it has a CA already, clients are added."""
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

    NEEDS = (NAME_NEEDS_CERTS,)

    def __post_init__(self) -> None:
        require_choices(self)
        parse_address(self.address, "ADDRESS")
        require_effect(self)
