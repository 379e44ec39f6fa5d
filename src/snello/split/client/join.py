"""`snello join`: the one training loop, with a half of the model here and the other on a server."""

import uuid
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial

from rich.console import Console
from torch import Tensor
from typing_extensions import override

from snello.config import FinetuneConfig, JoinConfig, Recipe
from snello.config.values import from_dict, to_dict
from snello.data import splits_of
from snello.devices import resolve_device, resolve_precision
from snello.errors import ConfigError
from snello.reports import pictures, terminal
from snello.runs.folder import RunFolder, require_same_config
from snello.runs.resolved import Resolved, ServerAddress
from snello.runs.summary import Summary
from snello.split.build import replace_weights
from snello.split.client.connection import Connection, Stopped
from snello.split.client.endpoints import describe, make_endpoint
from snello.split.client.place import RemotePlace
from snello.split.local import Session, Side
from snello.split.security.auth import Credentials
from snello.split.wire.frames import Kind, control, weights_frame, weights_of
from snello.split.wire.handshake import Welcome
from snello.train.display import warnings_on
from snello.train.loop import Trainer
from snello.train.tracking import require_trackers

LOCAL = tuple(f.name for f in fields(JoinConfig) if f.name in FinetuneConfig.__dataclass_fields__)
"""Settings of a run that are the client's own."""


def join(
    config: JoinConfig,
    console: Console | None = None,
    on_settings: Callable[[Recipe], None] = lambda recipe: None,
    on_end: Callable[[RunFolder, Console], None] | None = None,
) -> Summary:
    """Trains with a server as it says and returns the summary that it saves in the run folder.

    `on_settings` is called with the settings that the server gave, before the first step; `on_end` with the run's
    folder when all is done.

    Raises:
        SnelloError: for input that cannot be used, or a server that cannot be reached or refuses, before anything is
            written; later with the last checkpoint kept.
        Interrupted: after Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    console = console or Console(stderr=True)
    with warnings_on(console):
        session = RemoteSession(config, console=console)
        on_settings(session.trainer.config)
        try:
            session.trainer.fit()
            summary = session.finish()
        except Stopped:
            raise session.trainer.interrupted() from None
        finally:
            session.close()
    run = session.trainer.run
    terminal.print_result(console, summary, session.trainer.splits.num_skipped)
    if summary.method == "alast":
        pictures.plot_budgets(run)
    assert summary.traffic is not None
    terminal.print_traffic(console, summary.traffic)
    pictures.plot_traffic(run)
    if on_end is not None:
        on_end(run, console)
    terminal.print_verdict(console, summary, len(session.trainer.splits.train))
    terminal.print_next(console, run, "more --epochs of `snello serve`, then join it anew")
    return summary


class RemoteSession(Session):
    """A session whose server half is at the other end of a network.

    `credentials` are shown to the server instead of the token in `config.certs`.

    Raises:
        SnelloError: for input that cannot be used, or a server that cannot be reached or refuses.
    """

    def __init__(
        self, config: JoinConfig, credentials: Credentials | None = None, console: Console | None = None
    ) -> None:
        console = console or Console(stderr=True)
        require_trackers(config.track)
        plaintext = config.insecure_plaintext_for_everyone_on_the_network_to_read
        endpoint = make_endpoint(
            config.address, config.certs, config.name, plaintext=plaintext, credentials=credentials
        )
        saved_config, saved = _saved(config)
        welcome = describe(endpoint, config.patience_seconds)
        recipe = _recipe(config, welcome)
        run = RunFolder.of(recipe, "client-")
        if saved_config is not None:
            require_same_config(saved_config, recipe, run.path)
        splits = splits_of(recipe)
        patience, reconnect = config.patience_seconds, config.reconnect_seconds
        connect = partial(Connection, endpoint, patience_seconds=patience, reconnect_seconds=reconnect)
        own = {f.name for f in fields(ServerAddress)}
        server = {name: value for name, value in to_dict(config).items() if name in own}
        name = saved.server.session if saved is not None and saved.server is not None else uuid.uuid4().hex
        self.place = RemotePlace(
            recipe,
            run,
            saved,
            server=ServerAddress(session=name, **server),
            architecture=welcome.architecture,
            classes=tuple(splits.train.classes),
            open_connection=connect,
            console=console,
        )
        try:
            self.trainer = Trainer(recipe, splits, self.place, console)
        except BaseException:
            self.place.close()
            raise

    @override
    def get_state(self, side: Side) -> dict[str, Tensor]:
        if side == "client":
            return {name: value.detach().clone() for name, value in self.place.learner.half.weights().items()}
        connection = self.place.connection
        before, connection.max_body = connection.max_body, 1 << 33
        try:
            return weights_of(self.place.request(control(Kind.GET_WEIGHTS, {})))
        finally:
            connection.max_body = before

    @override
    def set_state(self, side: Side, state: Mapping[str, Tensor]) -> None:
        """Continues with these weights; raises Refused where the server takes none, or not these."""
        if side == "server":
            self.place.request(weights_frame(Kind.SET_WEIGHTS, state))
        else:
            replace_weights(self.place.learner.half.weights(), state, "client")


def _saved(config: JoinConfig) -> tuple[FinetuneConfig | None, Resolved | None]:
    if not config.resume:
        return None, None
    if config.out is None:
        raise ConfigError("--resume needs --out: the folder of the run to resume")
    saved_config, saved = RunFolder(config.out).read()
    if saved.server is None:
        raise ConfigError(f"--resume: {config.out} is no run of `snello join`")
    return saved_config, saved


def _recipe(config: JoinConfig, welcome: Welcome) -> FinetuneConfig:
    """The settings that the server told, with this side's own."""
    values = {name: getattr(config, name) for name in LOCAL}
    recipe = from_dict(FinetuneConfig, {**welcome.recipe, "compare": False}, "the server's settings")
    recipe = replace(recipe, weights="none", **values)
    device = resolve_device(recipe.device)
    resolve_precision(recipe.precision, device)  # says so where this machine lacks it
    return recipe
