"""The section of data: the pictures, the settings, the versions and the machine."""

from typing import Any

from snello.config.effect import changed
from snello.config.values import to_dict
from snello.reports.facts import Facts
from snello.reports.sections.mistakes import MOST_CLASSES
from snello.reports.words import setting_text
from snello.runs.folder import flat
from snello.runs.resolved import Resolved


def data(facts: Facts) -> dict[str, Any] | None:
    """The pictures, the settings, the versions and the machine."""
    found = facts.parts["data"] or {}
    train, held_out = found.get("train", {}), found.get("held_out", {})
    most = max([*train.values(), *held_out.values()], default=1) or 1
    classes = [
        {
            "name": name,
            "train": train.get(name, 0),
            "held_out": held_out.get(name, 0),
            "share": train.get(name, 0) / most,
        }
        for name in facts.classes[:MOST_CLASSES]
        if train
    ]
    settings = flat(to_dict(facts.config))
    resolved = facts.resolved
    told = () if resolved.server is None else ("weights", "compare")  # they come from the server, whatever these say
    own = {name for name in changed(facts.config) if name not in ("out", "config", "resume", "report", *told)}
    return {
        "source": found.get("source"),
        "notes": found.get("notes", []),
        "skipped": found.get("skipped", resolved.num_skipped),
        "num_train": resolved.num_train,
        "num_val": resolved.num_val,
        "classes": classes,
        "left_out": max(0, len(facts.classes) - MOST_CLASSES) if train else 0,
        "chosen": "Settings that were chosen" + ("" if resolved.server is None else ", here or by the server"),
        "copies": found.get("copies"),
        "changed": [(name, setting_text(value)) for name, value in settings.items() if name in own],
        "others": [(name, setting_text(value)) for name, value in settings.items() if name not in own],
        "versions": resolved.versions,
        "machine": _machine(found.get("machine", {}), resolved),
        "files": "config.yaml, report/data.json",
    }


def _machine(found: dict[str, Any], resolved: Resolved) -> dict[str, Any]:
    """Where it was trained, and how."""
    known = {name: f"{value / 2**30:.1f} GiB" if name == "memory" else value for name, value in found.items() if value}
    return known | {"device": resolved.device, "precision": resolved.precision, "threads": resolved.threads}
