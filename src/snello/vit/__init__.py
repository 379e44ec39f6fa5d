"""The one place that knows timm and transformers: their Vision Transformers, blocks, prefix tokens and attention.

blocks.py               a block that is observed: scores, drops and records, whoever made it
family.py               what a library's models have in common, asked by `ViT`
timm_family.py          timm's models and blocks
transformers_family.py  those of transformers; imported only where a model comes from there
model.py                `ViT`: all of the above as one interface

B: samples, N: tokens including prefix tokens, D: embed dim, H: heads, K: kept tokens.
"""

from snello.vit.blocks import AttentionPath, BlockObserver, DropAt, Score, TokenRule, recomputing
from snello.vit.family import SUPPORTED
from snello.vit.model import ViT, logits_of

__all__ = [
    "SUPPORTED",
    "AttentionPath",
    "BlockObserver",
    "DropAt",
    "Score",
    "TokenRule",
    "ViT",
    "logits_of",
    "recomputing",
]
