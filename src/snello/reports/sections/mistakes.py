"""The section of mistakes: which classes are taken for which, and which pictures go wrong."""

from collections import Counter
from typing import Any

from snello.reports.facts import Facts

MATRIX_CLASSES = 20
"""More classes than that make no matrix that anybody could read: their commonest confusions are listed."""
MOST_CLASSES = 200
"""Rows of the table of classes; with more, the least accurate are listed."""


def mistakes(facts: Facts) -> dict[str, Any] | None:
    """Which classes are taken for which, and which pictures go wrong."""
    rows = facts.predictions
    if not rows:
        return None
    names = facts.classes
    confused = Counter((row["label"], row["predicted"]) for row in rows)
    labels, predicted = (Counter(row[key] for row in rows) for key in ("label", "predicted"))
    matrix = None
    if len(names) <= MATRIX_CLASSES:
        matrix = [
            [
                {"num": confused[i, j], "share": confused[i, j] / labels[i] if labels[i] else 0.0}
                for j in range(len(names))
            ]
            for i in range(len(names))
        ]
    pairs = [
        {"label": names[i], "predicted": names[j], "num": num, "share": num / labels[i]}
        for (i, j), num in confused.most_common()
        if i != j
    ]
    table = [_class_row(names, i, confused, labels, predicted) for i in range(len(names))]
    total = len(table)
    if total > MOST_CLASSES:
        table = sorted(table, key=lambda row: row["recall"] if row["recall"] is not None else 2.0)[:MOST_CLASSES]
    shown = facts.parts["mistakes"] or {}
    return {
        "classes": list(names),
        "matrix": matrix,
        "pairs": pairs[:15],
        "table": table,
        "left_out": total - len(table),
        "wrong": [_thumbnail(facts, row) for row in shown.get("wrong", ())],
        "unsure": [_thumbnail(facts, row) for row in shown.get("unsure", ())],
        "num_wrong": sum(row["label"] != row["predicted"] for row in rows),
        "num": len(rows),
        "files": "report/predictions.jsonl, report/mistakes.json",
    }


def _cell(num: int, pictures: int) -> dict[str, float]:
    return {"num": num, "share": num / pictures if pictures else 0.0}


def _class_row(
    names: Any, i: int, confused: Counter[tuple[int, int]], labels: Counter[int], predicted: Counter[int]
) -> dict[str, Any]:
    right = confused[i, i]
    wrong = [(num, j) for (label, j), num in confused.items() if label == i and j != i]
    most = max(wrong, default=None)
    return {
        "name": names[i],
        "num": labels[i],
        "recall": right / labels[i] if labels[i] else None,
        "precision": right / predicted[i] if predicted[i] else None,
        "taken_for": None if most is None else f"{names[most[1]]} ({most[0]})",
    }


def _thumbnail(facts: Facts, row: dict[str, Any]) -> dict[str, Any]:
    names = facts.classes
    top = [(names[c], p) for c, p in row["top"]]
    return {"name": row["name"], "label": names[row["label"]], "predicted": names[row["predicted"]],
            "top": top[:3], "p": row["p"], "image": facts.image(row["image"])}  # fmt: skip
