"""What each side of a cut computes, counted on one exchange of a model of the same shape."""

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from snello.config import FinetuneConfig
from snello.errors import SnelloWarning
from snello.models import create_model, preprocessing
from snello.split.build import make_codec
from snello.split.learner import LocalLink, make_split_learner
from snello.split.wire.frames import Frame
from snello.train.place import Setup
from snello.train.schedule import Schedule
from snello.vit import ViT


def flops(
    config: FinetuneConfig, codec: str, num_classes: int, method: dict[str, Any] | None = None
) -> tuple[float, float]:
    """FLOPs per picture of the client's side and of the server's, forward and backward, in an exchange of a full batch.

    On random pictures; matrix products and convolutions count, two per multiply-add, the codec's too. `method` is the
    state of each half's method, by side; None starts at the beginning.
    """
    frozen, split = config.split.client == "frozen", replace(config.split, max_bytes=None, link=None)
    split = replace(split, send_epochs=None, replay=0, cutmix=None)  # nothing is stored here
    config = replace(config, split=split)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", SnelloWarning)  # said in training already
        torch.manual_seed(config.seed)
        model = create_model(config.model, "none", num_classes, config.image_size)
        vit = ViT(model)
        vit.set_attention_paths(["explicit"] * vit.depth)  # the counter does not know every fused kernel
        size, buffer = preprocessing(model, config.image_size).size, make_codec(config, codec, vit.embed_dim).buffer
        num = config.batch_size * buffer
        batches = [
            (torch.randn(config.batch_size, 3, size, size), torch.randint(num_classes, (config.batch_size,)))
            for _ in range(buffer)
        ]
        setup = Setup(config, num_classes, torch.device("cpu"), "fp32", Schedule(num, num, 1, 1), codec)
        learner = make_split_learner(vit, setup)
        assert isinstance(learner.link, LocalLink)
        server = learner.link.model
        if method is not None:
            learner.half.method.load_state_dict(method["client"])
            server.half.method.load_state_dict(method["server"])
        learner.half.begin(config.lr, 0.0)
        learner.half.freeze(frozen)
        server.half.begin(config.lr, 0.0)
        client, other = FlopCounterMode(display=False), FlopCounterMode(display=False)
        with client:
            frame: Frame | None = learner.half.start(batches, step=0, micro=0, num_samples=num, seed=0)
        counted = [client.get_total_flops(), 0]
        while frame is not None:
            with other:
                answer = server.half.answer(frame)
            counted[1] += other.get_total_flops()
            with client:
                frame = learner.half.answer(answer)
            counted[0] += client.get_total_flops()
    return counted[0] / num, counted[1] / num
