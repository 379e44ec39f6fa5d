#!/usr/bin/env python3
"""What was tried to make training cheaper, or better in the same time: every idea with its result, good or not.

    python get_cifar10.py cifar10 --classes automobile,cat,dog,horse,truck
    python benchmarks/time_tried.py train cifar10 work/          # accuracy
    python benchmarks/time_tried.py table cifar10 work/ --out results/time_tried.json

The task, the recipe and "full" are those of target_table.py; the baseline is ALaST as it is by default, 7 epochs. What
is no option of snello is a prototype in this file. Seed 0 runs first, with each learning rate where there are several;
the best goes on with the other seeds. What there was no time for has no accuracies, or fewer. Step times are CPU
seconds for 64 pictures, each variant in a process of its own, steps in turn: medians of the ratios in each round.
Finished runs stay in the work folder: the script goes on where it was cut off. `--seconds` says after how long no more
runs begin.
"""

import argparse
import contextlib
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from environment import environment
from rich.console import Console
from target import CLASSES, MODEL, TASKS, link_data
from timm.layers.format import Format
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, gelu, interpolate, linear, normalize

from snello import finetuning
from snello.config import AugmentConfig, FinetuneConfig
from snello.devices import resolve_device, resolve_precision
from snello.environment import set_environment
from snello.models import create_model
from snello.train.learner import MicroStep, WholeLearner
from snello.train.place import Setup
from snello.train.ranks import ALONE, make_accelerator
from snello.vit import ViT, logits_of, savings, tokens

LR, SEEDS, EPOCHS, BATCH = 1e-3, (0, 1, 2), 5, 64
PER_CLASS = TASKS["cifar"].per_class
WARMUP, STEPS = 2, 25
ALAST_EPOCHS, EASY, LOW, LOW_SHARE, ROWS, UNLIKE = 7, 0.5, 24, 0.4, 0.5, 0.15


class Selective(WholeLearner):
    """Trains on the half of a batch with the highest loss, after a forward pass of all (arXiv:1910.00762)."""

    def backward(self, work: MicroStep) -> Tensor:
        ((images, labels),) = work.batches
        with torch.no_grad(), self.accelerator.autocast():
            losses = cross_entropy(logits_of(self._model(images)).float(), labels, reduction="none")
        hard = losses.topk(max(1, round((1 - EASY) * len(labels)))).indices
        loss = super().backward(replace(work, batches=[(images[hard], labels[hard])], num_samples=len(hard)))
        self.method.discount()  # budgets follow the forward pass of all
        return loss


class LowFirst(WholeLearner):
    """Trains on smaller pictures at first, with interpolated position embeddings."""

    def __init__(self, vit: ViT, *args: Any) -> None:
        super().__init__(vit, *args)
        model: Any = vit.model
        model.dynamic_img_size, model.patch_embed.strict_img_size = True, False
        model.patch_embed.flatten, model.patch_embed.output_fmt = False, Format.NHWC
        self._low = True

    def begin(self, step: int, progress: float, num_micro: int) -> None:
        super().begin(step, progress, num_micro)
        self._low = progress < LOW_SHARE

    def backward(self, work: MicroStep) -> Tensor:
        ((images, labels),) = work.batches
        if self._low:
            images = interpolate(images, size=(LOW, LOW), mode="bilinear", antialias=True)
        return super().backward(replace(work, batches=[(images, labels)]))


