"""What each side of a cut computes, counted on one exchange of a model of the same shape."""

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from snello.config import FinetuneConfig
from snello.errors import SnelloWarning
from snello.models import create_model, preprocessing
from snello.split.learner import Cut
from snello.split.wire.frames import Frame
from snello.vit import ViT


def flops(
    config: FinetuneConfig, codec: str, num_classes: int, method: dict[str, Any] | None = None
) -> dict[str, float]:
    """FLOPs per picture of each side, forward and backward, in an exchange of a full batch on random pictures.

    Matrix products and convolutions count, two per multiply-add, the codec's too. For a CPU: they are the same
    everywhere.

    Args:
        config: of the run.
        codec: what its codec was resolved to.
        num_classes: of the classifier.
        method: state of each half's method, by side; None starts at the beginning.
    """
    config = replace(config, split=replace(config.split, max_bytes=None, link=None))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", SnelloWarning)  # said in training already
        torch.manual_seed(config.seed)
        model = create_model(config.model, "none", num_classes, config.image_size)
        vit = ViT(model)
        vit.set_attention_paths(["explicit"] * vit.depth)  # the counter does not know every fused kernel
        cut = Cut(vit, config, num_classes=num_classes, device=torch.device("cpu"), precision="fp32", codec_text=codec)
        if method is not None:
            cut.client.method.load_state_dict(method["client"])
            cut.server.method.load_state_dict(method["server"])
        size = preprocessing(model, config.image_size).size
        num = config.batch_size * cut.buffer
        batches = [
            (torch.randn(config.batch_size, 3, size, size), torch.randint(num_classes, (config.batch_size,)))
            for _ in range(cut.buffer)
        ]
        counted = {"client": 0, "server": 0}
        cut.begin(0.0)
        with FlopCounterMode(display=False) as counter:
            first = cut.client.start(batches, step=0, micro=0, num_samples=num, seed=0)
        frame: Frame | None = first
        counted["client"] += counter.get_total_flops()
        while frame is not None:
            with FlopCounterMode(display=False) as counter:
                answer = cut.server.answer(frame)
            counted["server"] += counter.get_total_flops()
            with FlopCounterMode(display=False) as counter:
                frame = cut.client.answer(answer)
            counted["client"] += counter.get_total_flops()
    return {f"{side}_flops_per_sample": total / num for side, total in counted.items()}
