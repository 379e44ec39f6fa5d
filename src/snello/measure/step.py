"""What a training step costs: time, FLOPs, and where its memory goes.

Everything is measured on real steps of a real model on random pictures: costs do not depend on what is on them.
"""

import contextlib
import functools
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from snello.config import FinetuneConfig
from snello.devices import Precision, autocast, synchronize
from snello.methods import make_method
from snello.models import create_model, preprocessing
from snello.train.optim import make_optimizer, set_lr
from snello.vit import AttentionPath, ViT, logits_of
from snello.vit.times import Times

DRAWS = 8  # steps over which the counts of a method are averaged, since a random draw varies them
HOLES = 0.15  # of the saved bytes: what the C library's heap keeps between them, as measured (docs/memory.md)
DRAWN = 100  # draws, without a forward pass, over which the largest gradients and optimizer state are sought


@dataclass(frozen=True)
class Costs:
    """Counts of one method; those per sample are for one picture in the batch that was measured."""

    flops_per_sample: float
    """Forward and backward, from torch's counter: matrix products and convolutions, two per multiply-add."""
    saved_bytes_per_sample: float
    """Unique storages that autograd keeps for the backward pass, parameters excluded."""
    saved_bytes: int
    """The same of the whole batch, the largest over draws."""
    weight_bytes: int
    """Parameters, trained or not, and buffers."""
    gradient_bytes: int
    """Gradients of a step, the largest over draws."""
    optimizer_bytes: int
    """The optimizer's state, the largest that is held at once."""
    trainable_parameters: int
    """Parameters with a gradient in a step, on average over draws."""


@dataclass(frozen=True)
class Memory:
    """Where the memory of a step goes, in bytes."""

    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    saved_bytes: int
    """Saved for the backward pass, of the whole batch."""
    working_bytes: int
    """What a step needs beyond gradients and saved bytes: what is computed again, intermediates, the heap's holes."""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


