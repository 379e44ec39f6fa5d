#!/usr/bin/env python3
"""Pretrains the weights that ship as `vit_micro_patch4_32` on five CIFAR-10 classes.

    python get_cifar10.py cifar10                       # the folder: cifar10/{train,test}/<class>/*.png
    python tools/pretrain_micro.py cifar10 work/ --epochs 36
    python tools/pretrain_micro.py cifar10 work/ --epochs 36   # again: goes on after the last whole epoch

The other five classes are never read: they are the target of the benchmarks. The recipe is supervised training with
random crops, flips, colour and erasing; in the first two thirds of the epochs half of the patches are left out
(PatchDropout, arXiv:2208.07220), which halves the cost of an epoch.
This is pretraining from uint8 tensors held in memory, hence the small loop of its own: fine-tuning has just one,
`snello.training`.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from timm.layers import PatchDropout
from torch import Tensor, nn

import snello  # noqa: F401  registers the model

CLASSES = ["airplane", "bird", "deer", "frog", "ship"]
MODEL = "vit_micro_patch4_32"


def load(folder: Path) -> tuple[Tensor, Tensor]:
    """All pictures of the five classes below `folder` as uint8 (S, 3, 32, 32), and their labels (S,)."""
    pictures, labels = [], []
    for label, name in enumerate(CLASSES):
        for path in sorted((folder / name).glob("*.png")):
            pictures.append(np.asarray(Image.open(path)))
            labels.append(label)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to 4 pixels, flip, colour, one erased square, drawn per sample. x: (B, 3, 32, 32) in 0..1."""
    B, _, H, W = x.shape
    x = torch.where(torch.rand(B, 1, 1, 1, generator=generator) < 0.5, x.flip(-1), x)
    padded = F.pad(x, (4, 4, 4, 4), mode="reflect")
    dy, dx = torch.randint(0, 9, (2, B, 1), generator=generator)
    rows, cols = dy + torch.arange(H), dx + torch.arange(W)
    x = padded[torch.arange(B)[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
    gain, offset, saturation = (torch.rand(3, B, 1, 1, 1, generator=generator) - 0.5) * torch.tensor(
        [0.8, 0.4, 1.0]
    ).view(3, 1, 1, 1, 1)
    grey = x.mean(1, keepdim=True)
    x = (grey + (x - grey) * (1 + saturation)) * (1 + gain) + offset
    cy, cx = torch.randint(0, H, (2, B, 1), generator=generator)
    hole = ((torch.arange(H) - cy).abs() < 5)[:, :, None] & ((torch.arange(W) - cx).abs() < 5)[:, None, :]
    hole &= torch.rand(B, 1, 1, generator=generator) < 0.5
    return x.clamp(0, 1).masked_fill(hole[:, None], 0.5)


def normalise(x: Tensor, cfg: dict[str, tuple[float, ...]]) -> Tensor:
    return (x - torch.tensor(cfg["mean"]).view(3, 1, 1)) / torch.tensor(cfg["std"]).view(3, 1, 1)


def groups(model: nn.Module) -> list[dict[str, object]]:
    decay = [p for n, p in model.named_parameters() if p.ndim > 1 and n not in model.no_weight_decay()]
    kept = {id(p) for p in decay}
    return [
        {"params": decay, "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if id(p) not in kept], "weight_decay": 0.0},
    ]


@torch.inference_mode()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    right = 0
    for start in range(0, len(x), 500):
        batch = normalise(x[start : start + 500].float() / 255, model.pretrained_cfg)
        with torch.autocast("cpu", torch.bfloat16):
            right += int((model(batch).argmax(1) == y[start : start + 500]).sum())
    return right / len(x)


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    epoch: int,
    args: argparse.Namespace,
) -> float:
    """One epoch; order and augmentation depend on (seed, epoch) only. Returns the mean loss."""
    generator = torch.Generator().manual_seed(args.seed * 1000 + epoch)
    torch.manual_seed(args.seed * 1000 + epoch)
    x, y = data
    steps = len(x) // args.batch_size
    order = torch.randperm(len(x), generator=generator)
    total, warmup = args.epochs * steps, 2 * steps
    sparse = epoch < args.epochs * 2 // 3
    model.train()
    model.patch_drop = PatchDropout(0.5, num_prefix_tokens=1) if sparse else nn.Identity()
    losses = 0.0
    for i in range(steps):
        t = epoch * steps + i
        rate = t / warmup if t < warmup else 0.5 * (1 + math.cos(math.pi * (t - warmup) / (total - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        rows = order[i * args.batch_size : (i + 1) * args.batch_size]
        batch = normalise(augment(x[rows].float() / 255, generator), model.pretrained_cfg)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(batch).float(), y[rows], label_smoothing=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses += loss.item()
    model.patch_drop = nn.Identity()
    return losses / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path, help="checkpoint, log and the weights")
    parser.add_argument("--epochs", type=int, default=36)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model = timm.create_model(MODEL, num_classes=len(CLASSES))
    for block in model.blocks:
        block.attn.fused_attn = False  # measured on CPU in bf16: twice as fast as the fused kernel at 65 tokens
    optimizer = torch.optim.AdamW(groups(model), lr=args.lr)
    train, test = load(args.data / "train"), load(args.data / "test")
    checkpoint, first = args.work / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"] + 1
    for epoch in range(first, args.epochs):
        started = time.monotonic()
        loss = train_epoch(model, optimizer, train, epoch, args)
        row = {
            "epoch": epoch,
            "loss": round(loss, 4),
            "test_accuracy": round(accuracy(model, *test), 4),
            "seconds": round(time.monotonic() - started, 1),
        }
        with (args.work / "pretrain_micro.log").open("a") as log:
            log.write(json.dumps(row) + "\n")
        print(row, flush=True)
        temporary = checkpoint.with_suffix(".tmp")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, temporary)
        temporary.replace(checkpoint)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(
        weights, args.work / f"{MODEL}.safetensors", metadata={"classes": ",".join(CLASSES), "epochs": str(args.epochs)}
    )


if __name__ == "__main__":
    main()
