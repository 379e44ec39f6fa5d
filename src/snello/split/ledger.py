"""What crossed a cut: bytes so far, what they would have been uncompressed, and how many steps a budget pays for."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, takewhile
from typing import Any

from snello.codecs.base import Codec
from snello.config import Recipe
from snello.config.units import Link, parse_bytes
from snello.errors import ConfigError
from snello.split.halves import ClientHalf
from snello.split.traffic import Exchange, exchange_bytes, uncompressed_bytes
from snello.split.wire.frames import Counters
from snello.vit import ViT

LEAST_SHARE = 100
"""A step takes no less than this part of what numbers without any order would take."""
SPARE = 1.1
"""How much larger than the largest step so far the next one may be."""


class Ledger:
    """The bytes of one run of a whole model, which may be on the device `meta`: only its sizes are looked at."""

    def __init__(self, vit: ViT, config: Recipe, codec: Codec, num_classes: int) -> None:
        split = config.split
        self.vit, self.config, self.codec, self.num_classes = vit, config, codec, num_classes
        self.counters = Counters()
        self.uncompressed = 0
        """Bytes that the same exchanges would have taken in fp32 without a codec."""
        self._round_trips = 0
        self._at_begin = (0, 0)  # training bytes and round trips before the step under way
        self.link = None if split.link is None else Link.parse(split.link, "--split.link")
        self.max_bytes = None if split.max_bytes is None else parse_bytes(split.max_bytes, "--split.max-bytes")
        self._step_bytes: list[int] = []
        self._largest_step = 0  # of those taken, where steps differ in bytes

    def begin(self) -> None:
        """Once per step."""
        self._note()
        self._at_begin = self.counters.training, self._round_trips

    def _note(self) -> None:
        self._largest_step = max(self._largest_step, self.counters.training - self._at_begin[0])

    def share_spent(self) -> float | None:
        """Share of the budget that is spent, in [0, 1), where steps differ in bytes; None where steps count."""
        return self._share(self.counters.training)

    @property
    def share_at_begin(self) -> float | None:
        """The same before the step under way."""
        return self._share(self._at_begin[0])

    def _share(self, spent: int) -> float | None:
        if self.max_bytes is None or not self.codec.varies:
            return None
        return min(spent / self.max_bytes, 1 - 1e-9)

    def exchanged(self, num_samples: int, round_trips: int, *, gradient: bool, feature_gradient: bool) -> None:
        """Notes an exchange that ended: pictures in it, conversations back and forth, and what went down and up."""
        self._round_trips += round_trips
        shape = replace(self._shape(num_samples), with_gradient=gradient, with_feature_gradient=feature_gradient)
        self.uncompressed += uncompressed_bytes(shape)

    def largest_frame(self, batch_size: int) -> int:
        """Bytes that no frame of an exchange of so many pictures needs to exceed."""
        shape = self._shape(batch_size * self.codec.buffer)
        return max(uncompressed_bytes(shape), sum(exchange_bytes(self.codec, shape))) + (1 << 16)

    def plan(self, client: ClientHalf, step_samples: Sequence[int]) -> int | None:
        """Steps whose training bytes fit into the budget, given the pictures in each step of an epoch.

        Where their bytes vary, the most that may fit: `spent` ends the run, and the learning rate goes by bytes.

        Raises:
            ConfigError: where not even one step fits.
        """
        if self.max_bytes is None:
            return None
        self._step_bytes = self._plan(client, step_samples)
        if self.codec.varies and self._step_bytes[0] <= self.max_bytes:
            return math.ceil(self.max_bytes / (min(self._step_bytes) / LEAST_SHARE))
        epochs, left = divmod(self.max_bytes, sum(self._step_bytes))
        begun = list(takewhile(lambda total: total <= left, accumulate(self._step_bytes)))
        steps = epochs * len(self._step_bytes) + len(begun)
        if steps == 0:
            takes = "that one step may take" if self.codec.varies else "of one step"
            raise ConfigError(
                f"--split.max-bytes {self.config.split.max_bytes} is less than the {self._step_bytes[0]} bytes {takes}"
                ": raise it, or use a smaller --batch-size or a codec that sends less"
            )
        return steps

    def spent(self, step: int) -> bool:
        """Whether the step after `step` steps would go over the budget."""
        if self.max_bytes is None:
            return False
        due = self._step_bytes[step % len(self._step_bytes)]
        if self.codec.varies and step:
            self._note()
            due = min(due, math.ceil(SPARE * self._largest_step))
        return self.counters.training + due > self.max_bytes

    def _plan(self, client: ClientHalf, step_samples: Sequence[int]) -> list[int]:
        """The training bytes of an epoch's steps, with ALaST's budgets as they are now."""
        batch_size = self.config.batch_size * self.codec.buffer
        num_tokens = self.vit.num_prefix_tokens + client.method.num_left(self.vit.num_patches)
        head = {id(p) for p in client.vit.head_parameters()}
        below = any(p.requires_grad and id(p) not in head for p in client.parameters())
        above = self.config.method_name != "head"

        @lru_cache
        def exchange(num_samples: int) -> int:
            shape = replace(self._shape(num_samples), num_tokens=num_tokens, with_gradient=below)
            return sum(exchange_bytes(self.codec, replace(shape, with_feature_gradient=below or above)))

        return [sum(exchange(min(batch_size, num - at)) for at in range(0, num, batch_size)) for num in step_samples]

    def _shape(self, num_samples: int) -> Exchange:
        return Exchange.of(self.vit, num_samples, self.num_classes, self.config.split.labels)

    @property
    def times_fewer(self) -> float:
        """Bytes that the same exchanges would have taken uncompressed over those they took; 1 before the first."""
        return self.uncompressed / self.counters.training if self.counters.training else 1.0

    def metrics(self) -> dict[str, Any]:
        """Bytes so far, and seconds that the link would have taken for the step under way."""
        before, trips = self._at_begin
        row: dict[str, Any] = {f"{way}_bytes": self.counters.total(way) for way in ("uplink", "downlink")}
        if self.link is not None:
            seconds = self.link.seconds(self.counters.training - before, self._round_trips - trips)
            row["link_seconds"] = round(seconds, 4)
        return row

    def status(self) -> str:
        """Traffic so far, for the progress bar."""
        up, down = (self.counters.total(way) / 1e6 for way in ("uplink", "downlink"))
        return f"  {up:.1f} MB up {down:.1f} down {self.times_fewer:.1f}x less"

    def summary(self) -> dict[str, Any]:
        """Training bytes of each way and kind, what they would be uncompressed, and bytes of evaluation."""
        counters = self.counters
        return {
            "cut": self.config.split.cut,
            "codec": self.codec.text,
            "labels": self.config.split.labels,
            "uplink_bytes": counters.total("uplink"),
            "downlink_bytes": counters.total("downlink"),
            "uncompressed_bytes": self.uncompressed,
            "ratio": counters.training / self.uncompressed if self.uncompressed else None,
            "eval_bytes": counters.evaluation,
            "uplink_bytes_by_kind": dict(counters.uplink),
            "downlink_bytes_by_kind": dict(counters.downlink),
        }

    def state_dict(self) -> dict[str, Any]:
        """As values that JSON can hold."""
        self._note()
        state = {"counters": self.counters.state_dict(), "uncompressed": self.uncompressed}
        return state | {"largest_step": self._largest_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict()`."""
        self.counters.load_state_dict(state["counters"])
        self.uncompressed = state["uncompressed"]
        self._largest_step = state.get("largest_step", 0)
        self._at_begin = self.counters.training, self._round_trips
