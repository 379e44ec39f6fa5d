"""timm's ViT in all the variants that every test of blocks must stand, and what a model gives, to compare it."""

import torch
from conftest import tiny_deit, tiny_vit
from timm.layers import SwiGLU
from timm.models.vision_transformer import Block

from snello.vit import ViT, logits_of

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


def in_pairs(n=3):
    """Pictures whose patches (of 4 x 4 pixels) are equal in pairs, left and right."""
    half = torch.randn(n, 3, 4, 4, 2, 1, 4, generator=torch.Generator().manual_seed(3)).expand(
        -1, -1, -1, -1, -1, 2, -1
    )
    return half.reshape(n, 3, 16, 16)


def run(model, x, seed=0):
    """Output and the gradient of every parameter."""
    torch.manual_seed(seed)
    model.zero_grad()
    out = logits_of(model(x))
    out.square().sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, untouched, x):
    (out, grads), (expected, expected_grads) = run(model, x), run(untouched, x)
    assert (out - expected).abs().max() <= 1e-6
    assert grads.keys() == expected_grads.keys() and len(grads) > 10
    for name, grad in grads.items():
        assert (grad - expected_grads[name]).abs().max() <= 1e-6, name
