"""Several processes that train one model."""

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from snello.devices import Precision


def world_size() -> int:
    """As how many processes torchrun or `accelerate launch` started this."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def make_accelerator(device: torch.device, precision: Precision) -> Accelerator:
    """An Accelerator on `device`; what an earlier run in this process set up is forgotten first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    before = os.environ.get("ACCELERATE_TORCH_DEVICE")
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(
        device
    )  # the one way to name a device that it honours on every back end
    try:
        return Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=device.type == "cpu")
    finally:
        del os.environ["ACCELERATE_TORCH_DEVICE"]
        if before is not None:
            os.environ["ACCELERATE_TORCH_DEVICE"] = before