def draw_rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of about half of the rows (n, D), drawn by their norms without replacement, and what each counts.

    Probabilities add up to the number wanted, none above 1; one random offset draws all (systematic sampling).
    """
    wanted = max(1.0, ROWS * len(gradient))
    shares = gradient.norm(dim=1).double().clamp(min=1e-30)
    shares = (shares * (wanted / shares.sum())).clamp(max=1)
    for _ in range(3):  # gives what is above 1 to the others
        free = shares < 1
        rest = (wanted - (~free).sum()) / shares[free].sum().clamp(min=1e-30)
        shares = torch.where(free, shares * rest, 1.0).clamp(max=1)
    counts = (shares.cumsum(0) + torch.rand(())).floor()
    rows = (counts.diff(prepend=counts.new_zeros(1)) > 0).nonzero().squeeze(1)
    return rows, (1 / shares[rows]).to(gradient.dtype).unsqueeze(1)


class SampledMlp(torch.autograd.Function):
    """As snello's `_Mlp`, with unbiased estimates of its weights' gradients (arXiv:2402.17227, 2305.15265)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        h = linear(rows, w1, b1)
        ctx.save_for_backward(rows, h, w1, w2)
        return linear(gelu(h), w2, b2).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        rows, h, w1, w2 = ctx.saved_tensors
        dy = grad.reshape(-1, grad.shape[-1])
        drawn, weights = draw_rows(dy)
        dw2 = (dy[drawn] * weights).t() @ gelu(h[drawn])
        dh = torch.ops.aten.gelu_backward(dy @ w2, h)
        drawn, weights = draw_rows(dh)
        dw1 = (dh[drawn] * weights).t() @ rows[drawn]
        return (dh @ w1).view(*grad.shape[:-1], -1), dw1, dh.sum(0), dw2, dy.sum(0)


