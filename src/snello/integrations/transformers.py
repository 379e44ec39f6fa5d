"""ALaST in `transformers.Trainer`.

The Trainer calls a callback for the first time after it has built the optimizer and wrapped the model. That is early
enough: ALaST freezes nothing before its first step, so optimizer and DDP know every parameter, and a compiled model is
traced at its first forward only.

The step for the next optimizer step is done at the end of the one before it, not when that begins: then no deltas are
pending when a checkpoint is saved, which only one process does, and which would have its own deltas alone.

The Trainer saves a model under the names that the hub knows, and reads checkpoints under those of the code. Where they
differ, as for ViT, it would continue with fresh blocks (huggingface/transformers#48805): while we are attached it saves
under the names of the code.
"""

import functools
from typing import Any

try:
    from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
    from transformers.training_args import ParallelMode
except ModuleNotFoundError as error:
    raise ImportError(
        f"snello.integrations.transformers needs transformers ({error.name} is missing): pip install 'snello[hf]'"
    ) from error

from snello.errors import ConfigError
from snello.integrations.attachment import Attachment, Log
from snello.methods.alast import ALaST


class ALaSTCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """ALaST while `Trainer` trains: `Trainer(..., callbacks=[ALaSTCallback(blocks=9, start_budget=0.9)])`.

    The model may be one that `snello.vit.ViT` supports, or peft's around it; when training ends it is as it was found.
    After an error, for which the Trainer has no event, call `detach`, or train again. The step size of the budgets
    defaults to the base learning rate. Checkpoints hold the state; `trainer.train(resume_from_checkpoint=...)` goes on
    exactly.

    Budgets and trained blocks are in the Trainer's `log_history` and in what callbacks after this one are told.

    Args:
        log: `blocks` logs the budget of every block and which train, `mean` the mean and lowest budget, `none` nothing.
        options: of `snello.ALaST`, and its `seed`.

    Raises:
        ConfigError: for an option or a value that ALaST does not take; when training starts, for a kind of parallelism
            that it cannot be right under.
        CheckpointError: when training starts, for a checkpoint without ALaST, or with other settings.
    """

    def __init__(self, *, log: Log = "blocks", **options: Any) -> None:
        self._attachment = Attachment(options, log)
        self._metrics: dict[str, float] = {}
        self._model: PreTrainedModel | None = None  # the one that saves under the names of the code
        self.snello: dict[str, Any] | None = None
        """What the Trainer hands over with `restore_callback_states_from_checkpoint`; resuming does not need that."""

    @property
    def alast(self) -> ALaST | None:
        """ALaST, once training has begun, and also after it."""
        return self._attachment.alast

    def detach(self) -> None:
        """Leaves the model as it was found."""
        self._attachment.detach()
        if self._model is not None:
            del self._model.save_pretrained
            self._model = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attaches ALaST, and resumes from the checkpoint or draws the first blocks."""
        _check_parallelism(args)
        self.detach()  # where an error ended the training before
        kwargs["model"].train()  # the Trainer does it too, but only after ALaST's first step
        self._attachment.attach(kwargs["model"])
        try:
            if isinstance(kwargs["model"], PreTrainedModel):
                self._model = kwargs["model"]
                self._model.save_pretrained = functools.partial(self._model.save_pretrained, save_original_format=False)
            if state.global_step > 0:
                saved = state.stateful_callbacks.get(type(self).__name__, {})
                saved = saved[0] if isinstance(saved, list) else saved
                self._attachment.resume(saved.get("attributes", {}).get("snello"))
                self._attachment.attached.set_progress(state.global_step / state.max_steps)
            else:
                self._attachment.begin(kwargs["optimizer"])
                self._attachment.step(kwargs["optimizer"], 0, state.max_steps)
        except Exception:
            self.detach()
            raise

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the budgets and draws the blocks for the next optimizer step."""
        self._metrics = self._attachment.metrics()  # those that the step ran with
        self._attachment.step(kwargs["optimizer"], state.global_step, state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds budgets and trained blocks to what is logged with the training loss."""
        if logs is not None and "loss" in logs:
            logs.update(self._metrics)
            state.log_history[-1].update(self._metrics)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detaches ALaST."""
        self.detach()

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into `trainer_state.json`: under `attributes`, as `snello`."""
        attachment = self._attachment
        snello = None if attachment.alast is None else attachment.state(together=False)
        return {"args": {**attachment.options, "log": attachment.log}, "attributes": {"snello": snello}}


def _check_parallelism(args: TrainingArguments) -> None:
    if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
        raise ConfigError("ALaST does not work under FSDP or DeepSpeed: use one device, or DDP (torchrun)")
    if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
        raise ConfigError(
            "ALaST does not work under nn.DataParallel: start one process per GPU (torchrun), or show it one GPU only "
            "(CUDA_VISIBLE_DEVICES=0)"
        )
    if args.parallel_mode == ParallelMode.DISTRIBUTED and (
        args.ddp_find_unused_parameters is not True or args.ddp_static_graph
    ):
        raise ConfigError(
            "ALaST freezes other blocks at every step: with several processes set "
            "TrainingArguments(ddp_find_unused_parameters=True), without ddp_static_graph"
        )
