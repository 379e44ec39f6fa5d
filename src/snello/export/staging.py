"""What an export leaves is whole or not there: written into a folder of its own, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from snello.errors import CheckpointError, ConfigError


def require_free(out: Path, beside: list[Path]) -> None:
    """Refuses, with a ConfigError that names --out, to write where something is, or where there is no folder."""
    for path in (out, *beside):
        if path.exists():
            what = "" if path == out else f": {path}"
            raise ConfigError(f"--out {out} is there already{what}: remove it, or name another")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")


@contextmanager
def staging(out: Path, *, is_folder: bool) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well, or whose files move to where `out` is.

    Raises:
        CheckpointError: where it cannot be written (a full disk, say); then nothing is left.
    """
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            _finish(file)
        if is_folder:
            temporary.replace(out)
        else:
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == out.name):  # it comes last
                file.replace(out.with_name(file.name))
    except (OSError, SafetensorError) as error:
        text = f"could not save {out}: {error} (nothing was written); free space or choose another --out"
        raise CheckpointError(text) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _finish(file: Path) -> None:
    """Makes a file as readable as others are, and safe from a crash of the machine."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)  # safetensors makes its files private
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
