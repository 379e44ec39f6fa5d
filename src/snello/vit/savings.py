"""An MLP that keeps less for its backward pass, with the same result: GELU is computed again there.

A plain `linear, GELU, linear` keeps its input, GELU's input and GELU's output; the last is a quarter of what a block
keeps, and cheap to compute from the one before it. The idea is gradient checkpointing (arXiv:1604.06174) of one
elementwise operation. What trains and what is frozen, autocast and the order of the products are as without it.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, linear
from typing_extensions import override


def recompute_gelu(mlp: Any) -> None:
    """Replaces the forward of an MLP made of `fc1`, exact GELU and `fc2`, until `restore`.

    It goes on with the MLP's own forward where no gradient is asked for, in eval mode, and while a layer is no plain
    `nn.Linear` (adapters) or somebody listens to it (hooks).
    """
    mlp.forward = partial(_forward, mlp)


def restore(mlp: Any) -> None:
    """Gives the MLP its own forward back; does nothing where it has it."""
    vars(mlp).pop("forward", None)


def listened(module: nn.Module) -> bool:
    """Whether hooks of a module want to see what it is given or returns."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _forward(mlp: Any, x: Tensor) -> Tensor:
    layers = mlp.fc1, mlp.fc2  # as they are now: adapters may have come between
    plain = all(type(layer) is nn.Linear and not listened(layer) for layer in layers)
    if not plain or not mlp.training or not torch.is_grad_enabled():
        y: Tensor = type(mlp).forward(mlp, x)
        return y
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    weights = [None if p is None else p.to(x.dtype) for layer in layers for p in (layer.weight, layer.bias)]
    with torch.autocast(kind, enabled=False):
        y = _Mlp.apply(x, *weights)
    return y


class _Mlp(torch.autograd.Function):
    """Two linear layers with exact GELU between them, on x (..., D)."""

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        h = linear(rows, w1, b1)
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, h, w1, w2)
        return linear(gelu(h), w2, b2).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, h, w1, w2 = ctx.saved_tensors
        of_x, of_w1, of_b1, of_w2, of_b2 = ctx.needs_input_grad
        dy = grad.reshape(-1, grad.shape[-1])
        dw2 = dy.t() @ gelu(h) if of_w2 else None
        db2 = dy.sum(0) if of_b2 else None
        if not (of_x or of_w1 or of_b1):
            return None, None, None, dw2, db2
        dh = torch.ops.aten.gelu_backward(dy @ w2, h)
        dw1 = dh.t() @ rows if of_w1 else None
        db1 = dh.sum(0) if of_b1 else None
        dx = (dh @ w1).view(*grad.shape[:-1], -1) if of_x else None
        return dx, dw1, db1, dw2, db2
