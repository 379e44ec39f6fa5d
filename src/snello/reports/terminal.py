"""What is printed: the result of a run, tables of costs and traffic, the plan, the codecs."""

import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import progress
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from snello.config import CodecsConfig, FinetuneConfig
from snello.config.registry import FROZEN_GOALS, GOALS
from snello.devices import device_name
from snello.measure.comparison import SAVING, Comparison, Progress, compared_with
from snello.measure.plan import Plan, command, method_label
from snello.reports.words import share_of_full
from snello.runs.folder import RunFolder
from snello.runs.summary import Summary, Traffic
from snello.train.display import say

COST_ROWS = (
    ("step time, ms", "step_time_s", ".1f", 1e-3),
    ("training GFLOPs per picture", "flops_per_sample", ".3f", 1e9),
    ("MiB saved for backward per picture", "saved_bytes_per_sample", ".2f", 2**20),
    ("trainable parameters, M", "trainable_parameters", ".2f", 1e6),
    ("weights, MiB", "weight_bytes", ".1f", 2**20),
    ("gradients, MiB", "gradient_bytes", ".1f", 2**20),
    ("optimizer state, MiB", "optimizer_bytes", ".1f", 2**20),
    ("saved for backward, MiB", "saved_bytes", ".1f", 2**20),
    ("sum, MiB", "memory_bytes", ".0f", 2**20),
    ("peak memory measured, MiB", "peak_memory_bytes", ".0f", 2**20),
)
SHORT = {
    "flops_per_sample": "GFLOPs/picture",
    "saved_bytes_per_sample": "saved MiB/picture",
    "trainable_parameters": "trained, M",
    "optimizer_bytes": "optimizer, MiB",
    "saved_bytes": "saved, MiB",
    "peak_memory_bytes": "peak, MiB",
}
"""Names for a terminal of 80 columns; saved is what is kept for the backward pass."""


def print_result(console: Console, summary: Summary, num_skipped: int) -> None:
    """Prints accuracy and length of a run in one line, and in another which classes are recognised least."""
    skipped = f", {num_skipped} bad pictures left out" if num_skipped else ""
    rows = summary.per_class or []
    balanced = f", balanced {summary.balanced_accuracy:.2%}" if rows else ""
    epochs = f"epoch {summary.best_epoch} of {summary.epochs}; last epoch {summary.last_accuracy:.2%}"
    took = f"{summary.steps} steps in {summary.train_time_s:.0f} s"
    say(console, f"accuracy {summary.accuracy:.2%}{balanced} ({epochs}), {took}{skipped}")
    found = sorted((row for row in rows if row["pictures"]), key=lambda row: float(row["accuracy"]))
    least = ", ".join(f"{row['class']} {row['accuracy']:.1%} of {row['pictures']}" for row in found[:3])
    if found and found[0]["accuracy"] < 1:
        say(console, f"least accurate: {least} (all in summary.json)")


def print_per_class(rows: list[dict[str, Any]]) -> None:
    """Prints accuracy and number of pictures of each class."""
    width = max(len(row["class"]) for row in rows)
    for row in rows:
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.2%}"
        print(f"  {row['class']:{width}}  {accuracy:>7} of {row['pictures']}")


@contextmanager
def measuring(console: Console, config: FinetuneConfig, folder: Path) -> Iterator[Progress]:
    """Says what is measured after a run whose model is in `folder`, and draws a bar until that is done."""
    against = f"measuring a linear probe, and a step of {config.method_name} against {_names(compared_with(config))}"
    say(console, f"the model is saved in {folder}; {against} (Ctrl-C skips this)")
    what = progress.TextColumn("measuring, {task.description}")
    columns = (what, progress.BarColumn(bar_width=20), progress.MofNCompleteColumn())
    with progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("")
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total)


def _names(methods: Iterable[str]) -> str:
    named = {SAVING: "full fine-tuning with the same exact savings", "full": "full fine-tuning"}
    return " and ".join(named.get(method, method) for method in methods)


