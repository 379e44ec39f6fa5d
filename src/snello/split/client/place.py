"""Where a run of `snello join` lives: the client's half here, the other on a server, and checkpoints on both sides."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn
from typing_extensions import override

from snello.config import FinetuneConfig
from snello.errors import CheckpointError, SnelloError
from snello.runs.folder import RunFolder
from snello.runs.resolved import Resolved, ServerAddress
from snello.split.build import cut_model, make_codec, meta_vit
from snello.split.checkpoints import Checkpoints, steps_in
from snello.split.client.connection import Connection, RolledBack, Stopped
from snello.split.client.link import NetworkLink
from snello.split.learner import SplitLearner
from snello.split.wire.frames import Frame, Kind, control, control_values, weights_of
from snello.split.wire.handshake import Hello, RunShape, Terms, Welcome, hash_of, make_terms
from snello.train.display import say
from snello.train.learner import Learner
from snello.train.place import GoBack, Place, Progress, Setup, State
from snello.train.schedule import Schedule
from snello.vit import ViT


class RemotePlace(Place):
    """A run whose other half is on a server.

    Args:
        config: the settings that the server told, with this side's own.
        architecture: what the server said that a transformers model is made of.
        open_connection: makes the connection, given what it asks of this side.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        run: RunFolder,
        saved: Resolved | None,
        *,
        server: ServerAddress,
        architecture: dict[str, Any] | None,
        classes: tuple[str, ...],
        open_connection: Callable[..., Connection],
        console: Console,
    ) -> None:
        super().__init__(config, run, saved)
        self.server: ServerAddress = server
        self._folder = run.path / "checkpoints"
        self._architecture, self._classes, self._console = architecture, classes, console
        self._stop: list[int] = []
        self.connection = open_connection(
            self._hello,
            tell=self._print,
            should_stop=lambda: bool(self._stop),
            on_shutdown=self._on_shutdown,
            accept=self._accept,
        )
        self._evaluating = False  # until the server has been told the result
        self._evaluated: dict[str, Any] = {}
        self._incarnation = ""
        self.rolled_back = self.lost_steps = 0
        """Steps done again after a crash; steps of a shared server half that this client has lost."""
        self._server_forgot = False  # in shared sessions: what it counted since its last checkpoint
        self._terms: Terms
        self._plan: RunShape
        self._welcome: Welcome
        self._schedule: Schedule
        self._state: Callable[[], State]

    @override
    def make_model(self, num_classes: int) -> nn.Module:
        return meta_vit(self.config, num_classes, self._architecture).model

    @override
    def make_learner(self, vit: ViT, setup: Setup) -> Learner:
        config = self.config
        self._stop = setup.stop
        codec = make_codec(config, str(setup.codec), vit.embed_dim).to(setup.device)
        lower, _ = cut_model(vit, config)
        lower.model.to_empty(device=setup.device)
        link = NetworkLink(self.connection, replays=setup.schedule.replay is not None)
        learner = self.learner = SplitLearner(vit, lower, codec, setup, link)
        schedule = self._schedule = replace(setup.schedule, buffer=learner.buffer, max_steps=learner.max_steps)
        if schedule.replay is not None:  # before it answers, the server takes its steps on what it has stored
            self.connection.slowest_times += 2 * schedule.replay.each
        self._plan = RunShape(schedule.num_train, schedule.total_steps, hash_of(list(self._classes)))
        self._terms = make_terms(vit.model, config, codec.text, setup.num_classes, setup.precision)
        self.checkpoints = Checkpoints(self._folder, learner.modules, learner.optimizers)
        weights = sum(value.numel() * value.element_size() for value in lower.model.state_dict().values())
        self.connection.max_body = weights + (1 << 20)
        self._welcome, frame = self.connection.open()
        self.connection.max_body = max(learner.ledger.largest_frame(config.batch_size), self.connection.max_body)
        self._incarnation, self.lost_steps = self._welcome.incarnation, self._welcome.lost_steps
        self._server_forgot = self._welcome.shared and self._welcome.back
        if self._welcome.fresh:
            try:
                lower.model.load_state_dict(weights_of(frame))
            except RuntimeError as error:
                raise CheckpointError(f"the server's weights do not fit the client half: {error}") from error
        return learner

    @override
    def begin(self, learner: Learner, resolved: Resolved, state: Callable[[], State]) -> State | None:
        self._state = state
        if self.saved is None:
            self.run.create(self.config, resolved)
        else:
            self.run.lock()
        if self._welcome.fresh:
            self.run.forget_after(0)
            self._save_here(state())
            return None
        if self.lost_steps:
            self._print(f"{self.lost_steps} steps of this client are in the shared server half, but no longer here")
        return self.checkpoints.load(self._welcome.step)

    @override
    def command(self) -> str:
        server = self.server
        options = {"--certs": server.certs, "--name": server.name}
        flags = [text for flag, value in options.items() if value is not None for text in (flag, value)]
        if server.insecure_plaintext_for_everyone_on_the_network_to_read:
            flags.append("--insecure-plaintext-for-everyone-on-the-network-to-read")
        return shlex.join(["snello", "join", server.address, *flags, "--out", str(self.run.path), "--resume"])

    @override
    def checkpoint(self) -> Path | None:
        steps = steps_in(self._folder)
        return self.checkpoints.path(steps[-1]) if steps else None

    def _hello(self) -> Hello:
        return Hello(
            "train",
            session=self.server.session,
            terms=self._terms,
            plan=self._plan,
            step=self.learner.step if self._incarnation else None,
            incarnation=self._incarnation,
            checkpoints=steps_in(self._folder),
        )

    def _accept(self, welcome: Welcome) -> bool:
        """Whether the frame in flight can be sent again after this welcome."""
        changed, self._incarnation = welcome.incarnation != self._incarnation, welcome.incarnation
        if welcome.shared and changed:
            self._server_forgot = True
            return self.learner.between_steps
        return not welcome.back

    def _print(self, text: str) -> None:
        say(self._console, text)

    def _on_shutdown(self, step: int) -> None:
        """The server has saved `step` before it went: with the same step saved here, nothing is lost."""
        state = self._state()
        if not self._evaluating and self.learner.between_steps and state["progressed"]["step"] == step:
            self._save_here(state)

    def request(self, frame: Frame) -> Frame:
        """The server's answer to a frame that belongs to no step."""
        return self.learner.link.exchange(frame)

    @override
    def go_back(self, error: GoBack, progress: Progress) -> State | None:
        assert isinstance(error, RolledBack)
        welcome, before = error.welcome, progress.step
        self._evaluated, self._evaluating = {}, False
        if not welcome.back:
            self._print(f"the server was restarted: step {before + 1} is done again")
            return None
        state = self.checkpoints.load(welcome.step)
        self._incarnation = welcome.incarnation
        step = min(welcome.step, before)
        self.rolled_back += before - step
        self._print(
            f"the server went on from step {step}, so this side goes back to it too: "
            f"{before - step} steps are done again, nothing is lost"
        )
        return state

    @override
    def begin_evaluation(self) -> None:
        self._evaluating = True

    @override
    def end_evaluation(self, progress: Progress) -> None:
        self._evaluated = {"accuracy": progress.last_accuracy, "best": progress.best_epoch == progress.epochs}

    @override
    def save(self, learner: Learner, progress: Progress, state: State) -> None:
        """The server first, so that what is saved here is saved there."""
        try:
            self.request(control(Kind.SAVE, self._evaluated))
        except Stopped:
            self._print("the server has not saved this step: the run resumes from the last one that both have")
        self._evaluated, self._evaluating = {}, False
        self._save_here(state)

    def _save_here(self, state: State) -> None:
        progress = Progress(**state["progressed"])
        self.checkpoints.save(self._schedule.checkpoint(progress.step, progress.finished), state)
        self.save_method(progress, state)

    @override
    def finish(self) -> None:
        """Tells the server that the run is complete.

        Raises:
            SnelloError: where the server has counted other bytes than this side.
            GoBack: where it has lost the end of the run.
        """
        theirs = control_values(self.request(control(Kind.FINISH, {})))["summary"]
        ours = self.learner.ledger.summary()
        different = [name for name in ours if theirs.get(name) != ours[name]]
        if different and not self._server_forgot:
            name = different[0]
            raise SnelloError(f"{name} is {ours[name]} here and {theirs.get(name)} on the server; please report this")

    @override
    def traffic(self) -> Mapping[str, Any]:
        again = {"repeated_bytes": self.connection.repeated_bytes, "rolled_back_steps": self.rolled_back}
        return again | {"lost_steps": self.lost_steps}

    @override
    def close(self) -> None:
        self.connection.close()
        super().close()
