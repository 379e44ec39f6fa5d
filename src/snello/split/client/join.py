"""`snello join`: the one training loop, with a half of the model here and the other on a server."""

import shlex
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from snello.config import FinetuneConfig, JoinConfig, Recipe
from snello.config.values import from_dict, to_dict
from snello.data import Splits, splits_of
from snello.devices import resolve_device, resolve_precision
from snello.errors import CheckpointError, ConfigError, SnelloError
from snello.files import save_json
from snello.report import pictures, terminal
from snello.runs.folder import RunFolder, require_same_config
from snello.split.build import meta_vit, replace_weights
from snello.split.checkpoints import Checkpoints, steps_in
from snello.split.client.connection import Connection, RolledBack, Stopped
from snello.split.client.endpoints import describe, make_endpoint
from snello.split.client.remote import Remote
from snello.split.local import Side, run_counted
from snello.split.security.auth import Credentials
from snello.split.wire.frames import Frame, Kind, control, control_values
from snello.split.wire.handshake import Hello, Plan, Terms, Welcome, hash_of, make_terms
from snello.split.wire.weights import weights_frame, weights_of
from snello.train.display import warnings_on
from snello.train.learner import MicroStep
from snello.train.loop import Trainer
from snello.train.tracking import require_trackers
from snello.vit import ViT

LOCAL = (
    "data",
    "columns",
    "data_root",
    "val_share",
    "skip_bad",
    "check_pictures",
    "workers",
    "device",
    "attention",
    "out",
    "track",
    "resume",
)


