"""A link to a server's half over a connection."""

import time
from dataclasses import replace
from typing import Any

from snello.errors import ProtocolError
from snello.split.client.connection import Connection
from snello.split.wire.frames import EXCHANGE_KINDS, NOTHING, Flags, Frame, Kind, control, control_values

ASK_SECONDS = 1.0
"""Between two questions to a server that takes steps by itself."""
TRAINING_KINDS = (Kind.ACTIVATIONS, Kind.FEATURE_GRADIENTS)


class NetworkLink:
    """Frames to a server (a `snello.split.learner.Link`)."""

    may_break = True

    def __init__(self, connection: Connection, *, replays: bool = False) -> None:
        self.connection, self._replays = connection, replays
        self._alone = 0.0
        self._left: int | None = None  # steps that the server has to take by itself; None where it was not asked
        self._step = 0
        self._flags = NOTHING  # what the next frame says of the step before
        self._waited = 0.0

    def exchange(self, frame: Frame) -> Frame:
        """The server's answer to a frame, which it applies exactly once; raises what `Connection.exchange` does."""
        started = time.perf_counter()
        frame = replace(frame, flags=frame.flags | self._flags)
        if frame.kind in TRAINING_KINDS:
            answer = self.connection.exchange(frame)
        else:
            answer = self.connection.request(frame, self._step)
        self._flags = NOTHING
        if frame.kind in EXCHANGE_KINDS:
            self._waited += time.perf_counter() - started
        return answer

    def begin(self, step: int) -> None:
        """Begins an optimizer step."""
        self._waited, self._step = 0.0, step

    def settle(self, overflow: bool, share: float | None) -> None:
        """Says with the next frame whether the step is skipped."""
        self._flags = Flags.SKIPPED if overflow else NOTHING
        self._step += 1

    def behind(self) -> int:
        """Steps on stored samples that the server had left when it was last asked."""
        if self._left is None:
            self._left = self._ask() if self._replays else 0
        return self._left

    def catch_up(self) -> dict[str, Any]:
        """Gives the server time for some of them; it logs them itself."""
        started = time.perf_counter()
        time.sleep(ASK_SECONDS)
        self._left = self._ask()
        self._alone += time.perf_counter() - started
        return {}

    def eval_metrics(self) -> dict[str, Any]:
        """The seconds of waiting for steps that the server took by itself."""
        return {"wait_seconds": round(self._alone, 4)} if self._alone else {}

    def _ask(self) -> int:
        left = control_values(self.connection.request(control(Kind.WAIT, {}), self._step)).get("left")
        if not isinstance(left, int) or left < 0:
            raise ProtocolError("the server did not say how many steps it has left")
        return left

    def metrics(self) -> dict[str, Any]:
        """Seconds of waiting for the server and the network."""
        return {"wait_seconds": round(self._waited, 4)}

    def method_metrics(self) -> dict[str, Any] | None:
        """None: the server logs them."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the server has checkpoints of its own."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stands where the checkpoint does."""
        self._step, self._flags, self._left = state["step"], NOTHING, None
