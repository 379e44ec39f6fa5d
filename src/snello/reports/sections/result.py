"""The section of the result: one sentence with its cost, and the command that repeats it."""

import shlex
from collections.abc import Iterator
from typing import Any

from snello.config import PicturesConfig
from snello.reports.facts import Facts
from snello.reports.words import duration, less, percent, share_of_full, size_text


def result(facts: Facts) -> dict[str, Any] | None:
    """The result in one sentence with its cost, and the command that repeats it."""
    summary, num = facts.summary, facts.resolved.num_val
    repeat = shlex.join(_command(facts))
    if summary is None:
        done = facts.steps[-1]["step"] if facts.steps else 0
        sentence = f"Not finished: {done} steps are done."
        return {"sentence": sentence, "tiles": [], "lines": [], "repeat": repeat, "files": "metrics.jsonl"}
    costs = summary.costs
    time, saved = share_of_full(costs, "step_time_s"), share_of_full(costs, "saved_bytes_per_sample")
    sentence = f"{percent(summary.accuracy)} on {num:,} held-out pictures"
    if time is not None and saved is not None and summary.method != "full":
        sentence += f", with steps that take {time:.2f} of full fine-tuning's time"
        sentence += f" and {saved:.2f} of its memory for activations"
    if summary.traffic is not None:
        sentence += f", with {less(summary.traffic)} traffic than uncompressed"
    tiles = [
        ("accuracy", percent(summary.accuracy), f"epoch {summary.best_epoch} of {summary.epochs}"),
        *([("balanced accuracy", percent(summary.balanced_accuracy), "every class counts the same")]
          if summary.balanced_accuracy is not None else []),
        ("training", duration(summary.train_time_s), f"{summary.steps:,} steps on {summary.device}"),
    ]  # fmt: skip
    if time is not None and summary.method != "full":
        tiles.append(("time of a step", f"{time:.2f}x", "full fine-tuning's, measured here"))
    if saved is not None and summary.method != "full":
        tiles.append(("activation memory", f"{saved:.2f}x", "full fine-tuning's, measured here"))
    if summary.traffic is not None:
        sent = summary.traffic.uplink_bytes + summary.traffic.downlink_bytes
        tiles.append(("traffic", size_text(sent), less(summary.traffic)))
    lines = [*_against_probe(facts), *_least(facts)]
    return {"sentence": sentence + ".", "tiles": tiles, "lines": lines, "repeat": repeat, "files": "summary.json"}


def _command(facts: Facts) -> list[str]:
    """What repeats the run; one with a server gets its settings from there."""
    server, config = facts.resolved.server, facts.config
    if server is None:
        return ["snello", "finetune", "--config", str(facts.path / "config.yaml")]
    args = ["snello", "join", server.address]
    for name, value in (("--data", config.data), ("--certs", server.certs), ("--name", server.name)):
        args += [name, str(value)] if value is not None else []
    if config.val_share != PicturesConfig.val_share:
        args += ["--val-share", str(config.val_share)]
    if server.insecure_plaintext_for_everyone_on_the_network_to_read:
        args.append("--insecure-plaintext-for-everyone-on-the-network-to-read")
    return [*args, *(["--skip-bad"] if config.skip_bad else [])]


def _against_probe(facts: Facts) -> Iterator[str]:
    """How the accuracy compares with the linear probe's."""
    if facts.summary is None or facts.summary.probe_accuracy is None:
        return
    probe = facts.summary.probe_accuracy
    gain = 100 * (facts.summary.accuracy - probe)
    end = f"{abs(gain):.1f} points {'above' if gain > 0 else 'below'} that" if abs(gain) >= 0.05 else "at the same"
    yield f"A linear classifier on the model as it was at the start reaches {percent(probe)}: the run ends {end}."


def _least(facts: Facts) -> Iterator[str]:
    rows = [row for row in (facts.summary.per_class if facts.summary else None) or () if row["pictures"]]
    if len(rows) > 1 and min(row["accuracy"] for row in rows) < 1:
        least = min(rows, key=lambda row: row["accuracy"])
        yield f"Least accurate: {least['class']}, {percent(least['accuracy'])} of {least['pictures']} pictures."
