"""Settings of `snello finetune`."""

from dataclasses import dataclass

from snello.config.pictures import PICTURES_NEEDS, PicturesConfig
from snello.config.recipe import RECIPE_NEEDS, Recipe


@dataclass(frozen=True)
class FinetuneConfig(PicturesConfig, Recipe):
    """Fine-tune a Vision Transformer on labelled pictures."""

    compare: bool = True
    """After training, measure step time, FLOPs and memory against full fine-tuning on this machine."""

    NEEDS = RECIPE_NEEDS + PICTURES_NEEDS

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        PicturesConfig.__post_init__(self)
