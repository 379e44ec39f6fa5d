"""The run folder: what is in it, and reading it back.

config.yaml         the effective settings, and under `resolved` what was decided from model, data and machine
metrics.jsonl       a line per step and per evaluation
model.safetensors   the weights with the best held-out accuracy, in the model's own names
codec.safetensors   those of the codec at the cut, where it has any
last.safetensors    the checkpoint to resume from
alast.json          the final state of ALaST (with that method)
summary.json        the result
tensorboard/        what TensorBoard shows (with --track tensorboard)
tracking.json       the run's names in other trackers
budgets.png         budgets and trained blocks over the steps (with ALaST)
traffic.png         accuracy against epochs, bytes and time (across a cut)
adapter/            the adapters of those weights, as peft reads them (with LoRA; model.safetensors is merged)
export.safetensors  the whole model for timm, once `snello export` has written it; export/ for transformers and
                    export.onnx likewise, each with a model card
checkpoints/        the last two, where the other half is on a server, instead of last.safetensors
"""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml

from snello.files import replacing
from snello.config import FinetuneConfig, Recipe
from snello.errors import CheckpointError, ConfigError
from snello.config.effect import effective
from snello.config.values import from_dict, read_yaml, to_dict

# Settings that may differ when a run is resumed: they change where or how it runs, not what it computes.
FREE = frozenset(
    (
        "config",
        "data_root",
        "out",
        "resume",
        "compare",
        "track",
        "workers",
        "checkpoint_steps",
        "check_pictures",
        # of a server
        "listen",
        "certs",
        "auth",
        "insecure_loopback",
        "insecure_plaintext_for_everyone_on_the_network_to_read",
        "max_sessions",
        "max_memory",
        "idle_seconds",
        "release_weights",
        "accept_weights",
        "metrics_port",
        "log_format",
    )
)
T = TypeVar("T")


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.model_file = path / "model.safetensors"
        self.codec_file = path / "codec.safetensors"
        self.weights_files = {"model": self.model_file, "codec": self.codec_file}
        """By the name of the module."""
        self.checkpoint_file = path / "last.safetensors"
        self.alast_file = path / "alast.json"
        self.tracking_file = path / "tracking.json"
        self.summary_file = path / "summary.json"
        self.plot_file = path / "budgets.png"
        self.traffic_file = path / "traffic.png"
        self.adapter_folder = path / "adapter"
        self.exports = {
            "timm": path / "export.safetensors",
            "transformers": path / "export",
            "onnx": path / "export.onnx",
        }
        """By their formats."""

    def exported_weights(self) -> Path | None:
        """The whole model's weights, where timm or transformers has been exported to."""
        files = (self.exports["timm"], self.exports["transformers"] / "model.safetensors")
        return next((file for file in files if file.is_file()), None)

    @classmethod
    def of(cls, config: Recipe, label: str = "") -> "RunFolder":
        """The folder that `config` names or, without --out, a new one named after label, model, method and time.

        Raises:
            ConfigError: where the folder is in use and --resume is not given, or there is nothing to resume.
        """
        if config.out is None:
            if config.resume:
                raise ConfigError("--resume needs --out: the run folder to go on with")
            model = re.sub(r"[^\w.]+", "-", config.model).strip("-")  # a folder or hf:name has slashes
            return cls(Path("runs") / f"{label}{model}-{config.method_name}-{time.strftime('%Y%m%d-%H%M%S')}")
        run = cls(config.out)
        if config.resume and not run.config_file.is_file():
            raise ConfigError(f"--resume: {config.out} holds no run (no config.yaml); leave --resume out to start one")
        if not config.resume and config.out.exists() and not _is_empty(config.out):
            raise ConfigError(f"--out {config.out} is not empty: add --resume to go on with its run, or name another")
        return run

    def write_config(self, config: Recipe, resolved: dict[str, Any]) -> None:
        """Creates the folder with its config.yaml."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"--out {self.path} cannot be created: {error.strerror or error}") from error
        values = to_dict(replace(config, config=None, resume=False)) | {"resolved": resolved}
        with replacing(self.config_file) as temporary:
            temporary.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")

    @overload
    def read_config(self) -> tuple[FinetuneConfig, dict[str, Any]]: ...

    @overload
    def read_config(self, cls: type[T]) -> tuple[T, dict[str, Any]]: ...

    def read_config(self, cls: Any = FinetuneConfig) -> tuple[Any, dict[str, Any]]:
        """The settings, of class `cls`, and what was resolved.

        Raises:
            CheckpointError: where the folder holds no readable run.
        """
        if not self.config_file.is_file():
            raise CheckpointError(f"{self.path} is not a run folder: there is no config.yaml in it")
        values = read_yaml(self.config_file)
        resolved = values.pop("resolved", {})
        return from_dict(cls, effective(cls, values, str(self.config_file)), str(self.config_file)), resolved

    def log(self, row: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            text = (
                f"could not write {self.metrics_file}: {error.strerror or error}; free space, then go on with --resume"
            )
            raise CheckpointError(text) from error

    def rows(self, kind: str | None = None) -> Iterator[dict[str, Any]]:
        """The rows of metrics.jsonl, all or of one kind (`step`, `eval`), without a line cut off by a crash."""
        if not self.metrics_file.exists():
            return
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if kind is None or row["kind"] == kind:
                yield row

    def forget_after(self, step: int) -> None:
        """Drops the metrics of what came after `step` steps: a resumed run does it again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        with replacing(self.metrics_file) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def _is_empty(folder: Path) -> bool:
    """Whether nothing is in a folder but what a run leaves that was killed before it began."""
    return folder.is_dir() and all(path.name == ".config.yaml.tmp" for path in folder.iterdir())


def require_same_config(saved: Recipe, config: Recipe, path: Path) -> None:
    """Refuses to resume a run with other settings than it was started with.

    Raises:
        ConfigError: naming every setting that differs.
    """
    old, new = (flat(to_dict(made) | {"method": made.method_name}) for made in (saved, config))
    changed = [name for name in old if name.split(".")[0] not in FREE and old[name] != new[name]]
    if changed:
        differences = ", ".join(f"{name} was {old[name]}, now {new[name]}" for name in changed)
        raise ConfigError(f"--resume: {path} was made with another config: {differences}")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under names with dots."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return result