def print_costs(console: Console, costs: Comparison, summary: Summary) -> None:
    """Prints the table of a method against others, all measured on this machine: values, and times the method's."""
    say(console, f"one training step of {summary.model}, batch {costs.compared_batch_size}, {summary.precision},")
    say(console, f"on {device_name(summary.device)}; 2.00x is twice that of {costs.method}:")
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    for heading in (costs.method, *("full, saving" if other == SAVING else other for other in costs.others)):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, field, style, unit in COST_ROWS:
        own = getattr(costs.own, field)
        values = [getattr(other, field, None) for other in costs.others.values()]
        table.add_row(
            SHORT.get(field, name), _number(own / unit, style), *(_beside(value, own, style, unit) for value in values)
        )
    console.print(table)
    if not costs.full_fits:
        at = f"the run's batch of {costs.batch_size}"
        say(console, f"full fine-tuning does not fit into memory at {at}; {costs.method} does")


def _beside(value: float | None, own: float, style: str, unit: float) -> str:
    if value is None:
        return "does not fit"
    ratio = f"{value / own:.2f}x" if own else ""
    return f"{_number(value / unit, style)} {ratio:>6}"


def _number(value: float, style: str) -> str:
    """Large ones without decimals: there are up to five columns."""
    return f"{value:{style if value < 1000 else '.0f'}}"


def print_verdict(console: Console, summary: Summary, num_train: int) -> None:
    """Prints in one line what a run came to: accuracy, that of the linear probe beside it, and what it cost."""
    pictures = sum(row["pictures"] for row in summary.per_class or [])
    verdict = f"accuracy {summary.accuracy:.2%}" + (f" on {pictures} held-out pictures" if pictures else "")
    if summary.probe_accuracy is not None:
        known = summary.probe_pictures or 0
        of = f", on a sample of {known} of {num_train} training pictures" if known < num_train else ""
        verdict += f" (linear probe of the model before training: {summary.probe_accuracy:.2%}{of})"
    shares = [
        f"{share:.2f} of the {what}"
        for what, name in (("time", "step_time_s"), ("activation memory", "saved_bytes"))
        if (share := share_of_full(summary.costs, name)) is not None
    ]
    say(console, verdict + (f"; a step took {' and '.join(shares)} of full fine-tuning" if shares else ""))
    if summary.probe_accuracy is not None and summary.accuracy <= summary.probe_accuracy < 1:
        few = f" (of {pictures} pictures, one is {1 / pictures:.1%})" if 0 < pictures < 100 else ""
        say(console, f"that is not above the linear probe{few}: train longer, or with another --lr")


def print_next(console: Console, run: RunFolder, longer: str | None = None) -> None:
    """Prints where the run is, and what may be done with it, as commands; `longer` is the one that trains longer."""
    say(console, f"run folder: {run.path}")
    folder = shlex.quote(str(run.path))
    what = {
        "accuracy by class": f"snello evaluate {folder} --per-class",
        "on your pictures": f"snello predict {folder} PICTURE",
        "for other software": f"snello export {folder} --format timm",
    }
    for name, line in (what | ({} if longer is None else {"train longer": longer})).items():
        say(console, f"  {name + ':':20}{line}")


def server_time(wait_seconds: float | None, server_seconds: float | None) -> tuple[str, float]:
    """Names and gives the seconds of waiting for the server and the network or, in one process, of the server half."""
    if wait_seconds is not None:
        return "waiting for the server", wait_seconds
    assert server_seconds is not None, "one of both is noted at every step"
    return "server", server_seconds


def print_plan(plan: Plan) -> None:
    """Prints what fits, the fastest first, the command of each, and which methods are missing."""
    print(f"{'':3} {'method':27} {'batch':>5} {'precision':9} {'checkpoints':11} {'pictures/s':>10} {'MiB':>7}")
    for number, row in enumerate(plan.rows, start=1):
        config = row.config
        method = method_label(config.method_name, config.alast.draw == "lowest-first")
        print(
            f"{number:2}. {method:27} {config.batch_size:5} {config.precision:9} "
            f"{'yes' if config.grad_checkpointing else 'no':11} {row.pictures_per_second:10.1f} "
            f"{row.need_bytes / 2**20:7.0f}"
        )
    for one in plan.not_ranked:
        print(f" -. {method_label(one.method, one.lowest_first):27} not ranked: {one.reason}")
    print()
    for number, row in enumerate(plan.rows, start=1):
        print(f"{number:2}. {command(row.config)}")
    print(
        f"\nOf {plan.candidates} settings {plan.too_large} do not fit by estimate, {plan.refused} did not fit when "
        f"they were run, and for {plan.left_out} there was no time (--seconds). Measured here on random pictures; "
        "which is the most accurate is another question (docs/alast.md). Add --data FOLDER to a command."
    )


