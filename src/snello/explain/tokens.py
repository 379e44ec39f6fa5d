"""Which tokens of some held-out pictures are left after each block, in a training step by the run's last budgets."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from snello.explain.crossing import Followed, change, cross
from snello.explain.files import Part, seen
from snello.explain.run import Row, Run
from snello.methods.alast import AlastMethod
from snello.vit.trace import grid_of, trace

VERSION = 1
SHOWN = 8
"""Pictures."""


def pictures(run: Run) -> Part:
    """Some held-out pictures, half of them mistaken where there are as many, patch by patch."""
    chosen = choose(run)
    indices = [row["index"] for row in chosen]
    images = [run.image(index) for index in indices]
    found = cross(run, indices) if run.cut else _whole(run, images)
    values = {
        "version": VERSION,
        "split": "held out",
        "grid": grid_of(found.num_patches, *images[0].shape[1:]),
        "depth": found.depth,
        "cut": run.cut or None,
        "method": run.config.method_name,
        **_alast(found.parts),
        "codec": run.resolved.codec,
        "pictures": [
            {**_words(run, row), "image": f"pictures/{row['index']}.jpg", "blocks": blocks, "crosses": crossed}
            for row, blocks, crossed in zip(chosen, found.blocks, found.crosses, strict=True)
        ],
    }
    files = {f"pictures/{index}.jpg": seen(run.picture(image)) for index, image in zip(indices, images, strict=True)}
    return Part(values, files)


def _whole(run: Run, images: list[Tensor]) -> Followed:
    """What becomes of pictures in a model in one piece."""
    vit = run.model()
    alast = run.attach(vit)
    with run.precision():
        found = trace(vit, run.normalized(images))
    blocks = [[change(*values) for values in found.changes(number)] for number in range(len(images))]
    return Followed(vit.depth, found.num_patches, [(0, vit.depth, alast)], blocks, [None] * len(images))


def choose(run: Run) -> list[Row]:
    """The pictures to show: half of them mistaken where there are as many, and of as many classes as can be."""
    rows = {row["index"]: row for row in run.predictions}
    if not rows:  # nothing is known of what the model says
        rows = {index: _unknown(run, index) for index in run.order}
    drawn = [rows[index] for index in run.order if index in rows]
    wrong = [row for row in drawn if row["predicted"] not in (None, row["label"])]
    right = [row for row in drawn if row["predicted"] in (None, row["label"])]
    num_wrong = min(len(wrong), max(SHOWN // 2, SHOWN - len(right)))
    counts = Counter[int]()
    chosen = [*_spread(wrong, num_wrong, counts), *_spread(right, SHOWN - num_wrong, counts)]
    return sorted(chosen, key=lambda row: (row["label"], row["index"]))


def _spread(rows: Sequence[Row], num: int, counts: Counter[int]) -> list[Row]:
    """The first rows of the classes that have been chosen least; `counts` remembers."""
    left, chosen = list(rows), list[Row]()
    while left and len(chosen) < num:
        row = min(left, key=lambda row: counts[row["label"]])
        left.remove(row)
        counts[row["label"]] += 1
        chosen.append(row)
    return chosen


def _unknown(run: Run, index: int) -> Row:
    return {
        "index": index, "name": run.held_out.name(index), "label": run.held_out.labels[index],
        "predicted": None, "top": [],
    }  # fmt: skip


def _words(run: Run, row: Row) -> dict[str, Any]:
    known = row["predicted"] is not None
    return {
        "index": row["index"],
        "name": row["name"],
        "label": run.classes[row["label"]],
        "predicted": run.classes[row["predicted"]] if known else None,
        "probability": row["top"][0][1] if known else None,
    }


def _alast(parts: Sequence[tuple[int, int, AlastMethod | None]]) -> dict[str, Any]:
    """Rule, budgets and trained blocks, of parts with their first block and depth; without ALaST a part trains all."""
    reducing = next((alast for _, _, alast in parts if alast is not None), None)
    budgets: list[float] = []
    trained: list[int] = []
    for first, depth, alast in parts:
        budgets += [1.0] * depth if alast is None else alast.step_budgets
        trained += [first + block for block in (range(depth) if alast is None else alast.trained)]
    if reducing is None:
        return {"rule": None, "drop_at": None, "budgets": None, "trained": None}
    return {"rule": reducing.config.rule, "drop_at": reducing.drop_at, "budgets": budgets, "trained": trained}
