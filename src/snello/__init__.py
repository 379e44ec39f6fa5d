"""snello fine-tunes Vision Transformers where compute, memory or bandwidth is scarce.

>>> import snello
>>> alast = snello.ALaST(model, blocks=9, start_budget=0.9, min_budget=0.5, alpha=1e-4, draw="proportional")

Importing it registers the micro ViT `vit_micro_patch4_32` with timm, and imports neither timm nor torch by itself:
the command line answers at once.
"""

import importlib
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from snello.config import AlastConfig as AlastConfig
    from snello.config import FinetuneConfig as FinetuneConfig
    from snello.config import SplitConfig as SplitConfig
    from snello.errors import SnelloError as SnelloError
    from snello.finetuning import finetune as finetune
    from snello.methods.alast import ALaST as ALaST
    from snello.vit import ViT as ViT

_PUBLIC = {
    "ALaST": "snello.methods.alast",
    "AlastConfig": "snello.config",
    "FinetuneConfig": "snello.config",
    "SnelloError": "snello.errors",
    "SplitConfig": "snello.config",
    "ViT": "snello.vit",
    "finetune": "snello.finetuning",
}

__all__ = list(_PUBLIC)
__version__ = version("snello")


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def _register(timm: ModuleType) -> None:
    importlib.import_module("snello.assets.micro")


wrapt.register_post_import_hook(_register, "timm")