def print_codecs(config: CodecsConfig, rows: list[dict[str, Any]]) -> None:
    """Prints the codecs, and below what each does."""
    print(
        f"Bytes of one exchange: {config.model} cut after block {config.cut}, batch {config.batch_size}, "
        f"labels on the {config.labels}; headers, labels and scales included.\n"
    )
    names = [f"{row['codec']} = {GOALS[row['codec']]}" if row["codec"] in GOALS else row["codec"] for row in rows]
    width = max(map(len, names))
    print(f"{'':{width}}  {'bytes up':>12} {'bytes down':>12} {'ratio':>8} {'fewer':>8}")
    for name, row in zip(names, rows, strict=True):
        print(
            f"{name:{width}}  {row['uplink_bytes']:>12} {row['downlink_bytes']:>12} {row['ratio']:>8.4f} "
            f"{row['times_fewer']:>7.2f}x{' *' if row['measured'] else ''}"
        )
    if any(row["measured"] for row in rows):
        print("\n* depends on the pictures: measured on some that ship with snello, the cost of a basis shared out.")
    if any(row["codec"] in GOALS for row in rows):
        frozen = ", ".join(f"{name} = {text}" for name, text in FROZEN_GOALS.items())
        print(f"  With --split.client frozen, where nothing comes down: {frozen}.")
    parts = {part["name"]: part for row in rows for part in row["parts"]}
    for part in parts.values():
        options = f"\n    options: {part['options']}" if part["options"] else ""
        source = f"\n    source: {part['source']}" if part["source"] != "-" else ""
        print(f"\n{part['name']}: {part['what']}{options}{source}")
    print(
        "\nCodecs are chained with +, a number format last, as adc(samples=1, tokens=0.4)+int4; options are given in "
        "order or by name. docs/codecs.md explains them."
    )


def print_traffic(console: Console, traffic: Traffic) -> None:
    """Prints what crossed the cut, against no compression and against uploading the pictures."""
    assert traffic.jpeg_bytes is not None, "of a run that has just ended"
    training = traffic.uplink_bytes + traffic.downlink_bytes
    table = Table(title=f"across the cut after block {traffic.cut}, codec {traffic.codec}")
    for heading in ("", "MB", "of uncompressed"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = (
        ("up", traffic.uplink_bytes),
        ("down", traffic.downlink_bytes),
        ("training, both ways", training),
        ("training uncompressed, fp32", traffic.uncompressed_bytes),
        ("uploading the pictures once", traffic.jpeg_bytes),
        ("evaluation", traffic.eval_bytes),
    )
    for name, size in rows:
        table.add_row(name, f"{size / 1e6:.2f}", f"{size / traffic.uncompressed_bytes:.2%}")
    console.print(table)
    less = f"{traffic.uncompressed_bytes / training:.1f}x less traffic than uncompressed"
    against = training / traffic.jpeg_bytes
    files = "what the pictures' files take" if against >= 1 else "less than the pictures' files"
    where, seconds = server_time(traffic.wait_seconds, traffic.server_seconds)
    took = f"client {traffic.client_seconds:.1f} s, {where} {seconds:.1f} s"
    link = "" if traffic.link_seconds is None else f", the link would take {traffic.link_seconds:.1f} s"
    stored = "" if traffic.server_steps is None else f"; the server took {traffic.server_steps} steps on them"
    say(console, f"{less}, {max(against, 1 / against):.1f}x {files}; {took}{link}{stored}")
