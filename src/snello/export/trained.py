"""A run's model, read: what every format is written from."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from snello.config import ExportConfig, FinetuneConfig
from snello.export.halves import Fetch, State, whole_state
from snello.models import Preprocessing
from snello.runs.folder import RunFolder
from snello.runs.resolved import Resolved
from snello.runs.summary import Summary

METADATA = "snello_export"  # not "snello", which marks checkpoints
"""Where the files of one file say, as JSON, what `Trained.about` does."""

HUB_NAME = re.compile(r"hf:\w[\w.-]*(/[\w.-]+)?")
"""A model of transformers that is not in a folder."""


@dataclass(frozen=True)
class Trained:
    """The best weights of a run, with what belongs to them."""

    run: RunFolder
    settings: FinetuneConfig
    resolved: Resolved
    summary: Summary | None
    """None for a run that has not ended."""
    state: State

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the logits."""
        return list(self.resolved.classes)

    @property
    def preprocessing(self) -> Preprocessing:
        """How the model wants its pictures."""
        return self.resolved.pictures

    @property
    def resize(self) -> int:
        """Pixels to which the shorter side of a picture is brought before its centre is cut out."""
        return round(self.preprocessing.size / self.preprocessing.crop_pct)

    @property
    def is_transformers(self) -> bool:
        """Whether the model is one of transformers; otherwise it is timm's."""
        return self.resolved.architecture is not None

    @property
    def name(self) -> str:
        """Name of the base model; for one that is in a folder only the folder's own."""
        name = self.settings.model
        if not self.is_transformers:
            return name
        return name if HUB_NAME.fullmatch(name) and not Path(name[3:]).exists() else Path(name).name

    def build(self) -> nn.Module:
        """The model with its weights, on the CPU, in eval mode, computing attention as the run did."""
        model = self.run.model().model
        model.load_state_dict(dict(self.state))
        return model.eval()

    def about(self) -> dict[str, Any]:
        """Model, classes and preprocessing, as JSON can hold them."""
        values = {"model": self.name, "num_classes": len(self.classes), "classes": self.classes}
        pre = asdict(self.preprocessing)
        return values | {"image_size": pre.pop("size"), "resize": self.resize, **pre}


def read(config: ExportConfig, fetch: Fetch | None) -> Trained:
    """The model of a run, joined from both halves where a cut parted them; see `export`."""
    run = RunFolder(config.run)
    settings, resolved = run.read()
    return Trained(run, settings, resolved, Summary.read(run.summary_file), whole_state(config, fetch))
