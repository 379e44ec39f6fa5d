"""ADC: the batch of activations at the cut shrinks twice: similar samples merge, little attended tokens are dropped.

Paper: Communication Efficient Split Learning of ViTs with Attention-based Double Compression, arXiv:2509.15058.
The paper's xi is `ratio`; both factors are its square root. Deviations from the released code, each with its reason in
docs/codecs.md: the token factor is really sqrt(xi) (there it is its fourth root), no cluster is ever empty, prefix
tokens are a number, labels travel as a list and sizes, and every byte is counted.

B: samples, N: tokens including P prefix tokens, D: embed dim, T: merged samples, k: kept tokens including prefix ones.
"""

import math
import warnings
from collections import Counter
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from snello.codecs.base import Arrays, Context, Reduced, Reducer, Shape, in_0_1, integer, number_type
from snello.errors import ConfigError, ProtocolError, SnelloWarning, require
from snello.vit import Score, tokens
from snello.vit.context import ForwardContext
from snello.vit.rules.merge import Merge

SIZES = "indices.sizes"
SIZE_TYPES = (torch.uint8, torch.int16, torch.int32)


class ADC(Reducer):
    """Merges samples with similar attention, then drops the tokens that the merged samples attend to least.

    1. K-means on the attention rows of the last client block (B, N) makes T = max(2, floor(samples * B)) groups.
    2. A group's centroid ranks its tokens: prefix tokens stay, and the best others, k = floor(tokens * N) in all.
    3. The activations of a group are averaged: (T, k, D). The gradient of an average is exact.

    With `rule=merge`, in place of 2: groups are averaged at all their tokens, and then the pairs of patch tokens that
    are most alike become one, as ALaST's rule merges them, until k are left. How many tokens each stands for travels
    beside it, (T, k) in one byte where N - k + 1 fits, else in two or four, and counts in the server's attention.

    Args:
        ratio: xi in (0, 1]: both factors are its square root.
        samples: share of the samples that is left, in (0, 1]; 1 merges none.
        tokens: share of the tokens that is left, in (0, 1]; 1 drops none.
        min_cluster: smallest group: samples of smaller ones join the nearest other group.
        buffer: forward passes that are merged together, for small batches.
        weight: how the loss weighs merged samples: all `rows` alike (published), or by their `sizes`.
        score: the attention that is looked at: from the `cls` token (published), or `received` from all tokens on
            average; `auto` is `received` where there is no CLS token.
        rule: what becomes of the other tokens: `drop` (published), or `merge` with those that are most like them.

    Raises:
        ConfigError: for an option out of range, or `ratio` beside `samples` or `tokens`.
    """

    source = "https://arxiv.org/abs/2509.15058"
    example = "0.1"

    def __init__(
        self,
        ratio: float | None = None,
        samples: float | None = None,
        tokens: float | None = None,
        min_cluster: int = 1,
        buffer: int = 1,
        weight: Literal["rows", "sizes"] = "rows",
        score: Score = "auto",
        rule: Literal["drop", "merge"] = "drop",
    ) -> None:
        super().__init__()
        if ratio is not None and not (samples is None and tokens is None):
            raise ConfigError("give either ratio, or samples and tokens")
        if ratio is None and samples is None and tokens is None:
            raise ConfigError("a ratio is needed, as adc(0.1), or factors, as adc(samples=1, tokens=0.4)")
        factor = 1.0 if ratio is None else math.sqrt(in_0_1(ratio, "ratio"))
        self.samples = factor if samples is None else in_0_1(samples, "samples")
        self.tokens = factor if tokens is None else in_0_1(tokens, "tokens")
        self.min_cluster = integer(min_cluster, "min_cluster", 1)
        self.buffer = integer(buffer, "buffer", 1)
        require(weight in ("rows", "sizes"), "weight", "rows or sizes", weight)
        require(score in ("auto", "cls", "received"), "score", "auto, cls or received", score)
        require(rule in ("drop", "merge"), "rule", "drop or merge", rule)
        self.weighting, self.score = weight, score
        self.merges_tokens = rule == "merge" and self.tokens < 1
        self._sizes: list[Tensor] = []
        self._warned = False

    def num_groups(self, num_samples: int) -> int:
        """T: what `num_samples` are merged into; as many as they are where there is nothing to merge."""
        return min(num_samples, max(2, _floor(self.samples * num_samples)))

    def num_kept(self, num_tokens: int, num_prefix_tokens: int) -> int:
        """k: tokens that are left, the prefix tokens and at least one other."""
        return min(num_tokens, max(num_prefix_tokens + 1, _floor(self.tokens * num_tokens)))

    @override
    def encode(self, z: Tensor, context: Context) -> Reduced:
        attention = context.attention
        if attention is None:
            raise ValueError("ADC needs the attention rows of the last client block")
        P, num_groups = context.num_prefix_tokens, self.num_groups(len(z))
        num_kept = z.shape[1] if self.merges_tokens else self.num_kept(z.shape[1], P)
        if num_groups == len(z):
            self._warn(len(z))
            return self._merge_tokens(Reduced(_drop(z, attention, num_kept, P)), P)
        present = None
        if context.positions is not None:
            z, attention, present = _in_place(z, attention, context.positions, context.num_positions)
        groups, centroids = tokens.kmeans(attention, num_groups, context.generator(attention.device))
        if self.min_cluster > 1:
            groups, centroids = _enlarge(attention, groups, centroids, self.min_cluster)
        self._sizes.append(groups.bincount())
        merged = _merge(z, groups, centroids, num_kept, P, present)
        return self._merge_tokens(Reduced(merged, groups=groups), P)

    @override
    def decoded_shape(self, shape: Shape, side: Arrays) -> Shape:
        if not self.merges_tokens:
            return shape
        sizes = side.get(SIZES)
        if sizes is None or sizes.shape != shape[:2] or sizes.dtype not in SIZE_TYPES or bool((sizes < 1).any()):
            raise ProtocolError("merged tokens must come with their sizes, a whole number from 1 on for each")
        return shape

    @override
    def sizes(self, side: Arrays) -> Tensor | None:
        return side[SIZES].float() if self.merges_tokens else None

    def _merge_tokens(self, reduced: Reduced, num_prefix_tokens: int) -> Reduced:
        """The rows of `reduced` with k of their N tokens, and how many each stands for; as they are with `rule=drop`.

        Rounds of pairs: one leaves no fewer than half. N is what the client has not dropped before.
        """
        if not self.merges_tokens:
            return reduced
        z, rule, context = reduced.values, Merge(), ForwardContext(num_prefix_tokens)
        N = z.shape[1]
        num_kept = self.num_kept(N, num_prefix_tokens)
        while z.shape[1] > num_kept:
            least = rule.least_keep(z.shape[1] - num_prefix_tokens)
            z = rule.reduce(z, context, max(least, num_kept - num_prefix_tokens))
        sizes = torch.ones(z.shape[:2], device=z.device) if context.sizes is None else context.sizes
        return replace(reduced, values=z, side={SIZES: sizes.to(number_type(N - num_kept + 1))})

    @override
    def metrics(self) -> dict[str, Any]:
        if not self._sizes:
            return {}
        counts = Counter(torch.cat(self._sizes).tolist())
        self._sizes = []
        # {"1": 7}: seven groups of one sample
        return {"cluster_sizes": {str(size): counts[size] for size in sorted(counts)}}

    def _warn(self, num_samples: int) -> None:
        if self.samples < 1 and not self._warned:
            self._warned = True
            text = f"a batch of {num_samples} leaves ADC nothing to merge: "
            text += f"only tokens are {'merged' if self.merges_tokens else 'dropped'}; "
            warnings.warn(text + "use a larger --batch-size or adc(..., buffer=n)", SnelloWarning, stacklevel=2)


