"""Writing a run's model for other software, with a card that says what it is.

trained.py              a run's model, read
halves.py               the weights, joined from both halves where a cut parted them
timm_file.py            one safetensors file for timm
transformers_folder.py  a folder for transformers, of its own models and of timm's
onnx_file.py            one file for onnxruntime and others
card.py                 the model card
staging.py              whole or not there
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from snello.config import ExportConfig
from snello.errors import ModelError
from snello.export import onnx_file, timm_file, transformers_folder
from snello.export.card import card
from snello.export.halves import Fetch
from snello.export.staging import require_free, staging
from snello.export.trained import METADATA, Trained, read
from snello.runs.folder import RunFolder


@dataclass(frozen=True)
class Format:
    """How a format is written and used; paths in code are as the user would type them."""

    is_folder: bool
    write: Callable[[Trained, Path], None]
    line: Callable[[Trained, str], str]
    code: Callable[[Trained, str], list[str]]


FORMATS = {
    "timm": Format(False, timm_file.write, timm_file.line, timm_file.code),
    "transformers": Format(True, transformers_folder.write, transformers_folder.line, transformers_folder.code),
    "onnx": Format(False, onnx_file.write, onnx_file.line, onnx_file.code),
}
"""By the name of the library that loads them, as the hub calls it."""


@dataclass(frozen=True)
class Exported:
    """What an export has written."""

    path: Path
    """The file or folder."""
    card: Path
    """The model card: in the folder, or beside the file."""
    line: str
    """The line of Python that loads it."""


def export(config: ExportConfig, fetch: Fetch | None = None) -> Exported:
    """Writes the best weights of a run with a model card, whole or not at all.

    A file of timm or ONNX says in its metadata under METADATA, as JSON: model, num_classes, classes, image_size,
    resize, mean, std, interpolation and crop_pct.

    For a run of `snello join` without --server-half, `fetch` gets the server's half for the run folder.

    Raises:
        CheckpointError: where the folder holds no finished epoch, a file cannot be read or written, or the halves do
            not make the model.
        ConfigError: where --out is there already, --server-half is missing or of no use, or a package is missing.
        ModelError: where the format has no place for the model, or for a trained codec that belongs to it, or the
            written file does not compute what the model does.
    """
    run, form = RunFolder(config.run), FORMATS[config.format]
    settings, resolved = run.read()
    run.require_model()
    if config.format == "timm" and resolved.architecture is not None:
        raise ModelError(f"{settings.model} is a model of transformers, not of timm: use --format transformers")
    if config.format == "onnx":
        onnx_file.require_packages()
    out = config.out or run.exports[config.format]
    beside = out / "README.md" if form.is_folder else out.with_name(out.name + ".md")
    require_free(out, [] if form.is_folder else [beside, out.with_name(out.name + ".data")])
    trained = read(config, fetch)
    with staging(out, is_folder=form.is_folder) as folder:
        form.write(trained, folder if form.is_folder else folder / out.name)
        text = card(trained, config.format, out.name, form.code(trained, "." if form.is_folder else out.name))
        (folder / beside.name).write_text(text, encoding="utf-8")
    return Exported(out, beside, form.line(trained, str(out)))


__all__ = ["FORMATS", "METADATA", "Exported", "export"]
