"""snello fine-tunes Vision Transformers where compute, memory or bandwidth is scarce.

>>> import snello
>>> alast = snello.ALaST(model)

docs/api.md shows what else there is. Importing it registers the micro ViT `vit_micro_patch4_32` with timm, sets nothing
in the process, and imports neither timm nor torch by itself: the command line answers at once.
"""

import importlib
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from snello import config, errors
from snello.config import *  # noqa: F403
from snello.errors import *  # noqa: F403

if TYPE_CHECKING:
    from snello.explain.report import Report, report
    from snello.export import export as export_run
    from snello.finetuning import finetune
    from snello.inference import Predictor, evaluate, load, predict
    from snello.measure.plan import make_plan as plan
    from snello.methods.alast import ALaST
    from snello.vit import ViT

# A function `export` would be hidden by the package `snello.export` as soon as that is imported.
_LAZY = {
    "ALaST": "snello.methods.alast:ALaST",
    "Predictor": "snello.inference:Predictor",
    "Report": "snello.explain.report:Report",
    "ViT": "snello.vit:ViT",
    "evaluate": "snello.inference:evaluate",
    "export_run": "snello.export:export",
    "finetune": "snello.finetuning:finetune",
    "load": "snello.inference:load",
    "plan": "snello.measure.plan:make_plan",
    "predict": "snello.inference:predict",
    "report": "snello.explain.report:report",
}
"""What needs torch: imported when it is asked for."""

__all__ = [
    "ALaST",
    "Predictor",
    "Report",
    "ViT",
    "evaluate",
    "export_run",
    "finetune",
    "load",
    "plan",
    "predict",
    "report",
]
__all__ += config.__all__
__all__ += errors.__all__
__version__ = version("snello")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _register(timm: ModuleType) -> None:
    importlib.import_module("snello.assets.micro")


wrapt.register_post_import_hook(_register, "timm")
