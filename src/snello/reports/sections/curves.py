"""The section of curves: loss, accuracy, learning rate, FLOPs, budgets and trained blocks over the steps."""

from itertools import accumulate
from typing import Any

from markupsafe import Markup

from snello.reports.charts import Mark, Series, heat_map, line_chart
from snello.reports.facts import Facts, Rows
from snello.reports.words import course

MOST_COLUMNS = 120
"""Steps that a heat map shows: of a longer run every second, or third, ..."""


def curves(facts: Facts) -> dict[str, Any] | None:
    """Loss, accuracy, learning rate; budgets and trained blocks over the steps; FLOPs spent."""
    if not facts.steps:
        return None
    charts = (
        ("Loss", _loss(facts)),
        ("Accuracy", _accuracy(facts)),
        ("Base learning rate", _learning_rate(facts)),
        ("TFLOPs spent", _flops(facts)),
    )
    drawn = [{"title": title, "svg": svg} for title, svg in charts if svg]
    return {"charts": drawn, "budgets": _budgets(facts.steps), "files": "metrics.jsonl, report/flops.json"}


def _loss(facts: Facts) -> Markup:
    training = Series("training", [(row["step"], row["loss"]) for row in facts.steps])
    held_out = Series("held out", [(row["step"], row["loss"]) for row in facts.evaluations], dots=True)
    return line_chart([training, held_out], alt=course("training loss", training.values), x="step")


def _accuracy(facts: Facts) -> Markup:
    held_out = Series("held out", [(row["step"], row["accuracy"]) for row in facts.evaluations], dots=True)
    alt = course("held-out accuracy", held_out.values)
    return line_chart([held_out], alt=alt, x="step", percent=True, marks=_probe_mark(facts))


def _learning_rate(facts: Facts) -> Markup:
    rate = Series("base learning rate", [(row["step"], row["lr"]) for row in facts.steps])
    return line_chart([rate], alt=course("base learning rate", rate.values), x="step", from_zero=True)


def _probe_mark(facts: Facts) -> list[Mark]:
    probe = facts.summary.probe_accuracy if facts.summary else None
    return [] if probe is None else [Mark("linear probe", y=probe)]


def _flops(facts: Facts) -> Markup:
    """FLOPs spent over the steps, this run's and what plain full fine-tuning would have spent."""
    found = facts.parts["flops"]
    if found is None or not found.get("steps"):
        return Markup("")
    at, shares, full = found["steps"], found["share"], found["full"]
    lengths = [after - before for before, after in zip([0, *at], at, strict=False)]
    size = facts.config.batch_size * facts.config.accumulate
    unit = size * full / 1e12
    spent = list(accumulate(share * length * unit for share, length in zip(shares, lengths, strict=True)))
    own = Series("this run", list(zip(at, spent, strict=True)))
    other = Series("full fine-tuning", [(step, step * unit) for step in at], dashed=True)
    alt = (
        f"FLOPs spent over steps: {spent[-1]:.3g} TFLOPs in all, {spent[-1] / (at[-1] * unit):.2f} of full fine-tuning"
    )
    return line_chart([own, other], alt=alt, x="step", from_zero=True)


def _budgets(steps: Rows) -> dict[str, Any] | None:
    """Budgets and trained blocks over the steps; None without ALaST, or where its budgets are another process's."""
    if "budgets" not in steps[0]:
        return None
    kept = steps[:: max(1, -(-len(steps) // MOST_COLUMNS))]
    used = [row["step_budgets" if "step_budgets" in row else "budgets"] for row in kept]
    values = list(map(list, zip(*used, strict=True)))
    trains = [[float(block in row["trained"]) for row in kept] for block in range(len(values))]
    reducing = [block for block, row in enumerate(values) if min(row) < 1]
    moved = [f"block {block} from {values[block][0]:.2f} to {values[block][-1]:.2f}" for block in reducing]
    course = "; ".join(moved[:3]) + (f"; {len(moved) - 3} others" if len(moved) > 3 else "")
    frozen = 1 - sum(map(sum, trains)) / (len(kept) * len(values))
    at = [row["step"] for row in kept]
    alt = f"budgets of {len(values)} blocks over {at[-1]} steps: {course or 'all pass on every token'}"
    trained = f"which of {len(values)} blocks train in each step: {100 * (1 - frozen):.0f} % of all"
    return {
        "svg": heat_map(values, at, alt=alt, x="step", row_name="block"),
        "course": course,
        "trained": heat_map(trains, at, alt=trained, x="step", row_name="block") if frozen else None,
        "frozen": frozen,
        "depth": len(values),
    }
