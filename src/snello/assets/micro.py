"""The micro ViT that ships inside the package, registered with timm as ``vit_micro_patch4_32``.

Small enough to fine-tune on two CPU cores in a minute, and shaped like the real thing (12 blocks, CLS token), so
that every method behaves on it as it does on DeiT-S. `tools/pretrain_micro.py` made the weights.
"""

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

__all__: list[str] = []  # timm's registry appends the entry point

WEIGHTS = Path(__file__).with_name("vit_micro_patch4_32.safetensors")

default_cfgs = generate_default_cfgs(
    {
        "vit_micro_patch4_32.cifar5": {
            "file": str(WEIGHTS),
            "num_classes": 5,
            "input_size": (3, 32, 32),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2470, 0.2435, 0.2616),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
            "label_names": ("airplane", "bird", "deer", "frog", "ship"),
        }
    }
)


@register_model  # type: ignore[untyped-decorator]
def vit_micro_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT with 12 blocks of width 128 and 4 heads on 32 x 32 pictures in patches of 4 (2.4 M parameters)."""
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 12, "num_heads": 4}
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer,
        "vit_micro_patch4_32",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,  # positions of pictures of another size
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**shape, **kwargs},
    )
    return model
