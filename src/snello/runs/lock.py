"""One process at a time in a run folder: the second is told whose it is."""

import os
from pathlib import Path
from typing import IO
from weakref import WeakSet

from snello.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows: folders are not locked there
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
_held: "WeakSet[IO[str]]" = WeakSet()


def _close_held() -> None:
    for file in list(_held):
        file.close()


if fcntl is not None:  # a process that loads pictures may outlive a run that was killed, and would keep it locked
    os.register_at_fork(after_in_child=_close_held)


class Lock:
    """A lock on a folder, held until `release` or the end of the process, however that comes."""

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def acquire(self, folder: Path) -> None:
        """Takes the lock; a ConfigError where another process has it, with its number."""
        while fcntl is not None and self._file is None:
            path = folder / NAME
            file = path.open("a+", encoding="ascii")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                owner = file.read().strip() or "unknown"
                file.close()
                advice = "wait for its end, or name another folder"
                raise ConfigError(f"--out {folder} is in use by process {owner}: {advice}") from None
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                file.close()  # its owner took it away between our opening and our locking
                continue
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            self._file = file
            _held.add(file)

    def release(self) -> None:
        """Gives the lock back; does nothing without it."""
        if self._file is not None:
            Path(self._file.name).unlink(missing_ok=True)
            self._file.close()
            self._file = None
