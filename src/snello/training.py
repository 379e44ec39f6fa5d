"""The training loop: one for every method, on Accelerate, resumable bit for bit.

Nothing that a run computes depends on how far a process lived: the order of the samples is a function of (seed,
epoch), their augmentation of (seed, epoch, index), the model's own noise (dropout, drop path) of (seed, micro-step),
the learning rate of the step. So a checkpoint holds weights, optimizer state, the method's state and a step number.

A step is one optimizer step of up to `accumulate` micro-steps; a step never spans two epochs.
"""

import gc
import math
import os
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from snello import checkpoint, comparison, report
from snello.codecs import AUTO
from snello.config import FinetuneConfig
from snello.data import Splits, load_splits, mix
from snello.devices import Precision, autocast, faster_attention, resolve_device, resolve_precision
from snello.errors import ConfigError, SnelloWarning, TrainingError
from snello.inference import Normalize, score
from snello.learners import Learner, Whole
from snello.loading import Batch, batches, eval_loader, eval_transform, train_loader, train_transform
from snello.models import Preprocessing, create_model, preprocessing
from snello.optim import lr_factor
from snello.runs import RunFolder, require_same_config
from snello.split import costs
from snello.split.cut import Cut
from snello.vit import ViT

# These keep the seeds of the model's noise and the codec's apart from those of order and augmentation.
NOISE, CODEC = 1, 2


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM), has saved a checkpoint, and can be resumed."""


def finetune(config: FinetuneConfig, console: Console | None = None) -> dict[str, Any]:
    """Fine-tunes as `config` says and returns the summary that it saves in the run folder.

    Raises:
        SnelloError: for input that cannot be used, before anything is written; TrainingError where the loss is not
            finite, with the last good checkpoint kept.
        Interrupted: after Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    console = console or Console(stderr=True)
    run = RunFolder.of(config)
    saved: dict[str, Any] = {}
    if config.resume:
        saved_config, saved = run.read_config()
        require_same_config(saved_config, config, run.path)
    splits = load_splits(
        config.data,
        val_share=config.val_share,
        seed=config.seed,
        skip_bad=config.skip_bad,
        check=config.check_pictures,
    )
    with warnings_on(console):
        trainer = Trainer(config, splits, run, saved, console)
        trainer.fit()
    summary = trainer.summary()
    checkpoint.save_json(run.summary_file, summary)  # safe before the comparison, which may take long
    report.print_result(console, summary, splits.num_skipped)
    if config.method == "alast":
        report.plot_budgets(run)
    if config.split.cut:
        report.print_traffic(console, summary)
        report.plot_traffic(run)
    elif config.compare:
        state = trainer.learner.state_dict()["method"]
        del trainer  # its memory is the comparison's
        gc.collect()
        costs = comparison.compare(config, summary, state)
        summary |= costs.summary()
        checkpoint.save_json(run.summary_file, summary)
        report.print_costs(console, costs)
    console.print(f"run folder: {run.path}", highlight=False, soft_wrap=True)
    return summary


@dataclass
class Progressed:
    """How far a run has come; saved in every checkpoint."""

    step: int = 0
    accuracy: float = -1.0
    """Best held-out accuracy so far, of the weights in model.safetensors."""
    best_epoch: int = 0
    last_accuracy: float = -1.0
    epochs: int = 0
    """Epochs trained."""
    finished: bool = False


