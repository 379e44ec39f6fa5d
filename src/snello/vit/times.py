"""What a training step of a Vision Transformer takes in seconds, from a short measurement of one block.

FLOPs mislead where tokens are few: a block hardly gets cheaper below some number of them. So one block of the model is
timed forward and backward, attention and MLP apart, at several numbers of tokens; between them time is a straight line.
"""

import copy
import time
from bisect import bisect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from snello.devices import Precision, autocast, synchronize
from snello.vit.context import ForwardContext
from snello.vit.flops import Tokens
from snello.vit.model import ViT
from snello.vit.rules import TokenRule

SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125, 0.0)
"""Of the patch tokens: where a block is timed."""
ROUNDS = 5
EVICTED = 2**22
"""Bytes that are written between two timed passes."""


@dataclass(frozen=True)
class Times:
    """Seconds of a batch, forward and backward, by how many tokens (prefix tokens too) a block works on, ascending."""

    tokens: tuple[int, ...]
    attention: tuple[float, ...]
    mlp: tuple[float, ...]
    frozen_attention: tuple[float, ...]
    """Without the gradient of its weights."""
    frozen_mlp: tuple[float, ...]
    reducing: tuple[float, ...]
    """Choosing and averaging or dropping tokens where there are so many, down to half of them."""
    last: tuple[float, ...]
    """The last block, which works on the tokens that the classifier reads alone."""
    plain: float
    """A block of plain full fine-tuning at all tokens."""
    embedding: float
    optimizer: float
    """An optimizer step, of all blocks."""


class StepTime:
    """Seconds of a step, as `Times` were measured: a `StepCost`."""

    def __init__(self, times: Times, depth: int) -> None:
        self.times, self._depth = times, depth

    def full(self, num_patches: int) -> float:
        """Plain full fine-tuning; pictures are of the size that was measured."""
        return self._depth * self.times.plain + self.times.embedding + self.times.optimizer

    def step(
        self, tokens: Sequence[Tokens], num_patches: int, trained: Collection[int], train_embeddings: bool
    ) -> float:
        """A step with these tokens; the backward pass goes through all blocks where the embeddings train."""
        total, times = self.times.embedding + self.times.optimizer, self.times
        lowest = 0 if train_embeddings else min(trained)
        for index, n in enumerate(tokens):
            if n.mlp < n.attention and index == self._depth - 1 and n.reducing == (0.0, 0.0) and not n.scored:
                total += self._at(times.last, n.attention)
                continue
            attention, mlp = (
                (times.attention, times.mlp) if index in trained else (times.frozen_attention, times.frozen_mlp)
            )
            share = 1.0 if index >= lowest else 1 / 3  # forward only
            total += share * (self._at(attention, n.attention) + self._at(mlp, n.mlp))
            if n.scored or n.reducing != (0.0, 0.0):
                total += self._at(times.reducing, n.attention)
        return total

    def _at(self, seconds: Sequence[float], tokens: int) -> float:
        """Between two measured numbers of tokens a straight line, beyond them that of the nearest two."""
        known = self.times.tokens
        right = min(max(bisect(known, tokens), 1), len(known) - 1)
        low, high = known[right - 1], known[right]
        share = (tokens - low) / (high - low)
        return max(0.0, seconds[right - 1] + share * (seconds[right] - seconds[right - 1]))


