"""The environment variables of a process that is snello's own: the command line's, and one that measures.

Importing snello sets none: who calls it from Python decides for himself (docs/memory.md). And what surrounds a process:
how many others there are, and how much memory.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

# How many kernels oneDNN keeps, and PyTorch's bindings over it; 1 024 each without us. In bf16 every number of tokens
# is a kernel more in each of some thirty products. Where tokens are dropped the numbers are ever new, so a run would
# fill both, and take several times what its steps need (docs/memory.md). A step on twelve blocks needs up to about 400:
# with fewer, it compiles them anew each time. Both are read before the first such product.
KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "512", "LRU_CACHE_CAPACITY": "64"}

# gRPC's own preparations for a fork would abort the processes that load pictures, which never touch a connection; and
# what it logs is said again, in one line, by the errors of snello. Both are read when it is imported.
GRPC = {"GRPC_ENABLE_FORK_SUPPORT": "0", "GRPC_VERBOSITY": "NONE"}


def set_environment() -> None:
    """Sets the environment variables that PyTorch and gRPC read; what the user has set stays."""
    values = KERNELS if "grpc" in sys.modules else KERNELS | GRPC  # too late for gRPC: see data.loaders
    if num_processes() > 1:
        values = values | {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # or DDP warns of what ALaST needs
    for name, value in values.items():
        os.environ.setdefault(name, value)


def num_processes() -> int:
    """Processes that torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def total_memory() -> int | None:
    """Bytes of memory of this machine or, where that is less, of the container; None where it cannot be told."""
    found = []
    with suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # the first says `max` where there is no limit
            found.append(int(Path(file).read_text()))
    return min(found, default=None)
