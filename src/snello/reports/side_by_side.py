"""Several runs on one page: what each reached, what it cost, where they differ."""

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from snello.config.values import to_dict
from snello.reports.charts import Series, line_chart
from snello.reports.facts import Facts
from snello.reports.page import Part, render
from snello.reports.sections.mistakes import MOST_CLASSES
from snello.reports.words import duration, setting_text, share_of_full, size_text
from snello.runs.folder import FREE, flat


def side_by_side(runs: Sequence[Facts]) -> str:
    """The text of an HTML file that compares runs."""
    names = _names(runs)
    classes = _classes(runs)
    parts = [
        Part("runs", "Runs", "runs.html.jinja", _runs(runs, names)),
        Part("curves", "Curves", "overlaid.html.jinja", _curves(runs, names)),
        Part("mistakes", "Classes", "classes.html.jinja", {"names": names, "rows": classes} if classes else None),
        Part("data", "Settings", "differences.html.jinja", {"names": names, "rows": _differences(runs)}),
    ]
    problems = [f"{name}: {problem}" for name, one in zip(names, runs, strict=True) for problem in one.problems]
    paths = [str(one.path) for one in runs]
    again = shlex.join(["snello", "report", *paths])
    return render(
        parts,
        title=f"{len(runs)} runs",
        folder=", ".join(paths),
        again=again,
        pictures=False,
        problems=problems,
        what="",
    )


def _names(runs: Sequence[Facts]) -> list[str]:
    """What tells the runs' paths apart."""
    paths = [one.path.resolve() for one in runs]
    if len(set(paths)) < len(paths) or len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]
    common = Path(os.path.commonpath(paths))
    return [str(path.relative_to(common)) for path in paths]


def _runs(runs: Sequence[Facts], names: Sequence[str]) -> dict[str, Any]:
    rows = [_row(one, name) for one, name in zip(runs, names, strict=True)]
    ended = [one.summary.accuracy for one in runs if one.summary]
    best = max(ended, default=None)
    others = {(one.resolved.classes, one.resolved.fingerprint) for one in runs}
    return {"rows": rows, "best": best, "same_pictures": len(others) == 1,
            "cut": any(one.summary and one.summary.traffic for one in runs)}  # fmt: skip


def _row(one: Facts, name: str) -> dict[str, Any]:
    summary = one.summary
    row: dict[str, Any] = {"name": name, "model": one.config.model, "method": one.config.method_name}
    row |= dict.fromkeys(("accuracy", "balanced", "epochs", "seconds", "took", "time", "saved", "bytes", "sent"))
    if summary is None:
        return row
    row |= {"accuracy": summary.accuracy, "balanced": summary.balanced_accuracy, "epochs": summary.epochs}
    row |= {"seconds": summary.train_time_s, "took": duration(summary.train_time_s)}
    row |= {"time": share_of_full(summary.costs, "step_time_s")}
    row |= {"saved": share_of_full(summary.costs, "saved_bytes_per_sample")}
    if summary.traffic is not None:
        sent = summary.traffic.uplink_bytes + summary.traffic.downlink_bytes
        row |= {"bytes": sent, "sent": size_text(sent)}
    return row


def _curves(runs: Sequence[Facts], names: Sequence[str]) -> dict[str, Any]:
    """Held-out accuracy of all runs against epochs, seconds of training and traffic."""
    charts = []
    for title, x, place in (
        ("Accuracy over epochs", "epoch", _epochs),
        ("Accuracy over time", "seconds of training steps", _seconds),
        ("Accuracy over traffic", "training traffic, both ways, MB", _megabytes),
    ):
        series = [Series(name, list(place(one)), dots=True) for one, name in zip(runs, names, strict=True)]
        svg = line_chart(series, alt=f"{title} of {len(runs)} runs", x=x, percent=True)
        if svg:
            charts.append({"title": title, "svg": svg})
    return {"charts": charts, "files": "metrics.jsonl of each run"}


def _epochs(one: Facts) -> Iterator[tuple[float, float]]:
    return ((row["epoch"], row["accuracy"]) for row in one.evaluations)


def _seconds(one: Facts) -> Iterator[tuple[float, float]]:
    taken, steps = 0.0, iter([*one.steps])
    for row in one.evaluations:
        while (step := next(steps, None)) is not None:
            taken += step.get("seconds", 0.0)
            if step["step"] >= row["step"]:
                break
        yield taken, row["accuracy"]


def _megabytes(one: Facts) -> Iterator[tuple[float, float]]:
    return ((row["training_bytes"] / 1e6, row["accuracy"]) for row in one.evaluations if "training_bytes" in row)


def _classes(runs: Sequence[Facts]) -> list[dict[str, Any]]:
    """Accuracy of each class in each run; empty where the runs have other classes."""
    if len({one.classes for one in runs}) > 1:
        return []
    found = [
        {row["class"]: row["accuracy"] for row in (one.summary.per_class if one.summary else None) or ()}
        for one in runs
    ]
    if not any(found):
        return []
    return [{"name": name, "values": [one.get(name) for one in found]} for name in runs[0].classes[:MOST_CLASSES]]


def _differences(runs: Sequence[Facts]) -> list[dict[str, Any]]:
    """Settings in which the runs differ from each other, of those that change what is computed."""
    values = [{**flat(to_dict(one.config)), "method": one.config.method_name} for one in runs]
    shown = [{name: setting_text(value) for name, value in one.items()} for one in values]
    names = [name for name in values[0] if len({str(one.get(name)) for one in values}) > 1]
    return [
        {"name": name, "values": [one.get(name, "") for one in shown]}
        for name in names
        if name.split(".")[0] not in FREE
    ]
