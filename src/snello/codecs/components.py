"""Whole numbers of K components per token as bytes: which components are there at all, their tables, and their words.

Tokens come in groups (prefix tokens, patches, or patches of one band of frequencies); within a group every component
has a table of its own, and one without any number but zero costs a bit.

B: samples, N: tokens, K: components.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from snello.codecs import rans
from snello.codecs.base import Arrays
from snello.errors import ProtocolError

Groups = Sequence[NDArray[np.int64]]
"""The tokens of each group, by their places in 0..N-1; together all of them, once."""
Codes = NDArray[np.int32]


def write(codes: Codes, groups: Groups) -> tuple[bytes, Arrays]:
    """Codes (B, N, K) as side information and as arrays: `values`, and those beyond the coder's range by themselves."""
    masks, parts, outliers = [], [], []
    for tokens in groups:
        group = codes[:, tokens].reshape(-1, codes.shape[2]).T  # (K, n)
        used = (group != 0).any(axis=1)
        group = group[used]
        masks.append(used)
        parts.append(group.clip(-rans.LARGEST, rans.LARGEST).astype(np.int8))
        outliers.append(group[np.abs(group) >= rans.LARGEST])
    where = rans.places(np.concatenate([part.ravel() for part in parts]), _rows([part.shape for part in parts]))
    parameters = rans.fit(rans.histograms(where, sum(map(len, parts))))
    arrays = {"values": torch.from_numpy(rans.encode(where, rans.Tables.of(parameters)))}
    rare = np.concatenate(outliers)
    if len(rare):
        arrays["indices.outliers"] = torch.from_numpy(rare)
    return np.packbits(np.concatenate(masks)).tobytes() + parameters.tobytes(), arrays


def read(side: rans.Bytes, arrays: Mapping[str, Tensor], groups: Groups, shape: tuple[int, int, int]) -> Codes:
    """The codes of this shape (B, N, K) that `write` was given.

    Raises:
        ProtocolError: where the parts do not fit each other.
    """
    B, N, K = shape
    masks, parameters = _parse(side, len(groups), K)
    shapes = [(int(mask.sum()), B * len(tokens)) for mask, tokens in zip(masks, groups, strict=True)]
    values = arrays["values"]
    if values.dtype != torch.uint8 or values.ndim != 1:
        raise ProtocolError("the words of the entropy coder must be bytes")
    symbols = rans.decode(values.cpu().numpy(), _rows(shapes), rans.Tables.of(parameters))
    beyond = np.flatnonzero(np.abs(symbols) == rans.LARGEST)  # these stand for numbers that come by themselves
    outliers = _outliers(arrays, len(beyond))
    codes = np.zeros((B, N, K), np.int32)
    begin = 0
    for mask, tokens, (num, length) in zip(masks, groups, shapes, strict=True):
        end = begin + num * length
        part = symbols[begin:end].astype(np.int32)
        first, last = np.searchsorted(beyond, (begin, end))
        part[beyond[first:last] - begin] = outliers[first:last]
        group = np.zeros((length, K), np.int32)
        group[:, mask] = part.reshape(num, length).T
        codes[:, tokens] = group.reshape(B, len(tokens), K)
        begin = end
    return codes


def _parse(side: rans.Bytes, num_groups: int, num_components: int) -> tuple[NDArray[np.bool_], rans.Bytes]:
    """Which components each group has, (groups, K), and the tables' parameters, in that order."""
    num = num_groups * num_components
    masks = np.unpackbits(side[: -(-num // 8)])[:num].astype(bool)
    parameters = side[-(-num // 8) :]
    if len(masks) != num or len(parameters) != 3 * masks.sum():
        raise ProtocolError("the side information of a frame has other components than tables")
    return masks.reshape(num_groups, num_components), parameters.reshape(-1, 3)


def _rows(shapes: Sequence[tuple[int, ...]]) -> NDArray[np.int32]:
    """The table of each symbol, for groups of (tables, symbols of each)."""
    lengths = np.concatenate([np.full(num, length) for num, length in shapes])
    return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)


def _outliers(arrays: Mapping[str, Tensor], num: int) -> Codes:
    """The `num` numbers beyond the coder's range."""
    outliers = arrays.get("indices.outliers", torch.zeros(0, dtype=torch.int32))
    if outliers.dtype != torch.int32 or outliers.shape != (num,):
        raise ProtocolError(f"outliers of shape {tuple(outliers.shape)} came, where {num} were due")
    return outliers.cpu().numpy()
