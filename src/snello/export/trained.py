"""A run's model, read: what every format is written from."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from snello.config import ExportConfig, FinetuneConfig
from snello.errors import CheckpointError
from snello.export.halves import Fetch, State, whole_state
from snello.models import Preprocessing, create_model
from snello.runs.folder import RunFolder
from snello.vit import ViT

METADATA = "snello_export"  # not "snello", which marks checkpoints
"""Where the files of one file say, as JSON, what `Trained.about` does."""

HUB_NAME = re.compile(r"hf:\w[\w.-]*(/[\w.-]+)?")
"""A model of transformers that is not in a folder."""


@dataclass(frozen=True)
class Trained:
    """The best weights of a run, with what belongs to them."""

    settings: FinetuneConfig
    resolved: Mapping[str, Any]
    """What was resolved: classes, preprocessing, attention path and so on."""
    summary: Mapping[str, Any]
    """Of a run that has ended; of another one {}."""
    state: State

    @property
    def classes(self) -> list[str]:
        """Their names, in the order of the logits."""
        classes: list[str] = self.resolved["classes"]
        return classes

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """How the model wants its pictures."""
        pre = self.resolved["preprocessing"]
        return Preprocessing(**pre | {"mean": tuple(pre["mean"]), "std": tuple(pre["std"])})

    @property
    def resize(self) -> int:
        """To what the shorter side of a picture is brought before its centre is cut out, in pixels."""
        return round(self.preprocessing.size / self.preprocessing.crop_pct)

    @property
    def is_transformers(self) -> bool:
        """Whether the model is one of transformers; otherwise it is timm's."""
        return is_transformers(self.resolved)

    @property
    def name(self) -> str:
        """The base model's; of one that is in a folder only the folder's own."""
        name = self.settings.model
        if not self.is_transformers:
            return name
        return name if HUB_NAME.fullmatch(name) and not Path(name[3:]).exists() else Path(name).name

    def build(self) -> nn.Module:
        """The model with its weights, on the CPU, in eval mode, computing attention as the run did."""
        model = create_model(
            self.settings.model,
            "none",
            len(self.classes),
            self.settings.image_size,
            self.resolved.get("architecture"),
        )
        vit = ViT(model)
        vit.set_attention_paths([self.resolved["attention"]] * vit.depth)
        model.load_state_dict(dict(self.state))
        return model.eval()

    def about(self) -> dict[str, Any]:
        """Model, classes and preprocessing, as JSON can hold them."""
        pre = self.preprocessing
        return {
            "model": self.name,
            "num_classes": len(self.classes),
            "classes": self.classes,
            "image_size": pre.size,
            "resize": self.resize,
            "mean": list(pre.mean),
            "std": list(pre.std),
            "interpolation": pre.interpolation,
            "crop_pct": pre.crop_pct,
        }


def is_transformers(resolved: Mapping[str, Any]) -> bool:
    """Whether the model of a run is one of transformers."""
    return resolved.get("architecture") is not None


def read_settings(run: RunFolder) -> tuple[FinetuneConfig, dict[str, Any]]:
    """The settings of a run that has finished an epoch, and what was resolved.

    Raises:
        CheckpointError: where there is no such run.
    """
    settings, resolved = run.read_config()
    if not isinstance(resolved, dict) or not {"classes", "preprocessing"} <= resolved.keys():
        raise CheckpointError(f"{run.config_file} is not that of a run: it does not say what was resolved")
    if not run.model_file.is_file():
        raise CheckpointError(f"{run.path} holds no model yet: its run has not finished an epoch")
    return settings, resolved


def read(config: ExportConfig, settings: FinetuneConfig, resolved: dict[str, Any], fetch: Fetch | None) -> Trained:
    """The model of a run, joined from both halves where a cut parted them; see `export`."""
    state = whole_state(config, settings, resolved, fetch)
    return Trained(settings, resolved, _summary(RunFolder(config.run)), state)


def _summary(run: RunFolder) -> dict[str, Any]:
    if not run.summary_file.is_file():
        return {}
    try:
        summary: dict[str, Any] = json.loads(run.summary_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"could not read {run.summary_file}: {error}") from error
    return summary
