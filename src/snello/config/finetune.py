"""Settings of `snello finetune`."""

from dataclasses import dataclass, field
from pathlib import Path

from snello.config.pictures import ColumnsConfig, _require_trackers, _source
from snello.config.recipe import Recipe
from snello.errors import require


@dataclass(frozen=True)
class FinetuneConfig(Recipe):
    """Fine-tune a Vision Transformer on labelled pictures."""

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
    compare: bool = True
    """After training, measure step time, FLOPs and memory against full fine-tuning on this machine."""
    track: tuple[str, ...] = ()
    """Show the run also in these trackers: tensorboard (in the run folder), wandb, mlflow."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_trackers(self.track)
        object.__setattr__(self, "data", _source(self.data))
        require(self.workers >= 0, "--workers", "0 or more", self.workers)
        require(0 < self.val_share < 1, "--val-share", "in (0, 1)", self.val_share)
