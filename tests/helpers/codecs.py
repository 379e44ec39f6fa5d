"""Every codec, chains of them, and what they may be given."""

from collections.abc import Callable

import torch
from torch import Tensor

from snello.codecs.base import Context

EXAMPLES = {
    "none": "none",
    "bf16": "bf16",
    "fp16": "fp16",
    "int8": "int8",
    "int4": "int4(down=8)",
    "int2": "int2",
    "adc": "adc(0.2)",
    "topk": "topk(0.2)",
    "randtopk": "randtopk(0.2)",
    "c3sl": "c3sl(3)",
    "bottlenet": "bottlenet(0.5)",
    "fedlite": "fedlite(3)",
    "pca": "pca(0.5)",
}
CHAINS = [
    "adc(0.2)+int8",
    "adc(samples=1, tokens=0.4)+int4",
    "adc(0.3)+bottlenet(0.5)+int4",
    "topk(0.2)+int8",
    "c3sl(3)+int8",
    "adc(0.5)+topk(0.5)+fedlite(2, 4)",
    "bottlenet(0.5)+topk(0.5)+int2(scale=pow2)",
    "int2(clip=1.5)",
    "pca(1, down=0.5, dct=0)",
    "adc(samples=1, tokens=0.5)+pca(1)",
    "adc(0.5, rule=merge)+pca(0.5, basis=1)",
    "bottlenet(0.5)+pca(1)",
    "adc(samples=1, tokens=0.5)+bottlenet(0.5)+int4(per=channel)",
    "adc(0.3, rule=merge)",
    "adc(samples=1, tokens=0.4, rule=merge)+int4",
    "adc(samples=1, tokens=0.5, rule=merge)+bottlenet(0.5)+int8",
]
TEXTS = [*EXAMPLES.values(), *CHAINS]
B, N, D = 10, 9, 12


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


INPUTS: dict[str, Callable[[], Tensor]] = {
    "plain": lambda: noise(B, N, D),
    "constant": lambda: torch.full((B, N, D), 3.3),
    "offset": lambda: 10 + noise(B, N, D).sigmoid(),
    "one-sided": lambda: noise(B, N, D).abs(),
    "zero": lambda: torch.zeros(B, N, D),
    "tiny": lambda: 1e-30 * noise(B, N, D),
    "two numbers": lambda: noise(1, 2, 1),
    "one number": lambda: noise(1, 1, 1),
    "square grid": lambda: noise(B, 10, D),
    "a token each": lambda: noise(B, 1, D),
    "float16": lambda: noise(B, N, D).half(),
    "bfloat16": lambda: noise(B, N, D).bfloat16(),
    "non-contiguous": lambda: noise(N, B, D).transpose(0, 1),
    "strided": lambda: noise(B, N, 2 * D)[..., ::2],
}


def context_of(z: Tensor, seed: int = 5) -> Context:
    generator = torch.Generator().manual_seed(2)
    attention = torch.randn(*z.shape[:2], generator=generator).softmax(dim=1)
    return Context(num_prefix_tokens=1, attention=attention, num_positions=z.shape[1], seed=seed)
