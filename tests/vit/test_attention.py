"""Which attention is faster here: measured beside the run, which does not notice."""

import torch
from conftest import tiny_vit

from snello.vit import ViT
from snello.vit.attention import faster_attention


def test_measuring_draws_nothing_from_the_generator_of_the_run():
    vit = ViT(tiny_vit(drop_rate=0.1, proj_drop_rate=0.1))
    before = torch.get_rng_state()
    assert faster_attention(vit, 2, torch.device("cpu"), "fp32") in ("fused", "explicit")
    assert torch.equal(torch.get_rng_state(), before)
