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
report.html         what a person looks at, drawn from the files here
report/             what it is drawn from beside the above: predictions.jsonl of the held-out pictures, what the method
                    did to some of them, small copies of those it shows
adapter/            the adapters of those weights, as peft reads them (with LoRA; model.safetensors is merged)
export.safetensors  the whole model for timm, once `snello export` has written it; export/ for transformers and
                    export.onnx likewise, each with a model card
checkpoints/        the last two, where the other half is on a server, instead of last.safetensors
"""

import json
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml

from snello.config import FinetuneConfig, Recipe
from snello.config.effect import effective
from snello.config.values import from_dict, read_yaml, to_dict
from snello.errors import CheckpointError, ConfigError
from snello.files import replacing
from snello.models import create_model
from snello.runs.lock import NAME as LOCK
from snello.runs.lock import Lock
from snello.runs.resolved import VERSION, Machine, Resolved
from snello.vit import ViT

# Settings that may differ when a run is resumed: they change where or how it runs, not what it computes.
FREE = frozenset((
    "config", "data_root", "out", "resume", "compare", "report", "track", "workers", "checkpoint_steps",
    "check_pictures",
    # of a server
    "listen", "certs", "auth", "insecure_loopback", "insecure_plaintext_for_everyone_on_the_network_to_read",
    "max_sessions", "max_memory", "max_disk", "idle_seconds", "release_weights", "accept_weights", "metrics_port",
    "log_format",
))  # fmt: skip
C = TypeVar("C")
R = TypeVar("R", bound=Machine)


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        self._named_by_user = True
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.model_file = path / "model.safetensors"
        self.codec_file = path / "codec.safetensors"
        self.weights_files = {"model": self.model_file, "codec": self.codec_file}
        """By the name of the module."""
        self.checkpoint_file = path / "last.safetensors"
        self.store_file = path / "store.frames"
        self.alast_file = path / "alast.json"
        self.tracking_file = path / "tracking.json"
        self.summary_file = path / "summary.json"
        self.plot_file = path / "budgets.png"
        self.traffic_file = path / "traffic.png"
        self.report_file = path / "report.html"
        self.report_folder = path / "report"
        self.predictions_file = self.report_folder / "predictions.jsonl"
        self.adapter_folder = path / "adapter"
        names = {"timm": "export.safetensors", "transformers": "export", "onnx": "export.onnx"}
        self.exports = {form: path / name for form, name in names.items()}
        """By their formats."""

    def exported_weights(self) -> Path | None:
        """The whole model's weights, where timm or transformers has been exported to."""
        files = (self.exports["timm"], self.exports["transformers"] / "model.safetensors")
        return next((file for file in files if file.is_file()), None)

    @classmethod
    def of(cls, config: Recipe, label: str = "") -> "RunFolder":
        """The folder that `config` names or, without --out, a new one named after label, model, method and time.

        Nothing is written yet; `create` makes it, or `lock` keeps it to this process where a run is resumed.

        Raises:
            ConfigError: where the folder is in use and --resume is not given, or there is nothing to resume.
        """
        if config.out is None:
            if config.resume:
                raise ConfigError("--resume needs --out: the folder of the run to resume")
            model = re.sub(r"[^\w.]+", "-", config.model).strip("-")  # a folder or hf:name has slashes
            run = cls(Path("runs") / f"{label}{model}-{config.method_name}-{time.strftime('%Y%m%d-%H%M%S')}")
            run._named_by_user = False
            return run
        run = cls(config.out)
        if config.resume and not run.config_file.is_file():
            raise ConfigError(f"--resume: {config.out} holds no run (no config.yaml); leave --resume out to start one")
        if not config.resume:
            if (config.out / LOCK).exists():  # a run that has the folder says more than that it is not empty
                run.lock()
                run.release()
            run._require_empty()
        return run

    def create(self, config: Recipe, resolved: Machine) -> None:
        """Makes the folder with its config.yaml, and keeps it to this process until `release`.

        Raises:
            ConfigError: where another process has made it its own since.
            CheckpointError: where it cannot be written.
        """
        try:
            self._make_folder()
        except OSError as error:
            raise CheckpointError(f"--out {self.path} cannot be created: {error.strerror or error}") from error
        self.lock()
        try:
            self._require_empty()
        except ConfigError:
            self.release()
            raise
        values = to_dict(replace(config, config=None, resume=False)) | {"resolved": to_dict(resolved)}
        with replacing(self.config_file) as temporary:
            temporary.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")

    def require_room(self, weights: int, checkpoint: int, advice: str) -> None:
        """Looks whether what the next epoch saves fits on the disk: the best weights and a checkpoint, in bytes.

        Raises:
            CheckpointError: where it does not, with both numbers; it ends with the `advice`.
        """
        # A file is written beside the one that it replaces, the weights first.
        old = self.model_file.stat().st_size if self.model_file.is_file() else 0
        need = max(weights, weights - old + checkpoint)
        there = next((path for path in (self.path, *self.path.absolute().parents) if path.exists()), None)
        with suppress(OSError):
            free = shutil.disk_usage(there or Path()).free
            if free < need:
                what = "to save the model and a checkpoint"
                raise CheckpointError(
                    f"{self.path}: {_mib(free)} of disk are free, an epoch needs {_mib(need)} {what}; {advice}"
                )

    def _make_folder(self) -> None:
        """A folder that the user did not name must be new: two runs may start in the same second."""
        if self._named_by_user:
            self.path.mkdir(parents=True, exist_ok=True)
            return
        wanted = self.path
        for number in count(2):
            try:
                self.path.mkdir(parents=True)
                return
            except FileExistsError:
                RunFolder.__init__(self, wanted.with_name(f"{wanted.name}-{number}"))

    def _require_empty(self) -> None:
        """Nothing may be in it but what a run leaves that was killed before it began."""
        leftovers = (".config.yaml.tmp", LOCK)
        if self.path.is_file() or any(path.name not in leftovers for path in self.path.glob("*")):
            raise ConfigError(f"--out {self.path} is not empty: add --resume to resume its run, or name another")

    def lock(self) -> None:
        """Keeps the folder to this process; a ConfigError where another one has it, with its number."""
        try:
            self._lock.acquire(self.path)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written to: {error.strerror or error}") from error

    def release(self) -> None:
        """Lets other processes have the folder."""
        self._lock.release()

    @overload
    def read(self) -> tuple[FinetuneConfig, Resolved]: ...

    @overload
    def read(self, cls: type[C], kind: type[R]) -> tuple[C, R]: ...

    def read(self, cls: Any = FinetuneConfig, kind: Any = Resolved) -> tuple[Any, Any]:
        """The settings, of class `cls`, and what was resolved, of class `kind`.

        Raises:
            CheckpointError: where the folder holds no readable run.
        """
        if not self.config_file.is_file():
            why = "there is no config.yaml in it" if self.path.exists() else "it does not exist"
            raise CheckpointError(f"{self.path} is not a run folder: {why}")
        where = f"{self.config_file}: resolved"
        try:
            values = read_yaml(self.config_file)
            resolved = values.pop("resolved", None)
            made = from_dict(kind, resolved, where) if isinstance(resolved, dict) else None
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        if made is None or (kind is Resolved and not made.classes):
            raise CheckpointError(f"{self.config_file} is not that of a run: it does not say what was resolved")
        if made.version != VERSION:
            raise CheckpointError(f"{where} is of version {made.version}, this snello reads {VERSION}")
        where = str(self.config_file)
        try:
            return from_dict(cls, effective(cls, values, where), where), made
        except ConfigError as error:
            raise CheckpointError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None

    def model(self, weights: str = "none") -> ViT:
        """The run's model, made again as it was trained; its weights are to be loaded, or `weights` as --weights."""
        config, resolved = self.read()
        vit = ViT(create_model(config.model, weights, len(resolved.classes), config.image_size, resolved.architecture))
        vit.set_attention_paths([resolved.attention] * vit.depth)  # type: ignore[list-item]
        return vit

    def require_model(self) -> None:
        """Raises a CheckpointError where no epoch has been finished."""
        if not self.model_file.is_file():
            raise CheckpointError(f"{self.path} holds no model yet: its run has not been evaluated; resume it")

    def require_resumable(self, config: Recipe) -> None:
        """Refuses to resume a run of `snello join`, or one whose checkpoint is gone: it would start over what is there.

        Raises:
            CheckpointError: saying which, and what to do.
        """
        if self.read()[1].server is not None:
            raise CheckpointError(
                f"--resume: {self.path} is a run of `snello join`, with its other half on a server: "
                f"snello join ADDRESS --out {self.path} --resume"
            )
        if self.checkpoint_file.exists():
            return
        steps, evaluated = ([row["step"] for row in self.rows(kind)] for kind in ("step", "eval"))
        due = [*evaluated[:1], *([config.checkpoint_steps] if config.checkpoint_steps else [])]
        if self.summary_file.exists() or (due and steps and max(steps) > min(due)):
            raise CheckpointError(
                f"--resume: {self.path} has metrics up to step {max(steps, default=0)}, but its checkpoint "
                f"{self.checkpoint_file.name} is gone: put it back, or start anew with another --out"
            )

    def log(self, row: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            text = f"could not write {self.metrics_file}: {error.strerror or error}"
            raise CheckpointError(f"{text}; free space, then resume with --resume") from error

    def rows(self, kind: str | None = None) -> Iterator[dict[str, Any]]:
        """The rows of metrics.jsonl, all or of a kind (`step`, `replay`, `eval`), without a line cut off by a crash."""
        if not self.metrics_file.exists():
            return
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if kind is None or row["kind"] == kind:
                yield row

    def forget_after(self, step: int, is_later: Callable[[dict[str, Any]], bool] = lambda row: False) -> None:
        """Drops the metrics of what came after `step` steps, and rows that are later though their step is not: a
        resumed run does it again.
        """
        kept = [row for row in self.rows() if row["step"] <= step and not is_later(row)]
        with replacing(self.metrics_file) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def longer(run: RunFolder, config: Recipe, length: float | None = None) -> tuple[list[str], list[str]]:
    """The flags of `snello finetune` for a run like this one of another `length`, by default twice as long.

    The first begins where it began, the second with its weights. The length is of epochs, or of --time-budget.
    """
    own = config.time_budget or config.num_epochs
    text = f"{length or 2 * own:g}"
    args = ["--config", str(run.config_file), "--epochs" if config.time_budget is None else "--time-budget", text]
    weights, name = ["--weights", str(run.model_file)], str(run.path).removesuffix(f"-{own:g}")
    return [*args, "--out", f"{name}-{text}"], [*args, *weights, "--out", f"{name}-more"]


def require_same_length(run: RunFolder, saved: Recipe, config: Recipe) -> None:
    """Refuses to resume a run for another number of epochs: its learning rate falls to zero over those that it has.

    Raises:
        ConfigError: with the commands that do what may be meant.
    """
    name = "epochs" if saved.time_budget is None else "time_budget"
    old, new = getattr(saved, name), getattr(config, name)
    if new is None or old == new:
        return
    anew, more = (shlex.join(["snello", "finetune", *args]) for args in longer(run, saved, new))
    after = f"; for {new:g} more with its weights: {more}" if run.model_file.is_file() else ""
    what = f"{old:g} epoch{'' if old == 1 else 's'}" if name == "epochs" else f"--time-budget {old:g}"
    raise ConfigError(
        f"--resume: {run.path} is a run of {what}, over which its learning rate falls to zero, and not one of "
        f"{new:g}; for one of {new:g} from the start: {anew}{after}"
    )


def require_same_config(saved: Recipe, config: Recipe, path: Path) -> None:
    """Refuses to resume a run with other settings than it has, in a ConfigError that names all that differ."""
    old, new = (flat(to_dict(made) | {"method": made.method_name}) for made in (saved, config))
    free = FREE | ({"epochs"} if config.epochs is None else set())  # then the run's own
    changed = [name for name in old if name.split(".")[0] not in free and old[name] != new[name]]
    if changed:
        differences = ", ".join(f"{name} was {old[name]}, now {new[name]}" for name in changed)
        raise ConfigError(f"--resume: {path} was made with another config: {differences}")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under names with dots."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return result
