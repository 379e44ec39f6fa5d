"""The section of traffic, across a cut: accuracy against bytes, and what the bytes were."""

from typing import Any

from snello.reports.charts import Mark, Series, line_chart
from snello.reports.facts import Facts
from snello.reports.words import course, percent, size_text


def traffic(facts: Facts) -> dict[str, Any] | None:
    """Across a cut: accuracy against bytes, and what the bytes were."""
    summary = facts.summary
    if summary is None or summary.traffic is None:
        return None
    crossed = summary.traffic
    points = [(row["training_bytes"] / 1e6, row["accuracy"]) for row in facts.evaluations if "training_bytes" in row]
    marks = [Mark("the pictures as JPEG files", x=crossed.jpeg_bytes / 1e6)] if crossed.jpeg_bytes else []
    chart = line_chart(
        [Series("held-out accuracy", points, dots=True)],
        alt=course("held-out accuracy over training traffic", [y for _, y in points]),
        x="training traffic, both ways, MB", percent=True, marks=marks,
    )  # fmt: skip
    ways = (("up", crossed.uplink_bytes_by_kind), ("down", crossed.downlink_bytes_by_kind))
    sizes = [(f"{kind}, {way}", way, size) for way, by_kind in ways for kind, size in by_kind.items() if size]
    most = max((size for _, _, size in sizes), default=1)
    kinds = [{"name": name, "way": way, "share": size / most, "text": size_text(size)} for name, way, size in sizes]
    totals = [
        ("up, from client to server", crossed.uplink_bytes),
        ("down, from server to client", crossed.downlink_bytes),
        ("uncompressed, fp32, both ways", crossed.uncompressed_bytes),
        ("evaluation, apart", crossed.eval_bytes),
    ]
    if crossed.jpeg_bytes:
        totals.append(("the pictures as files, once", crossed.jpeg_bytes))
    merged = facts.parts["merged"]
    groups = [] if merged is None else [_group(facts, group) for group in merged.get("groups", ())]
    return {
        "cut": crossed.cut,
        "codec": crossed.codec,
        "labels": crossed.labels,
        "chart": chart,
        "kinds": kinds,
        "totals": [(name, size_text(size), percent(size / crossed.uncompressed_bytes, 2)) for name, size in totals],
        "groups": groups,
        "batch": None if merged is None else merged.get("batch"),
        "files": "summary.json, metrics.jsonl" + (", report/merged.json" if groups else ""),
    }


def _group(facts: Facts, group: dict[str, Any]) -> list[dict[str, Any]]:
    """Pictures whose activations were averaged."""
    members = zip(group["names"], group["labels"], group["images"], strict=True)
    return [
        {"name": name, "label": label, "predicted": None, "image": facts.image(image)} for name, label, image in members
    ]
