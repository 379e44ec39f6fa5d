"""ALaST: every block of a Vision Transformer gets a compute budget that adapts at every step.

Paper: Adaptive Layer Selection for Efficient Vision Transformer Fine-Tuning, arXiv:2408.08670. Low-budget blocks pass
on fewer tokens and are frozen more often. Deviations, each with its reason in docs/alast.md: the change of the CLS
token is averaged over the batch (the released code sums it), the draw is proportional to the budgets by default, and
tokens are dropped between attention and MLP by default (`drop_at="block-end"` is the published place).
"""

import math
import operator
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from snello.errors import ConfigError
from snello.methods.flop_target import FlopTarget
from snello.vit import DropAt, TokenRule, ViT

Draw = Literal["proportional", "softmax", "lowest-first"]

PAPER_LR = 1e-4


class ALaST:
    """Attaches ALaST to a Vision Transformer inside any training loop.

        alast = ALaST(model, blocks=9, start_budget=0.9, min_budget=0.5, alpha=1e-4, draw="proportional")
        for batch in loader:
            alast.step()            # once per optimizer step, before its first forward
            ...                     # forward, backward, optimizer step as ever
        alast.detach()              # the model is as it was found

    In training mode, block l keeps the share b_l (its budget) of its patch tokens, those with the most attention from
    the CLS token (without one: on average); prefix tokens stay. `step` moves the budgets by the change of
    delta_l = ||CLS_out - CLS_in||^2 since the last step, draws the blocks that train, and freezes the others. In eval
    mode nothing is dropped and nothing recorded. Only parameters that require gradients here are ever switched.

    Build the optimizer over all parameters, before the first `step`: a block frozen now trains later.

    Args:
        model: a supported ViT (see `snello.vit.ViT`), or a part of one; not yet compiled or wrapped for data
            parallelism.
        blocks: blocks that train at each step, K in 1..depth; default: three quarters of the depth.
        start_budget: budget of every block at the start, in (0, 1].
        min_budget: lowest budget, in (0, start_budget].
        alpha: step size of the budgets, >= 0; default: the `lr` given to `step`, or 1e-4 (the paper's) without one.
        draw: `proportional` (to the budgets, without replacement), `softmax` (of budget / temperature), or
            `lowest-first` (always freezes the lowest blocks, where the backward pass costs most to reach).
        temperature: of the softmax draw, > 0.
        drop_at: `mid` drops tokens between attention and MLP, `block-end` after the block (published).
        rule: `drop` discards the tokens with the least attention (published), `merge` averages pairs of tokens that are
            most alike; at most half of a block's, and not in models whose classifier averages patch tokens.
        train_embeddings: whether patch, position and prefix embeddings train.
        flops: what a step that drops tokens costs, as a share of full fine-tuning's FLOPs, in (0, 1]: the budgets
            are scaled by a common factor to meet it, while they adapt underneath. None leaves them as they are.
        token_multiple: rounds the number of kept patch tokens up to a multiple, for few shapes
            under `torch.compile`.
        optimizer_state: `keep` leaves the optimizer's moments of frozen blocks alone; `release` deletes them at each
            `step` (give it the optimizer), so that a block starts with fresh ones when it is drawn again.
        seed: of the draws.

    Raises:
        ConfigError: for a value out of range.
        ModelError: for a model that is not supported, already attached, or already compiled.
    """

    def __init__(
        self,
        model: nn.Module | ViT,
        *,
        blocks: int | None = None,
        start_budget: float = 0.9,
        min_budget: float = 0.5,
        alpha: float | None = None,
        draw: Draw = "proportional",
        temperature: float = 1.0,
        drop_at: DropAt = "mid",
        rule: TokenRule = "drop",
        train_embeddings: bool = True,
        flops: float | None = None,
        token_multiple: int = 1,
        optimizer_state: Literal["keep", "release"] = "keep",
        seed: int = 0,
    ) -> None:
        self.vit = model if isinstance(model, ViT) else ViT(model)
        depth = self.vit.depth
        self.num_blocks = max(1, round(depth * 0.75)) if blocks is None else blocks
        _check(1 <= self.num_blocks <= depth, f"blocks must be in 1..{depth} (the model's depth)", self.num_blocks)
        _check(0 < start_budget <= 1, "start_budget must be in (0, 1]", start_budget)
        _check(0 < min_budget <= start_budget, f"min_budget must be in (0, {start_budget}]", min_budget)
        _check(alpha is None or alpha >= 0, "alpha must be 0 or more", alpha)
        _check(draw in ("proportional", "softmax", "lowest-first"), "draw must be a known one", draw)
        _check(temperature > 0, "temperature must be above 0", temperature)
        _check(drop_at in ("mid", "block-end"), "drop_at must be mid or block-end", drop_at)
        _check(rule in ("drop", "merge"), "rule must be drop or merge", rule)
        if rule == "merge" and self.vit.family.pools_patches:
            raise ConfigError("rule must be drop for this model: its classifier averages patch tokens, got 'merge'")
        _check(token_multiple >= 1, "token_multiple must be at least 1", token_multiple)
        _check(optimizer_state in ("keep", "release"), "optimizer_state must be keep or release", optimizer_state)
        self.min_budget, self.alpha, self.draw, self.temperature = min_budget, alpha, draw, temperature
        self.drop_at, self.token_multiple, self.optimizer_state = drop_at, token_multiple, optimizer_state
        self.rule: TokenRule = rule
        self.dropping = True  # False passes on every token, for a full-token tail
        self.budgets = [start_budget] * depth
        self.trained = list(range(depth))  # the blocks of the current draw
        self._deltas: list[float] | None = None  # of the step before
        self._records: list[list[Tensor]] = [[] for _ in range(depth)]  # one () float32 per forward since the last step
        self._samples: list[int] = []  # of each of those forwards
        self._loaded: tuple[list[list[float]], list[int]] = ([], [])  # what `_pending` said where a run was cut off
        self._generator = torch.Generator().manual_seed(seed)
        self._parameters = [_places(block) for block in self.vit.blocks]
        self._embeddings = _places(self.vit.model, {id(p) for p in self.vit.embedding_parameters()})
        self.target: FlopTarget | None = None
        if flops is not None:
            self.target = FlopTarget(
                flops,
                self.vit,
                num_blocks=self.num_blocks,
                drop_at=drop_at,
                rule=rule,
                train_embeddings=train_embeddings and len(self._embeddings) > 0,
                keep=self._keep,
            )
        self.vit.attach(self)
        if not train_embeddings:
            _set_trainable(self._embeddings, False)

    @property
    def step_budgets(self) -> list[float]:
        """What this step drops tokens by: the budgets, or those scaled to meet `flops`."""
        scaled = None if self.target is None else self.target.scaled
        return list(self.budgets if scaled is None else scaled)

    # What the blocks ask and tell (snello.vit.BlockObserver): they only record, `step` alone moves budgets.

    def num_keep(self, index: int, num_patches: int) -> int:
        """Patch tokens that block `index` passes on: its budget's share, rounded down, at least one."""
        if self.target is not None and index == 0:
            self.target.num_patches = num_patches
        return self._keep(self.step_budgets[index], num_patches) if self.dropping else num_patches

    def _keep(self, budget: float, num_patches: int) -> int:
        keep = max(1, math.floor(budget * num_patches + 1e-6))  # 0.58 * 50 is 28.999... and means 29
        if self.rule == "merge":
            keep = max(keep, num_patches - num_patches // 2)  # in pairs
        return min(num_patches, math.ceil(keep / self.token_multiple) * self.token_multiple)

    def record(self, index: int, change: Tensor, num_samples: int = 1) -> None:
        """Remembers delta of block `index`, () float32 on the model's device, a mean over samples, until `step`."""
        if index == 0:  # a forward begins: what one that broke off half-way left behind does not count
            forwards = min(map(len, self._records))
            for column in self._records:
                del column[forwards:]
            del self._samples[forwards:]
            self._samples.append(num_samples)
        self._records[index].append(change)

    def discount(self) -> None:
        """Makes the last forward count for nothing: it was there to keep a rank without samples in step with others."""
        if self._samples:
            self._samples[-1] = 0

    def step(self, lr: float | None = None, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Moves the budgets, draws the blocks that train, freezes the others and drops their gradients.

        Call it once per optimizer step, before its first forward. It waits for the device once.

        Args:
            lr: base learning rate (not the scheduled one), the budgets' step size where `alpha` was not given.
            optimizer: checked to hold every block's parameters; needed for `optimizer_state="release"`.

        Raises:
            ConfigError: where the optimizer lacks parameters of a block, or `optimizer_state="release"` has none.
        """
        if optimizer is not None:
            self._check_optimizer(optimizer)
        elif self.optimizer_state == "release":
            raise ConfigError('optimizer_state="release" needs the optimizer: call step(optimizer=optimizer)')
        self.vit.require_intact()
        self._move_budgets(lr)
        self.trained = self._draw()
        if self.target is not None and self.dropping:
            self.target.scale(self.budgets, self.trained)
        for index, parameters in enumerate(self._parameters):
            frozen = index not in self.trained
            _set_trainable(parameters, not frozen)
            if frozen and optimizer is not None and self.optimizer_state == "release":
                for module, name in parameters:
                    parameter = getattr(module, name)
                    optimizer.state.pop(parameter, None)

    def detach(self) -> None:
        """Leaves the model as it was found: forwards restored, everything that was trainable trainable again."""
        self.vit.detach()
        for parameters in (*self._parameters, self._embeddings):
            _set_trainable(parameters, True)
        self._parameters, self._embeddings = [], []  # no longer its business

    def summary(self) -> dict[str, Any]:
        """Budgets, drawn blocks and the number of parameters that train now, for logs."""
        parameters = list(self.vit.model.parameters())
        return {
            "budgets": list(self.budgets),
            "trained": list(self.trained),
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "parameters": sum(p.numel() for p in parameters),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as plain numbers and lists (JSON can hold them without loss).

        Under data parallelism every rank has to call it: pending deltas are averaged over ranks.
        """
        return {
            "budgets": list(self.budgets),
            "target": None if self.target is None else self.target.state_dict(),
            "trained": list(self.trained),
            "deltas": self._deltas,
            **dict(zip(("pending", "pending_samples"), self._pending(), strict=True)),
            "dropping": self.dropping,
            "generator": self._generator.get_state().tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict()` of an ALaST with the same settings on a model of the same depth.

        It freezes what the state's draw froze: under data parallelism call it after wrapping the model.

        Raises:
            ConfigError: where the state is of a model of another depth.
        """
        depth = self.vit.depth
        _check(len(state["budgets"]) == depth, f"the state must be of a model of {depth} blocks", len(state["budgets"]))
        self.budgets = list(state["budgets"])
        if self.target is not None and state["target"] is not None:
            self.target.load_state_dict(state["target"])
        self.trained = list(state["trained"])
        self._deltas = state["deltas"]
        self._loaded = state["pending"], state["pending_samples"]
        self._records, self._samples = [[] for _ in range(depth)], []
        self.dropping = state["dropping"]
        self._generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))
        for index, parameters in enumerate(self._parameters):
            _set_trainable(parameters, index in self.trained)

    def _pending(self) -> tuple[list[list[float]], list[int]]:
        """The deltas since the last step, forwards x blocks, means over all ranks, and the samples of each forward.

        Waits for the device.
        """
        rows, samples = self._loaded
        forwards = min(map(len, self._records))  # whole ones only
        if forwards == 0:
            return rows, samples
        deltas = torch.stack([torch.stack(column[:forwards]) for column in self._records], dim=1)
        counts = self._samples[:forwards]
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return rows + deltas.tolist(), samples + counts
        weights = torch.tensor(counts, dtype=deltas.dtype, device=deltas.device)[:, None]
        sums = torch.cat([deltas * weights, weights], dim=1)
        torch.distributed.all_reduce(sums)
        values = sums.tolist()
        return (
            rows + [[value / max(row[-1], 1.0) for value in row[:-1]] for row in values],
            samples + [int(row[-1]) for row in values],
        )

    def _move_budgets(self, lr: float | None) -> None:
        """b_l <- clip(b_l + alpha * (delta_l now - delta_l before), min_budget, 1); the first time only records."""
        rows, samples = self._pending()
        self._records, self._samples, self._loaded = [[] for _ in self.budgets], [], ([], [])
        if not any(samples):
            return
        now = [sum(map(operator.mul, samples, column)) / sum(samples) for column in zip(*rows, strict=True)]
        if not all(map(math.isfinite, now)):
            return  # an overflowing forward says nothing about the blocks
        if self._deltas is not None:
            alpha = next(value for value in (self.alpha, lr, PAPER_LR) if value is not None)
            for index, (new, old) in enumerate(zip(now, self._deltas, strict=True)):
                self.budgets[index] = min(1.0, max(self.min_budget, self.budgets[index] + alpha * (new - old)))
        self._deltas = now

    def _draw(self) -> list[int]:
        """The K blocks that train next, ascending."""
        depth = self.vit.depth
        if self.draw == "lowest-first":
            return list(range(depth - self.num_blocks, depth))
        weights = torch.tensor(self.budgets, dtype=torch.float64)
        if self.draw == "softmax":
            weights = (weights / self.temperature).softmax(0)
        chosen = torch.multinomial(weights, self.num_blocks, replacement=False, generator=self._generator)
        return sorted(chosen.tolist())

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        lacking = [
            index
            for index, parameters in enumerate(self._parameters)
            if any(id(getattr(module, name)) not in held for module, name in parameters)
        ]
        if lacking:
            raise ConfigError(
                f"the optimizer lacks parameters of blocks {lacking}, which would never train: "
                "build it from all parameters, before the first step()"
            )


def _places(root: nn.Module, among: set[int] | None = None) -> list[tuple[nn.Module, str]]:
    """Where the parameters that train stand; not they themselves, which FSDP replaces."""
    return [
        (module, name)
        for module in root.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and (among is None or id(parameter) in among)
    ]


def _set_trainable(places: Iterable[tuple[nn.Module, str]], trainable: bool) -> None:
    """Switches gradients; a frozen parameter loses its gradient, or the next optimizer step would still move it."""
    for module, name in places:
        parameter = getattr(module, name)
        parameter.requires_grad_(trainable)
        if not trainable:
            parameter.grad = None


def _check(ok: bool, rule: str, got: object) -> None:
    if not ok:
        raise ConfigError(f"{rule}, got {got!r}")
