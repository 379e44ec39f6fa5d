"""Files that are whole or not there: written under a temporary name, then renamed. No pickle."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from snello.errors import CheckpointError

VERSION = 2


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well; otherwise `path` stays as it was.

    Raises:
        CheckpointError: where it cannot be written (a full disk, say).
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the user's umask says; safetensors would make it private
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):  # where the folder is no folder there is nothing to take away
            temporary.unlink(missing_ok=True)
        kept = "the one before is untouched" if path.exists() else "nothing was written"
        raise CheckpointError(f"could not save {path}: {error} ({kept}); free space or choose another --out") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_json(path: Path, values: Any) -> None:
    """Writes `values` as indented JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def save_tensors(path: Path, values: Mapping[str, Tensor], state: Mapping[str, Any] | None = None) -> None:
    """Writes tensors, and `state` as JSON in the metadata, as a safetensors file, whole or not at all."""
    metadata = {"format": "pt"} | ({} if state is None else {"snello": json.dumps({"version": VERSION, **state})})
    contiguous = {name: value.detach().contiguous() for name, value in values.items()}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, metadata=metadata)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file, on the CPU, and the state saved beside them ({} without one).

    Raises:
        CheckpointError: where the file is missing, damaged, or of another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a mapping
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not read {path}: {error}") from error
    try:
        state = json.loads(metadata.get("snello", "{}"))
        saved_by = state["version"] if state else VERSION
    except (ValueError, TypeError, KeyError):
        raise CheckpointError(f"{path} was not written by snello: its metadata cannot be read") from None
    if saved_by != VERSION:
        raise CheckpointError(f"{path} is of checkpoint version {saved_by}, this snello reads {VERSION}")
    return tensors, state