def join(
    config: JoinConfig, console: Console | None = None, on_settings: Callable[[Recipe], None] = lambda recipe: None
) -> dict[str, Any]:
    """Trains with a server as it says and returns the summary that it saves in the run folder.

    Args:
        config: this side's own.
        console: where the run reports to.
        on_settings: called with the settings that the server gave, before the first step.

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
    if summary["method"] == "alast":
        pictures.plot_budgets(run)
    terminal.print_traffic(console, summary)
    pictures.plot_traffic(run)
    console.print(f"run folder: {run.path}", highlight=False, soft_wrap=True)
    return summary


class JoinTrainer(Trainer):
    """The training loop around a client half.

    Args:
        session: a run's name for the server.
        open_connection: makes the connection, given what it asks of this side.
        server: what config.yaml keeps of the server.
        architecture: what the server said that a transformers model is made of.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        splits: Splits,
        run: RunFolder,
        saved: dict[str, Any],
        console: Console,
        *,
        session: str,
        open_connection: Callable[..., Connection],
        server: Mapping[str, Any],
        architecture: dict[str, Any] | None,
    ) -> None:
        self._session, self._server, self._architecture = session, server, architecture
        self._evaluating = False
        self._ahead: Ahead | None = None
        self._evaluated: dict[str, Any] = {}
        self._incarnation = ""
        self.rolled_back = self.lost_steps = 0
        """Steps done again after a crash; steps of a shared server half that this client has lost."""
        self._server_forgot = False  # in shared sessions: what it counted since its last checkpoint
        self.connection = open_connection(
            self._hello,
            tell=self._tell,
            should_stop=lambda: bool(self._stop),
            on_shutdown=self._on_shutdown,
            accept=self._accept,
        )
        self._welcome: Welcome
        self._folder = run.path / "checkpoints"
        try:
            super().__init__(config, splits, run, saved, console)
            self._begin(fresh=self._welcome.fresh)
        except BaseException:
            self.connection.close()
            raise

    # --------------------------------------------------------------------------------------------------- beginning

    def _make_model(self) -> nn.Module:
        model: nn.Module = meta_vit(self.config, len(self.splits.train.classes), self._architecture).model
        return model

    def _make_learner(self, vit: ViT, resolved: dict[str, Any]) -> Remote:
        num_classes, config = len(self.splits.train.classes), self.config
        remote = Remote(
            vit,
            config,
            self.connection,
            num_classes=num_classes,
            device=self.device,
            precision=self.precision,
            codec_text=resolved["codec"],
            step_samples=[self.schedule.num_samples(step) for step in range(self.schedule.steps_per_epoch)],
        )
        schedule = replace(self.schedule, buffer=remote.buffer, max_steps=remote.max_steps)
        self._plan = Plan(schedule.num_train, schedule.total_steps, hash_of(list(self.splits.train.classes)))
        self._terms: Terms = make_terms(
            vit.model,
            config,
            codec=resolved["codec"],
            num_classes=num_classes,
            precision=self.precision,
        )
        remote.upcoming = lambda: None if self._ahead is None else self._ahead.peek()
        self.checkpoints = Checkpoints(self._folder, remote.modules, remote.optimizers)
        weights = sum(value.numel() * value.element_size() for value in remote.half.vit.model.state_dict().values())
        room, self.connection.max_body = self.connection.max_body, weights + (1 << 20)
        self._welcome, frame = self.connection.open()
        self.connection.max_body = max(room, self.connection.max_body)
        self._incarnation, self.lost_steps = self._welcome.incarnation, self._welcome.lost_steps
        self._server_forgot = self._welcome.shared and self._welcome.back
        if self._welcome.fresh:
            self._load_weights(remote, frame)
        return remote

    def _micro_steps(self, start: int) -> Iterator[MicroStep]:
        self._ahead = Ahead(super()._micro_steps(start))
        return self._ahead

    def _load_weights(self, remote: Remote, frame: Frame) -> None:
        try:
            remote.load(weights_of(frame))
        except RuntimeError as error:
            raise CheckpointError(f"the server's weights do not fit the client half: {error}") from error

    def _resume(self, saved: dict[str, Any], resolved: dict[str, Any]) -> None:
        self._require_same_pictures(saved, resolved)

    def _begin(self, fresh: bool) -> None:
        """Stands where the server does."""
        if fresh:
            self.run.forget_after(0)
            self._save_here()
            return
        self._go_on(self.checkpoints.load(self._welcome.step))
        self.console.print(f"resuming after step {self.progressed.step} of {self.total_steps}", highlight=False)
        if self.lost_steps:
            self._tell(f"{self.lost_steps} steps of this client are in the shared server half, but no longer here")

    def _resolved(self, attention: str, codec: str | None) -> dict[str, Any]:
        return super()._resolved(attention, codec) | {"server": {**self._server, "session": self._session}}

    def _resume_command(self) -> str:
        certs = ["--certs", self._server["certs"]] if self._server.get("certs") else []
        return shlex.join(["snello", "join", self._server["address"], *certs, "--out", str(self.run.path), "--resume"])

    # ---------------------------------------------------------------------------------------------- the connection

    def _hello(self) -> Hello:
        learner = getattr(self, "learner", None)
        ready = isinstance(learner, Remote) and bool(self._incarnation)
        return Hello(
            "train",
            session=self._session,
            terms=self._terms,
            plan=self._plan,
            step=learner.step if ready and isinstance(learner, Remote) else None,
            incarnation=self._incarnation,
            checkpoints=steps_in(self._folder),
        )

    def _accept(self, welcome: Welcome) -> bool:
        """Whether the frame in flight can be sent again after this welcome."""
        changed, self._incarnation = welcome.incarnation != self._incarnation, welcome.incarnation
        if welcome.shared and changed:
            self._server_forgot = True
            return self.remote.between_steps
        return not welcome.back

    def _tell(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def _on_shutdown(self, step: int) -> None:
        """The server has saved `step` before it went: with the same step saved here, nothing is lost."""
        if not self._evaluating and self.remote.between_steps and self.progressed.step == step:
            self._save_here()

    @property
    def remote(self) -> Remote:
        """The learner."""
        assert isinstance(self.learner, Remote)
        return self.learner

    # ------------------------------------------------------------------------------------------------------ the loop

    def advance(self, steps: int) -> list[float]:
        """See `Trainer`; steps that the server has lost are done again."""
        target = min(self.progressed.step + steps, self.total_steps)
        losses: list[float] = []
        while self.progressed.step < target and not self.progressed.finished:
            try:
                losses += super().advance(1)
            except RolledBack as back:
                self._go_back(back.welcome)
        return losses

    def _go_back(self, welcome: Welcome) -> None:
        before = self.progressed.step
        self._stream = None
        self._evaluated = {}
        self._evaluating = False
        if not welcome.back:
            self.remote.restart()
            self._tell(f"the server was restarted: step {before + 1} is done again")
            return
        self._go_on(self.checkpoints.load(welcome.step))
        self._incarnation = welcome.incarnation
        self.rolled_back += before - welcome.step
        self._tell(
            f"the server went on from step {welcome.step}, so this side goes back to it too: "
            f"{before - welcome.step} steps are done again, nothing is lost"
        )

    def close(self) -> None:
        """Ends what loads pictures, what prefetches, and the connection."""
        super().close()
        self._ahead = None
        self.remote.close()
        self.connection.close()

    def _evaluate_epoch(self) -> None:
        self._evaluating = True  # until the server has been told
        super()._evaluate_epoch()
        at = self.progressed
        self._evaluated = {"accuracy": at.last_accuracy, "best": at.best_epoch == at.epochs}

    def _save(self) -> None:
        """The server first, so that what is saved here is saved there."""
        try:
            self.connection.request(control(Kind.SAVE, self._evaluated), self.remote.step)
        except Stopped:
            self._tell("the server has not saved this step: the run goes on from the last one that both have")
        self._evaluated, self._evaluating = {}, False
        self._save_here()

    def _save_to_stop(self) -> None:
        try:
            self._save()
        except RolledBack as back:  # to what both have saved
            self._go_back(back.welcome)

    def _save_here(self) -> None:
        state = self._state()
        self.checkpoints.save(self.progressed.step, state)
        self._save_method(state)

    def finish(self) -> dict[str, Any]:
        """Tells the server that the run is complete, and returns the summary that it saves.

        Raises:
            SnelloError: where the server has counted other bytes than this side.
        """
        theirs, ours = self._finished()["summary"], self.remote.summary()
        different = [name for name in ours if theirs.get(name) != ours[name]]
        if different and not self._server_forgot:
            name = different[0]
            raise SnelloError(f"{name} is {ours[name]} here and {theirs.get(name)} on the server; please report this")
        summary = self.summary()
        save_json(self.run.summary_file, summary)
        return summary

    def _finished(self) -> dict[str, Any]:
        """What the server says of the whole run; where it has lost its end, that is done again."""
        while True:
            try:
                while not self.progressed.finished:
                    self.advance(1)
                return control_values(self.connection.request(control(Kind.FINISH, {}), self.remote.step))
            except RolledBack as back:
                self._go_back(back.welcome)

    def _traffic(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        seconds = {name: round(sum(row[name] for row in rows), 3) for name in ("client_seconds", "wait_seconds")}
        return {
            **self.remote.summary(),
            **seconds,
            "jpeg_bytes": self.splits.train.file_bytes(),
            "repeated_bytes": self.connection.repeated_bytes,
            "rolled_back_steps": self.rolled_back,
            "lost_steps": self.lost_steps,
        }


class Ahead(Iterator[MicroStep]):
    """An iterator that can be asked what comes next without moving on."""

    def __init__(self, items: Iterator[MicroStep]) -> None:
        self._items, self._seen = items, deque[MicroStep]()

    def __next__(self) -> MicroStep:
        """The next item."""
        return self._seen.popleft() if self._seen else next(self._items)

    def peek(self) -> MicroStep | None:
        """The next item, which stays; None at the end."""
        if not self._seen:
            self._seen.extend(islice(self._items, 1))
        return self._seen[0] if self._seen else None


class RemoteSession:
    """A session whose server half is at the other end of a network (a `snello.split.session.Session`).

    Args:
        config: of the client.
        credentials: shown to the server instead of the token in `config.certs`.
        console: where the run reports to.

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

        def open_connection(hello: Callable[[], Hello], **callbacks: Any) -> Connection:
            return Connection(
                endpoint,
                hello,
                patience_seconds=config.patience_seconds,
                reconnect_seconds=config.reconnect_seconds,
                **callbacks,
            )

        self.trainer = JoinTrainer(
            recipe,
            splits,
            run,
            saved,
            console,
            session=saved["server"]["session"] if saved else uuid.uuid4().hex,
            open_connection=open_connection,
            server={name: to_dict(config)[name] for name in ("address", "certs", "name")},
            architecture=welcome.architecture,
        )

    def run(self, steps: int) -> dict[str, float]:
        """See `Session`."""
        return run_counted(self.trainer, self.trainer.remote.ledger.counters, steps)

    def get_state(self, side: Side) -> dict[str, Tensor]:
        """See `Session`."""
        if side == "client":
            return {name: value.detach().clone() for name, value in self.trainer.remote.half.weights().items()}
        remote = self.trainer.remote
        before, self.trainer.connection.max_body = self.trainer.connection.max_body, 1 << 33
        try:
            return weights_of(self.trainer.connection.request(control(Kind.GET_WEIGHTS, {}), remote.step))
        finally:
            self.trainer.connection.max_body = before

    def set_state(self, side: Side, state: Mapping[str, Tensor]) -> None:
        """See `Session`.

        Raises:
            CheckpointError: where names or shapes are not those of the client half; nothing was changed.
            Refused: where the server takes no weights, or not these.
        """
        if side == "server":
            step = self.trainer.remote.step
            self.trainer.connection.request(weights_frame(Kind.SET_WEIGHTS, state), step)
            return
        replace_weights(self.trainer.remote.half.weights(), state, "client")

    def finish(self) -> dict[str, Any]:
        """Ends the session on both sides and returns the summary."""
        return self.trainer.finish()

    def close(self) -> None:
        """Ends the connection; the session can be gone on with."""
        self.trainer.close()


def _saved(config: JoinConfig) -> tuple[FinetuneConfig | None, dict[str, Any]]:
    if not config.resume:
        return None, {}
    if config.out is None:
        raise ConfigError("--resume needs --out: the run folder to go on with")
    saved_config, saved = RunFolder(config.out).read_config()
    if "server" not in saved:
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
