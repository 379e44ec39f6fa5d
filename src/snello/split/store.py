"""What a server keeps of a frozen client: the frames of activations as they came, and the samples in them.

    store.frames    the frames' bytes, one after the other, each as long as its header says

The file only grows; how far it belongs to a checkpoint, the checkpoint says. What lies beyond is cut off on resuming:
the client sends it again.
"""

import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from snello.codecs.frequencies import grid_side
from snello.errors import CheckpointError, ProtocolError
from snello.runs.folder import RunFolder
from snello.split.wire import frames
from snello.split.wire.frames import HEADER, Frame

FRAMES_EACH = 8
"""Frames whose samples make a step, or more where those hold too few."""
MIXED = 17  # keeps the seeds of what is mixed apart from others


@dataclass(frozen=True)
class Samples:
    """Samples that the server's half can learn from, on any device."""

    z: Tensor
    """(R, K, D) bfloat16: their tokens."""
    targets: Tensor
    """(R, C) float32: the share of each class."""
    weights: Tensor
    """(R,) float32: how much each counts in the loss."""
    sizes: Tensor | None = None
    """(R, K): how many tokens each stands for; None: one each."""

    @property
    def num_bytes(self) -> int:
        """Of memory."""
        columns = (self.z, self.targets, self.weights, self.sizes)
        return sum(column.numel() * column.element_size() for column in columns if column is not None)

    def to(self, device: torch.device) -> "Samples":
        """The same on `device`."""
        return self._of(lambda column: column.to(device))

    def pick(self, index: Tensor) -> "Samples":
        """Those at index (n,)."""
        return self._of(lambda column: column[index])

    def _of(self, change: Callable[[Tensor], Tensor]) -> "Samples":
        sizes = None if self.sizes is None else change(self.sizes)
        return Samples(change(self.z), change(self.targets), change(self.weights), sizes)

    @classmethod
    def join(cls, parts: Sequence["Samples"]) -> "Samples":
        """All of several."""
        z, targets, weights = (torch.cat([getattr(p, name) for p in parts]) for name in ("z", "targets", "weights"))
        sizes = [part.sizes for part in parts if part.sizes is not None]
        return cls(z, targets, weights, torch.cat(sizes) if sizes else None)


class Decoder(Protocol):
    """Makes samples of frames, in any order once it has decoded those that are keys."""

    def __call__(self, frame: Frame) -> Samples:
        """The samples of a frame."""

    def is_key(self, frame: Frame) -> bool:
        """Whether later frames can only be decoded when this one has been."""

    def snapshot(self) -> Any:
        """What it remembers of keys."""

    def restore(self, state: Any) -> None:
        """Remembers what it did at a `snapshot()`; None: nothing."""


