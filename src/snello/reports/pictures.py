"""The pictures of a run: budgets and trained blocks, accuracy against traffic."""

from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snello.files import replacing
from snello.reports.terminal import server_time
from snello.runs.folder import RunFolder

if TYPE_CHECKING:  # slow to import, and not every run draws
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]


def plot_budgets(run: RunFolder) -> None:
    """Draws the budgets and the trained blocks of a run over its steps into budgets.png.

    Does nothing for a run that has no budgets of its own, as one whose ALaST is on the server.
    """
    rows = list(run.rows("step"))
    if rows and "budgets" in rows[0]:
        _save(budgets_figure(rows), run.plot_file)


def plot_traffic(run: RunFolder) -> None:
    """Draws accuracy against epochs, training bytes and time, with and without the link, into traffic.png."""
    kinds = (list(run.rows(kind)) for kind in ("step", "eval", "replay"))
    _save(traffic_figure(*kinds), run.traffic_file)


def budgets_figure(rows: Rows) -> "Figure":
    """Draws the budgets that steps used, and below them which blocks were trained, where not always all were."""
    from matplotlib import colormaps

    steps = [row["step"] for row in rows]
    used: list[list[float]] = [row["step_budgets" if "step_budgets" in row else "budgets"] for row in rows]
    depth = len(used[0])
    some = any(len(row["trained"]) < depth for row in rows)
    figure = _figure(9, 6 if some else 3.6)
    parts = figure.subplots(2, 1, sharex=True) if some else [figure.subplots()]
    top = parts[0]
    reducing = [block for block in range(depth) if any(budgets[block] < 1 for budgets in used)]
    for number, block in enumerate(reducing):
        colour = colormaps["viridis"](number / max(1, len(reducing)))
        top.plot(steps, [budgets[block] for budgets in used], color=colour, label=f"block {block}")
    if len(reducing) < depth:
        top.axhline(1.0, color="grey", linestyle="--", label="all others" if reducing else "all blocks")
    title = "ALaST: budgets and trained blocks" if some else "ALaST: budgets; all blocks train"
    top.set(ylabel="budget (share of patch tokens passed on)", title=title, ylim=(0, 1.05))
    top.legend(fontsize="x-small", ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    parts[-1].set_xlabel("step")
    if some:
        trained = [[float(block in row["trained"]) for row in rows] for block in range(depth)]
        extent = (steps[0] - 0.5, steps[-1] + 0.5, -0.5, depth - 0.5)
        options: dict[str, Any] = {"aspect": "auto", "origin": "lower", "interpolation": "nearest"}
        parts[1].imshow(trained, cmap="Greens", vmin=0, vmax=1.4, extent=extent, **options)
        parts[1].set(ylabel="block (green: trained)", yticks=range(depth))
    return figure


def traffic_figure(steps: Rows, evaluations: Rows, alone: Rows | None = None) -> "Figure":
    """Draws the accuracy of the evaluations against epochs, megabytes and seconds.

    `alone` are the steps that a server took by itself after the last of `steps`.
    """
    per_epoch = sum(row["epoch"] == 0 for row in steps)
    server = [server_time(row.get("wait_seconds"), row.get("server_seconds")) for row in steps]
    compute = [0.0, *accumulate(row["client_seconds"] + took for row, (_, took) in zip(steps, server, strict=True))]
    link = [0.0, *accumulate(row.get("link_seconds", 0.0) for row in steps)]
    at = [row["step"] for row in evaluations]
    # What came after the last step came before the last evaluation.
    compute[-1] += sum(row["server_seconds"] for row in alone or ())
    compute[-1] += evaluations[-1].get("wait_seconds", 0.0) if evaluations else 0.0
    accuracy = [100 * row["accuracy"] for row in evaluations]
    figure = _figure(11, 3.6)
    by_epoch, by_bytes, by_time = figure.subplots(1, 3, sharey=True)
    by_epoch.plot([step / per_epoch for step in at], accuracy, "o-")
    by_epoch.set(xlabel="epochs", ylabel="held-out accuracy, %")
    by_epoch.xaxis.get_major_locator().set_params(integer=True)
    by_bytes.plot([row["training_bytes"] / 1e6 for row in evaluations], accuracy, "o-")
    by_bytes.set_xlabel("training traffic, MB")
    by_time.plot([compute[step] for step in at], accuracy, "o-", label=f"client and {server[0][0]}")
    if link[-1]:
        by_time.plot([compute[step] + link[step] for step in at], accuracy, "s--", label="and the link")
    by_time.set_xlabel("seconds")
    by_time.legend(fontsize="small")
    for axes in (by_epoch, by_bytes, by_time):
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
    return figure


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", file: Path) -> None:
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
