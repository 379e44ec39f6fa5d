"""What a training step costs: time, FLOPs, bytes saved for backward, optimizer state, peak memory.

Everything is measured on real steps of a real model on random pictures: costs do not depend on what is on them.
"""

import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from snello.config import FinetuneConfig
from snello.devices import Precision, autocast, synchronize
from snello.methods import make_method
from snello.models import create_model, preprocessing
from snello.optim import make_optimizer, set_lr
from snello.vit import AttentionPath, ViT, logits_of

DRAWS = 8  # steps over which the counts of a method are averaged, since a random draw varies them


@dataclass(frozen=True)
class Costs:
    """Counts of one method; those per sample are for one picture in the batch that was measured."""

    flops_per_sample: float
    """Forward and backward, from torch's counter: matrix products and convolutions, two per multiply-add."""
    saved_bytes_per_sample: float
    """Unique storages that autograd keeps for the backward pass, parameters excluded."""
    optimizer_bytes: int
    """The optimizer's state at its largest."""
    trainable_parameters: int
    """Parameters with a gradient in a step, on average over draws."""


class TrainingStep:
    """A model, a method and an optimizer that take the same step again and again on one random batch.

    Args:
        config: names model and method; ALaST's budgets stay where `state` puts them.
        num_classes: classes of the head.
        batch_size: pictures in the batch.
        state: of the method, from a run; None starts at the beginning.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        *,
        num_classes: int,
        batch_size: int,
        device: torch.device,
        precision: Precision,
        attention: AttentionPath,
        state: dict[str, Any] | None = None,
    ) -> None:
        torch.manual_seed(config.seed)
        config = replace(config, alast=replace(config.alast, alpha=0.0, full_tail=0.0))
        model = create_model(config.model, "none", num_classes, config.image_size).to(device)
        self.model, self.vit = model, ViT(model)
        self.set_attention(attention)
        self.method = make_method(self.vit, config)
        if state:
            self.method.load_state_dict(state)
        self.optimizer = make_optimizer(self.vit, lr=config.lr, weight_decay=config.weight_decay, device=device)
        set_lr(self.optimizer, 1e-6)  # real updates, too small to let random pictures spoil the model
        size = preprocessing(model, config.image_size).size
        generator = torch.Generator().manual_seed(config.seed)
        self.images = torch.randn(batch_size, 3, size, size, generator=generator).to(device)
        self.labels = torch.randint(num_classes, (batch_size,), generator=generator).to(device)
        self.batch_size, self.device, self.precision, self.lr = batch_size, device, precision, config.lr
        self.model.train()

    def set_attention(self, path: AttentionPath) -> None:
        """Computes attention by `path` from now on."""
        self.vit.set_attention_paths([path] * self.vit.depth)

    def begin(self) -> None:
        """What a method does before a step's first forward."""
        self.method.step(self.lr, self.optimizer, 0.0)

    def loss(self) -> Tensor:
        """The forward pass, () float32."""
        with autocast(self.device, self.precision):
            logits = logits_of(self.model(self.images))
        return cross_entropy(logits.float(), self.labels)

    def run(self) -> float:
        """A whole optimizer step; returns its seconds."""
        synchronize(self.device)
        started = time.perf_counter()
        self.begin()
        torch.autograd.backward(self.loss())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.device)
        return time.perf_counter() - started

    def costs(self, draws: int = DRAWS) -> Costs:
        """The counts, averaged over `draws` draws."""
        path = self.vit.attention_paths[0]
        flops, saved, trainable = [], [], []
        for _ in range(draws):
            self.begin()
            trainable.append(sum(p.numel() for p in self.model.parameters() if p.requires_grad))
            saved.append(self._saved_bytes())
            self.set_attention("explicit")  # the counter does not know every fused kernel; the products are the same
            flops.append(self._flops())
            self.set_attention(path)
        return Costs(
            flops_per_sample=statistics.mean(flops) / self.batch_size,
            saved_bytes_per_sample=statistics.mean(saved) / self.batch_size,
            optimizer_bytes=optimizer_bytes(self.optimizer),
            trainable_parameters=round(statistics.mean(trainable)),
        )

    def _flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward(self.loss())
        self.optimizer.zero_grad(set_to_none=True)
        return int(counter.get_total_flops())

    def _saved_bytes(self) -> int:
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        return saved_bytes(self.loss, parameters)


def saved_bytes(forward: Callable[[], Tensor], excluded: set[int]) -> int:
    """Bytes of the unique storages that `forward` makes autograd keep, without those at the addresses `excluded`."""
    storages: dict[int, int] = {}
    held: list[Tensor] = []  # kept alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()  # with its graph it would hold itself in a cycle that nothing collects
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            storages[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storages.values())


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state tensors."""
    values = [value for entry in optimizer.state.values() for value in entry.values()]
    return sum(value.untyped_storage().nbytes() for value in values if isinstance(value, Tensor))


def peak_memory(device: torch.device) -> int:
    """Bytes: the most the device has held (CUDA), or the largest resident size of this process so far."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _process_memory("VmHWM:")


def resident_memory(device: torch.device) -> int:
    """Bytes held now, as `peak_memory` counts them."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _process_memory("VmRSS:")


def _process_memory(key: str) -> int:
    with contextlib.suppress(OSError):  # not getrusage: its peak survives exec and would be the parent's
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
