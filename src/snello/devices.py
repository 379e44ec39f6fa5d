"""Choosing device and precision by capability; memory that the C library keeps."""

import contextlib
import ctypes
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import torch

from snello.errors import ConfigError

CPU_INFO = Path("/proc/cpuinfo")

Precision = Literal["fp32", "bf16", "fp16"]

M_MMAP_THRESHOLD = -3  # malloc.h
LARGE_BLOCK = 2**17  # bytes; glibc's own start, which it raises as blocks are freed unless it is set

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The device that `name` means here; `auto` is the first of cuda, mps and cpu that there is.

    Raises:
        ConfigError: for a name that is none, or a device that this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device must be auto, cpu, cuda, cuda:N or mps, got {name!r}") from None
    num = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= num.get(device.type, 0):
        raise ConfigError(f"--device {name}: this machine has no such device that PyTorch can use")
    return device


def device_name(name: str) -> str:
    """What a device is called by its maker, as far as that is known."""
    device = torch.device(name)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return name
    threads = torch.get_num_threads()
    return f"{cpu_name() or 'cpu'}, {threads} thread{'s' if threads > 1 else ''}"


def cpu_name() -> str:
    """What the processor is called by its maker; empty where the system does not say."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = CPU_INFO.read_text(encoding="utf-8").splitlines()
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, "")


def resolve_precision(name: str, device: torch.device) -> Precision:
    """The precision that `name` means on `device`; `auto` is bf16 where the device computes in it natively.

    Raises:
        ConfigError: for fp16 on a CPU.
    """
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("--precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
    if name != "auto":
        return name  # type: ignore[return-value]
    return "bf16" if _bf16_is_native(device) else "fp32"


def _bf16_is_native(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The context in which a forward pass computes in `precision`."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def return_large_blocks() -> None:
    """Makes the C library give memory back to the system as soon as it is freed, where that is glibc.

    Left alone it keeps what is freed in its heap, in pieces, and most of what gradient checkpointing saves stays with
    the process. The price is time, since pages are made anew (docs/memory.md has both).
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def return_freed_memory() -> None:
    """Gives what the C library keeps of freed memory back to the system, where that is glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
