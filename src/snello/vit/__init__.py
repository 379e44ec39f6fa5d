"""The one place that knows timm and transformers: their Vision Transformers, blocks, prefix tokens and attention.

model.py                `ViT`: a model of either library as one interface
tokens.py               pure functions: which tokens to keep, merging, k-means
context.py              what one forward pass knows of its tokens
rules/                  what becomes of the tokens that a block does not pass on
blocks.py               a block that is observed: scores, drops and records, whoever made it
family.py               what a library's models have in common, asked by `ViT`
timm_family.py          timm's models and blocks
transformers_family.py  those of transformers; imported only where a model comes from there
attention.py            which way to compute attention is faster here
flops.py                what a training step costs

B: samples, N: tokens including prefix tokens, D: embed dim, H: heads, K: kept tokens.
"""

from snello.vit.blocks import AttentionPath, BlockObserver, Counting, Score
from snello.vit.family import SUPPORTED
from snello.vit.model import ViT, logits_of

__all__ = ["SUPPORTED", "AttentionPath", "BlockObserver", "Counting", "Score", "ViT", "logits_of"]
