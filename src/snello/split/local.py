"""A session: a client half in training with a server half, a number of steps at a time.

That is what rounds of federated learning call: run some steps, take a half's weights, put averaged ones back.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

from rich.console import Console
from torch import Tensor
from typing_extensions import override

from snello.config import FinetuneConfig
from snello.config.default_model import default_model, named
from snello.data import splits_of
from snello.errors import AuthenticationError, ConfigError
from snello.runs.summary import Summary
from snello.split.build import replace_weights
from snello.split.halves import Half
from snello.split.learner import LocalLink, SplitLearner, make_split_learner
from snello.split.security.auth import Anyone, Authenticator, Credentials
from snello.train.loop import Trainer
from snello.train.place import LocalPlace

Side = Literal["client", "server"]


class Session(ABC):
    """Training across a cut, wherever the other half is."""

    trainer: Trainer

    def run(self, steps: int) -> dict[str, float]:
        """Takes up to `steps` optimizer steps; returns their number, mean loss, and the bytes they sent each way."""
        assert isinstance(self.trainer.learner, SplitLearner)
        counters = self.trainer.learner.ledger.counters
        up, down = counters.total("uplink"), counters.total("downlink")
        losses = self.trainer.advance(steps)
        return {
            "steps": len(losses),
            "loss": sum(losses) / len(losses) if losses else 0.0,
            "uplink_bytes": counters.total("uplink") - up,
            "downlink_bytes": counters.total("downlink") - down,
        }

    @abstractmethod
    def get_state(self, side: Side) -> dict[str, Tensor]:
        """A copy of a half's weights, by their names in the whole model; a codec's begin with `codec.`"""

    @abstractmethod
    def set_state(self, side: Side, state: Mapping[str, Tensor]) -> None:
        """Continues with these weights; optimizers keep their state.

        Raises:
            CheckpointError: where names or shapes are not those of the half; nothing was changed.
        """

    def finish(self) -> Summary:
        """Ends the session on both sides and returns the summary, which is in the run folder too."""
        return self.trainer.finish()

    def close(self) -> None:
        """Ends what loads pictures, and the connection where there is one; the session can be resumed."""
        self.trainer.close()


class LocalSession(Session):
    """A session with both halves in this process, with the client's credentials and the server's authenticator.

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
        config = named(config, default_model(config.data is not None, config.weights))
        place = LocalPlace(config, make_split_learner)
        self.trainer = Trainer(config, splits_of(config), place, console or Console(stderr=True))
        assert isinstance(self.trainer.learner, SplitLearner) and isinstance(self.trainer.learner.link, LocalLink)
        self._halves: dict[Side, Half] = {
            "client": self.trainer.learner.half,
            "server": self.trainer.learner.link.model.half,
        }

    @override
    def get_state(self, side: Side) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._halves[side].weights().items()}

    @override
    def set_state(self, side: Side, state: Mapping[str, Tensor]) -> None:
        replace_weights(self._halves[side].weights(), state, side)
