"""Labels at the cut: as targets of a loss, and as arrays for the wire, merged where samples are.

B: samples, R: rows after merging (B where nothing merges), C: classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from snello.codecs.base import Message, number_type
from snello.errors import ProtocolError

Labels = Literal["server", "client"]
"""Who has them."""


@dataclass(frozen=True)
class Targets:
    """What the loss compares logits with."""

    values: Tensor
    """Classes (B,) int64, or their shares in every row, (R, C) float32."""
    sizes: Tensor | None
    """(R,) float32: samples in every row; None where every sample is a row of its own."""

    @classmethod
    def of(cls, labels: Tensor, groups: Tensor | None, num_rows: int, num_classes: int) -> "Targets":
        """Makes the targets of labels (B,) whose samples went into the rows `groups` (B,)."""
        if groups is None:
            return cls(labels, None)
        counts = torch.zeros(num_rows, num_classes, device=labels.device)
        counts.index_put_((groups, labels), torch.ones_like(labels, dtype=counts.dtype), accumulate=True)
        sizes = counts.sum(dim=1)
        return cls(counts / sizes.unsqueeze(1), sizes)


def labels_to_arrays(labels: Tensor, message: Message, num_classes: int) -> dict[str, Tensor]:
    """Labels (B,) for the wire in the smallest type: ordered by row, with the rows' sizes where samples were merged.

    That says as much as the soft labels (R, C) would, exactly, in B + R numbers.
    """
    small = number_type(num_classes - 1)
    if message.groups is None:
        return {"labels": labels.to(small)}
    sizes = message.groups.bincount(minlength=message.num_rows)
    order = (message.groups * num_classes + labels).argsort()
    return {"labels": labels[order].to(small), "labels.sizes": sizes.to(number_type(len(labels)))}


def labels_from_arrays(arrays: dict[str, Tensor], num_classes: int, num_rows: int) -> Targets:
    """What `labels_to_arrays` was given, as targets of so many rows.

    Raises:
        ProtocolError: where labels are missing, out of range, or of another number of rows.
    """
    if "labels" not in arrays:
        raise ProtocolError("a frame of activations came without labels")
    if any(arrays[name].is_floating_point() for name in ("labels", "labels.sizes") if name in arrays):
        raise ProtocolError("labels must be whole numbers")
    rows = arrays["labels.sizes" if "labels.sizes" in arrays else "labels"].numel()
    if rows != num_rows:  # before memory is taken for them
        raise ProtocolError(f"labels of {rows} rows came with activations of {num_rows}")
    labels = arrays["labels"].long()
    if labels.ndim != 1 or bool((labels < 0).any()) or bool((labels >= num_classes).any()):
        raise ProtocolError(f"labels must be in 0..{num_classes - 1}")
    sizes = arrays.get("labels.sizes")
    if sizes is None:
        return Targets(labels, None)
    sizes = sizes.long()
    num = len(labels)
    if sizes.ndim != 1 or bool((sizes < 1).any()) or bool((sizes > num).any()) or int(sizes.sum()) != num:
        raise ProtocolError("the sizes of merged rows do not add up to the number of labels")
    groups = torch.arange(len(sizes), device=labels.device).repeat_interleave(sizes)
    return Targets.of(labels, groups, len(sizes), num_classes)


def share_of(arrays: Mapping[str, Tensor]) -> float:
    """The share of the step that a frame's samples are."""
    share = arrays.get("labels.share", torch.empty(0))
    if share.numel() != 1 or not 0 < float(share) <= 1:
        raise ProtocolError("labels came without their share of the step")
    return float(share)
