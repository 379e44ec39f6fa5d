#!/usr/bin/env python3
"""Draws results/codecs.json: accuracy against bytes, one line per codec, the JPEG upload as a vertical line.

python benchmarks/codecs_picture.py results/codecs.json results/codecs.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

MARKERS = "osD^v<>Ph*X"


def draw(result: dict[str, Any], path: Path) -> None:
    """Rows of equal epochs as lines by family; rows that end otherwise as open markers."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots()
    rows = result["rows"]
    families = list(dict.fromkeys(row["family"] for row in rows))
    for index, family in enumerate(families):
        mine = sorted((row for row in rows if row["family"] == family), key=lambda row: row["training_bytes"])
        colour = f"C{index % 10}"
        marker = MARKERS[index % len(MARKERS)]
        equal = [row for row in mine if row["until"] == "epochs"]
        line = "" if family in ("chains", "none", "ADC variants") else "-"
        axes.errorbar(
            [row["training_bytes"] / 1e6 for row in equal],
            [100 * row["accuracy"] for row in equal],
            yerr=[100 * (row["spread"] or 0) for row in equal],
            fmt=f"{marker}{line}",
            color=colour,
            label=family,
            markersize=7,
            linewidth=1.2,
        )
        for row in mine:
            if row["until"] != "epochs":
                axes.plot(
                    row["training_bytes"] / 1e6,
                    100 * row["accuracy"],
                    marker,
                    color=colour,
                    fillstyle="none",
                    markersize=11,
                )
                axes.annotate(row["setting"], _at(row), fontsize=7, xytext=(6, 6), textcoords="offset points")
    frontier = _frontier([row for row in rows if row["until"] == "epochs"])
    axes.plot(*zip(*map(_at, frontier), strict=True), ":", color="grey", zorder=0, label="frontier, equal epochs")
    axes.axvline(result["jpeg_bytes"] / 1e6, color="black", linestyle="--", linewidth=1)
    axes.annotate(
        "the pictures themselves,\nas JPEG files, once",
        (result["jpeg_bytes"] / 1e6, axes.get_ylim()[0]),
        fontsize=8,
        xytext=(4, 8),
        textcoords="offset points",
    )
    axes.set_xscale("log")
    axes.set_xlabel("training traffic, both ways, MB (labels, scales, indices and headers counted)")
    axes.set_ylabel("test accuracy, %")
    config = result["config"]
    axes.set_title(
        f"micro ViT cut after block {config['cut']}, {5 * config['per_class']} pictures, {config['epochs']} epochs; "
        "open markers: trained for another length"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)


def _at(row: dict[str, Any]) -> tuple[float, float]:
    return row["training_bytes"] / 1e6, 100 * row["accuracy"]


def _frontier(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that none beats in both bytes and accuracy, from the fewest bytes on."""
    best, frontier = -1.0, []
    for row in sorted(rows, key=lambda row: (row["training_bytes"], -row["accuracy"])):
        if row["accuracy"] > best:
            best = row["accuracy"]
            frontier.append(row)
    return frontier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    draw(json.loads(args.result.read_text()), args.picture)


if __name__ == "__main__":
    main()
