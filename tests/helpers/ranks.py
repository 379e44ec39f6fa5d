"""Two processes that train together, as torchrun starts them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import free_port


def run_ranks(function: Callable[[int, Path], Any], folder: Path) -> list[Any]:
    """Calls a function of a test module with rank and folder in two processes; returns what each returned."""
    torch.multiprocessing.spawn(_rank, (function, folder, free_port()), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def _rank(rank: int, function: Callable[[int, Path], Any], folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"})
    torch.save(function(rank, folder), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
    os._exit(0)  # a gloo thread that lets go of a tensor while the interpreter ends would abort the process
