"""What a training step of a Vision Transformer costs in FLOPs, from the shapes of its weights.

Matrix products and convolutions of one picture, two FLOPs per multiply-add, as torch's FlopCounterMode counts them with
explicit attention; what gradient checkpointing computes twice counts once.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch.nn import Parameter

from snello.vit.model import ViT


@dataclass(frozen=True)
class Tokens:
    """How many tokens of a picture a block works on."""

    attention: int
    mlp: int
    scored: bool
    """Whether attention is computed once more to rank them: the CLS token's row, or without one the whole matrix."""
    reducing: tuple[float, float] = (0.0, 0.0)
    """What the rule that reduces them costs itself, forward and backward: `TokenRule.cost`."""
    queries: int | None = None
    """Those of which the attention is computed; None: all."""


class StepFlops:
    """Forward and backward of one picture through a model or a part; what requires gradients now may train later."""

    def __init__(self, vit: ViT) -> None:
        self.prefix, self.has_cls = vit.num_prefix_tokens, vit.has_cls
        attention = vit.family.attention_modules
        self._blocks = [_Block(dict(block.named_parameters()), attention) for block in vit.blocks]
        self._embedding = _sum(p for p in vit.embedding_parameters() if p.ndim == 4)  # the convolution
        self._head = _sum(p for p in vit.head_parameters() if p.ndim == 2)

    def full(self, num_patches: int) -> float:
        """Full fine-tuning, without adapters (LoRA): every token, every weight."""
        N = self.prefix + num_patches
        blocks = (3 * (2 * N * (b.base_attention + b.base_mlp) + 4 * N**2 * b.width) for b in self._blocks)
        return sum(blocks) + 4 * num_patches * self._embedding + 6 * self._head

    def step(
        self, tokens: Sequence[Tokens], num_patches: int, trained: Collection[int], train_embeddings: bool
    ) -> float:
        """A step that starts with `num_patches` patch tokens, and trains the blocks `trained`.

        Where the embeddings do not train, the backward pass ends at the lowest trained block.
        """
        total = 2 * num_patches * self._embedding * (2 if train_embeddings else 1) + 6.0 * self._head
        lowest = 0 if train_embeddings else min(trained)
        for index, (block, n) in enumerate(zip(self._blocks, tokens, strict=True)):
            queries = n.attention if n.queries is None else n.queries
            spared = n.attention - queries
            linear = 2.0 * (n.attention * block.attention - spared * block.queries + n.mlp * block.mlp)
            products = 4.0 * n.attention * queries * block.width
            total += linear + products + n.reducing[0]
            if n.scored:
                total += 2.0 * n.attention * block.width * (1 if self.has_cls else n.attention)
            if index >= lowest:
                total += linear + 2 * products + n.reducing[1]
            if index == lowest and block.inputs and not train_embeddings:
                total -= 2.0 * n.attention * block.inputs
            if index in trained:
                total += 2.0 * (n.attention * block.trained_attention + n.mlp * block.trained_mlp)
                total -= 2.0 * spared * block.queries if block.trains_queries else 0.0
        return total


class _Block:
    """Elements of a block's weight matrices, in attention and MLP, and the width of its attention products."""

    def __init__(self, parameters: dict[str, Parameter], attention_modules: tuple[str, ...]) -> None:
        matrices = {name: p for name, p in parameters.items() if p.ndim == 2}
        inside = attention_modules[0].split(".")[0] + "."
        attention = {name: p for name, p in matrices.items() if name.startswith(inside)}
        mlp = {name: p for name, p in matrices.items() if name not in attention}
        parts = attention, mlp
        self.attention, self.mlp = (_sum(part.values()) for part in parts)
        self.trained_attention, self.trained_mlp = (_sum(p for p in part.values() if p.requires_grad) for part in parts)
        self.base_attention, self.base_mlp = (
            _sum(p for name, p in part.items() if "lora_" not in name) for part in parts
        )
        # The projection after the heads takes all their values.
        last = attention_modules[-1]
        self.width = next(p.shape[1] for name, p in attention.items() if name.startswith(last))
        # Those of the queries, and the projection after the heads; both have that width.
        rows = next(p.shape[0] for name, p in attention.items() if name.startswith(last))
        self.queries = 2 * self.width * rows
        self.trains_queries = self.trained_attention == self.attention
        # Where the norm before it is frozen (LoRA), nothing asks for the gradient of the attention's own input.
        first = (p for name, p in attention.items() if not name.startswith(last) and "lora_B" not in name)
        self.inputs = 0 if any(p.requires_grad for p in parameters.values() if p.ndim == 1) else _sum(first)


def _sum(parameters: Iterable[Parameter]) -> int:
    return sum(p.numel() for p in parameters)
