"""Several processes that train one model: who they are, what each of them takes, and how they agree.

They are started by torchrun or `accelerate launch`; each is a *rank*. Gradients are averaged by PyTorch's DDP through
Accelerate. All the rest that has to be the same on all ranks goes through `Ranks`, also what goes wrong: an error on
one rank must reach the others before they wait for it in the next collective. With one process, nothing here acts.
"""

import atexit
import gc
import os
import shlex
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment
from torch import Tensor

from snello.devices import Precision, resolve_device
from snello.environment import num_processes
from snello.errors import ConfigError, SnelloError

T = TypeVar("T")

# Set by `accelerate launch` for plugins that would change what is computed, or how, behind the loop's back.
PLUGINS = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")


class OtherRankFailed(SnelloError):
    """Another process of the run failed; the main one says why, so this one says nothing."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as seen by one of them."""

    rank: int = 0
    """This process among all, in 0..size - 1; 0 is the main one: it alone prints and writes."""
    size: int = 1
    local_rank: int = 0
    """Among those of this machine."""
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def is_first_here(self) -> bool:
        """Whether this is the first process of its machine."""
        return self.local_rank == 0

    def share(self, num: int) -> range:
        """Which of `num` things in a row are this rank's: as evenly as possible, and none where there are too few."""
        return range(self.rank * num // self.size, (self.rank + 1) * num // self.size)

    def device(self, name: str) -> torch.device:
        """The device of this process where all were given `name`: of several GPUs the one with its local number.

        Raises:
            ConfigError: for a name that is none, or not one for several processes, or a device that is not there.
        """
        if self.size == 1:
            return resolve_device(name)
        if name not in ("auto", "cpu", "cuda"):
            rule = "auto, cpu or cuda with several processes (each takes its own GPU)"
            raise ConfigError(f"--device must be {rule}, got {name}")
        cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
        return resolve_device(f"cuda:{self.local_rank}" if cuda else "cpu")

    # All the following are collective: every rank has to call them, in the same order.

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        if self.size == 1:
            return flag
        told = torch.tensor(int(flag))
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told)

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over the ranks, on their device."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Ends all ranks where this block fails on one: the main one with what went wrong, the others silently.

        Nothing collective may stand in the block. An error that is no SnelloError also stays with the rank it is of.
        """
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if not self.any(error is not None):
            return
        texts: list[str | None] = [None] * self.size
        said = str(error) if isinstance(error, SnelloError) else f"{type(error).__name__}: {error}"
        dist.all_gather_object(texts, None if error is None else said)
        if error is not None and (self.is_main or not isinstance(error, SnelloError)):
            raise error
        if self.is_main:
            rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
            raise SnelloError(f"{text} (process {rank} of {self.size})")
        raise OtherRankFailed("another process failed")

    def all_of(self, items: Iterable[T]) -> Iterator[T]:
        """This rank's items; where it fails to bring them, all ranks end. Go through it to its end."""
        with self.together():
            yield from items

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on the main rank, the only one to call it."""
        made: list[T | None] = [None]
        with self.together():
            if self.is_main:
                made = [make()]
        if self.size > 1:
            dist.broadcast_object_list(made, device=torch.device("cpu"))
        return made[0]  # type: ignore[return-value]

    def require_same(self, value: object, otherwise: SnelloError) -> None:
        """Raises `otherwise` where a rank has another value than the main one: the steps would not be those meant."""
        if self.size > 1:
            those = self.from_main(lambda: value)
            with self.together():
                if those != value:
                    raise otherwise

    def on_main(self, act: Callable[[], object]) -> None:
        """Does this on the main rank only."""
        with self.together():
            if self.is_main:
                act()

    def first_here(self, make: Callable[[], T]) -> T:
        """What `make` returns on this rank; the first of each machine goes first, so that the others find downloads."""
        made: list[T] = []
        for turn in (True, False):
            with self.together():
                if self.is_first_here == turn:
                    made = [make()]
        return made[0]

    def command(self, verb: Sequence[str]) -> str:
        """How the user starts `snello` with this verb and its flags on as many processes."""
        if self.size == 1:
            return shlex.join(["snello", *verb])
        nodes = self.size // self.local_size
        where = ["--standalone"]
        if nodes > 1:
            address = os.environ.get("MASTER_ADDR", socket.gethostname())
            where = ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address}:29500"]
        launch = ["torchrun", *where, "--nproc-per-node", str(self.local_size), "-m", "snello"]
        return shlex.join([*launch, *verb])


ALONE = Ranks()


def connect(device: str) -> Ranks:
    """The processes of the run, connected as long as this one lives; unless all is on the CPU, tensors go by NCCL.

    Raises:
        ConfigError: for a plugin of `accelerate launch` that is not supported.
    """
    for plugin in PLUGINS:
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() in ("true", "1"):
            why = "is not supported (docs/scale.md says why): use data parallelism"
            raise ConfigError(f"accelerate launch: {plugin} {why}")
    if num_processes() == 1:
        return ALONE
    if not dist.is_initialized():  # a program that calls snello may have done it, or an earlier run
        dist.init_process_group("cuda:nccl,cpu:gloo" if device != "cpu" and torch.cuda.is_available() else "gloo")
        atexit.register(_disconnect)
    local = [int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))]
    warnings.filterwarnings("ignore", message=".*Grad strides do not match")  # of DDP, to programmers
    return Ranks(dist.get_rank(), dist.get_world_size(), *local)


def _disconnect() -> None:
    if dist.is_initialized():
        with suppress(RuntimeError):  # others may have left already
            dist.destroy_process_group()
    # The group ends its threads only where nothing holds it any more, such as a model that DDP wraps. One that still
    # lets go of a tensor while the interpreter ends would abort the process, after a run that went well.
    gc.collect()


def wait_for_main() -> None:
    """Until the main rank has left: torchrun kills all others as soon as one fails, and it has to say why first."""
    if dist.is_initialized():
        with suppress(RuntimeError):  # it sends nothing: this ends with the connection
            dist.recv(torch.zeros(1), src=0)


def make_accelerator(device: torch.device, precision: Precision, ranks: Ranks = ALONE) -> Accelerator:
    """An Accelerator on `device`; what an earlier run in this process set up is forgotten first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    # The one way to name a device that it honours on every back end; what it would read from a launcher is overruled.
    settings: dict[str, object] = {"ACCELERATE_TORCH_DEVICE": device}
    settings["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = 1  # backward() would divide by it once more
    if ranks.size == 1:
        settings["LOCAL_RANK"] = -1
    with patch_environment(**settings):
        return Accelerator(
            mixed_precision="no" if precision == "fp32" else precision,
            cpu=device.type == "cpu",
            # A block that ALaST has frozen gets no gradient that DDP could wait for.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
