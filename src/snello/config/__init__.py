"""Every setting, once: these dataclasses are the flags, the YAML keys, the defaults and the help text.

Nothing heavy is imported here, so that ``snello --help`` answers at once. Values are checked when a config is made:
a run with a wrong setting fails before anything is loaded.

registry.py       names of methods, token rules, codecs, ..., and where they are found
methods.py        ALaST, LoRA
pictures.py       where pictures come from, and how they are loaded
default_model.py  which model a run takes where none is named
presets.py        what --preset fills in
recipe.py         what a run computes; `snello finetune`
network.py        `snello serve`, `join`, `certs`, `doctor`
use.py            the other verbs
effect.py         settings without effect
codec_text.py     the text that names a codec
units.py          amounts, addresses and links as text
names.py          what other tools call a setting, and the nearest of ours
values.py         configs as plain values and back
"""

from snello.config.methods import AlastConfig, LoraConfig
from snello.config.network import CertsConfig, DoctorConfig, JoinConfig, ServeConfig
from snello.config.pictures import ColumnsConfig, PicturesConfig
from snello.config.recipe import AugmentConfig, FinetuneConfig, Recipe, SplitConfig
from snello.config.use import (
    CheckDataConfig,
    CodecsConfig,
    EvaluateConfig,
    ExportConfig,
    PlanConfig,
    PredictConfig,
    ReportConfig,
)

__all__ = [
    "AlastConfig", "AugmentConfig", "CertsConfig", "CheckDataConfig", "CodecsConfig", "ColumnsConfig", "DoctorConfig",
    "EvaluateConfig", "ExportConfig", "FinetuneConfig", "JoinConfig", "LoraConfig", "PicturesConfig", "PlanConfig",
    "PredictConfig", "Recipe", "ReportConfig", "ServeConfig", "SplitConfig",
]  # fmt: skip
