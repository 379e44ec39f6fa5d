"""What becomes of pictures across a cut: in the client's blocks, in the codec, and in the server's blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snello.codecs.base import Codec, Context, Reducer
from snello.explain.run import CPU, Run
from snello.files import load_tensors
from snello.methods.alast import AlastMethod
from snello.runs.checkpoint import load_into
from snello.seeds import mix
from snello.split.build import cut_model, make_codec
from snello.vit import Counting, ViT
from snello.vit.trace import DROPPED, Trace, compose, origins, trace, tracing

BATCH = 64
"""Most pictures that go through a codec together: in training there may be more, which takes time and shows no more."""
_SEED = 0x63726F7373

Change = dict[str, Any]
"""A block, the patch tokens that it leaves, and the token that each patch is part of."""


@dataclass(frozen=True)
class Followed:
    """What becomes of some pictures."""

    depth: int
    num_patches: int
    parts: Sequence[tuple[int, int, AlastMethod | None]]
    """Of the model: first block, depth, and what is attached."""
    blocks: Sequence[list[Change]]
    """For each picture, what the blocks that reduce tokens do to it."""
    crosses: Sequence[dict[str, Any] | None]
    """For each picture, what crosses the cut."""


def change(block: int, tokens: int, groups: list[int]) -> Change:
    """What a block does to a picture."""
    return {"block": block, "tokens": tokens, "groups": groups}


@dataclass(frozen=True)
class Sent:
    """A batch as it leaves the client and arrives at the server."""

    indices: list[int]
    """The held-out pictures, those that were asked for first."""
    z: Tensor
    """(B, P + n', D): the client's tokens."""
    below: Trace
    arrived: Tensor
    """(R, P + k, D): the server's tokens."""
    sizes: Tensor | None
    """As of `Decoded`."""
    rows: Tensor
    """(B,) int64: the row of `arrived` that each picture is in."""
    kept: Tensor | None
    """(B, n') int64: the token there that each of the client's patch tokens is in, or DROPPED; None: its own."""
    num_bytes: int
    """What crosses."""


class Cut:
    """Both halves of a run's model, or the client's alone where the server is elsewhere, and its codec."""

    def __init__(self, run: Run) -> None:
        self.run, config, resolved = run, run.config, run.resolved
        run.folder.require_model()
        elsewhere = resolved.server is not None
        with torch.device("meta" if elsewhere else "cpu"):
            vit = run.folder.model() if elsewhere else run.model()
        self.depth, self.num_prefix_tokens = vit.depth, vit.num_prefix_tokens
        self.codec = make_codec(config, str(resolved.codec), vit.embed_dim)
        if any(True for _ in self.codec.parameters()):
            self._load(self.codec, run.folder.codec_file)
        self.codec.train()
        self.lower, upper = cut_model(vit, config)
        if elsewhere:
            self.lower.model.to_empty(device=CPU)
            self._load(self.lower.model, run.folder.model_file)
        if self.codec.score is not None:
            self.lower.watch(self.lower.depth - 1)
        self.upper = None if elsewhere else upper
        self.client, self.server = run.attach(self.lower, "client"), None
        if self.upper is not None:
            self.server = run.attach(self.upper, "server")
            if self.server is None and self.codec.merges_tokens:
                self.upper.attach(Counting())  # as in training: tokens count by their sizes

    def _load(self, module: torch.nn.Module, file: Any) -> None:
        state = load_tensors(file)[0]
        if module is self.codec:
            state = {name: value for name, value in state.items() if name in module.state_dict()}
        load_into(module, state, f"{file} does not fit")

    @torch.no_grad()
    def send(self, indices: list[int]) -> Sent:
        """A batch with these pictures, filled up with others as in training."""
        run, codec = self.run, self.codec
        size = max(len(indices), min(BATCH, run.config.batch_size * codec.buffer, len(run.held_out)))
        chosen = set(indices)
        indices = [*indices, *(index for index in run.order if index not in chosen)][:size]
        images = run.normalized([run.image(index) for index in indices])
        with run.precision(), tracing(self.lower) as below:
            z = self.lower.tokens(images)
            last, score = self.lower.depth - 1, codec.score
            attention = None if score is None else self.lower.cls_attention(last, score)
            positions = self.lower.context.positions
        below.num_patches = below.num_patches or z.shape[1] - self.num_prefix_tokens
        places = self.num_prefix_tokens + self.lower.num_patches
        context = Context(self.num_prefix_tokens, attention, positions, places, mix(run.config.seed, _SEED))
        z = z.float()
        message = codec.encode(z, context)
        decoded = codec.decode(message.arrays, with_gradient=False)
        rows = torch.arange(len(z)) if message.groups is None else message.groups
        kept = None if decoded.z.shape[1] == z.shape[1] else _kept(codec, z, context)
        num_bytes = sum(array.numel() * array.element_size() for array in message.arrays.values())
        return Sent(indices, z, below, decoded.z, decoded.sizes, rows, kept, num_bytes)


def cross(run: Run, indices: list[int]) -> Followed:
    """What becomes of held-out pictures in a run's halves."""
    cut = Cut(run)
    sent = cut.send(indices)
    above = None if cut.upper is None else _above(run, cut.upper, sent)
    blocks, crosses = [], []
    for number in range(len(indices)):
        changes = [change(*values) for values in sent.below.changes(number)]
        here = sent.below.groups[-1][number % len(sent.below.groups[-1])][None]
        there = here if sent.kept is None else compose(here, sent.kept[number][None])
        row = int(sent.rows[number])
        for block, tokens, groups in above.changes(row) if above is not None else ():
            gone = compose(there, torch.tensor([groups]))[0].tolist()
            changes.append(change(cut.lower.depth + block, tokens, gone))
        blocks.append(changes)
        crosses.append(_crosses(cut, sent, number, here[0], there[0]))
    parts = [(0, cut.lower.depth, cut.client), (cut.lower.depth, cut.depth - cut.lower.depth, cut.server)]
    return Followed(cut.depth, sent.below.num_patches, parts, blocks, crosses)


def _above(run: Run, upper: ViT, sent: Sent) -> Trace:
    with run.precision():
        return trace(upper, sent.arrived, sent.sizes)


def _kept(codec: Codec, z: Tensor, context: Context) -> Tensor:
    """The token that each patch token of z (B, P + n, D) is in when the codec has left some out, or DROPPED, (B, n).

    What comes after the reducers of tokens, as top-k, does not change which there are.
    """
    leaf = z.detach().requires_grad_()
    values = leaf
    with torch.enable_grad():
        for part in codec.reducers:
            assert isinstance(part, Reducer)
            made = part.encode(values, context).values
            if made.ndim != 3 or made.shape[:2] == values.shape[:2]:
                break
            values = made
    return origins(leaf, values, context.num_prefix_tokens)


def _crosses(cut: Cut, sent: Sent, number: int, here: Tensor, there: Tensor) -> dict[str, Any]:
    """What crosses the cut of a picture whose patches are in the tokens `here` at the client, `there` at the server."""
    P, total = cut.num_prefix_tokens, sent.below.num_patches
    row = int(sent.rows[number])
    tokens = sent.arrived.shape[1] - P
    others = int((sent.rows == row).sum()) - 1
    size = sent.num_bytes / len(sent.z)
    plain = 4 * (P + total) * sent.z.shape[2]
    note = f"{tokens} of {total} patch tokens, {_size(size)} a picture ({_size(plain)} without a codec)"
    if others:
        note += f"; averaged with {others} other picture{'s' if others > 1 else ''} of a batch of {len(sent.z)}"
    values: dict[str, Any] = {"tokens": tokens, "groups": there.tolist(), "note": note}
    if sent.kept is None:
        z, arrived = sent.z[number, P:], sent.arrived[row, P:]
        error = (arrived - z).norm(dim=1) / z.norm(dim=1).clamp_min(1e-12)
        of_patch = [None if token == DROPPED else round(float(error[token]), 4) for token in here.tolist()]
        values |= {"error": of_patch}
    return values


def _size(num_bytes: float) -> str:
    return f"{num_bytes:.0f} bytes" if num_bytes < 1000 else f"{num_bytes / 1000:.1f} kB"
