"""What a run folder says of its run: every file that a report is drawn from, read once.

A file that is not there, or cannot be read, leaves its part out: an old run has a shorter report, not none.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snello.config import FinetuneConfig
from snello.errors import CheckpointError
from snello.runs.folder import RunFolder
from snello.runs.resolved import Resolved
from snello.runs.summary import Summary

Rows = list[dict[str, Any]]
PARTS = ("pictures", "merged", "mistakes", "data", "flops")
"""Files of the folder report/, without `.json`."""
KINDS = {".jpg": "jpeg", ".png": "png"}


@dataclass(frozen=True)
class Facts:
    """One run."""

    path: Path
    config: FinetuneConfig
    resolved: Resolved
    summary: Summary | None
    """None where the run has not ended."""
    steps: Rows
    evaluations: Rows
    predictions: Rows
    """Of the held-out pictures, by the weights that are kept."""
    parts: dict[str, dict[str, Any] | None]
    """By the names in `PARTS`."""
    problems: Sequence[str] = field(default=())
    """What could not be found out, in a line each."""

    @property
    def name(self) -> str:
        """What the run is called: the last part of its path."""
        return self.path.resolve().name

    @property
    def classes(self) -> Sequence[str]:
        """Names, in the order of the logits."""
        return self.resolved.classes

    def image(self, name: str) -> str | None:
        """A picture in the folder report/ as a data URL; None where it is gone."""
        file = self.path / "report" / name
        inside = file.resolve().is_relative_to((self.path / "report").resolve())
        if not inside or not file.is_file() or file.suffix not in KINDS:
            return None
        return f"data:image/{KINDS[file.suffix]};base64,{base64.b64encode(file.read_bytes()).decode()}"

    @classmethod
    def read(cls, path: Path, problems: Sequence[str] = ()) -> "Facts":
        """What the folder holds.

        Raises:
            CheckpointError: where it is not that of a run, or its summary cannot be read.
        """
        run = RunFolder(path)
        config, resolved = run.read()
        rows = list(run.rows())
        return cls(
            path,
            config,
            resolved,
            Summary.read(run.summary_file),
            [row for row in rows if row["kind"] == "step"],
            [row for row in rows if row["kind"] == "eval"],
            _predictions(run.predictions_file, len(resolved.classes)),
            {name: _part(run.report_folder / f"{name}.json") for name in PARTS},
            tuple(problems),
        )


def _predictions(file: Path, num_classes: int) -> Rows:
    if not file.is_file():
        return []
    rows: Rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if any(not 0 <= row[name] < num_classes for row in rows for name in ("label", "predicted")):
        raise CheckpointError(f"{file} is of other classes than the run: remove it")
    return rows


def _part(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return values if isinstance(values, dict) else None
