"""The optimizer's parameter groups and the learning rate as a pure function of the step: neither has state to save."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from snello.vit import ViT


def make_optimizer(
    vit: ViT,
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    device: torch.device,
    others: Iterable[torch.nn.Parameter] = (),
) -> torch.optim.AdamW:
    """AdamW over ALL parameters, frozen ones too, since a method may train them later.

    Biases, norms, position and prefix tokens have no weight decay. With `layer_decay` below 1 a layer's learning rate
    is `lr * layer_decay ** (layers above it)`; each group keeps its share of it as `scale`.
    In a part of a model that is as in the whole. The `others`, which are not the model's, have neither decay.
    """
    groups: dict[tuple[int, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in vit.model.named_parameters():
        groups.setdefault((vit.layer_of(name), vit.decays(name, parameter)), []).append(parameter)
    rows: list[dict[str, Any]] = []
    for layer, decays in sorted(groups):
        scale = layer_decay ** (vit.top_layer - layer)
        rows.append({"params": groups[layer, decays], "weight_decay": weight_decay if decays else 0.0, "scale": scale})
    if added := list(others):
        rows.append({"params": added, "weight_decay": 0.0, "scale": 1.0})
    return torch.optim.AdamW(rows, lr=lr, fused=device.type in ("cpu", "cuda"))


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of AdamW's two moments of all that it has trained, or, before the first step, of all that trains now."""
    state = optimizer.state_dict()["state"]
    if state:
        return sum(value.nbytes for entry in state.values() for value in entry.values())
    return sum(2 * p.nbytes for group in optimizer.param_groups for p in group["params"] if p.requires_grad)


def lr_factor(step: int, total: int, warmup: float) -> float:
    """Factor on the base learning rate at `step` in 0..total-1: linear warm-up, then a cosine to zero; in (0, 1]."""
    rising = round(total * warmup)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every group its share of the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
