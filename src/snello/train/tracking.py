"""Trackers: what a run logs, also in TensorBoard, Weights & Biases or MLflow, through Accelerate.

metrics.jsonl stays the record of a run; trackers only show it. A resumed run goes on in the same tracker run, whose
name is kept in tracking.json. What a tracker needs to log in (keys, addresses) is its own business: it stands in its
own files or in the environment, and is never written here.
"""

import contextlib
import json
import math
import uuid
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from accelerate import tracking

from snello.errors import ConfigError, SnelloError, SnelloWarning, one_line
from snello.files import save_json
from snello.runs.folder import RunFolder

PROJECT = "snello"


def require_trackers(names: Sequence[str]) -> None:
    """Raises a ConfigError with the pip command where a tracker's package is missing."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"--track {name} needs a package that is not installed: pip install {name}")


class Trackers:
    """The trackers of a run, which show its flat `settings` beside it; they open when the first row comes."""

    def __init__(self, names: Sequence[str], run: RunFolder, settings: dict[str, Any]) -> None:
        self.names, self.run, self.settings = tuple(names), run, settings
        self._open: dict[str, Any] = {}  # Accelerate has no types

    def log(self, row: dict[str, Any], num_samples: int = 0) -> None:
        """A row of metrics.jsonl; `num_samples` are the pictures of a step.

        A tracker that fails on the way is left out from then on, with a warning.

        Raises:
            SnelloError: for one that cannot be started.
        """
        if not self.names:
            return
        if not self._open:
            self._open = {name: self._started(name, row["step"]) for name in self.names}
        values = scalars(row, num_samples)
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(values, step=row["step"])
            except Exception as error:  # whatever the package raises, it must not cost the run
                del self._open[name]
                self.names = tuple(self._open)
                text = f"--track {name} failed at step {row['step']}, the run continues without it: {one_line(error)}"
                warnings.warn(text, SnelloWarning, stacklevel=2)

    def close(self) -> None:
        """Writes what is left. The next row opens them again: a run that goes back does its steps once more."""
        for tracker in self._open.values():
            with contextlib.suppress(Exception):  # metrics.jsonl has all of it
                tracker.finish()
        self._open = {}

    def _started(self, name: str, step: int) -> Any:
        try:
            return self._start(name, step)
        except Exception as error:  # of the package
            raise SnelloError(f"--track {name} cannot be started: {one_line(error)}") from error

    def _start(self, name: str, step: int) -> Any:
        """A tracker in the run that it had before, if any."""
        ids = json.loads(self.run.tracking_file.read_text()) if self.run.tracking_file.is_file() else {}
        had = set(ids)
        if name == "tensorboard":  # what an earlier attempt has logged from this step on is hidden
            tracker = tracking.TensorBoardTracker("tensorboard", self.run.path, purge_step=step)
        elif name == "wandb":
            ids.setdefault(name, uuid.uuid4().hex)
            options = {"id": ids[name], "name": self.run.path.name, "dir": str(self.run.path), "resume": "allow"}
            tracker = tracking.WandBTracker(PROJECT, **options)
        else:
            tracker = tracking.MLflowTracker(PROJECT, run_id=ids.get(name), run_name=self.run.path.name)
        tracker.main_process_only = False  # who calls this knows that it is the main one
        tracker.start()
        if name == "mlflow":
            ids.setdefault(name, tracker.tracker.info.run_id)
        if name in ids and name not in had:
            save_json(self.run.tracking_file, ids)
            tracker.store_init_configuration(self.settings)
        return tracker


def scalars(row: dict[str, Any], num_samples: int = 0) -> dict[str, float]:
    """The numbers of a row under the names that trackers show: `train/loss`, `eval/accuracy`, `budget/0`, ..."""
    group = "eval" if row["kind"] == "eval" else "train"
    values = {
        f"{group}/{name}": value
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in ("step", "seconds")
    }
    values |= {f"budget/{block}": budget for block, budget in enumerate(row.get("budgets", ()))}
    if num_samples and row.get("seconds"):
        values["train/pictures_per_second"] = num_samples / row["seconds"]
    return {name: value for name, value in values.items() if math.isfinite(value)}