def merge_likely(x: Tensor, sizes: Tensor | None, num_keep: int, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """As `tokens.merge_into`, but the tokens that are least like the one they would go into are dropped instead.

    The threshold is the similarity below which a share `UNLIKE` of the batch's tokens lie, so that counts stay equal.
    """
    B, N, _ = x.shape
    with torch.no_grad():
        stay, go = tokens._evenly(N - num_prefix_tokens, num_keep, num_prefix_tokens, x.device)
        unit = normalize(x.detach(), dim=2)
        best, into = (unit[:, go] @ unit[:, stay[num_prefix_tokens:]].transpose(1, 2)).max(dim=2)
        alike = best >= best.flatten().kthvalue(max(1, round(UNLIKE * best.numel()))).values
        shares = torch.zeros(B, len(stay), N, device=x.device)
        flat = shares.view(B, -1)
        flat[:, torch.arange(len(stay), device=x.device) * N + stay] = 1.0
        flat.scatter_(1, (into + num_prefix_tokens) * N + go, alike.to(shares.dtype))
        if sizes is not None:
            shares *= sizes.unsqueeze(1)
        merged = shares.sum(dim=2)
        shares /= merged.unsqueeze(2)
    with torch.autocast(x.device.type, enabled=False):
        return shares.to(x.dtype) @ x, merged


LEARNERS: dict[str, type[WholeLearner]] = {"selective": Selective, "low-first": LowFirst}


@contextlib.contextmanager
def prototype(name: str) -> Iterator[None]:
    """Puts what a prototype changes outside the learner in its place."""
    with contextlib.ExitStack() as stack:
        if name == "sampled":
            stack.enter_context(mock.patch.object(savings, "_Mlp", SampledMlp))
        if name == "merge-alike":
            stack.enter_context(mock.patch.object(tokens, "merge_into", merge_likely))
        yield


@dataclass(frozen=True)
class Trial:
    """A row of the table."""

    name: str
    method: str = "alast"
    epochs: int = ALAST_EPOCHS
    batch: int = BATCH
    lrs: tuple[float, ...] = (LR,)
    prototype: str = ""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    seeds: tuple[int, ...] = SEEDS
    remark: str = ""


SMALL_LRS = (7e-4, 5e-4, 1e-3)
MIXED = AugmentConfig(mixup=0.2, cutmix=1.0)
BASE = Trial("ALaST", remark="the baseline; 31 or, as budgets move, 47 patch tokens after block 0: timed with 31")
TRIALS = (
    BASE,
    Trial("ALaST, batch 32", batch=32, lrs=SMALL_LRS),
    Trial("full, batch 32", "full", EPOCHS, batch=32, lrs=SMALL_LRS),
    Trial("ALaST, selective backward", prototype="selective", remark="the half with the highest loss"),
    Trial("ALaST, half the rows for MLP weights", prototype="sampled", remark="drawn by norm, unbiased"),
    Trial(
        "ALaST, 24 x 24 pixels first",
        prototype="low-first",
        remark="first 0.4 of the steps; 36 -> 15 -> 15 patch tokens there, by the usual rounding to 16",
    ),
    Trial(
        "ALaST, merging only what is alike",
        prototype="merge-alike",
        remark="the 15 % of tokens least like the one they would go into are dropped, so that counts stay equal",
    ),
    Trial("ALaST, selective backward, equal time", epochs=8, prototype="selective"),
    Trial("ALaST, Mixup and CutMix", augment=MIXED, seeds=(0,)),
    Trial("full, Mixup and CutMix", "full", EPOCHS, augment=MIXED, seeds=(0,)),
    Trial("ALaST, Mixup and CutMix, 12 epochs", epochs=12, augment=MIXED, seeds=(0,)),
)


def config_of(trial: Trial, data: Path | None, lr: float, seed: int) -> FinetuneConfig:
    return FinetuneConfig(
        data=None if data is None else str(data),
        model=MODEL,
        method=trial.method,
        augment=trial.augment,
        epochs=trial.epochs,
        batch_size=trial.batch,
        lr=lr,
        seed=seed,
        device="cpu",
        attention="explicit",
        workers=1,
        check_pictures=False,
        eval_epochs=trial.epochs,  # only the last counts
        compare=False,
    )


def folder(trial: Trial, work: Path, lr: float, seed: int) -> Path:
    """The run folder of one training."""
    name = "".join(c if c.isalnum() or c in ".-" else "_" for c in trial.name)
    return work / f"{name}--{PER_CLASS}-{lr:g}-{trial.epochs}-{seed}"


def accuracy(trial: Trial, work: Path, lr: float, seed: int) -> float | None:
    """Of a finished run; None without one."""
    file = folder(trial, work, lr, seed) / "summary.json"
    return json.loads(file.read_text())["last_accuracy"] if file.exists() else None


def make_learner(trial: Trial, vit: ViT, setup: Setup) -> WholeLearner:
    accelerator = make_accelerator(setup.device, setup.precision, setup.ranks)
    return LEARNERS.get(trial.prototype, WholeLearner)(vit, setup.config, accelerator, setup.num_classes, setup.times)


def train(trial: Trial, data: Path, work: Path, lr: float, seed: int) -> None:
    """One run, unless it is finished."""
    if accuracy(trial, work, lr, seed) is not None:
        return
    out, spent = folder(trial, work, lr, seed), time.monotonic()
    config = config_of(trial, link_data(data, work, PER_CLASS), lr, seed)
    config = replace(config, out=out, resume=(out / "config.yaml").exists())
    with (
        (work / "console.log").open("a") as log,
        prototype(trial.prototype),
        mock.patch.object(finetuning, "make_whole_learner", lambda vit, setup: make_learner(trial, vit, setup)),
    ):
        summary = finetuning.finetune(config, Console(file=log))
    spent = time.monotonic() - spent
    print(f"{trial.name:40} lr {lr:g} seed {seed}: {summary.last_accuracy:.2%}  ({spent:.0f} s)", flush=True)


def best_lr(trial: Trial, work: Path, *, so_far: bool = False) -> float | None:
    """The learning rate with the best seed 0; None while one of them is missing, or all, where those so far do."""
    found = {lr: accuracy(trial, work, lr, 0) for lr in trial.lrs}
    known = {lr: a for lr, a in found.items() if a is not None}
    return max(known, key=lambda lr: known[lr]) if known and (so_far or len(known) == len(found)) else None


def train_all(args: argparse.Namespace) -> None:
    until = time.monotonic() + args.seconds
    for seed in SEEDS:
        for trial in TRIALS:
            best = best_lr(trial, args.work) if seed else None
            for lr in trial.lrs if seed == 0 else () if best is None else (best,):
                wanted = not args.only or trial.name in args.only.split(";")
                if wanted and str(seed) in args.seeds.split(",") and seed in trial.seeds and time.monotonic() < until:
                    train(trial, args.data, args.work, lr, seed)


def kind(trial: Trial) -> tuple[str, int, str]:
    """What a step of a trial depends on."""
    return trial.method, trial.batch, trial.prototype


def serve(trial: Trial, threads: int, link: Connection) -> None:
    """A process that takes steps with 64 pictures when asked, and answers with their CPU seconds."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config, device = config_of(trial, None, LR, 0), torch.device("cpu")
    if trial.method == "alast":
        config = replace(config, alast=replace(config.alast, alpha=0.0))  # budgets stay
    vit = ViT(create_model(config.model, config.weights, len(CLASSES), config.image_size))
    vit.set_attention_paths(["explicit"] * vit.depth)
    accelerator = make_accelerator(device, resolve_precision("auto", device), ALONE)
    learner = LEARNERS.get(trial.prototype, WholeLearner)(vit, config, accelerator, len(CLASSES))
    images, labels = torch.randn(trial.batch, 3, 32, 32), torch.randint(len(CLASSES), (trial.batch,))
    work = MicroStep([(images, labels)], 0, 0, trial.batch, 0)
    with prototype(trial.prototype):
        while link.recv():
            began = time.process_time()
            for _ in range(BATCH // trial.batch):
                learner.begin(0, 0.0, 1)
                learner.backward(work)
                learner.clip(config.clip_norm)
                learner.update(1e-6)
            link.send(time.process_time() - began)


def costs(threads: int) -> dict[str, list[float]]:
    """CPU seconds of every kind of step, round by round."""
    spawn = multiprocessing.get_context("spawn")
    kinds = {kind(trial): trial for trial in (Trial("full", "full"), *TRIALS)}
    links: dict[str, Any] = {}
    for kept, trial in kinds.items():
        links[str(kept)], other = spawn.Pipe()
        spawn.Process(target=serve, args=(trial, threads, other), daemon=True).start()
    seconds: dict[str, list[float]] = {key: [] for key in links}
    for _ in range(WARMUP + STEPS):
        for key, link in links.items():
            link.send(True)
            seconds[key].append(link.recv())
    for link in links.values():
        link.send(False)
    return {key: values[WARMUP:] for key, values in seconds.items()}


def row(trial: Trial, work: Path, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """A trial's row of the results."""
    lr = best_lr(trial, work, so_far=True) or trial.lrs[0]
    found = {seed: accuracy(trial, work, lr, seed) for seed in SEEDS}
    accuracies = [a for a in found.values() if a is not None]

    def relative(other: tuple[str, int, str]) -> float | None:
        own, base, usual = (seconds.get(str(key)) for key in (kind(trial), other, kind(BASE)))
        if own is None or base is None or usual is None:
            return None
        share = statistics.median(a / b for a, b in zip(own, base, strict=True))
        if trial.prototype == "low-first":
            rest = statistics.median(a / b for a, b in zip(usual, base, strict=True))
            share = LOW_SHARE * share + (1 - LOW_SHARE) * rest
        return share

    of_full = relative(("full", BATCH, ""))
    return {
        "name": trial.name,
        "method": trial.method,
        "prototype": bool(trial.prototype),
        "epochs": trial.epochs,
        "batch_size": trial.batch,
        "lr": lr,
        "seeds": [seed for seed, a in found.items() if a is not None],
        "accuracies": accuracies,
        "accuracy": statistics.mean(accuracies) if accuracies else None,
        "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "step_time_of_full": of_full,
        "step_time_of_baseline": relative(kind(BASE)),
        "relative_time": None if of_full is None else of_full * trial.epochs / EPOCHS,
        "tried": [{"lr": lr, "seed": 0, "accuracy": accuracy(trial, work, lr, 0)} for lr in trial.lrs],
        "remark": trial.remark if accuracies else "not run",
    }


def main() -> None:
    set_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["train", "table"])
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/time_tried.json"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="train these only, separated by semicolons")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so many")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    where = args.work / "environment.json"
    if not where.exists():  # of the code that trains: the table may be made later
        where.write_text(json.dumps(environment(resolve_device("cpu"))))
    if args.do == "train":
        train_all(args)
        return
    file = args.work / "costs.json"
    if not file.exists():
        file.write_text(json.dumps(costs(args.threads)))
    seconds = json.loads(file.read_text())
    config = {
        "per_class": PER_CLASS,
        "full_epochs": EPOCHS,
        "threads": args.threads,
        "augment_mixed": [0.2, 1.0],
    }
    rows = [row(trial, args.work, seconds) for trial in TRIALS]
    result = {"config": config, "environment": json.loads(where.read_text()), "rows": rows}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