class Store:
    """Frames in an append-only file.

    Args:
        run: the folder that the file is in, which is made with the first frame.
        decode: makes samples of a frame; it knows no keys but those in the file.
        max_memory: bytes of samples that are kept decoded; those of one frame are kept in any case.
        max_disk: bytes that the file may have; None: any number.
    """

    def __init__(
        self,
        run: RunFolder,
        decode: Decoder,
        max_memory: int,
        max_disk: int | None = None,
    ) -> None:
        self._run, self.decode, self._max_memory, self.max_disk = run, decode, max_memory, max_disk
        self._ends: list[int] = []
        self._sums: list[int] = []  # checksums of the frames
        self._keys: list[int] = []
        self._decoded: OrderedDict[int, Samples] = OrderedDict()  # the last used at the end

    @property
    def path(self) -> Path:
        """The file."""
        return self._run.store_file

    def __len__(self) -> int:
        """Frames."""
        return len(self._ends)

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return self._ends[-1] if self._ends else 0

    def append(self, frame: Frame, samples: Samples) -> None:
        """Adds a frame that was decoded to `samples`.

        Raises:
            ProtocolError: where it is more than the file may have.
            CheckpointError: where it cannot be written. In either case the store is as it was.
        """
        data = b"".join(frames.write(frame))
        if self.max_disk is not None and self.num_bytes + len(data) > self.max_disk:
            raise ProtocolError(f"the frames of this run take more than the {self.max_disk} bytes that it was given")
        try:
            # Not "ab": what a write that broke off has left is overwritten.
            with self.path.open("r+b" if self.path.exists() else "wb") as file:
                file.seek(self.num_bytes)
                file.write(data)
                file.truncate()
        except OSError as error:
            raise CheckpointError(f"could not write {self.path}: {error.strerror or error}") from error
        self._keys += [len(self)] if self.decode.is_key(frame) else []
        self._sums.append(zlib.crc32(data))
        self._ends.append(self.num_bytes + len(data))
        self._keep(len(self) - 1, samples)

    def samples(self, index: int) -> Samples:
        """Those of a frame.

        Raises:
            CheckpointError: where the file can no longer be read.
        """
        if index not in self._decoded:
            self._keep(index, self.decode(self._read(index)))
        self._decoded.move_to_end(index)
        return self._decoded[index]

    def sync(self) -> None:
        """Makes sure that what was appended is on the disk, before a checkpoint says so.

        Raises:
            CheckpointError: where it is gone.
        """
        if not self._ends:
            return
        try:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise self._lost(error.strerror or error) from error

    def state_dict(self) -> dict[str, Any]:
        """As values that JSON can hold."""
        return {"ends": list(self._ends), "sums": list(self._sums), "keys": list(self._keys)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a `state_dict()`: what was appended since is cut off.

        Raises:
            CheckpointError: where the file is gone, too short, or not what it was.
        """
        begin = 0
        try:
            if state["ends"] or self.path.exists():
                with self.path.open("r+b") as file:
                    for end, known in zip(state["ends"], state["sums"], strict=True):
                        if zlib.crc32(file.read(end - begin)) != known:
                            raise self._lost(f"{state['ends'][-1]} bytes of it belong to the checkpoint")
                        begin = end
                    file.truncate(begin)
        except OSError as error:
            raise self._lost(error.strerror or error) from error
        self.recall(state)
        self._decoded.clear()
        self.decode.restore(None)
        for index in self._keys:
            self.samples(index)

    def recall(self, state: dict[str, Any]) -> None:
        """Knows again what was stored, without looking whether it is there."""
        self._ends, self._sums, self._keys = list(state["ends"]), list(state["sums"]), list(state["keys"])

    def _read(self, index: int) -> Frame:
        begin = self._ends[index - 1] if index else 0
        try:
            with self.path.open("rb") as file:
                file.seek(begin)
                data = file.read(self._ends[index] - begin)
        except OSError as error:
            raise self._lost(error.strerror or error) from error
        if zlib.crc32(data) != self._sums[index]:
            raise self._lost(f"frame {index} of it is not the one that came")
        return frames.read([bytearray(data)], max(len(data) - HEADER.size, 0))

    def _lost(self, why: object) -> CheckpointError:
        return CheckpointError(f"{self.path} is gone or damaged: {why}")

    def _keep(self, index: int, samples: Samples) -> None:
        self._decoded[index] = samples
        held = sum(kept.num_bytes for kept in self._decoded.values())
        while held > self._max_memory and len(self._decoded) > 1:
            held -= self._decoded.popitem(last=False)[1].num_bytes


def draw(store: Store, num: int, seed: int) -> Samples:
    """`num` samples, or all where there are fewer, of a few frames, both drawn from `seed`.

    Decoding a frame for one sample is dear.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[Samples] = []
    held = 0
    for index in torch.randperm(len(store), generator=generator).tolist():
        if len(parts) >= FRAMES_EACH and held >= num:
            break
        parts.append(store.samples(index))
        held += len(parts[-1].z)
    return Samples.join(parts).pick(torch.randperm(held, generator=generator)[:num])


def cutmix(samples: Samples, share: float, num_prefix_tokens: int, seed: int) -> Samples:
    """Puts a square of the patch grid of another sample into a `share` of them, with as much of its label.

    Prefix tokens, which stand for the whole picture, are mixed by the square's share of the patches. Differentiable.

    Source: CutMix, arXiv:1905.04899; on activations of a cut model as CutMixSL, arXiv:2207.00234.
    """
    generator = torch.Generator().manual_seed(seed)
    B, side = len(samples.z), grid_side(samples.z.shape[1] - num_prefix_tokens)
    order = torch.randperm(B, generator=generator)
    area = torch.rand(B, generator=generator) * (torch.rand(B, generator=generator) < share)
    length = (area.sqrt() * side).round().unsqueeze(1)
    begin = (torch.rand(B, 2, generator=generator) * (side - length + 1)).floor().unsqueeze(2)
    cells = torch.arange(side)
    inside = (cells >= begin) & (cells < begin + length.unsqueeze(2))  # (B, 2, side)
    patches = (inside[:, 0, :, None] & inside[:, 1, None, :]).flatten(1).float()
    part = patches.mean(dim=1)
    by_token = torch.cat((part.unsqueeze(1).expand(B, num_prefix_tokens), patches), dim=1).unsqueeze(2)
    device = samples.z.device
    by_token, part, other = by_token.to(device), part.to(device), samples.pick(order.to(device))
    z = torch.lerp(samples.z.float(), other.z.float(), by_token)
    targets = torch.lerp(samples.targets, other.targets, part.unsqueeze(1))
    return Samples(z, targets, torch.lerp(samples.weights, other.weights, part))
