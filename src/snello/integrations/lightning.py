"""ALaST in `lightning.Trainer`.

ALaST is attached when the module is on its device and wrapped, and freezes nothing before the first batch, so optimizer
and DDP know every parameter.
"""

from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
except ModuleNotFoundError as error:
    raise ImportError(
        f"snello.integrations.lightning needs lightning ({error.name} is missing): pip install 'snello[lightning]'"
    ) from error

import torch

from snello.errors import ConfigError, ModelError
from snello.integrations.attachment import Attachment, Log
from snello.methods.alast import ALaST
from snello.vit import ViT


class ALaSTCallback(Callback):  # type: ignore[misc]
    """ALaST while `Trainer.fit` runs: `Trainer(..., callbacks=[ALaSTCallback(blocks=9, start_budget=0.9)])`.

    When fitting ends, also by an error, the model is as it was found. The step size of the budgets defaults to the
    base learning rate. Checkpoints hold the state; `trainer.fit(..., ckpt_path=...)` goes on exactly, as far as the
    data loader does. Budgets and trained blocks go to the Trainer's loggers, every `log_every_n_steps`.

    Args:
        module: the attribute of the LightningModule that is the Vision Transformer (see `snello.vit.ViT`), as in
            `backbone` or `student.vit`; default: the only one of its children that is one.
        log: `blocks` logs the budget of every block and which train, `mean` the mean and lowest budget, `none` nothing.
        options: of `snello.ALaST`, and its `seed`.

    Raises:
        ConfigError: for an option or a value that ALaST does not take; when fitting starts, for a strategy that it
            cannot be right under.
        ModelError: when fitting starts, where there is not one supported Vision Transformer, or it is in eval mode.
        CheckpointError: when fitting starts, for a checkpoint without ALaST, or with other settings.
    """

    def __init__(self, *, module: str | None = None, log: Log = "blocks", **options: Any) -> None:
        self._attachment = Attachment(options, log)
        self._module = module
        self._optimizer: torch.optim.Optimizer | None = None
        self._total = float("inf")  # optimizer steps
        self._drawn_at: int | None = None  # the optimizer steps done when ALaST's last step was
        self._resuming = False
        self._loaded: Any = None

    @property
    def alast(self) -> ALaST | None:
        """ALaST, once fitting has begun, and also after it."""
        return self._attachment.alast

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets what another run left."""
        self._resuming, self._loaded, self._drawn_at = False, None, None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remembers the state in a checkpoint that is to be resumed."""
        self._resuming, self._loaded = True, checkpoint["callbacks"].get(self.state_key)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches ALaST, and resumes from the checkpoint."""
        _check_strategy(trainer.strategy)
        self._attachment.detach()
        self._attachment.attach(_find(pl_module, self._module))
        if self._resuming:
            self._attachment.resume(self._loaded and self._loaded["snello"])
            self._drawn_at = self._loaded["drawn_at"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the blocks' optimizer and checks that the model is to be trained."""
        vit = self._attachment.attached.vit
        if not all(block.training for block in vit.blocks):
            raise ModelError("the Vision Transformer is in eval mode, in which ALaST does nothing: call its train()")
        self._total = trainer.estimated_stepping_batches
        if self._attachment.config.full_tail and self._total == float("inf"):
            raise ConfigError("full_tail needs to know where training ends: give the Trainer max_epochs or max_steps")
        blocks = {id(parameter) for block in vit.blocks for parameter in block.parameters()}
        holding = [o for o in trainer.optimizers if any(id(p) in blocks for g in o.param_groups for p in g["params"])]
        self._optimizer = (holding or trainer.optimizers)[0]
        if not self._resuming:
            self._attachment.begin(self._optimizer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before the first batch of an optimizer step: moves the budgets, draws the blocks, and logs both."""
        step = trainer.global_step
        if step != self._drawn_at:
            assert self._optimizer is not None
            self._attachment.step(self._optimizer, step, self._total)
            self._drawn_at = step
        if trainer.log_every_n_steps and (step + 1) % trainer.log_every_n_steps == 0:
            pl_module.log_dict(self._attachment.metrics(), on_step=True, on_epoch=False, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        """What the Trainer writes into a checkpoint: ALaST's state, as `snello`."""
        if self._attachment.alast is None:
            return {}
        return {"snello": self._attachment.state(together=True), "drawn_at": self._drawn_at}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detaches ALaST."""
        self._attachment.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detaches ALaST."""
        self._attachment.detach()


def _check_strategy(strategy: Any) -> None:
    if isinstance(strategy, DDPStrategy):
        options = strategy._ddp_kwargs
        if options.get("find_unused_parameters") and not options.get("static_graph"):
            return
        raise ConfigError(
            "ALaST freezes other blocks at every step: with several processes use "
            'Trainer(strategy="ddp_find_unused_parameters_true"), without static_graph'
        )
    if not isinstance(strategy, SingleDeviceStrategy):
        raise ConfigError(
            f"ALaST does not work under {type(strategy).__name__}: use one device, or "
            'strategy="ddp_find_unused_parameters_true"'
        )


def _find(pl_module: LightningModule, name: str | None) -> ViT:
    """The Vision Transformer called `name` in the module, or the only one among its children."""
    if name is not None:
        try:
            return ViT(pl_module.get_submodule(name))
        except AttributeError:
            raise ModelError(f"the LightningModule has no module {name!r}") from None
    found: dict[str, ViT] = {}
    refused: dict[str, ModelError] = {}
    children = dict(pl_module.named_children())
    for child, module in children.items():
        try:
            found[child] = ViT(module)
        except ModelError as error:
            refused[child] = error
    if len(found) == 1:
        return next(iter(found.values()))
    name_it = 'name it, as in ALaSTCallback(module="backbone")'
    if found:
        raise ModelError(f"the LightningModule has several Vision Transformers ({', '.join(found)}): {name_it}")
    if not refused:
        what = "no modules among its attributes, so no Vision Transformer"
        raise ModelError(f"the LightningModule has {what}: {name_it}")
    largest = max(refused, key=lambda child: sum(p.numel() for p in children[child].parameters()))
    raise ModelError(f"{largest} of the LightningModule, its largest module: {refused[largest]}; or {name_it}")
