#!/usr/bin/env python3
"""What a codec computes: encoding and decoding, both ways, against a step of the client's half and of both halves.

    python benchmarks/codec_cost.py --out results/codec_cost.json

In one process, in turn: a step of the uncompressed cut model (without the optimizer), then every codec on the
activations of pictures that ship with snello, and on their gradient: encode, decode, encode the gradient, decode it,
and back through the codec's own graph; what the client does of it (encode, decode the gradient) is timed apart.
Medians. K-means is timed by itself against the client half's forward and backward pass of DeiT-T.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import environment

from snello.codecs.base import Codec, Context
from snello.config import FinetuneConfig, SplitConfig
from snello.data.loaders import eval_transform
from snello.data.shipped import Shipped
from snello.devices import autocast, resolve_device, synchronize
from snello.environment import set_environment
from snello.models import create_model
from snello.split.learner import LocalLink, SplitLearner, make_split_learner
from snello.train.learner import MicroStep
from snello.train.place import Setup
from snello.train.schedule import Schedule
from snello.vit import ViT
from snello.vit.tokens import kmeans

CODECS = (
    "none", "bf16", "fp16", "int8", "int4", "int2", "int2(clip=auto)", "adc(0.1)", "adc(0.1)+int8",
    "adc(samples=1, tokens=0.1)", "adc(samples=1, tokens=0.4)+int4", "adc(samples=1, tokens=0.7)+int2(clip=auto)",
    "topk(0.1)", "randtopk(0.1)", "bottlenet(0.1)", "c3sl(10)", "fedlite(32)", "pca(1)", "pca(1.5, down=1)", "pca(2)",
    "pca(4.5)",
)  # fmt: skip
CUT = 3


def timed(function: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def make_cut(model: str, args: argparse.Namespace, device: torch.device) -> SplitLearner:
    config = FinetuneConfig(
        model=model,
        method="full",
        batch_size=args.batch_size,
        split=SplitConfig(cut=CUT, codec="none", frames=False),
    )
    vit = ViT(create_model(model, "none", args.classes).to(device))
    vit.set_attention_paths([args.attention] * vit.depth)
    size = args.batch_size
    return make_split_learner(
        vit, Setup(config, args.classes, device, args.precision, Schedule(size, size, 1, 1000), "none")
    )


def round_trip(codec: Codec, z: torch.Tensor, gradient: torch.Tensor, attention: torch.Tensor) -> tuple[float, float]:
    """Seconds of the client and of the server for all that a codec does in an exchange; `gradient` is that of z."""
    z = z.detach().requires_grad_()
    context = Context(num_prefix_tokens=1, attention=attention, seed=1)
    times = [time.perf_counter()]
    message = codec.encode(z, context)
    times.append(time.perf_counter())
    decoded = codec.decode(message.arrays)
    if decoded.z is not decoded.leaf:
        same = decoded.z.shape == gradient.shape
        torch.autograd.backward(decoded.z, gradient if same else torch.ones_like(decoded.z))
    leaf = decoded.leaf
    down = leaf.grad if leaf.grad is not None else gradient if leaf.shape == z.shape else torch.ones_like(leaf)
    arrays = codec.encode_gradient(down, context)
    times.append(time.perf_counter())
    torch.autograd.backward(message.sent, codec.decode_gradient(message, arrays))
    times.append(time.perf_counter())
    return times[1] - times[0] + times[3] - times[2], times[2] - times[1]


def pictures(num: int) -> torch.Tensor:
    """Pictures that ship with snello, (num, 3, 224, 224)."""
    shipped = Shipped().read("train")
    transform = eval_transform(224, "bicubic", 1.0)
    return (torch.stack([transform(shipped.open(index)) for index in range(num)]).float() / 255 - 0.5) / 0.5


def exchanged(cut: SplitLearner, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What crosses the cut of a model: activations, and their gradient."""
    assert isinstance(cut.link, LocalLink)
    upper = cut.link.model.half.vit
    with torch.no_grad():
        z = cut.half.vit.tokens(images)
    leaf = z.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(upper.head(upper.features(upper.tokens(leaf))), labels)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return z, gradient