class TrainingStep:
    """A model, a method and an optimizer that take the same step again and again on one random batch.

    ALaST's budgets stay where the `state` of a run put them, else at their start, unless `moving`: then they move as in
    a run, with kernels for every number of tokens on the way. A step `without_data` allocates and computes nothing:
    only `memory` can be asked.
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
        times: Times | None = None,
        moving: bool = False,
        without_data: bool = False,
    ) -> None:
        torch.manual_seed(config.seed)
        if "alast" in config.method_name:
            config = replace(config, alast=replace(config.alast, full_tail=0.0))
            if not moving:
                config = replace(config, alast=replace(config.alast, alpha=0.0))
        self._data = FakeTensorMode() if without_data else contextlib.nullcontext()
        with torch.device("meta" if without_data else "cpu"):
            model = create_model(config.model, "none", num_classes, config.image_size)
            self.model, self.vit = model, ViT(model if without_data else model.to(device))
            self.set_attention(attention)
            self.method = make_method(self.vit, config, times=times)
        if isinstance(self._data, FakeTensorMode):
            _pretend(model, device, self._data)
        self._holes = device.type == "cpu" and not config.grad_checkpointing  # that gives freed memory back
        self._releases = config.alast.optimizer_state == "release"
        if state:
            self.method.load_state_dict(state)
        self.optimizer = make_optimizer(self.vit, lr=config.lr, weight_decay=config.weight_decay, device=device)
        set_lr(self.optimizer, 1e-6)  # real updates, too small to let random pictures spoil the model
        self.device, self.precision, self.lr, self._seed = device, precision, config.lr, config.seed
        self._size, self._num_classes = preprocessing(model, config.image_size).size, num_classes
        self.set_batch_size(batch_size)
        self.model.train()

    def set_attention(self, path: AttentionPath) -> None:
        """Computes attention by `path` from now on."""
        self.vit.set_attention_paths([path] * self.vit.depth)

    def set_batch_size(self, batch_size: int) -> None:
        """Takes steps on a batch of so many pictures from now on."""
        generator = torch.Generator().manual_seed(self._seed)
        with self._data:
            shape = (batch_size, 3, self._size, self._size)
            self.images = torch.randn(shape, generator=generator).to(self.device)
            self.labels = torch.randint(self._num_classes, (batch_size,), generator=generator).to(self.device)
        self.batch_size = batch_size

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
        gradients, moments = self.trained_bytes
        flops, saved, trainable = [], [], []
        for _ in range(draws):
            self.begin()
            trainable.append(sum(p.numel() for p in self.model.parameters() if p.requires_grad))
            saved.append(saved_bytes(self.loss, storages_of(self.model.parameters())))
            self.set_attention("explicit")  # the counter does not know every fused kernel; the products are the same
            with FlopCounterMode(display=False) as counter:
                torch.autograd.backward(self.loss())
            self.optimizer.zero_grad(set_to_none=True)
            flops.append(counter.get_total_flops())
            self.set_attention(path)
        return Costs(
            flops_per_sample=statistics.mean(flops) / self.batch_size,
            saved_bytes_per_sample=statistics.mean(saved) / self.batch_size,
            saved_bytes=max(saved),
            weight_bytes=self.weight_bytes(),
            gradient_bytes=gradients,
            optimizer_bytes=moments,
            trainable_parameters=round(statistics.mean(trainable)),
        )

    def memory(self, check: Callable[[], None] = lambda: None) -> Memory:
        """Takes a step, with the optimizer's where there is data, and says where its memory goes.

        At every operation `check` is called, which may raise.
        """
        gradients, moments = self.trained_bytes
        state = self.method.state_dict()
        with self._data, LiveBytes(check) as live:
            loss, saved = saving(self.loss, storages_of(self.model.parameters()))
            torch.autograd.backward(loss)
        if not isinstance(self._data, FakeTensorMode):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.load_state_dict(state)  # what forwards without data recorded cannot be read
        working = max(0, self.images.nbytes + live.peak - saved - gradients)
        holes = round(HOLES * saved) if self._holes else 0
        return Memory(self.weight_bytes(), gradients, moments, saved, working + holes)

    def weight_bytes(self) -> int:
        """Bytes of all parameters and buffers."""
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))

    @functools.cached_property
    def trained_bytes(self) -> tuple[int, int]:
        """Bytes of the gradients of a step and of AdamW's state, each the largest that is held at once.

        Only draws: call it before a forward pass on a model without data.
        """
        gradients, moments, ever = 0, 0, dict[int, torch.nn.Parameter]()
        for _ in range(DRAWN):
            self.begin()
            trained = [p for p in self.model.parameters() if p.requires_grad]
            gradients = max(gradients, sum(p.nbytes for p in trained))
            moments = max(moments, adamw_bytes(trained))
            ever.update((id(p), p) for p in trained)
        return gradients, moments if self._releases else adamw_bytes(ever.values())


def _pretend(model: torch.nn.Module, device: torch.device, mode: FakeTensorMode) -> None:
    """Makes a model without data one that seems to be on `device`; its parameters stay the objects they are."""
    for tensor in (*model.parameters(), *model.buffers()):
        fake = FakeTensor(mode, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), device)
        fake.requires_grad_(tensor.requires_grad)
        fake._is_param = isinstance(tensor, torch.nn.Parameter)
        torch.utils.swap_tensors(tensor, fake)  # type: ignore[no-untyped-call]


def storages_of(tensors: Iterable[Tensor]) -> set[int]:
    """What tells the storages of `tensors` apart, with or without data, as long as they live."""
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def saved_bytes(forward: Callable[[], Tensor], excluded: set[int]) -> int:
    """Bytes of the unique storages that `forward` makes autograd keep, without those `excluded` (`storages_of`)."""
    return saving(forward, excluded)[1]


def saving(forward: Callable[[], Tensor], excluded: set[int]) -> tuple[Tensor, int]:
    """Runs `forward`; returns its result, ready for a backward pass, and its `saved_bytes`."""
    packed: list[weakref.ref[Tensor]] = []  # weak: what autograd gives up on the way is not kept

    def pack(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()  # with its graph it would hold itself in a cycle that nothing collects
        packed.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    storages = (tensor.untyped_storage() for tensor in (each() for each in packed) if tensor is not None)
    sizes = {storage._cdata: storage.nbytes() for storage in storages}
    return result, sum(size for key, size in sizes.items() if key not in excluded)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations make while it is entered, from birth to death."""

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._check = check
        self.peak = 0
        """The most that lived at once."""
        self._now = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and enters what it made."""
        self._check()
        made = func(*args, **(kwargs or {}))
        given = storages_of(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._alive:
                    self._alive.add(storage._cdata)
                    self._now += storage.nbytes()
                    weakref.finalize(storage, self._leave, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self._now)
        return made

    def _leave(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._now -= size


def adamw_bytes(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Bytes of AdamW's state: two moments of each parameter, and a float32 count of its steps."""
    return sum(2 * p.nbytes + 4 for p in parameters)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most the device has held (CUDA), or the largest resident size of this process so far."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _process_memory("VmHWM:")


def resident_memory(device: torch.device) -> int:
    """Bytes held now, as `peak_memory` counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _process_memory("VmRSS:")


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
