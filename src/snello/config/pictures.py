"""Where pictures come from, and how they are loaded."""

from dataclasses import dataclass, field
from pathlib import Path

from snello.config.effect import Need
from snello.config.registry import TrackerName
from snello.config.values import require_choices
from snello.errors import require


@dataclass(frozen=True)
class ColumnsConfig:
    """Columns of a table or Hugging Face dataset, where their names are not the usual ones."""

    image: str | None = None
    """Column of the pictures: of paths in a table; default: path, file, filename, image, image_path, ..."""
    label: str | None = None
    """Column of the classes; default: label, class, target, ..."""
    split: str | None = None
    """Column of a table that says train, val or test; default: split, where there is one."""


PICTURES_NEEDS: tuple[Need, ...] = (
    Need("columns", lambda c: c.data is not None, "without --data"),
    Need("data_root", lambda c: c.data is not None, "without --data"),
)


@dataclass(frozen=True, kw_only=True)
class PicturesConfig:
    """The pictures of a run, whoever trains on them."""

    data: str | None = None
    """Pictures: a folder with train/ and val/ (or test/), each with a folder per class, or with one folder per class; a
    .csv, .tsv or .parquet file of paths and labels; hf:PATH_OR_NAME[:CONFIG] for a Hugging Face dataset; or a
    torchvision set, as cifar100 (docs/data.md); default: the 2 500 Fashion-MNIST pictures that ship with snello."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    data_root: Path | None = None
    """Folder that holds torchvision sets; default: ~/.cache/snello/torchvision. Nothing is downloaded."""
    val_share: float = 0.2
    """Share of each class that is held out where the pictures come without val or test, in (0, 1)."""
    skip_bad: bool = False
    """Leave out pictures that cannot be read, and count them, instead of stopping."""
    check_pictures: bool = True
    """Decode every picture once before training, so that a bad one is found at the start."""
    workers: int = 2
    """Processes that load pictures; 0 loads in the main process."""
    report: bool = True
    """Write report.html at the end: the result, its cost, and what the method did to some of your pictures."""
    track: tuple[TrackerName, ...] = ()
    """Show the run also in these trackers: tensorboard (in the run folder), wandb, mlflow."""

    NEEDS = PICTURES_NEEDS

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", source_text(self.data))
        require(self.workers >= 0, "--workers", "0 or more", self.workers)
        require(0 < self.val_share < 1, "--val-share", "in (0, 1)", self.val_share)
        require_choices(self)


def source_text(data: str | Path | None) -> str | None:
    """The text of a source of pictures; `photos/` and `photos` are one, as a run that is resumed must know."""
    if data is None:
        return None
    text = str(data)
    if "://" in text:  # an address, to be refused as it was typed
        return text
    return text.rstrip("/") if text.startswith("hf:") else str(Path(text))
