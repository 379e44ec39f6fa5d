"""`snello serve`: settings to a running server, and back to an orderly end."""

import asyncio
import contextlib
import signal
from functools import partial
from typing import Any

import grpc
from rich.console import Console

from snello.config import ServeConfig
from snello.config.default_model import TOY
from snello.config.units import is_loopback, parse_address
from snello.errors import ConfigError
from snello.runs.folder import RunFolder, require_same_config
from snello.runs.resolved import Machine, machine
from snello.split.security.auth import Anyone, Authenticator, Both, Certificates, Tokens
from snello.split.security.tls import ServerFiles
from snello.split.server.registry import Registry
from snello.split.server.sessions import TrainingSession
from snello.split.server.streams import Limits, Server
from snello.split.server.telemetry import Board, Telemetry, close_logger, make_logger
from snello.train.display import warnings_on

Security = tuple[grpc.ServerCredentials | None, Authenticator]


def serve(config: ServeConfig, console: Console | None = None) -> None:
    """Serves clients until Ctrl-C or SIGTERM; then steps under way end, and every session is saved.

    Raises:
        SnelloError: for settings that cannot be used, before anything is written.
    """
    console = console or Console(stderr=True)
    security = make_security(config)
    run = RunFolder.of(config, "server-")
    saved = Machine(attention=config.attention)
    if config.resume:
        saved_config, saved = run.read(ServeConfig, Machine)
        require_same_config(saved_config, config, run.path)
        run.lock()
    with warnings_on(console):
        registry = Registry(config, run, saved.attention)
    if not config.resume:
        run.create(config, Machine(**machine(str(registry.device), registry.precision, registry.attention)))
    log = make_logger(run.path, config.log_format, console)
    try:
        with warnings_on(console):
            asyncio.run(_serve(config, registry, security, log, console))
    finally:
        close_logger(log)
        run.release()


def make_security(config: ServeConfig) -> Security:
    """TLS and authenticator as `config` says; no TLS only on loopback, or where it is asked for by its full name.

    Raises:
        ConfigError: where the files cannot be used, or plaintext would leave this machine unasked.
    """
    host, _ = parse_address(config.listen, "--listen", any_port=True)
    everywhere = config.insecure_plaintext_for_everyone_on_the_network_to_read
    if config.certs is None:
        if not (config.insecure_loopback or everywhere):
            raise ConfigError(
                "give --certs, the folder that `snello certs` makes; or --insecure-loopback for clients on this machine"
            )
        if not everywhere and not is_loopback(host):
            raise ConfigError(f"--insecure-loopback cannot listen on {host}, which others can reach: give --certs")
        return None, Anyone()
    if config.insecure_loopback or everywhere:
        raise ConfigError("--certs and --insecure-... contradict each other: leave one out")
    files = ServerFiles.load(config.certs)
    mutual = config.auth in ("both", "certificate")
    tls = grpc.ssl_server_credentials(
        [(files.key, files.certificate)], root_certificates=files.ca if mutual else None, require_client_auth=mutual
    )
    tokens = Tokens(files.tokens_file)
    if config.auth == "both":
        return tls, Both(Certificates(), tokens)
    return tls, tokens if config.auth == "token" else Certificates()


async def _serve(config: ServeConfig, registry: Registry, security: Security, log: Any, console: Console) -> None:
    tls, authenticator = security
    telemetry = Telemetry(log)
    server = Server(registry, authenticator, telemetry, log, Limits(idle_seconds=config.idle_seconds))
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # outside the main thread
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    host, _ = parse_address(config.listen, "--listen", any_port=True)
    try:
        port = await server.start(config.listen, tls)
    except OSError as error:
        raise ConfigError(f"--listen {config.listen}: {error or 'the address cannot be had'}; is it in use?") from None
    try:
        if config.metrics_port is not None:
            telemetry.serve(config.metrics_port)
        _announce(config, registry, host, port, tls is not None, console)
        with Board(console) as board:
            server.on_step = partial(_show, board)
            server.on_leave = board.remove
            await stopping.wait()
            log.info("stopping: steps under way end, and every session is saved")
            await server.stop()
    finally:
        telemetry.close()


def _announce(config: ServeConfig, registry: Registry, host: str, port: int, tls: bool, console: Console) -> None:
    way = "TLS" if tls else "PLAINTEXT, anyone who can reach the port can read and take part"
    toy = f"\n{TOY} is a toy, to try things with: another with --model NAME" if config.model == TOY else ""
    console.print(
        f"{config.model} cut after block {config.split.cut}, {config.method_name}, {registry.precision} on "
        f"{registry.device}; listening on {host}:{port} ({way})\nrun folder: {registry.run.path}{toy}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def _show(board: Board, session: TrainingSession, seconds: float) -> None:
    board.show(
        session.run.path.name,
        step=session.step,
        total=session.schedule.total_steps,
        loss=session.loss,
        rate=session.schedule.num_samples(session.step - 1) / max(seconds, 1e-9),
        uplink_bytes=session.ledger.counters.total("uplink"),
        downlink_bytes=session.ledger.counters.total("downlink"),
        times_fewer=session.ledger.times_fewer,
    )
