"""`snello finetune`: what one run is made of: data, model, learner, loop, comparison, report."""

import gc
from typing import Any

from rich.console import Console

from snello.config import FinetuneConfig
from snello.data import splits_of
from snello.errors import DataError
from snello.files import save_json
from snello.measure import comparison
from snello.report import pictures, terminal
from snello.runs.folder import RunFolder, require_same_config
from snello.train.display import warnings_on
from snello.train.loop import Trainer
from snello.train.ranks import Ranks, connect, require_alone
from snello.train.tracking import require_trackers


def finetune(config: FinetuneConfig, console: Console | None = None) -> dict[str, Any]:
    """Fine-tunes as `config` says and returns the summary that it saves in the run folder.

    Raises:
        SnelloError: for input that cannot be used, before anything is written; TrainingError where the loss is not
            finite, with the last good checkpoint kept.
        Interrupted: after Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    require_alone(config)
    ranks = connect(config.device)
    console = (console or Console(stderr=True)) if ranks.is_main else Console(quiet=True)
    run, summary, state = _train(config, ranks, console)
    if not ranks.is_main:
        return summary
    if "alast" in config.method_name:
        pictures.plot_budgets(run)
    if config.split.cut:
        terminal.print_traffic(console, summary)
        pictures.plot_traffic(run)
    elif config.compare:
        gc.collect()  # the trainer's memory is the comparison's
        costs = comparison.compare(config, summary, state)
        summary |= costs.summary()
        save_json(run.summary_file, summary)
        terminal.print_costs(console, costs)
    console.print(f"run folder: {run.path}", highlight=False, soft_wrap=True)
    return summary


def _train(config: FinetuneConfig, ranks: Ranks, console: Console) -> tuple[RunFolder, dict[str, Any], dict[str, Any]]:
    """The whole run but its costs; the run folder, the summary, and the method's state for what comes after."""
    run, saved = ranks.from_main(lambda: _open(config))
    splits = ranks.first_here(
        # Checked once per machine is enough, unless what is left out has to be known to all.
        lambda: splits_of(config, check=config.check_pictures and (ranks.is_first_here or config.skip_bad))
    )
    found = (splits.train.classes, splits.num_skipped, list(splits.train.labels), list(splits.val.labels))
    ranks.require_same(found, DataError(f"--data: other pictures than in process 0 ({splits.source})"))
    with warnings_on(console):
        trainer = Trainer(config, splits, run, saved, console, ranks)
        try:
            trainer.fit()
        finally:
            trainer.close()
    state = trainer.learner.state_dict()["method"]
    summary = ranks.from_main(trainer.summary)
    if ranks.is_main:
        save_json(run.summary_file, summary)  # safe before the comparison, which may take long
        terminal.print_result(console, summary, splits.num_skipped)
    return run, summary, state


def _open(config: FinetuneConfig) -> tuple[RunFolder, dict[str, Any]]:
    """The run folder, and what was resolved where a run is gone on with."""
    require_trackers(config.track)
    run = RunFolder.of(config)
    if not config.resume:
        return run, {}
    saved_config, saved = run.read_config()
    require_same_config(saved_config, config, run.path)
    return run, saved
