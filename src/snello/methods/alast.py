"""ALaST: every block of a Vision Transformer gets a compute budget that adapts at every step.

Paper: Adaptive Layer Selection for Efficient Vision Transformer Fine-Tuning, arXiv:2408.08670. Low-budget blocks pass
on fewer tokens and are frozen more often. What was measured as better is the default: tokens are merged in the first
blocks instead of dropped in all, all blocks train, and budgets follow each block's share of the change of the CLS
token. `AlastConfig().published()` is the paper's setting; deviations are in docs/alast.md, each with its reason.
"""

import math
import operator
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from snello.config import AlastConfig, Recipe
from snello.config.registry import RULES
from snello.errors import ConfigError, SnelloWarning, require
from snello.methods import Method, training_share
from snello.methods.budgets import decided, num_blocks, running_mean, towards_shares
from snello.methods.target import CostTarget, StepCost
from snello.vit import ViT
from snello.vit.flops import StepFlops
from snello.vit.rules import make_rule
from snello.vit.times import StepTime, Times

if TYPE_CHECKING:
    from snello.methods.showing import Shown

PAPER_LR = 1e-4


class ALaST:
    """Attaches ALaST to a Vision Transformer inside any training loop.

        with ALaST(model) as alast:
            for batch in loader:
                alast.step()        # once per optimizer step, before its first forward
                ...                 # forward, backward, optimizer step as ever
        # the model is as it was found; without `with`: alast.detach()

    In training mode, block l passes on the share b_l (its budget) of its patch tokens; the others are merged with those
    that stay, or dropped; prefix tokens stay. `step` moves the budgets by what the blocks did to the CLS token,
    delta_l = ||CLS_out - CLS_in||^2, draws the blocks that train, and freezes the others. In eval mode nothing is
    merged, dropped or recorded. Only parameters that require gradients here are ever switched.

    Build the optimizer over all parameters, before the first `step`: a block frozen now trains later.

    Args:
        model: a supported ViT (see `snello.vit.ViT`), or a part of one; not yet compiled or wrapped for data
            parallelism.
        config: the options, each described in `snello.AlastConfig`.
        seed: of the draws.
        times: of a block here (`snello.vit.times.measure_times`), for the option `time`.
        options: the same options one by one; they win over `config`.

    Raises:
        ConfigError: for an option that there is not, or a value out of range.
        ModelError: for a model that is not supported, already attached, or already compiled.
    """

    process_group: "dist.ProcessGroup | None" = None
    """What `step` and `state_dict` take where they are given none."""

    def __init__(
        self,
        model: nn.Module | ViT,
        config: AlastConfig | None = None,
        *,
        seed: int = 0,
        times: Times | None = None,
        **options: Any,
    ) -> None:
        config = (config or AlastConfig()).with_options(options)
        self.vit = model if isinstance(model, ViT) else ViT(model)
        depth = self.vit.depth
        self.num_blocks = num_blocks(config.blocks, depth)
        limit = f"in 1..{depth} (the model's depth)"
        require(self.num_blocks <= depth, "blocks", limit, self.num_blocks, section="alast")
        self.config = config = decided(config, self.vit)
        self.start_budget, self.min_budget = float(config.start_budget or 0), float(config.min_budget or 0)
        assert config.drop_at is not None
        self.drop_at, self.rule = config.drop_at, make_rule(config.rule)
        if self.vit.family.pools_patches and not self.rule.has_places:
            others = " or ".join(name for name in RULES if make_rule(name).has_places)
            rule = f"{others} for this model: its classifier averages patch tokens"
            require(False, "rule", rule, repr(config.rule), section="alast")
        choices = " or ".join(name for name in RULES if not make_rule(name).needs_scores)
        early = f"{choices} with drop_at {self.drop_at}: there is no attention yet to choose by"
        fits = self.drop_at not in ("start", "queries") or not self.rule.needs_scores
        require(fits, "rule", early, config.rule, section="alast")
        self._reducing = set(config.merge_blocks or ())
        within = f"in 0..{depth - 1} (the model's depth less 1)"
        require(max(self._reducing) < depth, "merge_blocks", within, max(self._reducing), section="alast")
        self.dropping = True  # False passes on every token
        self.budgets = [self.start_budget if index in self._reducing else 1.0 for index in range(depth)]
        self.trained = list(range(depth))  # the blocks of the current draw
        self._deltas: list[float] | None = None  # of the step before, or their running mean
        self._records: list[Sequence[Tensor]] = []  # of each forward since the last step, the change in every block
        self._samples: list[int] = []  # of each of those forwards
        self._loaded: tuple[list[list[float]], list[int]] = ([], [])  # what `_pending` returned where a run was cut off
        self._stepped = False
        self._generator = torch.Generator().manual_seed(seed)
        self._parameters = [_places(block) for block in self.vit.blocks]
        self._embeddings = _places(self.vit.model, {id(p) for p in self.vit.embedding_parameters()})
        self._multiple = config.token_multiple or 1
        self.target = self._make_target(times)
        self.vit.attach(self)
        if not config.train_embeddings:
            _set_trainable(self._embeddings, False)

    def __enter__(self) -> "ALaST":
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"ALaST {self.describe()}"

    def describe(self) -> str:
        """What trains at each step, of all there is: `trains 2.1 of 2.7 M parameters, 9 of 12 blocks`."""
        depth = self.vit.depth
        held = {id(p): p.numel() for p in (getattr(*place) for places in self._parameters for place in places)}
        parameters = list(self.vit.model.parameters())
        others = sum(p.numel() for p in parameters if p.requires_grad and id(p) not in held)
        trained = others + round(sum(held.values()) * self.num_blocks / depth)  # blocks are of one size
        return training_share(trained, sum(p.numel() for p in parameters), self.num_blocks, depth)

    @property
    def step_budgets(self) -> list[float]:
        """What this step drops tokens by: the budgets, or those scaled to meet `flops`."""
        scaled = None if self.target is None else self.target.scaled
        used = self.budgets if scaled is None else scaled
        return [budget if index in self._reducing else 1.0 for index, budget in enumerate(used)]

    # What the blocks ask and tell (snello.vit.BlockObserver): they only record, `step` alone moves budgets.

    def num_keep(self, index: int, num_patches: int) -> int:
        """Patch tokens that block `index` passes on: its budget's share, rounded down, at least one."""
        if self.target is not None and index == 0:
            self.target.num_patches = num_patches
        return self.keep(index, self.step_budgets[index], num_patches) if self.dropping else num_patches

    def keep(self, index: int, budget: float, num_patches: int) -> int:
        """The same by a given budget, in steps that drop tokens."""
        if index not in self._reducing:
            return num_patches
        keep = math.floor(budget * num_patches + 1e-6)  # 0.58 * 50 is 28.999... and means 29
        prefix, multiple = self.vit.num_prefix_tokens, self._multiple
        if multiple > 1 and keep < num_patches:
            keep = max(multiple, multiple * round((prefix + keep) / multiple)) - prefix
        return min(num_patches, max(1, keep, self.rule.least_keep(num_patches)))

    def _make_target(self, times: Times | None) -> CostTarget | None:
        config = self.config
        cost: StepCost = StepFlops(self.vit)
        if config.time is not None:
            measured = "left out, or given with times=snello.vit.times.measure_times(...); flops needs none"
            require(times is not None, "time", measured, config.time, section="alast")
            assert times is not None
            cost = StepTime(times, self.vit.depth)
        for option, share in (("flops", config.flops), ("time", config.time)):
            if share is not None:
                return CostTarget(option, share, cost, config, self.vit, self.rule, self.num_blocks, self.keep)
        return None

    def record(self, changes: Sequence[Tensor], num_samples: int = 1) -> None:
        """Remembers delta of every block, () float32 on the model's device, means over samples, until `step`."""
        self._records.append(changes)
        self._samples.append(num_samples)

    def discount(self) -> None:
        """Makes the last forward count for nothing: it was there to keep a rank without samples in step with others."""
        if self._samples:
            self._samples[-1] = 0

    def step(
        self,
        lr: float | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        progress: float | None = None,
        *,
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        """Moves the budgets, draws the blocks that train, freezes the others and drops their gradients.

        Call it once per optimizer step, before its first forward. It waits for the device once.

        Args:
            lr: base learning rate (not the scheduled one), the budgets' step size where `alpha` was not given.
            optimizer: checked to hold every block's parameters; needed for `optimizer_state="release"`.
            progress: share of the training steps that are done, in [0, 1); needed for `full_tail`.
            process_group: the processes that train the model together (`torch.distributed.group.WORLD`): the deltas
                are averaged over them, and each of them has to call this. None: the attribute `process_group`, or where
                that is None too, this process alone.

        Raises:
            ConfigError: where the optimizer lacks parameters of a block, or where one is needed, or progress is.
        """
        process_group = process_group or self.process_group
        self._check_step(optimizer, progress)
        if not self._stepped:
            self._warn(process_group)
        self._stepped = True
        self.vit.require_intact()
        if progress is not None:
            self.set_progress(progress)
        self._move_budgets(lr, process_group)
        self.trained = self._draw()
        if self.target is not None and self.dropping:
            self.target.scale(self.budgets, self.trained)
        self._freeze()
        if optimizer is not None and self.config.optimizer_state == "release":
            for index in set(range(self.vit.depth)).difference(self.trained):
                for place in self._parameters[index]:
                    optimizer.state.pop(getattr(*place), None)

    def set_progress(self, progress: float) -> None:
        """Drops tokens where the tail of the training has not come; `progress`: share of the steps done, in [0, 1)."""
        self.dropping = progress < 1 - self.config.full_tail

    def detach(self) -> None:
        """Leaves the model as it was found: forwards restored, everything that was trainable trainable again."""
        self.vit.detach()
        for parameters in (*self._parameters, self._embeddings):
            _set_trainable(parameters, True)
        self._parameters, self._embeddings = [], []  # no longer its business

    def show(self, image: Any) -> "Shown":
        """Which tokens of a picture the blocks pass on by the budgets of now, block by block; a notebook shows it.

        `image` is a PIL picture, or a tensor (3, H, W): uint8, or float as the model gets it. Training goes on as if
        nothing had been asked. `.save(path)` writes it as an HTML file.
        """
        from snello.methods.showing import show  # who does not look has no need of it

        return show(self, image)

    def summary(self) -> dict[str, Any]:
        """Budgets, drawn blocks and the number of parameters that train now, for logs."""
        parameters = list(self.vit.model.parameters())
        return {
            "budgets": list(self.budgets),
            "trained": list(self.trained),
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "parameters": sum(p.numel() for p in parameters),
        }

    def state_dict(self, process_group: "dist.ProcessGroup | None" = None) -> dict[str, Any]:
        """All that a resumed run needs, as plain numbers and lists (JSON can hold them without loss).

        With a process group, as of `step`, the deltas since the last step are averaged over its processes, each of
        which has to call this. None: they are of this process alone, which may be the only one that saves.
        """
        pending, samples = self._pending(process_group or self.process_group)
        return {
            "budgets": list(self.budgets),
            "target": None if self.target is None else self.target.state_dict(),
            "trained": list(self.trained),
            "deltas": self._deltas,
            "pending": pending,
            "pending_samples": samples,
            "dropping": self.dropping,
            "generator": self._generator.get_state().tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the `state_dict()` of an ALaST with the same settings on a model of the same depth.

        It freezes what the state's draw froze: under data parallelism call it after wrapping the model.

        Raises:
            ConfigError: where the state is of a model of another depth.
        """
        depth = self.vit.depth
        require(len(state["budgets"]) == depth, "the state", f"of a model of {depth} blocks", len(state["budgets"]))
        self.budgets = list(state["budgets"])
        if self.target is not None and state["target"] is not None:
            self.target.load_state_dict(state["target"])
        self.trained = list(state["trained"])
        self._deltas = state["deltas"]
        self._loaded = state["pending"], state["pending_samples"]
        self._records, self._samples = [], []
        self.dropping = state["dropping"]
        self._generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))
        self._freeze()

    def _pending(self, process_group: "dist.ProcessGroup | None") -> tuple[list[list[float]], list[int]]:
        """The deltas since the last step, forwards x blocks, and each forward's samples; waits for the device."""
        rows, samples = self._loaded
        if not self._records:
            return rows, samples
        deltas = torch.stack([torch.stack(list(changes)) for changes in self._records])
        if process_group is None:
            return rows + deltas.tolist(), samples + self._samples
        weights = torch.tensor(self._samples, dtype=deltas.dtype, device=deltas.device)[:, None]
        sums = torch.cat([deltas * weights, weights], dim=1)
        dist.all_reduce(sums, group=process_group)
        values = sums.tolist()
        means = [[value / max(row[-1], 1.0) for value in row[:-1]] for row in values]
        return rows + means, samples + [int(row[-1]) for row in values]

    def _move_budgets(self, lr: float | None, process_group: "dist.ProcessGroup | None") -> None:
        """Moves every budget as `adapt` says, within min_budget..1; the first time only records."""
        rows, samples = self._pending(process_group)
        self._records, self._samples, self._loaded = [], [], ([], [])
        if not any(samples):
            return
        now = [sum(map(operator.mul, samples, column)) / sum(samples) for column in zip(*rows, strict=True)]
        if not all(map(math.isfinite, now)):
            return  # an overflowing forward says nothing about the blocks
        before, self._deltas = self._deltas, now
        if before is None:
            return
        if self.config.adapt == "share":
            self._deltas = running_mean(before, now)
            moves = towards_shares(self.budgets, self._deltas, self.config)
        else:
            alpha = next(value for value in (self.config.alpha, lr, PAPER_LR) if value is not None)
            moves = [alpha * (new - old) for new, old in zip(now, before, strict=True)]
        for index, move in enumerate(moves):
            if index not in self._reducing:
                continue  # it passes on all
            self.budgets[index] = min(1.0, max(self.min_budget, self.budgets[index] + move))

    def _draw(self) -> list[int]:
        """The K blocks that train next, ascending."""
        depth = self.vit.depth
        if self.config.draw == "lowest-first":
            return list(range(depth - self.num_blocks, depth))
        weights = torch.tensor(self.budgets, dtype=torch.float64)
        if self.config.draw == "softmax":
            weights = (weights / self.config.temperature).softmax(0)
        chosen = torch.multinomial(weights, self.num_blocks, replacement=False, generator=self._generator)
        return sorted(chosen.tolist())

    def _freeze(self) -> None:
        for index, places in enumerate(self._parameters):
            _set_trainable(places, index in self.trained)

    def _check_step(self, optimizer: torch.optim.Optimizer | None, progress: float | None) -> None:
        if progress is None and self.config.full_tail > 0:
            raise ConfigError("full_tail needs to know how far training is: call step(progress=...)")
        if optimizer is None:
            if self.config.optimizer_state == "release":
                raise ConfigError('optimizer_state="release" needs the optimizer: call step(optimizer=optimizer)')
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        blocks = enumerate(self._parameters)
        lacking = [index for index, places in blocks if any(id(getattr(*place)) not in held for place in places)]
        if lacking:
            raise ConfigError(
                f"the optimizer lacks parameters of blocks {lacking}, which would never train: "
                "build it from all parameters, before the first step()"
            )

    def _warn(self, process_group: "dist.ProcessGroup | None") -> None:
        """Says at the first step where ALaST would quietly do nothing, or something else on every rank."""
        if not any(block.training for block in self.vit.blocks):
            text = "the model is in eval mode, in which ALaST does nothing: call its train() before the first step()"
            warnings.warn(text, SnelloWarning, stacklevel=3)
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several and process_group is None:
            text = "several processes run, but ALaST was given no process group: each will draw blocks of its own; "
            text += "where they train one model, call step(process_group=torch.distributed.group.WORLD)"
            warnings.warn(text, SnelloWarning, stacklevel=3)


class AlastMethod(ALaST, Method):
    """ALaST in our own training loop."""

    def __init__(self, vit: ViT, config: Recipe, times: Times | None = None) -> None:
        settings, whole = config.alast, vit.top_layer - 1
        if settings.blocks is not None and settings.blocks >= 1 and vit.depth < whole:  # a half trains its share
            settings = replace(settings, blocks=max(1, round(settings.blocks * vit.depth / whole)))
        super().__init__(vit, settings, seed=config.seed, times=times)

    @override
    def num_left(self, num_patches: int) -> int:
        for index in range(self.vit.depth):
            num_patches = self.num_keep(index, num_patches)
        return num_patches

    @override
    def detach(self) -> None:
        ALaST.detach(self)
        Method.detach(self)

    @override
    def metrics(self) -> dict[str, Any]:
        row = {"budgets": list(self.budgets), "trained": list(self.trained)}
        return row if self.target is None else row | {"step_budgets": self.step_budgets}


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