def measure_times(
    vit: ViT,
    rule: TokenRule,
    multiple: int,
    image_size: int,
    batch_size: int,
    device: torch.device,
    precision: Precision,
    savings: bool,
) -> Times:
    """Times one block of a whole model here, on random tokens; takes about as long as ten steps.

    Args:
        vit: stays as it is; one with random or trained weights takes the same time.
        rule: what reduces tokens.
        multiple: of tokens that blocks pass on: only such sizes are timed, others may be slower.
        image_size: side of the pictures in pixels.
        batch_size: B.
        device: where the model will train.
        precision: of autocast.
        savings: whether the run has exact savings.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # what the run draws does not hang on it
        images = torch.randn(batch_size, 3, image_size, image_size, device=device)
        return _Stopwatch(vit, rule, multiple, images, precision).times(savings)


class _Stopwatch:
    """One block and the embeddings, apart from the model they are copied from."""

    def __init__(self, vit: ViT, rule: TokenRule, multiple: int, images: Tensor, precision: Precision) -> None:
        self.images, self.device, self.precision, self.rule = images, images.device, precision, rule
        first = vit.cut(1)[0] if vit.depth > 1 else vit  # embeddings and a block
        self.vit = ViT(copy.deepcopy(first.model).to(self.device).train())
        self.adapter, self.block = self.vit.adapters[0], self.vit.blocks[0]
        self.reads, self.depth = vit.family.reads, vit.depth
        most, least = vit.num_prefix_tokens + vit.num_patches, vit.num_prefix_tokens + 1
        rounded = (max(least, multiple * round(share * most / multiple)) for share in SHARES)
        self.tokens = sorted({least, most, *(number for number in rounded if number < most)})
        self._others = torch.zeros(EVICTED // 4 if self.device.type == "cpu" else 1)

    def times(self, savings: bool) -> Times:
        adapter, most = self.adapter, self.tokens[-1]
        self._seconds(self.block, most)  # the first ones compile kernels and find memory
        plain = self._seconds(self.block, most)
        adapter.save_exactly(None, savings)
        parts: dict[str, tuple[float, ...]] = {}
        for name, trains in (("", True), ("frozen_", False)):
            self.block.requires_grad_(trains)
            parts[f"{name}attention"] = self._at_all(adapter.attend)
            parts[f"{name}mlp"] = self._at_all(adapter.feed)
        self.block.requires_grad_(True)
        return Times(
            tokens=tuple(self.tokens),
            **parts,
            reducing=self._at_all(self._reduce),
            last=self._at_all(self._last),
            plain=plain,
            embedding=max(0.0, self._whole() - plain),
            optimizer=self._optimizer(),
        )

    def _reduce(self, x: Tensor) -> Tensor:
        P = self.vit.num_prefix_tokens
        keep = max((x.shape[1] - P) // 2, self.rule.least_keep(x.shape[1] - P))
        if keep < 1 or keep >= x.shape[1] - P:
            return x * 1
        context = ForwardContext(P)
        context.scores = torch.rand(x.shape[:2], device=x.device) if self.rule.needs_scores else None
        return self.rule.reduce(x, context, keep)

    def _last(self, x: Tensor) -> Tensor:
        if self.reads is None:
            return self.adapter.feed(self.adapter.attend(x))
        queries = x[:, : self.reads] if self.adapter.queries_alone() else None
        return self.adapter.feed(self.adapter.attend(x, None, queries)[:, : self.reads])

    def _at_all(self, forward: Callable[[Tensor], Tensor]) -> tuple[float, ...]:
        """By tokens; more of them never take less, whatever else the machine does meanwhile."""
        return tuple(accumulate((self._seconds(forward, tokens) for tokens in self.tokens), max))

    def _seconds(self, forward: Callable[[Tensor], Tensor], tokens: int) -> float:
        """Of `forward` and its backward pass on that many tokens, the least of some rounds."""
        x = torch.randn(len(self.images), tokens, self.vit.embed_dim, device=self.device)
        return self._least(lambda: forward(x.requires_grad_()))

    def _whole(self) -> float:
        """Of the embeddings and one block."""
        return self._least(lambda: self.vit.tokens(self.images))

    def _least(self, forward: Callable[[], Tensor]) -> float:
        def step() -> None:
            with autocast(self.device, self.precision):
                y = forward()
            torch.autograd.backward(y, torch.ones_like(y))

        return self._timed(step)

    def _timed(self, work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(ROUNDS + 1):
            self._others += 1.0  # as other blocks do, drives the weights out of the caches
            synchronize(self.device)
            started = time.perf_counter()
            work()
            synchronize(self.device)
            seconds.append(time.perf_counter() - started)
        return min(seconds[1:])

    def _optimizer(self) -> float:
        """Of as many blocks as the model has."""
        parameters: list[Any] = list(self.block.parameters())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=self.device.type in ("cpu", "cuda"))
        return self.depth * self._timed(optimizer.step)
