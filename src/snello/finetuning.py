"""`snello finetune`: what one run is made of: data, model, learner, loop, comparison, report."""

import gc
from dataclasses import replace
from typing import Any

from rich.console import Console

from snello.config import FinetuneConfig
from snello.config.default_model import DefaultModel, default_model, named, toy_run
from snello.data import Splits, splits_of
from snello.devices import resolve_device, resolve_precision
from snello.environment import num_processes
from snello.errors import ConfigError, DataError
from snello.explain.report import report_after
from snello.measure import comparison
from snello.measure.probe import probe
from snello.reports import pictures, terminal
from snello.runs import folder as run_folders
from snello.runs.folder import RunFolder
from snello.runs.summary import Summary
from snello.split.flops import flops
from snello.split.learner import make_split_learner
from snello.train.display import say, warnings_on
from snello.train.loop import Trainer
from snello.train.place import LocalPlace, make_whole_learner
from snello.train.ranks import Ranks, connect
from snello.train.schedule import enough_epochs
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
    chosen = ranks.from_main(lambda: default_model(config.data is not None, config.weights))
    first = _first_lines(config, chosen)
    config = named(config, chosen)
    run, splits, summary, state = _train(config, ranks, console, first)
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
    elif config.compare:
        gc.collect()  # the trainer's memory is the comparison's
        summary = _measure(config, run, splits, summary, state, console)
    if config.report:
        report_after(run, console)
    terminal.print_verdict(console, summary, len(splits.train))
    longer, _ = run_folders.longer(run, run.read()[0])
    terminal.print_next(console, run, None if config.split.max_bytes else ranks.command(["finetune", *longer]))
    return summary


def _first_lines(config: FinetuneConfig, chosen: DefaultModel) -> list[str]:
    """Which model was chosen, where none was named, or that pictures and model are a toy; and what will not learn."""
    lines = []
    if config.model == "auto":
        lines.append(chosen.line)
    elif config.data is None and not config.resume:
        lines.append(toy_run(config.model))
    if config.weights == "none" and config.method_name in ("head", "lora", "alast+lora"):
        rest = "what is not trained stays random; --weights pretrained or a file, or --method full"
        lines.append(f"warning: --method {config.method_name} on random weights (--weights none): {rest}")
    return lines


def _train(
    config: FinetuneConfig, ranks: Ranks, console: Console, first_lines: list[str]
) -> tuple[RunFolder, Splits, Summary, dict[str, Any]]:
    """Trains; returns the run folder, the pictures, the summary, and the method's state for what comes after."""
    place = LocalPlace(config, make_split_learner if config.split.cut else make_whole_learner, ranks)
    splits = ranks.first_here(
        # Checked once per machine is enough, unless what is left out has to be known to all.
        lambda: splits_of(config, check=config.check_pictures and (ranks.is_first_here or config.skip_bad))
    )
    found = (splits.train.classes, splits.num_skipped, list(splits.train.labels), list(splits.val.labels))
    ranks.require_same(found, DataError(f"--data: other pictures than in process 0 ({splits.source})"))
    known = Summary.read(place.run.summary_file)  # of a run that was complete already
    if config.time_budget is not None and not config.resume:
        say(console, "timing steps for --time-budget")
    config = place.config = ranks.from_main(lambda: _with_length(config, place.run, splits, ranks, first_lines))
    with warnings_on(console):
        trainer = Trainer(config, splits, place, console, ranks)
        for line in first_lines:  # now that all that is given can be used
            say(console, line)
        try:
            trainer.fit()
            summary = trainer.finish()  # saved before the comparison, which may take long
        finally:
            trainer.close()
    state = trainer.learner.state_dict()["method"]
    if summary.traffic is None:
        summary = replace(summary, costs=known.costs if known else comparison.not_measured(config))
        if known:
            summary = replace(summary, probe_accuracy=known.probe_accuracy, probe_pictures=known.probe_pictures)
        ranks.on_main(lambda: summary.write(place.run.summary_file))
    terminal.print_result(console, summary, splits.num_skipped)
    return place.run, splits, summary, state


def _with_length(
    config: FinetuneConfig, run: RunFolder, splits: Splits, ranks: Ranks, lines: list[str]
) -> FinetuneConfig:
    """With its number of epochs, which a run that is resumed has already; says in `lines` where that needs saying."""
    if config.resume:
        return replace(config, epochs=run.read()[0].epochs)
    enough = enough_epochs(config, len(splits.train), ranks.size)
    if config.time_budget is None:
        if enough > config.num_epochs:
            lines.append(f"{enough} epochs, since the pictures are few (--epochs says otherwise)")
        return replace(config, epochs=enough)
    with interruptible():
        share = comparison.relative_time(config, len(splits.train.classes))
    epochs = max(1, int(config.time_budget / share))
    many = "1 epoch" if epochs == 1 else f"{epochs} epochs"
    text = f"{many} in the time of {config.time_budget:g}: a step takes {share:.2f} of plain full fine-tuning's here"
    if config.preset == "accurate" and epochs < enough:
        epochs, text = enough, f"{enough} epochs, since the pictures are few, and not {text}"
    lines.append(text)
    return replace(config, epochs=epochs)


def _measure(
    config: FinetuneConfig, run: RunFolder, splits: Splits, summary: Summary, state: dict[str, Any], console: Console
) -> Summary:
    """Measures, and saves, a linear probe and what the run's method costs beside others, unless that is known already.

    Ctrl-C or SIGTERM skips what is left of it.
    """
    costs: comparison.Comparison | None = None
    probed, compared = summary.probe_accuracy is not None, summary.costs["step_time_s"] is not None
    if probed and compared:
        return summary
    try:
        with interruptible(), terminal.measuring(console, config, run.path) as progress:
            if not probed:
                device = resolve_device(summary.device)
                precision = resolve_precision(summary.precision, device)
                found = probe(config, splits, device, precision, summary.epochs)
                summary = replace(summary, probe_accuracy=found.accuracy, probe_pictures=found.pictures)
                summary.write(run.summary_file)
            if not compared:
                costs = comparison.compare(config, summary, state, run.read()[1].times, progress)
                summary = replace(summary, costs=costs.summary())
                summary.write(run.summary_file)
    except KeyboardInterrupt:
        say(console, f"measuring skipped; the model is in {run.path}")
    if costs is not None:
        terminal.print_costs(console, costs, summary)
    return summary