def _floor(x: float) -> int:
    return math.floor(x + 1e-6)  # 0.58 * 50 is 28.999... and means 29


def _drop(z: Tensor, ranks: Tensor, num_kept: int, num_prefix_tokens: int) -> Tensor:
    """Each row of z (B, N, D) with its highest ranked tokens, (B, k, D)."""
    if num_kept == z.shape[1]:
        return z
    return tokens.gather(z, tokens.keep_top(ranks, num_kept - num_prefix_tokens, num_prefix_tokens))


def _merge(
    z: Tensor, groups: Tensor, ranks: Tensor, num_kept: int, num_prefix_tokens: int, present: Tensor | None
) -> Tensor:
    """The means of the groups at the tokens that rank (T, N) highest in each, (T, k, D)."""
    T, N = ranks.shape
    if present is not None:  # a place that no member has must not win
        ranks = ranks.masked_fill(tokens.merge(present, groups, T) == 0, -math.inf)
    if num_kept < N:
        index = tokens.keep_top(ranks, num_kept - num_prefix_tokens, num_prefix_tokens)
        z = tokens.gather(z, index[groups])  # before merging: there is less to add up
        present = None if present is None else present.gather(1, index[groups])
    merged = tokens.merge(z, groups, T)
    if present is None:
        return merged
    # A token that some members dropped is the mean of those that have it.
    return merged / tokens.merge(present, groups, T).clamp_min(1 / len(groups)).unsqueeze(2)


def _in_place(z: Tensor, attention: Tensor, positions: Tensor, num_positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and attention at the places they had before some were dropped, zero elsewhere, and which are there.

    Samples that kept different tokens can only be averaged place by place.
    """
    B, K, D = z.shape
    rows = positions + torch.arange(B, device=z.device).unsqueeze(1) * num_positions
    whole = z.new_zeros(B * num_positions, D).index_copy(0, rows.view(-1), z.reshape(B * K, D))
    scores = attention.new_zeros(B, num_positions).scatter(1, positions, attention)
    present = z.new_zeros(B, num_positions).scatter(1, positions, 1.0)
    return whole.view(B, num_positions, D), scores, present


def _enlarge(x: Tensor, groups: Tensor, centroids: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Groups and centroids without groups smaller than `least`: the smallest is dissolved, one after the other."""
    sizes = groups.bincount(minlength=len(centroids))
    while len(centroids) > 1 and int(sizes.min()) < least:
        smallest = int(sizes.argmin())
        left = torch.arange(len(centroids), device=x.device) != smallest
        centroids, names = centroids[left], left.cumsum(0) - 1
        homeless = groups == smallest
        groups = names[groups]
        groups[homeless] = torch.cdist(x[homeless], centroids).argmin(dim=1)
        centroids = tokens.merge(x, groups, len(centroids))
        sizes = groups.bincount(minlength=len(centroids))
    return groups, centroids
