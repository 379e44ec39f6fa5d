"""What each step of a run cost in FLOPs of a picture, as a share of plain full fine-tuning's."""

from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from snello.config import FinetuneConfig
from snello.errors import DataError
from snello.explain.files import Part
from snello.explain.run import Run
from snello.methods import make_method
from snello.methods.alast import ALaST
from snello.methods.target import BudgetCost
from snello.runs.summary import Summary
from snello.split.build import meta_vit
from snello.train.schedule import Schedule
from snello.vit import ViT, logits_of
from snello.vit.flops import StepFlops

MOST = 400
"""Steps that are listed."""


def flops(run: Run) -> Part | None:
    """Steps, and what each cost as a share of `full`, the FLOPs of a picture; None before the first step.

    Raises:
        DataError: across a cut where the other side's are not known.
    """
    rows = list(run.folder.rows("step"))
    if not rows or run.resolved.server is not None:  # what the other side computes is not known here
        return None
    rows = [rows[index] for index in _evenly(len(rows), MOST)]
    # Sizes and names are all that counts; adapters to start from would want the weights themselves.
    config = replace(run.config, lora=replace(run.config.lora, start=None))
    vit = meta_vit(config, len(run.classes), run.resolved.architecture)
    full = StepFlops(vit).full(vit.num_patches)
    if run.cut:
        costs = [_across(run)] * len(rows)
    elif "alast" in config.method_name:
        costs = _by_budgets(run, config, vit, rows)
    else:
        costs = [_counted(vit, config, run.resolved.pictures.size)] * len(rows)
    shares = [round(cost / full, 5) for cost in costs]
    return Part({"steps": [row["step"] for row in rows], "share": shares, "full": full})


def _evenly(num: int, most: int) -> list[int]:
    """So many of 0..num - 1 with even distances, the first and the last among them."""
    if num <= most:
        return list(range(num))
    return [index * (num - 1) // (most - 1) for index in range(most)]


def _by_budgets(run: Run, config: FinetuneConfig, vit: ViT, rows: list[dict[str, Any]]) -> list[float]:
    """What ALaST's budgets cost, step by step."""
    # Budgets are logged as they were scaled to meet a target.
    method = make_method(vit, replace(config, alast=replace(config.alast, flops=None, time=None)))
    assert isinstance(method, ALaST)
    cost = BudgetCost(StepFlops(vit), method.config, vit, method.rule, method.keep)
    schedule = Schedule.of(config, run.resolved.num_train, run.resolved.processes)
    costs = []
    for row in rows:
        method.set_progress(schedule.progress(row["step"] - 1))
        budgets = row.get("step_budgets", row["budgets"]) if method.dropping else [1.0] * vit.depth
        costs.append(cost.cost(budgets, row["trained"]))
    return costs


def _counted(vit: ViT, config: FinetuneConfig, size: int) -> float:
    """What a forward and backward pass of one picture costs, without data."""
    make_method(vit, replace(config, grad_checkpointing=False))  # what is computed twice counts once
    vit.set_exact_savings(config.exact_savings, mlp=False)  # GELU is no product, and asks for a device that computes
    vit.set_attention_paths(["explicit"] * vit.depth)  # the counter does not know every fused kernel
    vit.model.train()
    with FlopCounterMode(display=False) as counter:
        logits_of(vit.model(torch.empty(1, 3, size, size, device="meta"))).sum().backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops())


def _across(run: Run) -> float:
    """What both sides of a cut compute of a picture, as the run's summary says."""
    summary = Summary.read(run.folder.summary_file)
    crossed = None if summary is None else summary.traffic
    parts = (None, None) if crossed is None else (crossed.client_flops_per_sample, crossed.server_flops_per_sample)
    if parts[0] is None or parts[1] is None:
        raise DataError("the FLOPs of both sides of the cut are known only where both were in one process")
    return parts[0] + parts[1]
