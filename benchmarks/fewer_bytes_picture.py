#!/usr/bin/env python3
"""Draws results/fewer_bytes.json: points below uncompressed training against bytes, the JPEG upload as a line.

python benchmarks/fewer_bytes_picture.py results/fewer_bytes.json results/fewer_bytes.png
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

TITLES = {"cifar": "five CIFAR-10 classes", "fashion": "Fashion-MNIST"}


def draw(result: dict[str, Any], path: Path) -> None:
    """One panel a task; a colour for each group of settings."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, len(TITLES), sharey=True)
    for axes, (task, title) in zip(panels, TITLES.items(), strict=True):
        rows = [row for row in result["rows"] if row["task"] == task]
        for index, group in enumerate(dict.fromkeys(row["group"] for row in rows)):
            for between in (False, True):
                mine = [row for row in rows if row["group"] == group and bool(row["replay"]) == between]
                axes.errorbar(
                    [row["training_bytes"] / 1e6 for row in mine],
                    [100 * row["accuracy"] for row in mine],
                    yerr=[100 * (row["spread"] or 0) for row in mine],
                    fmt="osD^"[index % 4],
                    color=f"C{index}",
                    fillstyle="none" if between else "full",
                    label=None if not mine else "the same, replayed between" if between else group,
                )
            for row in (row for row in rows if row["group"] == group and not row["replay"]):
                below = row["name"] == "small"  # beside its neighbour
                at = (row["training_bytes"] / 1e6, 100 * row["accuracy"])
                axes.annotate(row["codec"], at, fontsize=7, xytext=(6, -9 if below else 3), textcoords="offset points")
        jpeg = result["jpeg_bytes"][task] / 1e6
        axes.axvline(jpeg, color="black", linestyle="--", linewidth=1)
        axes.annotate(
            "the pictures\nas JPEG", (jpeg, 0.02), xycoords=("data", "axes fraction"), fontsize=8,
            xytext=(4, 2), textcoords="offset points",
        )  # fmt: skip
        axes.set_xscale("log")
        axes.set_title(title)
        axes.set_xlabel("training traffic, both ways, MB")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
