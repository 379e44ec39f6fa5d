"""What came out of a run: `summary.json`, written and read here alone."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from snello.errors import CheckpointError
from snello.files import save_json

VERSION = 1


@dataclass(frozen=True)
class Traffic:
    """What crossed the cut of a run, in bytes and seconds; fields that a run does not have are None and not written."""

    cut: int
    codec: str
    labels: str
    uplink_bytes: int
    """Training bytes of the client; evaluation is apart."""
    downlink_bytes: int
    uncompressed_bytes: int
    """What the same exchanges would have taken in fp32 without a codec."""
    ratio: float | None
    eval_bytes: int
    uplink_bytes_by_kind: dict[str, int]
    downlink_bytes_by_kind: dict[str, int]
    server_steps: int | None = None
    """Steps of the server's half, on what was sent and on what it has stored, where it stores anything."""
    client_seconds: float | None = None
    server_seconds: float | None = None
    """Time of the server's half, where both are in one process."""
    wait_seconds: float | None = None
    """Time of waiting for the server and the network."""
    link_seconds: float | None = None
    """Time that the link of --split.link would have taken."""
    jpeg_bytes: int | None = None
    """What uploading the pictures once would take."""
    client_flops_per_sample: float | None = None
    server_flops_per_sample: float | None = None
    repeated_bytes: int | None = None
    """Bytes of frames that had to be sent again."""
    rolled_back_steps: int | None = None
    lost_steps: int | None = None
    """Steps of a shared server half that this client no longer has."""


@dataclass(frozen=True)
class Summary:
    """A run's result; accuracies are in [0, 1] and those of the epoch whose weights were kept, unless said."""

    accuracy: float
    balanced_accuracy: float | None
    per_class: list[dict[str, Any]] | None
    last_accuracy: float
    best_epoch: int
    epochs: int
    steps: int
    train_time_s: float
    num_classes: int
    method: str
    model: str
    seed: int
    device: str
    precision: str
    attention: str
    versions: dict[str, str]
    probe_accuracy: float | None = None
    """Of a linear probe: a linear classifier on the features that the model had at the start; None: not measured."""
    probe_pictures: int | None = None
    """Training pictures that the probe has seen: all, or a sample."""
    traffic: Traffic | None = None
    """None without a cut."""
    costs: dict[str, Any] = field(default_factory=dict)
    """`snello.measure.comparison.Comparison.summary`, or its fields as None where nothing was measured."""
    version: int = VERSION

    def to_dict(self) -> dict[str, Any]:
        """The flat mapping that summary.json holds."""
        values = {name: value for name, value in asdict(self).items() if name not in ("traffic", "costs")}
        traffic = {} if self.traffic is None else asdict(self.traffic)
        return values | {name: value for name, value in traffic.items() if value is not None} | self.costs

    def write(self, file: Path) -> None:
        """Writes summary.json, whole or not at all."""
        save_json(file, self.to_dict())

    @classmethod
    def read(cls, file: Path) -> "Summary | None":
        """What summary.json says; None where there is none, as of a run that has not ended.

        Raises:
            CheckpointError: where it cannot be read.
        """
        if not file.is_file():
            return None
        own = [f.name for f in fields(cls) if f.name not in ("traffic", "costs", "version")]
        crossed = [f.name for f in fields(Traffic)]
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            version = values.pop("version", VERSION)
            if version != VERSION:
                raise ValueError(f"version {version}, this snello reads {VERSION}")
            probe = {name: values.pop(name, None) for name in own if name.startswith("probe_")}  # older ones have none
            summary = probe | {name: values.pop(name) for name in own if name not in probe}
            cut = {name: values.pop(name) for name in crossed if name in values}
            return cls(**summary, traffic=Traffic(**cut) if "uplink_bytes" in cut else None, costs=values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"could not read {file}: {error}") from error
