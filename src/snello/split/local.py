"""A session: a client half in training with a server half, a number of steps at a time.

That is what rounds of federated learning call: run some steps, take a half's weights, put averaged ones back.
"""

from collections.abc import Mapping
from typing import Literal, Protocol

from rich.console import Console
from torch import Tensor

from snello.config import FinetuneConfig
from snello.data import splits_of
from snello.errors import AuthenticationError, ConfigError
from snello.runs.folder import RunFolder
from snello.split.build import replace_weights
from snello.split.halves import Half
from snello.split.learner import Cut
from snello.split.security.auth import Anyone, Authenticator, Credentials
from snello.split.wire.frames import Counters
from snello.train.loop import Trainer

Side = Literal["client", "server"]


class Session(Protocol):
    """Training across a cut, wherever the other half is."""

    def run(self, steps: int) -> dict[str, float]:
        """Takes up to `steps` optimizer steps; returns their number, mean loss, and the bytes they sent each way."""

    def get_state(self, side: Side) -> dict[str, Tensor]:
        """A copy of a half's weights, by their names in the whole model; a codec's begin with `codec.`"""

    def set_state(self, side: Side, state: Mapping[str, Tensor]) -> None:
        """Goes on with these weights; optimizers keep their state."""


class LocalSession:
    """A session with both halves in this process.

    Args:
        config: of the run, with a cut.
        credentials: of the client.
        authenticator: of the server.
        console: where the run reports to.

    Raises:
        ConfigError: where the config has no cut.
        AuthenticationError: where the client is not admitted; nothing has been written.
        SnelloError: for input that cannot be used.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        credentials: Credentials | None = None,
        authenticator: Authenticator | None = None,
        console: Console | None = None,
    ) -> None:
        if not config.split.cut:
            raise ConfigError("a session needs a cut: set --split.cut")
        if (authenticator or Anyone()).identify((credentials or Anyone()).credentials()) is None:
            raise AuthenticationError("the server did not admit this client: check its token")
        self._trainer = Trainer(config, splits_of(config), RunFolder.of(config), {}, console or Console(stderr=True))
        assert isinstance(self._trainer.learner, Cut)
        self._cut = self._trainer.learner

    def run(self, steps: int) -> dict[str, float]:
        """See `Session`."""
        return run_counted(self._trainer, self._cut.counters, steps)

    def get_state(self, side: Side) -> dict[str, Tensor]:
        """See `Session`."""
        return {name: value.detach().clone() for name, value in self._tensors(side).items()}

    def set_state(self, side: Side, state: Mapping[str, Tensor]) -> None:
        """See `Session`.

        Raises:
            CheckpointError: where names or shapes are not those of the half; nothing was changed.
        """
        replace_weights(self._tensors(side), state, side)

    def _tensors(self, side: Side) -> dict[str, Tensor]:
        half: Half = getattr(self._cut, side)
        return half.weights()


def run_counted(trainer: Trainer, counters: Counters, steps: int) -> dict[str, float]:
    """Takes up to `steps` steps; what `Session.run` says of them."""
    up, down = counters.total("uplink"), counters.total("downlink")
    losses = trainer.advance(steps)
    return {
        "steps": len(losses),
        "loss": sum(losses) / len(losses) if losses else 0.0,
        "uplink_bytes": counters.total("uplink") - up,
        "downlink_bytes": counters.total("downlink") - down,
    }