def main() -> None:
    set_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--attention", default="explicit")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="of the whole model")
    parser.add_argument("--rounds", type=int, default=5, help="of every codec")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    generator = torch.Generator().manual_seed(0)
    images = pictures(args.batch_size).to(device)
    labels = torch.randint(args.classes, (args.batch_size,), generator=generator).to(device)
    result: dict[str, Any] = {
        "config": {key: value for key, value in vars(args).items() if key != "out"} | {"cut": CUT},
        "environment": environment(device),
        "kmeans": kmeans_cost(args, device, images),
    }
    cut = make_cut("deit_small_patch16_224", args, device)

    assert isinstance(cut.link, LocalLink)
    halves = cut.half, cut.link.model.half

    def step() -> None:
        cut.begin(0, 0.0, 1)
        cut.backward(MicroStep([(images, labels)], 0, 0, len(labels), 0))
        cut.restart()
        for half in halves:
            half.optimizer.zero_grad(set_to_none=True)

    def client_step() -> None:
        with autocast(device, args.precision):
            sent = cut.half.vit.tokens(images)
        torch.autograd.backward(sent, gradient)
        cut.half.optimizer.zero_grad(set_to_none=True)

    z, gradient = exchanged(cut, images, labels)
    attention = torch.softmax(torch.randn(args.batch_size, 197, generator=generator), 1).to(device)
    codecs = {text: Codec(text, embed_dim=384).to(device) for text in CODECS}
    steps, client_steps, taken = [], [], {text: [] for text in CODECS}  # type: ignore[var-annotated]
    for index in range(max(args.steps, args.rounds) + 1):
        if index <= args.steps:
            steps.append(timed(step, device))
            client_steps.append(timed(client_step, device))
        for text, codec in codecs.items():
            taken[text].append(round_trip(codec, z, gradient, attention))
    step_seconds = statistics.median(steps[1:])
    client_seconds = statistics.median(client_steps[1:])
    result |= {"step_seconds": step_seconds, "client_step_seconds": client_seconds, "rows": []}
    for text, times in taken.items():
        both = statistics.median(sum(pair) for pair in times[1:])
        client = statistics.median(pair[0] for pair in times[1:])
        row = {"codec": text, "seconds": both, "share": both / step_seconds}
        result["rows"].append(row | {"client_seconds": client, "client_share": client / client_seconds})
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["kmeans"]), f"step {step_seconds:.2f} s")
    for row in result["rows"]:
        client = f"client {1000 * row['client_seconds']:.0f} ms, {row['client_share']:.2%} of its step"
        print(f"{row['codec']:45} {1000 * row['seconds']:8.1f} ms  {row['share']:.2%} of a step; {client}")


def kmeans_cost(args: argparse.Namespace, device: torch.device, images: torch.Tensor) -> dict[str, float]:
    """K-means on (B, 197) rows against the client half's forward and backward pass of DeiT-T."""
    cut = make_cut("deit_tiny_patch16_224", args, device)
    cut.half.vit.watch(CUT - 1)
    cut.half.train()

    def forward_backward() -> None:
        with autocast(device, args.precision):
            z = cut.half.vit.tokens(images)
        torch.autograd.backward(z, torch.ones_like(z))

    halves = [timed(forward_backward, device) for _ in range(4)][1:]
    attention = cut.half.vit.cls_attention(CUT - 1)
    generator = torch.Generator(device)
    groups = int(0.1**0.5 * args.batch_size)
    calls = [timed(lambda i=i: kmeans(attention, groups, generator.manual_seed(i)), device) for i in range(21)][1:]
    seconds, half = statistics.median(calls), statistics.median(halves)
    return {"seconds": seconds, "client_half_seconds": half, "share": seconds / half, "groups": groups}


if __name__ == "__main__":
    main()
