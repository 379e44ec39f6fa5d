"""Where pictures come from."""

from dataclasses import dataclass
from pathlib import Path

from snello.config.registry import TRACKERS
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


def _require_trackers(names: tuple[str, ...]) -> None:
    for name in names:
        require(name in TRACKERS, "--track", f"some of {', '.join(TRACKERS)}", name)


def _source(data: str | Path | None) -> str | None:
    """The text of a source of pictures; `photos/` and `photos` are one, as a run that is resumed must know."""
    if "://" in str(data):  # an address, to be refused as it was typed
        return str(data)
    if data is None or str(data).startswith("hf:"):
        return None if data is None else str(data).rstrip("/")
    return str(Path(data))
