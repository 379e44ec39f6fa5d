"""The training loop: one for every method, on Accelerate, resumable bit for bit.

Nothing that a run computes depends on how far a process lived: the order of the samples is a function of (seed,
epoch), their augmentation of (seed, epoch, index), the model's own noise (dropout, drop path) of (seed, micro-step),
the learning rate of the step. So a checkpoint holds weights, optimizer state, the method's state and a step number.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from snello import files
from snello.config import FinetuneConfig
from snello.config.values import to_dict
from snello.data import Splits, imbalance
from snello.data.loaders import Batch, batches, eval_loader, eval_transform, train_loader, train_transform
from snello.devices import Precision, autocast, resolve_precision
from snello.errors import ConfigError, TrainingError
from snello.measure import comparison
from snello.methods.lora import merged_state
from snello.models import Preprocessing, architecture_of, create_model, preprocessing
from snello.runs import checkpoint
from snello.runs.folder import RunFolder, flat
from snello.runs.resolved import versions
from snello.seeds import mix
from snello.split import flops as costs
from snello.split.build import codec_text
from snello.split.learner import Cut
from snello.train.display import progress_bar
from snello.train.learner import Learner, MicroStep, Whole
from snello.train.ranks import ALONE, Ranks, make_accelerator, require_alone
from snello.train.schedule import Schedule
from snello.train.scoring import Normalize, Score, score
from snello.train.signals import Interrupted, stopping
from snello.train.tracking import Trackers
from snello.vit import ViT
from snello.vit.attention import faster_attention


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
    right: list[int] = field(default_factory=list)
    """Of each class, the held-out pictures that the weights in model.safetensors recognise."""


class Trainer:
    """One run: model, method, data and where it stands. With several processes, each of them has one."""

    def __init__(
        self,
        config: FinetuneConfig,
        splits: Splits,
        run: RunFolder,
        saved: dict[str, Any],
        console: Console,
        ranks: Ranks = ALONE,
    ) -> None:
        require_alone(config)
        self.config, self.splits, self.run, self.console, self.ranks = config, splits, run, console, ranks
        with ranks.together():
            self.device = ranks.device(saved.get("device", config.device))
        self.precision: Precision = ranks.from_main(
            lambda: resolve_precision(saved.get("precision", config.precision), self.device)
        )
        self.schedule = Schedule(len(splits.train), config.batch_size * ranks.size, config.accumulate, config.epochs)
        torch.manual_seed(mix(config.seed))  # the head's random start
        vit = ViT(ranks.first_here(self._make_model))
        self.preprocessing = preprocessing(vit.model, config.image_size)
        self._architecture = architecture_of(vit.model)
        attention = saved.get("attention", config.attention)
        if attention == "auto":
            attention = ranks.from_main(lambda: faster_attention(vit, config.batch_size, self.device, self.precision))
        vit.set_attention_paths([attention] * vit.depth)
        self.normalize = Normalize(self.preprocessing, self.device)
        self.trackers = Trackers(config.track if ranks.is_main else (), run, flat(to_dict(config)))
        self.progressed = Progressed()
        self._stream: Iterator[MicroStep] | None = None
        self._eval_loader: DataLoader[tuple[Tensor, int]] | None = None
        self._stop: list[int] = []
        self._shown: Callable[[float, float], None] = lambda loss, seconds: None
        resolved = self._resolved(str(attention), saved.get("codec"))
        self.learner = self._make_learner(vit, resolved)
        self.schedule = replace(self.schedule, buffer=self.learner.buffer, max_steps=self.learner.max_steps)
        if saved:
            self._resume(saved, resolved)
        else:
            ranks.on_main(lambda: run.write_config(config, resolved))

    def _make_model(self) -> nn.Module:
        config = self.config
        return create_model(config.model, config.weights, len(self.splits.train.classes), config.image_size)

    def _make_learner(self, vit: ViT, resolved: dict[str, Any]) -> Learner:
        if self.config.split.cut:
            vit.model.to(self.device)
            return Cut(
                vit,
                self.config,
                num_classes=len(self.splits.train.classes),
                device=self.device,
                precision=self.precision,
                codec_text=resolved["codec"],
                step_samples=[self.schedule.num_samples(step) for step in range(self.schedule.steps_per_epoch)],
            )
        return Whole(vit, self.config, make_accelerator(self.device, self.precision, self.ranks))

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the run."""
        return self.schedule.total_steps

    def fit(self) -> None:
        """Trains from where the run stands to its end, evaluating and saving after every epoch."""
        if self.progressed.finished:
            self.console.print("the run was already complete")
            return
        with stopping(patient=self.ranks.size > 1) as self._stop, self._progress_bar():
            while not self.progressed.finished:
                self.advance(1)
                if self.ranks.any(bool(self._stop)) and not self.progressed.finished:
                    self._save_to_stop()
                    raise self.interrupted()

    def interrupted(self) -> Interrupted:
        """What is raised where the run was asked to stop."""
        return Interrupted(
            f"stopped after step {self.progressed.step} of {self.total_steps}; go on with: {self._resume_command()}"
        )

    def _resume_command(self) -> str:
        return self.ranks.command(["finetune", "--out", str(self.run.path), "--resume"])

    def close(self) -> None:
        """Ends trackers, and the processes that load pictures, which the interpreter would else meet at its exit."""
        self.trackers.close()
        self._stream = None
        self._eval_loader = None

    def advance(self, steps: int) -> list[float]:
        """Takes up to `steps` optimizer steps, fewer where the run ends, and returns their losses.

        After the last step of an epoch it evaluates, and it saves whenever a checkpoint is due.
        """
        losses: list[float] = []
        while len(losses) < steps and not self.progressed.finished:
            started = time.perf_counter()
            losses.append(self._step())
            self._shown(losses[-1], time.perf_counter() - started)
            self._after_step()
        return losses

    def evaluate(self) -> Score:
        """Accuracy and mean loss on the held-out pictures."""
        held_out = self.ranks.all_of(self._held_out)
        with autocast(self.device, self.precision):
            return score(
                self.learner.evaluator,
                held_out,
                len(self.splits.train.classes),
                self.normalize,
                self.device,
                self.ranks.total,
            )

    def summary(self) -> dict[str, Any]:
        """The run's result; the costs are None until they are measured."""
        rows = list(self.run.rows("step"))
        return {
            "accuracy": self.progressed.accuracy,
            **self._by_class(),
            "last_accuracy": self.progressed.last_accuracy,
            "best_epoch": self.progressed.best_epoch,
            "epochs": self.progressed.epochs,
            "steps": self.progressed.step,
            "train_time_s": round(sum(row["seconds"] for row in rows), 3),
            **(self._traffic(rows) if self.config.split.cut else comparison.not_measured(self.config.method_name)),
            "num_classes": len(self.splits.train.classes),
            "method": self.config.method_name,
            "model": self.config.model,
            "seed": self.config.seed,
            "device": str(self.device),
            "precision": self.precision,
            "attention": self.run.read_config()[1]["attention"],
            "versions": versions(),
        }

    def _by_class(self) -> dict[str, Any]:
        """What a class contributes to the accuracy of the weights that are kept."""
        counts, at = self.splits.val.counts(), self.progressed
        if not at.right:  # of a run that an older version has begun
            return {"balanced_accuracy": None, "per_class": None}
        kept = Score(at.accuracy, math.nan, tuple(at.right), tuple(counts.values()))
        return {"balanced_accuracy": kept.balanced_accuracy, "per_class": kept.per_class(list(counts))}

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

    def _step(self) -> float:
        """One optimizer step; returns its mean loss."""
        config, step = self.config, self.progressed.step
        if self._stream is None:
            self._stream = self._micro_steps(step)
        started = time.perf_counter()
        num_micro = self.schedule.num_micro(step)
        self.learner.begin(self.schedule.progress(step), num_micro)
        total = torch.zeros((), device=self.device)
        for _ in range(num_micro):
            with self.ranks.together():
                work = next(self._stream)
            total += self._backward(work)
        total = self.ranks.total(total)
        norms = self.learner.clip(config.clip_norm)
        self._require_finite(total, list(norms.values()))
        lr = self.schedule.lr(step, config.lr, config.warmup)
        self.learner.update(lr)
        self.progressed.step = step + 1
        row = {
            "kind": "step",
            "step": step + 1,
            "epoch": self.schedule.epoch(step),
            "loss": float(total),
            "lr": lr,
            **{name: float(norm) for name, norm in norms.items()},
        }
        self._log(row | self.learner.metrics() | {"seconds": round(time.perf_counter() - started, 4)})
        return float(total)

    def _log(self, row: dict[str, Any]) -> None:
        """Writes down a step or an evaluation."""

        def log() -> None:
            self.run.log(row)
            self.trackers.log(row, self.schedule.num_samples(row["step"] - 1))

        self.ranks.on_main(log)

    def _to_device(self, batch: Batch, number: int) -> Batch:
        """A batch as the learner wants it; one that is only there to keep step with other ranks has no labels."""
        images, labels = batch
        labels = labels[: len(self.ranks.share(self.schedule.batch_samples(number)))]
        return self.normalize(images.to(self.device, non_blocking=True)), labels.to(self.device, non_blocking=True)

    def _micro_steps(self, start: int) -> Iterator[MicroStep]:
        """The micro-steps of the run from the step `start` on, loaded as they are asked for."""
        stream = self._training_batches(self.schedule.batches_of(start, 0).start)
        for step in range(start, self.total_steps):
            for micro in range(self.schedule.num_micro(step)):
                numbers = self.schedule.batches_of(step, micro)
                loaded = [self._to_device(next(stream), number) for number in numbers]
                yield MicroStep(loaded, step, micro, self.schedule.num_samples(step), numbers.start, self.ranks.rank)

    def _backward(self, work: MicroStep) -> Tensor:
        torch.manual_seed(work.noise_seed(self.config.seed))
        try:
            return self.learner.backward(
                work.batches,
                step=work.step,
                micro=work.micro,
                num_samples=work.num_samples,
                seed=work.codec_seed(self.config.seed),
            )
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
        if at.step % self.schedule.steps_per_epoch and not last:
            if config.checkpoint_steps and at.step % config.checkpoint_steps == 0:
                self._save()
            return
        at.epochs = self.schedule.epoch(at.step)
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
        result = self.evaluate()
        at.last_accuracy = result.accuracy
        if at.last_accuracy > at.accuracy:
            at.accuracy, at.best_epoch, at.right = at.last_accuracy, at.epochs, list(result.right)
            self.ranks.on_main(self._save_best)
        row: dict[str, Any] = {"kind": "eval", "step": at.step, "epoch": at.epochs}
        row |= {"accuracy": result.accuracy, "balanced_accuracy": result.balanced_accuracy, "loss": result.loss}
        row |= self.learner.eval_metrics()
        self._log(row)
        sent = f", {row['training_bytes'] / 1e6:.2f} MB" if "training_bytes" in row else ""
        text = f"epoch {at.epochs}: accuracy {at.last_accuracy:.2%}, loss {result.loss:.4f}{sent}"
        self.console.print(text, highlight=False)

    # ------------------------------------------------------------------------------------- saving and resuming

    def _save_best(self) -> None:
        for name, module in self.learner.modules.items():
            files.save_tensors(self.run.weights_files[name], merged_state(module))
        if isinstance(self.learner, Whole):
            self.learner.save_adapters(self.run.adapter_folder)

    def _save(self) -> None:
        state = self._state()  # of all ranks
        self.ranks.on_main(lambda: self._write_checkpoint(state))

    def _write_checkpoint(self, state: dict[str, Any]) -> None:
        checkpoint.save_checkpoint(self.run.checkpoint_file, self.learner.modules, self.learner.optimizers, state)
        self._save_method(state)

    def _save_to_stop(self) -> None:
        self._save()

    def _state(self) -> dict[str, Any]:
        return {"progressed": asdict(self.progressed), "learner": self.learner.state_dict()}

    def _save_method(self, state: dict[str, Any]) -> None:
        if "alast" in self.config.method_name and self.progressed.finished:
            files.save_json(self.run.alast_file, state["learner"]["method"])

    def _resume(self, saved: dict[str, Any], resolved: dict[str, Any]) -> None:
        self._require_same_pictures(saved, resolved)
        if not self.ranks.from_main(self.run.checkpoint_file.exists):
            self.ranks.on_main(lambda: self.run.forget_after(0))
            return
        learner = self.learner
        with self.ranks.together():
            state = checkpoint.load_checkpoint(self.run.checkpoint_file, learner.modules, learner.optimizers)
        self._go_on(state)
        self.console.print(f"resuming after step {self.progressed.step} of {self.total_steps}", highlight=False)

    def _go_on(self, state: dict[str, Any]) -> None:
        """Stands where a checkpoint does that has just been loaded."""
        self.trackers.close()  # they begin anew where the run does
        self.learner.load_state_dict(state["learner"])
        self.progressed = Progressed(**state["progressed"])
        self.ranks.on_main(lambda: self.run.forget_after(self.progressed.step))

    def _require_same_pictures(self, saved: dict[str, Any], resolved: dict[str, Any]) -> None:
        if saved["processes"] != self.ranks.size:
            raise ConfigError(
                f"--resume: the run was started with {saved['processes']} processes, now it has {self.ranks.size}: "
                "its batches would be others; start as many"
            )
        changed = [name for name in ("classes", "num_train", "num_val") if saved.get(name) != resolved[name]]
        if changed:
            raise ConfigError(f"--resume: the pictures are not those the run was started with ({', '.join(changed)})")
        for name in ("versions", "threads"):
            if saved[name] != resolved[name]:
                self.console.print(
                    f"resuming with other {name} than the run began with: results may differ in rounding"
                )

    def _resolved(self, attention: str, codec: str | None) -> dict[str, Any]:
        """What was decided from model, data and machine; a resumed run takes it from its config.yaml."""
        return {
            "device": str(self.device) if self.ranks.size == 1 else self.device.type,
            "processes": self.ranks.size,
            "precision": self.precision,
            "attention": attention,
            "threads": torch.get_num_threads(),
            "preprocessing": asdict(self.preprocessing) | _as_lists(self.preprocessing),
            "architecture": self._architecture,
            "classes": list(self.splits.train.classes),
            "num_train": len(self.splits.train),
            "num_val": len(self.splits.val),
            "num_skipped": self.splits.num_skipped,
            "versions": versions(),
        } | ({"codec": codec or codec_text(self.config)} if self.config.split.cut else {})

    # --------------------------------------------------------------------------------------------- data, display

    def _training_batches(self, start: int) -> Iterator[Batch]:
        pre = self.preprocessing
        loader = train_loader(
            self.splits.train,
            train_transform(pre.size, pre.interpolation, self.config.augment),
            batch_size=self.schedule.batch_size,
            epochs=self.schedule.total_epochs,
            seed=self.config.seed,
            start=start,
            share=self.ranks.share,
            workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
        )
        return batches(loader)

    @property
    def _held_out(self) -> Iterator[Batch]:
        if self._eval_loader is None:
            pre = self.preprocessing
            self._eval_loader = eval_loader(
                self.splits.val,
                eval_transform(pre.size, pre.interpolation, pre.crop_pct),
                batch_size=self.config.batch_size,
                share=self.ranks.share,
                workers=self.config.workers,
                pin_memory=self.device.type == "cuda",
            )
        return batches(self._eval_loader)

    def _where(self) -> str:
        if self.ranks.size == 1:
            return str(self.device)
        step = self.schedule.batch_size * self.config.accumulate
        return f"{self.ranks.size} processes ({self.device.type}), {step} pictures a step together"

    @contextmanager
    def _progress_bar(self) -> Iterator[None]:
        self.console.print(
            f"{self.config.model}, {self.config.method_name}, {self.precision} on {self._where()}: "
            f"{len(self.splits.train)} pictures to train, {len(self.splits.val)} held out, "
            f"{len(self.splits.train.classes)} classes ({self.splits.source})",
            highlight=False,
            soft_wrap=True,
        )
        if line := imbalance(self.splits.train):
            self.console.print(line, highlight=False, soft_wrap=True)
        with progress_bar(self.console, total=self.total_steps, completed=self.progressed.step) as bar:

            def show(loss: float, seconds: float) -> None:
                rate = self.schedule.batch_size * self.config.accumulate / seconds
                bar(self.progressed.step, f"loss {loss:.4f}  {rate:.0f} pictures/s{self.learner.said()}")

            before, self._shown = self._shown, show
            yield
            self._shown = before


def _as_lists(pre: Preprocessing) -> dict[str, list[float]]:
    return {"mean": list(pre.mean), "std": list(pre.std)}
