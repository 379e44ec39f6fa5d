"""The training loop: one for every method, on Accelerate, resumable bit for bit.

Nothing that a run computes depends on how far a process lived: the order of the samples is a function of (seed,
epoch), their augmentation of (seed, epoch, index), the model's own noise (dropout, drop path) of (seed, micro-step),
the learning rate of the step. So a checkpoint holds weights, optimizer state, the method's state and a step number.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from snello.config import FinetuneConfig
from snello.config.values import to_dict
from snello.data import Splits, imbalance
from snello.data.loaders import Batch, batches, eval_loader, eval_transform, train_loader, train_transform
from snello.devices import Precision, autocast, resolve_precision
from snello.errors import ConfigError, TrainingError
from snello.methods.budgets import decided
from snello.models import architecture_of, preprocessing
from snello.runs.folder import flat
from snello.runs.resolved import Resolved, machine
from snello.runs.summary import Summary, Traffic
from snello.seeds import mix
from snello.train.display import progress_bar, say, toy_note
from snello.train.learner import MicroStep
from snello.train.place import GoBack, Place, Progress, Setup, State
from snello.train.predictions import Predictions
from snello.train.ranks import ALONE, Ranks
from snello.train.schedule import Schedule
from snello.train.scoring import Normalize, Score, no_one, score
from snello.train.signals import Interrupted, stopping
from snello.train.tracking import Trackers
from snello.vit import ViT
from snello.vit.attention import faster_attention
from snello.vit.rules import make_rule
from snello.vit.times import Times, measure_times

SAVE_SECONDS = 60.0
"""Between checkpoints while another side takes its last steps."""


class Trainer:
    """One run: model, method, data and where it stands. With several processes, each of them has one.

    Raises:
        SnelloError: for input that cannot be used; nothing has been written.
    """

    def __init__(
        self, config: FinetuneConfig, splits: Splits, place: Place, console: Console, ranks: Ranks = ALONE
    ) -> None:
        self.config, self.splits, self.place, self.console, self.ranks = config, splits, place, console, ranks
        self.run, saved = place.run, place.saved
        with ranks.together():
            self.device = ranks.device(saved.device if saved else config.device)
        self.precision: Precision = ranks.from_main(
            lambda: resolve_precision(saved.precision if saved else config.precision, self.device)
        )
        self.schedule = Schedule.of(config, len(splits.train), ranks.size)
        torch.manual_seed(mix(config.seed))  # the head's random start
        num_classes = len(splits.train.classes)
        vit = ViT(ranks.first_here(lambda: place.make_model(num_classes)))
        self.preprocessing = preprocessing(vit.model, config.image_size)
        self.normalize = Normalize(self.preprocessing, self.device)
        self.resolved = self._resolve(vit, saved)
        self.trackers = Trackers(config.track if ranks.is_main else (), self.run, flat(to_dict(config)))
        self.progress = Progress()
        self._stream: Iterator[MicroStep] | None = None
        self._loading: dict[str, Any] = {"share": ranks.share, "workers": config.workers}
        self._loading["pin_memory"] = self.device.type == "cuda"
        self._eval_loader: DataLoader[tuple[Tensor, int]] | None = None
        self._predictions: Predictions | None = None  # of the last evaluation
        self._stop: list[int] = []
        self._saved = time.monotonic()
        self._show: Callable[[int, str], None] = lambda done, text: None
        if saved:
            self._require_same_pictures(saved)
        setup = Setup(
            config,
            num_classes,
            self.device,
            self.precision,
            self.schedule,
            self.resolved.codec,
            self.resolved.times,
            ranks,
            self._stop,
            self.run,
        )
        try:
            self._begin(vit, setup)
        except BaseException:
            place.close()
            raise

    def _begin(self, vit: ViT, setup: Setup) -> None:
        """Makes the learner, and takes the run's folder, or the state in it."""
        self.learner = self.place.make_learner(vit, setup)
        self.schedule = replace(self.schedule, buffer=self.learner.buffer, max_steps=self.learner.max_steps)
        if not self.place.saved:
            self.ranks.on_main(lambda: self.place.require_room(self.learner))
        state = self.place.begin(self.learner, self.resolved, self._state)
        if state is not None:
            self._resume(state)
            self._print(f"resuming after step {self.progress.step} of {self.total_steps}")

    def _resolve(self, vit: ViT, saved: Resolved | None) -> Resolved:
        """What is decided from model, data and machine; for a resumed run most of it has been decided before."""
        config, ranks, splits = self.config, self.ranks, self.splits
        attention = saved.attention if saved else config.attention
        if attention == "auto":
            attention = ranks.from_main(lambda: faster_attention(vit, config.batch_size, self.device, self.precision))
        vit.set_attention_paths([attention] * vit.depth)  # type: ignore[list-item]
        times = saved.times if saved else None
        if times is None and "alast" in config.method_name and config.alast.time is not None:
            times = ranks.from_main(lambda: self._measure_times(vit))
        return Resolved(
            **machine(str(self.device) if ranks.size == 1 else self.device.type, self.precision, str(attention)),
            classes=tuple(splits.train.classes),
            preprocessing=self.preprocessing,
            architecture=architecture_of(vit.model),
            num_train=len(splits.train),
            num_val=len(splits.val),
            num_skipped=splits.num_skipped,
            fingerprint=f"{splits.train.fingerprint()}-{splits.val.fingerprint()}",
            processes=ranks.size,
            times=times,
            codec=saved.codec if saved else config.split.codec_text,
            server=self.place.server,
            data=_absolute(config.data),
            data_root=_absolute(config.data_root),
        )

    def _measure_times(self, vit: ViT) -> Times:
        config = self.config
        alast, size = decided(config.alast, vit), self.preprocessing.size
        rule, multiple, batch_size = make_rule(alast.rule), alast.token_multiple or 1, config.batch_size
        return measure_times(vit, rule, multiple, size, batch_size, self.device, self.precision, config.exact_savings)

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the run."""
        return self.schedule.total_steps

    def fit(self) -> None:
        """Trains from where the run stands to its end, evaluating and saving after every epoch.

        Raises:
            Interrupted: where the user asked to stop, with a checkpoint saved.
            TrainingError: where the loss is not finite; the last checkpoint is kept.
        """
        if self.progress.finished:
            self._print("the run was already complete")
            return
        with stopping(self._stop, patient=self.ranks.size > 1):
            self._print_start()
            with progress_bar(self.console, total=self.total_steps, completed=self.progress.step) as self._show:
                while not self.progress.finished:
                    self.advance(1)
                    if self.ranks.any(bool(self._stop)):
                        break
            if not self.progress.finished:
                try:
                    self._save()
                except GoBack as back:  # to what both sides have saved
                    self._go_back(back)
                raise self.interrupted()

    def interrupted(self) -> Interrupted:
        """The exception for a run that was asked to stop."""
        at = f"stopped after step {self.progress.step} of {self.total_steps}"
        left = self.learner.behind() if self.progress.step == self.total_steps else 0
        if left and self.place.server is None:
            at = f"stopped with {left} steps left on what is stored"
        elif left:
            at = f"all is sent: the server takes its last {left} steps by itself"
        goal = "fetch the result" if left and self.place.server is not None else "resume"
        return Interrupted(f"{at}; {goal} with: {self.place.command()}")

    def finish(self) -> Summary:
        """Ends the run wherever it lives, doing lost steps again, and returns the summary that it saves."""
        while True:
            try:
                while not self.progress.finished:
                    self.advance(1)
                self.place.finish()
                break
            except GoBack as back:
                self._go_back(back)
        summary = self.ranks.from_main(self._summary)
        self.ranks.on_main(lambda: summary.write(self.run.summary_file))
        return summary

    def close(self) -> None:
        """Ends trackers, and the processes that load pictures, which the interpreter would else meet at its exit."""
        self.trackers.close()
        self._stream = None
        self._eval_loader = None
        self.place.close()

    def advance(self, steps: int) -> list[float]:
        """Takes up to `steps` optimizer steps, fewer where the run ends, and returns their losses.

        After the last step of an epoch it evaluates, and it saves whenever a checkpoint is due. Steps that were lost
        elsewhere are done again.
        """
        target = min(self.progress.step + steps, self.total_steps)
        losses: list[float] = []
        while self.progress.step < target and not self.progress.finished:
            started = time.perf_counter()
            try:
                loss = self._step()
                rate = self.schedule.num_samples(self.progress.step - 1) / (time.perf_counter() - started)
                self._show(self._shown_step, f"loss {loss:.4f}  {rate:.0f} pictures/s{self.learner.status()}")
                self._after_step()
                losses.append(loss)
            except GoBack as back:
                self._go_back(back)
        if not losses and self.progress.step == self.total_steps and not self.progress.finished:
            self._wait()
        return losses

    @property
    def _shown_step(self) -> int:
        """How far the run is, in steps; by what is spent where a budget decides and steps differ in bytes."""
        share = self.learner.share_spent()
        return self.progress.step if share is None else min(self.total_steps, round(share * self.total_steps))

    def _wait(self) -> None:
        """Lets another side take the steps that it has left by itself, some at a time, and then ends the run."""
        try:
            if not self.learner.behind():
                self._after_step()
                return
            started = time.perf_counter()
            with self._explaining(self.total_steps):
                row = self.learner.catch_up()
            if row:  # trackers count steps of the run, and these are none
                row = {"kind": "replay", "step": self.total_steps, **row}
                self.run.log(row | {"seconds": round(time.perf_counter() - started, 4)})
            self._show(self.total_steps, f"{self.learner.behind()} steps of the server are left")
            # Steps of its own are not steps of the run, so checkpoints go by time here.
            if time.monotonic() - self._saved > SAVE_SECONDS:
                self._save()
        except GoBack as back:
            self._go_back(back)

    def evaluate(self) -> Score:
        """Accuracy and mean loss on the held-out pictures."""
        if self._eval_loader is None:
            pre, size = self.preprocessing, self.config.batch_size
            transform = eval_transform(pre.size, pre.interpolation, pre.crop_pct)
            self._eval_loader = eval_loader(self.splits.val, transform, batch_size=size, **self._loading)
        held_out, num_classes = self.ranks.all_of(batches(self._eval_loader)), len(self.splits.train.classes)
        num, ranks = len(self.splits.val), self.ranks
        each = no_one
        if self.config.report:
            self._predictions = Predictions(num, num_classes, ranks.share(num).start, self.device)
            each = self._predictions.add
        with autocast(self.device, self.precision):
            return score(self.learner.evaluator, held_out, num_classes, self.normalize, self.device, ranks.total, each)

    def _summary(self) -> Summary:
        """The run's result, without costs."""
        rows = [row for row in self.run.rows() if row["kind"] in ("step", "replay") or "wait_seconds" in row]
        at, config = self.progress, self.config
        return Summary(
            accuracy=at.accuracy,
            **self._by_class(),
            last_accuracy=at.last_accuracy,
            best_epoch=at.best_epoch,
            epochs=at.epochs,
            steps=at.step,
            train_time_s=round(sum(row.get("seconds", row.get("wait_seconds", 0)) for row in rows), 3),
            num_classes=len(self.splits.train.classes),
            method=config.method_name,
            model=config.model,
            seed=config.seed,
            device=str(self.device),
            precision=self.precision,
            attention=self.resolved.attention,
            versions=self.resolved.versions,
            traffic=self._traffic(rows),
        )

    def _by_class(self) -> dict[str, Any]:
        """What each class contributes to the accuracy of the weights that are kept."""
        counts, at = self.splits.val.counts(), self.progress
        if not at.right:  # of a run that an older version has begun
            return {"balanced_accuracy": None, "per_class": None}
        kept = Score(at.accuracy, math.nan, tuple(at.right), tuple(counts.values()))
        return {"balanced_accuracy": kept.balanced_accuracy, "per_class": kept.per_class(list(counts))}

    def _traffic(self, rows: list[dict[str, Any]]) -> Traffic | None:
        """What crossed a cut, with the seconds that every step has noted."""
        crossed = self.learner.traffic()
        if not crossed:
            return None
        timed = [field.name for field in fields(Traffic) if field.name.endswith("_seconds")]
        seconds = {name: round(sum(row.get(name, 0) for row in rows), 3) for name in timed if rows and name in rows[0]}
        return Traffic(**crossed, **seconds, jpeg_bytes=self.splits.train.file_bytes(), **self.place.traffic())

    def _step(self) -> float:
        """One optimizer step; returns its mean loss."""
        config, step = self.config, self.progress.step
        if self._stream is None or step % self.schedule.steps_per_epoch == 0:
            self.ranks.on_main(lambda: self.place.require_room(self.learner))
        if self._stream is None:
            self._stream = self._micro_steps(step)
        started = time.perf_counter()
        num_micro = self.schedule.num_micro(step)
        share = self.learner.share_spent()
        self.learner.begin(step, self.schedule.progress(step) if share is None else share, num_micro)
        total, lr = torch.zeros((), device=self.device), self.schedule.lr(step, config.lr, config.warmup, share)
        with self._explaining(step + 1):
            for _ in range(num_micro):
                with self.ranks.together():
                    work = next(self._stream)
                total += self._backward(work)
            total = self.ranks.total(total)
            norms = self.learner.clip(config.clip_norm)
            # Before weights are touched. Under fp16 an overflowing gradient is the scaler's to handle.
            finite = self.precision == "fp16" or all(norm.isfinite() for norm in norms.values())
            if not total.isfinite() or not finite:
                raise TrainingError(f"the {'gradient' if total.isfinite() else 'loss'} is not finite")
            self.learner.update(lr)
        self.progress.step = step + 1
        row = {"kind": "step", "step": step + 1, "epoch": self.schedule.epoch(step), "loss": float(total), "lr": lr}
        row |= {name: float(norm) for name, norm in norms.items()} | self.learner.metrics()
        self._log(row | {"seconds": round(time.perf_counter() - started, 4)})
        return float(total)

    @contextmanager
    def _explaining(self, step: int) -> Iterator[None]:
        """Says of a TrainingError where it was, what is kept and what may help."""
        try:
            yield
        except TrainingError as error:
            file = self.place.checkpoint()
            kept = "no checkpoint had been saved yet" if file is None else f"the last good checkpoint is {file}"
            advice = "try a lower --lr, more --warmup, or --precision fp32"
            raise TrainingError(f"{error} at step {step}; {kept}; {advice}") from error

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
        pre, config = self.preprocessing, self.config
        loader = train_loader(
            self.splits.train,
            train_transform(pre.size, pre.interpolation, config.augment),
            batch_size=self.schedule.batch_size,
            epochs=self.schedule.total_epochs,
            seed=config.seed,
            start=self.schedule.batches_of(start, 0).start,
            **self._loading,
        )
        stream = batches(loader)
        for step in range(start, self.total_steps):
            for micro in range(self.schedule.num_micro(step)):
                numbers = self.schedule.batches_of(step, micro)
                loaded = [self._to_device(next(stream), number) for number in numbers]
                yield MicroStep(loaded, step, micro, self.schedule.num_samples(step), numbers.start, self.ranks.rank)

    def _backward(self, work: MicroStep) -> Tensor:
        torch.manual_seed(work.noise_seed(self.config.seed))
        return self.learner.backward(work)

    def _after_step(self) -> None:
        """At the end of an epoch evaluates, and saves a checkpoint whenever one is due."""
        at, config = self.progress, self.config
        last = at.step == self.total_steps or self.learner.spent(at.step)
        if last and self.learner.behind():
            self._save()  # the user may leave now
            return
        if at.step % self.schedule.steps_per_epoch and not last:
            if config.checkpoint_steps and at.step % config.checkpoint_steps == 0:
                self._save()
            return
        at.epochs = self.schedule.epoch(at.step)
        at.finished = last
        if last or at.epochs % config.evaluates_every == 0:
            self._evaluate_epoch()
            if not last and config.patience and at.epochs - at.best_epoch >= config.patience:
                at.finished = True
                self._print(f"stopped early: no better accuracy in {config.patience} epochs")
        self._save()

    def _evaluate_epoch(self) -> None:
        """Evaluates on the held-out pictures, and keeps the weights where they are the best so far."""
        at = self.progress
        self.place.begin_evaluation()
        result = self.evaluate()
        said = self._predictions
        if said is not None:
            said.gather(self.ranks.total)
        at.last_accuracy = result.accuracy
        if at.last_accuracy > at.accuracy:
            at.accuracy, at.best_epoch, at.right = at.last_accuracy, at.epochs, list(result.right)
            self.ranks.on_main(lambda: self.place.save_best(self.learner))
            if said is not None:
                self.ranks.on_main(lambda: said.write(self.run.predictions_file, self.splits.val))
        row: dict[str, Any] = {"kind": "eval", "step": at.step, "epoch": at.epochs}
        row |= {"accuracy": result.accuracy, "balanced_accuracy": result.balanced_accuracy, "loss": result.loss}
        row |= self.learner.eval_metrics()
        self._log(row)
        sent = f", {row['training_bytes'] / 1e6:.2f} MB" if "training_bytes" in row else ""
        self._print(f"epoch {at.epochs}: accuracy {at.last_accuracy:.2%}, loss {result.loss:.4f}{sent}")
        self.place.end_evaluation(at)

    def _save(self) -> None:
        self._saved = time.monotonic()
        self.place.save(self.learner, self.progress, self._state())

    def _state(self) -> State:
        """The state of all ranks: it is collective."""
        return {"progressed": asdict(self.progress), "learner": self.learner.state_dict()}

    def _resume(self, state: State) -> None:
        """Stands where a checkpoint does that has just been loaded."""
        self.trackers.close()  # they begin anew where the run does
        self.learner.load_state_dict(state["learner"])
        self.progress = Progress(**state["progressed"])
        at, done = self.progress, state["learner"].get("done", 0)

        def is_later(row: dict[str, Any]) -> bool:
            """What a server did by itself after the last step, and the evaluation after that."""
            name, last = ("server_step", done) if row["kind"] == "replay" else ("epoch", at.epochs)
            return bool(row["kind"] != "step" and row[name] > last)

        self.ranks.on_main(lambda: self.run.forget_after(at.step, is_later))

    def _go_back(self, error: GoBack) -> None:
        """Resumes where the place says, after steps were lost."""
        self._stream = None
        state = self.place.go_back(error, self.progress)
        if state is None:
            self.learner.restart()
        else:
            self._resume(state)

    def _require_same_pictures(self, saved: Resolved) -> None:
        now = self.resolved
        if saved.processes != now.processes:
            raise ConfigError(
                f"--resume: the run was started with {saved.processes} processes, now it has {now.processes}: "
                "its batches would be others; start as many"
            )
        names = ("classes", "num_train", "num_val")
        changed = [name for name in names if getattr(saved, name) != getattr(now, name)]
        if not changed and saved.fingerprint not in (None, now.fingerprint):
            changed = ["labels or sizes of files"]
        if changed:
            raise ConfigError(f"--resume: the pictures are not those the run was started with ({', '.join(changed)})")
        for name in ("versions", "threads"):
            if getattr(saved, name) != getattr(now, name):
                self._print(f"resuming with other {name} than the run began with: results may differ in rounding")

    def _print(self, text: str) -> None:
        say(self.console, text)

    def _print_start(self) -> None:
        """What trains on what."""
        where = str(self.device)
        if self.ranks.size > 1:
            step = self.schedule.batch_size * self.config.accumulate
            where = f"{self.ranks.size} processes ({self.device.type}), {step} pictures a step together"
        self._print(
            f"{self.config.model}, {self.config.method_name}, {self.precision} on {where}: "
            f"{len(self.splits.train)} pictures to train, {len(self.splits.val)} held out, "
            f"{len(self.splits.train.classes)} classes ({self.splits.source}); {self.learner.describe()}"
        )
        toy = toy_note(self.config.model, self.splits.train, self.preprocessing.size, self.place.server is not None)
        for line in (*self.splits.notes, imbalance(self.splits.train), toy):
            if line:
                self._print(line)


def _absolute(source: str | Path | None) -> str | None:
    """Where a source of pictures is, whatever folder is the current one; None for one that is no path."""
    return None if source is None or not Path(source).exists() else str(Path(source).absolute())