class Trainer:
    """One run: model, method, data and where it stands."""

    def __init__(
        self, config: FinetuneConfig, splits: Splits, run: RunFolder, saved: dict[str, Any], console: Console
    ) -> None:
        self.config, self.splits, self.run, self.console = config, splits, run, console
        self.device = resolve_device(saved.get("device", config.device))
        self.precision: Precision = resolve_precision(saved.get("precision", config.precision), self.device)
        torch.manual_seed(mix(config.seed))  # the head's random start
        model = create_model(config.model, config.weights, len(splits.train.classes), config.image_size)
        vit = ViT(model)
        self.preprocessing = preprocessing(model, config.image_size)
        attention = saved.get("attention", config.attention)
        if attention == "auto":
            attention = faster_attention(vit, config.batch_size, self.device, self.precision)
        vit.set_attention_paths([attention] * vit.depth)
        self.normalize = Normalize(self.preprocessing, self.device)
        self.progressed = Progressed()
        self._stream: Iterator[Batch] | None = None
        resolved = self._resolved(str(attention), saved.get("codec"))
        self.learner = self._make_learner(vit, resolved)
        if saved:
            self._resume(saved, resolved)
        else:
            run.write_config(config, resolved)

    def _make_learner(self, vit: ViT, resolved: dict[str, Any]) -> Learner:
        if self.config.split.cut:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise ConfigError("--split.cut trains both halves in one process: start it without torchrun")
            vit.model.to(self.device)
            return Cut(
                vit,
                self.config,
                num_classes=len(self.splits.train.classes),
                device=self.device,
                precision=self.precision,
                codec_text=resolved["codec"],
                step_samples=[self._num_samples(step) for step in range(self.steps_per_epoch)],
            )
        return Whole(vit, self.config, make_accelerator(self.device, self.precision))

    @property
    def micro_per_epoch(self) -> int:
        """Micro-steps in an epoch."""
        return math.ceil(len(self.splits.train) / self.config.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the last may have fewer micro-steps."""
        return math.ceil(self.micro_per_epoch / self.config.accumulate)

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the run; a budget of traffic decides alone."""
        return self.learner.max_steps or self.config.epochs * self.steps_per_epoch

    @property
    def epochs(self) -> int:
        """Epochs that those steps begin."""
        return math.ceil(self.total_steps / self.steps_per_epoch)

    def _num_samples(self, index: int) -> int:
        """Pictures in the `index`-th step of an epoch."""
        per_step = self.config.batch_size * self.config.accumulate
        return min(per_step, len(self.splits.train) - index * per_step)

    def fit(self) -> None:
        """Trains from where the run stands to its end, evaluating and saving after every epoch."""
        if self.progressed.finished:
            self.console.print("the run was already complete")
            return
        with stopping() as stop, self._progress_bar() as (bar, task):
            while not self.progressed.finished:
                started = time.perf_counter()
                (loss,) = self.advance(1)
                rate = self.config.batch_size * self.config.accumulate / (time.perf_counter() - started)
                bar.update(task, advance=1, loss=loss, rate=rate)
                if stop and not self.progressed.finished:
                    self._save()
                    raise Interrupted(
                        f"stopped after step {self.progressed.step} of {self.total_steps}; "
                        f"go on with: snello finetune --out {self.run.path} --resume"
                    )

    def advance(self, steps: int) -> list[float]:
        """Takes up to `steps` optimizer steps, fewer where the run ends, and returns their losses.

        After the last step of an epoch it evaluates, and it saves whenever a checkpoint is due.
        """
        if self._stream is None:
            epoch, done = divmod(self.progressed.step, self.steps_per_epoch)
            self._stream = self._training_batches(epoch * self.micro_per_epoch + done * self.config.accumulate)
        losses: list[float] = []
        while len(losses) < steps and not self.progressed.finished:
            losses.append(self._step(self._stream))
            self._after_step()
        return losses

    def evaluate(self) -> tuple[float, float]:
        """Accuracy in [0, 1] and mean loss on the held-out pictures."""
        with autocast(self.device, self.precision):
            return score(self.learner.evaluator, self._held_out, self.normalize, self.device)

    def summary(self) -> dict[str, Any]:
        """The run's result; the costs are None until they are measured."""
        rows = list(self.run.rows("step"))
        return {
            "accuracy": self.progressed.accuracy,
            "last_accuracy": self.progressed.last_accuracy,
            "best_epoch": self.progressed.best_epoch,
            "epochs": self.progressed.epochs,
            "steps": self.progressed.step,
            "train_time_s": round(sum(row["seconds"] for row in rows), 3),
            **(self._traffic(rows) if self.config.split.cut else comparison.NOT_MEASURED),
            "num_classes": len(self.splits.train.classes),
            "method": self.config.method,
            "model": self.config.model,
            "seed": self.config.seed,
            "device": str(self.device),
            "precision": self.precision,
            "attention": self.run.read_config()[1]["attention"],
            "versions": versions(),
        }

    def _traffic(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """What a cut adds to the result: bytes, seconds of each side and of the link, FLOPs of each side."""
        timed = ("client_seconds", "server_seconds", "link_seconds")
        seconds = {name: round(sum(row[name] for row in rows), 3) for name in timed if rows and name in rows[0]}
        state = self.learner.state_dict()["method"]
        return {
            **self.learner.summary(),
            **seconds,
            "jpeg_bytes": self.splits.train.file_bytes(),
            **costs.flops(self.config, self.learner.summary()["codec"], len(self.splits.train.classes), state),
        }

    # ------------------------------------------------------------------------------------------------- one step

    def _step(self, stream: Iterator[Batch]) -> float:
        """One optimizer step; returns its mean loss."""
        config, step = self.config, self.progressed.step
        started = time.perf_counter()
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * config.accumulate
        last = min(first + config.accumulate, self.micro_per_epoch)
        num_samples = self._num_samples(index)
        self.learner.begin(step / self.total_steps)
        total = torch.zeros((), device=self.device)
        for micro, begin in enumerate(range(first, last, self.learner.buffer)):
            batches = [self._to_device(next(stream)) for _ in range(min(self.learner.buffer, last - begin))]
            at = epoch * self.micro_per_epoch + begin
            torch.manual_seed(mix(config.seed, NOISE, at))
            seed = mix(config.seed, CODEC, at)
            total += self._backward(batches, step=step, micro=micro, num_samples=num_samples, seed=seed)
        norms = self.learner.clip(config.clip_norm)
        self._require_finite(total, list(norms.values()))
        lr = config.lr * lr_factor(step, self.total_steps, config.warmup)
        self.learner.update(lr)
        self.progressed.step = step + 1
        row = {
            "kind": "step",
            "step": step + 1,
            "epoch": epoch,
            "loss": float(total),
            "lr": lr,
            **{name: float(norm) for name, norm in norms.items()},
        }
        self.run.log(row | self.learner.metrics() | {"seconds": round(time.perf_counter() - started, 4)})
        return float(total)

    def _to_device(self, batch: Batch) -> Batch:
        images, labels = batch
        return self.normalize(images.to(self.device, non_blocking=True)), labels.to(self.device, non_blocking=True)

    def _backward(self, batches: list[Batch], **options: Any) -> Tensor:
        try:
            return self.learner.backward(batches, **options)
        except TrainingError as error:
            raise self._stopped(str(error)) from error

    def _require_finite(self, loss: Tensor, norms: list[Tensor]) -> None:
        """Stops before weights are touched. Under fp16 an overflowing gradient is the scaler's to handle."""
        bad = "loss" if not loss.isfinite() else "gradient" if not all(norm.isfinite() for norm in norms) else None
        if bad == "loss" or (bad and self.precision != "fp16"):
            raise self._stopped(f"the {bad} is not finite")

    def _stopped(self, why: str) -> TrainingError:
        kept = f"the last good checkpoint is {self.run.checkpoint_file}"
        if not self.run.checkpoint_file.exists():
            kept = "no checkpoint had been saved yet"
        return TrainingError(
            f"{why} at step {self.progressed.step + 1}; {kept}; try a lower --lr, more --warmup, or --precision fp32"
        )

    def _after_step(self) -> None:
        """At the end of an epoch evaluates, and saves a checkpoint whenever one is due."""
        at, config = self.progressed, self.config
        last = at.step == self.total_steps or self.learner.spent(at.step)
        if at.step % self.steps_per_epoch and not last:
            if config.checkpoint_steps and at.step % config.checkpoint_steps == 0:
                self._save()
            return
        at.epochs = at.step // self.steps_per_epoch
        at.finished = last
        if last or at.epochs % config.eval_epochs == 0:
            self._evaluate_epoch()
            if not last and config.patience and at.epochs - at.best_epoch >= config.patience:
                at.finished = True
                self.console.print(f"stopped early: no better accuracy in {config.patience} epochs", highlight=False)
        self._save()

    def _evaluate_epoch(self) -> None:
        """Evaluates on the held-out pictures, and keeps the weights where they are the best so far."""
        at = self.progressed
        at.last_accuracy, loss = self.evaluate()
        if at.last_accuracy > at.accuracy:
            at.accuracy, at.best_epoch = at.last_accuracy, at.epochs
            files = {"model": self.run.model_file, "codec": self.run.codec_file}
            for name, module in self.learner.modules.items():
                checkpoint.save_tensors(files[name], module.state_dict())
        row: dict[str, Any] = {"kind": "eval", "step": at.step, "epoch": at.epochs}
        row |= {"accuracy": at.last_accuracy, "loss": loss}
        row |= self.learner.eval_metrics()
        self.run.log(row)
        sent = f", {row['training_bytes'] / 1e6:.2f} MB" if "training_bytes" in row else ""
        text = f"epoch {at.epochs}: accuracy {at.last_accuracy:.2%}, loss {loss:.4f}{sent}"
        self.console.print(text, highlight=False)

    # ------------------------------------------------------------------------------------- saving and resuming

    def _save(self) -> None:
        learner = self.learner.state_dict()
        state = {"progressed": asdict(self.progressed), "learner": learner}
        checkpoint.save_checkpoint(self.run.checkpoint_file, self.learner.modules, self.learner.optimizers, state)
        if self.config.method == "alast" and self.progressed.finished:
            checkpoint.save_json(self.run.alast_file, learner["method"])

    def _resume(self, saved: dict[str, Any], resolved: dict[str, Any]) -> None:
        changed = [name for name in ("classes", "num_train", "num_val") if saved.get(name) != resolved[name]]
        if changed:
            raise ConfigError(f"--resume: the pictures are not those the run was started with ({', '.join(changed)})")
        for name in ("versions", "threads"):
            if saved[name] != resolved[name]:
                self.console.print(
                    f"resuming with other {name} than the run began with: results may differ in rounding"
                )
        if not self.run.checkpoint_file.exists():
            self.run.forget_after(0)
            return
        learner = self.learner
        state = checkpoint.load_checkpoint(self.run.checkpoint_file, learner.modules, learner.optimizers)
        learner.load_state_dict(state["learner"])
        self.progressed = Progressed(**state["progressed"])
        self.run.forget_after(self.progressed.step)
        self.console.print(f"resuming after step {self.progressed.step} of {self.total_steps}", highlight=False)

    def _resolved(self, attention: str, codec: str | None) -> dict[str, Any]:
        """What was decided from model, data and machine; a resumed run takes it from its config.yaml."""
        return {
            "device": str(self.device),
            "precision": self.precision,
            "attention": attention,
            "threads": torch.get_num_threads(),
            "preprocessing": asdict(self.preprocessing) | _as_lists(self.preprocessing),
            "classes": list(self.splits.train.classes),
            "num_train": len(self.splits.train),
            "num_val": len(self.splits.val),
            "num_skipped": self.splits.num_skipped,
            "versions": versions(),
        } | ({"codec": codec or self._codec_text()} if self.config.split.cut else {})

    def _codec_text(self) -> str:
        text = self.config.split.codec
        return AUTO if text.strip() == "auto" else text

    # --------------------------------------------------------------------------------------------- data, display

    def _training_batches(self, start: int) -> Iterator[Batch]:
        pre = self.preprocessing
        loader = train_loader(
            self.splits.train,
            train_transform(pre.size, pre.interpolation, self.config.augment),
            batch_size=self.config.batch_size,
            epochs=self.epochs,
            seed=self.config.seed,
            start=start,
            workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
        )
        return batches(loader)

    @property
    def _held_out(self) -> Iterator[Batch]:
        if not hasattr(self, "_eval_loader"):
            pre = self.preprocessing
            self._eval_loader = eval_loader(
                self.splits.val,
                eval_transform(pre.size, pre.interpolation, pre.crop_pct),
                batch_size=self.config.batch_size,
                workers=self.config.workers,
                pin_memory=self.device.type == "cuda",
            )
        return batches(self._eval_loader)

    @contextmanager
    def _progress_bar(self) -> Iterator[tuple[Progress, Any]]:
        self.console.print(
            f"{self.config.model}, {self.config.method}, {self.precision} on {self.device}: "
            f"{len(self.splits.train)} pictures to train, {len(self.splits.val)} held out, "
            f"{len(self.splits.train.classes)} classes ({self.splits.source})",
            highlight=False,
            soft_wrap=True,
        )
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.0f} pictures/s"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as bar:
            start = self.progressed.step
            yield bar, bar.add_task("training", total=self.total_steps, completed=start, loss=math.nan, rate=0.0)


def make_accelerator(device: torch.device, precision: Precision) -> Accelerator:
    """An Accelerator on `device`; what an earlier run in this process set up is forgotten first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    before = os.environ.get("ACCELERATE_TORCH_DEVICE")
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(
        device
    )  # the one way to name a device that it honours on every back end
    try:
        return Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=device.type == "cpu")
    finally:
        del os.environ["ACCELERATE_TORCH_DEVICE"]
        if before is not None:
            os.environ["ACCELERATE_TORCH_DEVICE"] = before


@contextmanager
def warnings_on(console: Console) -> Iterator[None]:
    """Prints snello's own warnings as one line on `console`."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, SnelloWarning):
                console.print(f"warning: {message}", highlight=False, soft_wrap=True)
            else:
                shown(message, category, *where, **more)

        warnings.showwarning = show
        yield


@contextmanager
def stopping() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C or SIGTERM asks to stop; a second Ctrl-C stops at once.

    Outside the main thread signals cannot be caught: there the list stays empty.
    """
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        before = {}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {name: version(name) for name in ("snello", "torch", "torchvision", "timm", "accelerate")}


def _as_lists(pre: Preprocessing) -> dict[str, list[float]]:
    return {"mean": list(pre.mean), "std": list(pre.std)}
