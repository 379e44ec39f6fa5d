"""timm's ViT in all the variants that every test of blocks must stand."""

from conftest import tiny_deit, tiny_vit
from timm.layers import SwiGLU
from timm.models.vision_transformer import Block

from snello.vit import ViT

VARIANTS = {
    "plain": {},
    "layerscale": {"init_values": 0.1},
    "qk-norm": {"qk_norm": True},
    "registers": {"reg_tokens": 2},
    "registers-no-embed-class": {"reg_tokens": 2, "no_embed_class": True},
    "stochastic": {"drop_path_rate": 0.2, "drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1},
    "patch-dropout": {"patch_drop_rate": 0.25},
    "no-cls": {"class_token": False, "global_pool": "avg"},
    "avg-with-cls": {"global_pool": "avg"},
    "max": {"global_pool": "max"},
    "pre-norm": {"pre_norm": True},
    "swiglu": {"mlp_layer": SwiGLU},
    "head-dim": {"block_fn": Block, "num_heads": 4, "qkv_bias": False},
    "distilled": {"cls": "deit"},
    "dinov2-like": {"dynamic_img_size": True, "init_values": 1.0, "reg_tokens": 1},
}


def make(variant: str, path: str = "fused"):
    options = {**VARIANTS[variant]}
    model = tiny_deit() if options.pop("cls", None) else tiny_vit(**options)
    vit = ViT(model)
    vit.set_attention_paths([path] * vit.depth)
    return model
