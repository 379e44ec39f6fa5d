"""From pictures to batches: transforms, the order of the samples, and loaders.

Nothing here draws from the global random state. The order of an epoch is a pure function of (seed, epoch), and the
augmentation of a picture of (seed, epoch, index): a run gives the same batches whatever the number of workers, and
when it goes on after being cut off. Shapes: B batch, H and W the side in pixels.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from snello.config import AugmentConfig
from snello.data import PictureSet
from snello.errors import DataError
from snello.seeds import mix, permutation, seeded

Transform = Callable[[Image.Image], torch.Tensor]
Share = Callable[[int], range]
"""The part of so many positions that is a rank's."""
Key = tuple[int, int]
"""(epoch, index): one picture in one epoch."""
Batch = tuple[torch.Tensor, torch.Tensor]
"""Pictures (B, 3, H, W) uint8 in 0..255 and labels (B,) int64."""


def train_transform(size: int, interpolation: str, augment: AugmentConfig) -> Transform:
    """From a picture to (3, size, size) uint8 in 0..255, augmented with draws from torch's global CPU generator."""
    mode = v2.InterpolationMode(interpolation)
    if augment.crop_scale == 1:
        steps = [v2.Resize(size, interpolation=mode), v2.CenterCrop(size)]
    else:
        steps = [v2.RandomResizedCrop(size, scale=(augment.crop_scale, 1.0), interpolation=mode)]
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip())
    if augment.rand_ops > 0:
        bilinear = v2.InterpolationMode.BILINEAR
        steps.append(v2.RandAugment(augment.rand_ops, augment.rand_magnitude, interpolation=bilinear))
    return v2.Compose([*steps, v2.PILToTensor()])  # type: ignore[no-any-return]


def eval_transform(size: int, interpolation: str, crop_pct: float) -> Transform:
    """From a picture to (3, size, size) uint8 in 0..255: its centre, `crop_pct` of the short side wide and high."""
    resize = v2.Resize(round(size / crop_pct), interpolation=v2.InterpolationMode(interpolation))
    return v2.Compose([resize, v2.CenterCrop(size), v2.PILToTensor()])  # type: ignore[no-any-return]


class TrainingPictures(Dataset[tuple[torch.Tensor, int]]):
    """Augmented pictures under keys (epoch, index); what a key gives depends on it and the seed alone."""

    def __init__(self, pictures: PictureSet, transform: Transform, seed: int) -> None:
        self.pictures, self.transform, self.seed = pictures, transform, seed

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, int]:
        """The picture (3, H, W) uint8 and its label; a DataError where it cannot be read."""
        epoch, index = key
        image = self.pictures.open(index)
        # The transforms of torchvision draw from torch's global CPU generator and take no other.
        with seeded(mix(self.seed, epoch, index)):
            return self.transform(image), self.pictures.labels[index]


class HeldOutPictures(Dataset[tuple[torch.Tensor, int]]):
    """Pictures (3, H, W) uint8 that are not augmented, with their labels, in their order."""

    def __init__(self, pictures: PictureSet, transform: Transform) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.pictures.open(index)), self.pictures.labels[index]


class EpochBatches(Sampler[list[Key]]):
    """The keys of every micro-batch of a run, from the `start`-th on; the last batch of an epoch may be smaller.

    `share` gives the part of a batch's positions that is this rank's. Where that is none, it gets the first key all the
    same: it has to go through the model with the others.
    """

    def __init__(
        self, num_samples: int, batch_size: int, epochs: int, seed: int, start: int = 0, share: Share = range
    ) -> None:
        self.num_samples, self.batch_size, self.epochs = num_samples, batch_size, epochs
        self.seed, self.start, self.share = seed, start, share

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches in an epoch."""
        return -(-self.num_samples // self.batch_size)

    def __len__(self) -> int:
        """Micro-batches that remain."""
        return max(self.epochs * self.batches_per_epoch - self.start, 0)

    def __iter__(self) -> Iterator[list[Key]]:
        """Lists of (epoch, index); each epoch is a permutation drawn from (seed, epoch)."""
        first_epoch, first_batch = divmod(self.start, self.batches_per_epoch)
        for epoch in range(first_epoch, self.epochs):
            order = permutation(self.num_samples, mix(self.seed, epoch))
            for begin in range(first_batch * self.batch_size, self.num_samples, self.batch_size):
                batch = order[begin : begin + self.batch_size]
                yield [(epoch, batch[position]) for position in self.share(len(batch)) or (0,)]
            first_batch = 0


def _worker_context() -> str | None:
    """How workers are started: as usual (None), unless gRPC is here and would not let forked ones be.

    They never touch a connection, but gRPC's own preparations for a fork restart its threads in the worker, which abort
    it, unless the environment said otherwise when it was imported, as it does under the command line.
    """
    return "forkserver" if "grpc" in sys.modules and os.environ.get("GRPC_ENABLE_FORK_SUPPORT") != "0" else None


def _start_worker(worker: int) -> None:
    """Ctrl-C reaches the whole process group, but only the main process decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def train_loader(
    pictures: PictureSet,
    transform: Transform,
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    start: int = 0,
    share: Share = range,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[tuple[torch.Tensor, int]]:
    """Loads a rank's share of the micro-batches of all epochs from the `start`-th on; go through it with `batches`."""
    return DataLoader(
        TrainingPictures(pictures, transform, seed),
        batch_sampler=EpochBatches(len(pictures), batch_size, epochs, seed, start, share),
        num_workers=workers,
        multiprocessing_context=_worker_context() if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else every iterator would draw its workers' seed from the global one
    )


def eval_loader(
    pictures: PictureSet,
    transform: Transform,
    *,
    batch_size: int,
    share: Share = range,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[tuple[torch.Tensor, int]]:
    """Loads a rank's share of the pictures once, in order; its workers stay for the next time; see `batches`."""
    return DataLoader(
        HeldOutPictures(pictures, transform),
        batch_size=batch_size,
        sampler=share(len(pictures)),
        num_workers=workers,
        multiprocessing_context=_worker_context() if workers else None,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
    )


def batches(loader: DataLoader[tuple[torch.Tensor, int]]) -> Iterator[Batch]:
    """The batches of a loader; a DataError for a bad picture, in one line even where a worker process met it."""
    try:
        yield from loader
        return
    except DataError as error:
        # From a worker the text is its traceback, whose last line is ours. Torch's reraise() makes a cycle of error and
        # frames; broken here, the workers end now, and not 5 s late when the garbage collector finds them.
        line = str(error).rpartition(f"{DataError.__module__}.{DataError.__name__}: ")[2].strip()
        error.__traceback__ = None
    raise DataError(line)
