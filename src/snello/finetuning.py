"""`snello finetune`: what one run is made of: data, model, learner, loop, comparison, report."""

import gc
from dataclasses import replace
from typing import Any

from rich.console import Console

from snello.config import FinetuneConfig
from snello.data import splits_of
from snello.environment import num_processes
from snello.errors import ConfigError, DataError
from snello.explain.report import report_after
from snello.measure import comparison
from snello.reports import pictures, terminal
from snello.runs.folder import RunFolder
from snello.runs.summary import Summary
from snello.split.flops import flops
from snello.split.learner import make_split_learner
from snello.train.display import say, warnings_on
from snello.train.loop import Trainer
from snello.train.place import LocalPlace, make_whole_learner
from snello.train.ranks import Ranks, connect
from snello.train.signals import interruptible


def finetune(config: FinetuneConfig, console: Console | None = None) -> Summary:
    """Fine-tunes as `config` says and returns the summary that it saves in the run folder.

    Raises:
        SnelloError: for input that cannot be used, before anything is written; TrainingError where the loss is not
            finite, with the last good checkpoint kept.
        Interrupted: after Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    if config.split.cut and num_processes() > 1:
        raise ConfigError("--split.cut: a cut model trains in one process: start it without torchrun")
    ranks = connect(config.device)
    console = (console or Console(stderr=True)) if ranks.is_main else Console(quiet=True)
    run, summary, state = _train(config, ranks, console)
    if not ranks.is_main:
        return summary
    if "alast" in config.method_name:
        pictures.plot_budgets(run)
    if summary.traffic is not None:
        client, server = flops(config, summary.traffic.codec, summary.num_classes, state)
        traffic = replace(summary.traffic, client_flops_per_sample=client, server_flops_per_sample=server)
        summary = replace(summary, traffic=traffic)
        summary.write(run.summary_file)
        terminal.print_traffic(console, traffic)
        pictures.plot_traffic(run)
    elif config.compare and summary.costs["step_time_s"] is None:
        gc.collect()  # the trainer's memory is the comparison's
        costs = _compare(config, run, summary, state, console)
        if costs is not None:
            summary = replace(summary, costs=costs.summary())
            summary.write(run.summary_file)
            terminal.print_costs(console, costs)
    say(console, f"run folder: {run.path}")
    if config.report:
        report_after(run, console)
    return summary


def _train(config: FinetuneConfig, ranks: Ranks, console: Console) -> tuple[RunFolder, Summary, dict[str, Any]]:
    """Trains; returns the run folder, the summary, and the method's state for what comes after."""
    place = LocalPlace(config, make_split_learner if config.split.cut else make_whole_learner, ranks)
    splits = ranks.first_here(
        # Checked once per machine is enough, unless what is left out has to be known to all.
        lambda: splits_of(config, check=config.check_pictures and (ranks.is_first_here or config.skip_bad))
    )
    found = (splits.train.classes, splits.num_skipped, list(splits.train.labels), list(splits.val.labels))
    ranks.require_same(found, DataError(f"--data: other pictures than in process 0 ({splits.source})"))
    known = Summary.read(place.run.summary_file)  # of a run that was complete already
    config = place.config = ranks.from_main(lambda: _within_time(config, len(splits.train.classes), console))
    with warnings_on(console):
        trainer = Trainer(config, splits, place, console, ranks)
        try:
            trainer.fit()
            summary = trainer.finish()  # saved before the comparison, which may take long
        finally:
            trainer.close()
    state = trainer.learner.state_dict()["method"]
    if summary.traffic is None:
        summary = replace(summary, costs=known.costs if known else comparison.not_measured(config))
        ranks.on_main(lambda: summary.write(place.run.summary_file))
    terminal.print_result(console, summary, splits.num_skipped)
    return place.run, summary, state


def _within_time(config: FinetuneConfig, num_classes: int, console: Console) -> FinetuneConfig:
    """With as many epochs as --time-budget has room for; a run that is resumed has them already."""
    if config.time_budget is None or config.resume:
        return config
    say(console, "timing steps for --time-budget")
    with interruptible():
        share = comparison.relative_time(config, num_classes)
    epochs = max(1, int(config.time_budget / share))
    many = "1 epoch" if epochs == 1 else f"{epochs} epochs"
    say(console, f"{many}: a step takes {share:.2f} of the time of plain full fine-tuning here")
    return replace(config, epochs=epochs)


def _compare(
    config: FinetuneConfig, run: RunFolder, summary: Summary, state: dict[str, Any], console: Console
) -> comparison.Comparison | None:
    """Measures what the run's method costs beside others; None where Ctrl-C or SIGTERM skips it."""
    try:
        with interruptible(), terminal.measuring(console, config, run.path) as progress:
            return comparison.compare(config, summary, state, run.read()[1].times, progress)
    except KeyboardInterrupt:
        say(console, f"measuring skipped; the model is in {run.path}")
        return None
