"""The model card beside every export: what the model is, how it was made, what that cost, how to use it."""

from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import yaml

from snello.errors import printable
from snello.export.trained import Trained
from snello.reports.terminal import COST_ROWS
from snello.runs.summary import Summary

SHOWN = 100
"""Classes that a card names; the others are in the model's own files."""
SETTINGS = (
    "epochs", "batch_size", "accumulate", "lr", "weight_decay", "layer_decay", "warmup", "clip_norm",
    "label_smoothing", "seed",
)  # fmt: skip
"""Those that every method has."""


def card(trained: Trained, library: str, name: str, code: list[str]) -> str:
    """The text of README.md, as the Hugging Face hub reads it; `code` is blocks of Python, run in its folder."""
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(trained, library), sort_keys=False)}---",
        f"# {_quoted(trained.name)} fine-tuned on {len(trained.classes)} classes",
        _what(trained),
        "## How to use it",
        f"In the folder of {_quoted(name)}:" if library != "transformers" else "In this folder:",
        *(f"```python\n{block}\n```" for block in code),
        _preprocessing(trained),
        "## Classes",
        _classes(trained.classes),
        "## Accuracy",
        _accuracy(trained.summary),
        "## Training",
        _training(trained),
        *_costs(trained),
        *_traffic(trained.summary),
        "## Licence",
        "The licence of the base model and of its weights applies to this model too; so may that of the pictures.",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(trained: Trained, library: str) -> dict[str, Any]:
    task, base = "image-classification", base_model(trained)
    tags = [task, "snello", *trained.settings.method_name.split("+")]
    values = {"library_name": library, "pipeline_tag": task, "tags": tags, "metrics": ["accuracy"]}
    return values if base is None else values | {"base_model": base}


def base_model(trained: Trained) -> str | None:
    """What the model was fine-tuned from, by its name on the hub; None where it has none."""
    if trained.settings.weights != "pretrained":
        return None
    if trained.is_transformers:
        return trained.name[3:] if trained.name.startswith("hf:") else None
    known = timm.get_pretrained_cfg(trained.name, allow_unregistered=False)
    hub: str | None = known and known.hf_hub_id
    return hub


def _what(trained: Trained) -> str:
    settings, pre = trained.settings, trained.preprocessing
    library = "transformers" if trained.is_transformers else "timm"
    known = {"pretrained": "its pretrained weights", "none": "random weights"}
    weights = known.get(settings.weights, "weights of the user's own")
    made = _versions(trained).get("snello", version("snello"))
    return (
        f"A Vision Transformer for image classification: {_quoted(trained.name)} of {library}, fine-tuned from "
        f"{weights} on {len(trained.classes)} classes at {pre.size} x {pre.size} pixels with snello {made}, "
        f"method {_method(trained)}."
    )


def _method(trained: Trained) -> str:
    settings = trained.settings
    names = {
        "alast": "ALaST (adaptive compute budgets, arXiv:2408.08670)",
        "full": "full fine-tuning",
        "head": "linear probe (the head alone)",
        "last-k": f"the last {settings.last_k} blocks and the head",
        "lora": f"LoRA (arXiv:2106.09685), r = {settings.lora.r}, alpha = {settings.lora.alpha:g}, merged",
    }
    return " with ".join(names.get(part, part) for part in settings.method_name.split("+"))


def _preprocessing(trained: Trained) -> str:
    pre = trained.preprocessing
    return (
        f"Preprocessing, which this code does: the shorter side to {trained.resize} pixels ({pre.interpolation}), the "
        f"central {pre.size} x {pre.size}, values from 0 to 1, less the mean {_numbers(pre.mean)}, divided by "
        f"{_numbers(pre.std)} (red, green, blue)."
    )


def _classes(classes: list[str]) -> str:
    more = f" and {len(classes) - SHOWN} more, which the model's files name" if len(classes) > SHOWN else ""
    return f"{len(classes)}, in the order of the logits: {', '.join(map(_quoted, classes[:SHOWN]))}{more}."


def _accuracy(summary: Summary | None) -> str:
    if summary is None:
        return "The run had not ended when this was exported."
    return (
        f"{summary.accuracy:.2%} on the held-out pictures, after epoch {summary.best_epoch} of "
        f"{summary.epochs} (the last: {summary.last_accuracy:.2%}). The epoch was chosen on these pictures."
    )


def _versions(trained: Trained) -> dict[str, str]:
    return {} if trained.summary is None else trained.summary.versions


def _training(trained: Trained) -> str:
    settings = trained.settings
    rows: list[tuple[str, Any]] = [("method", settings.method_name)]
    rows += [(name, getattr(settings, name)) for name in SETTINGS]
    for part in settings.method_name.split("+"):
        if part in ("alast", "lora"):
            rows += [(f"{part}.{name}", value) for name, value in asdict(getattr(settings, part)).items()]
    if settings.method_name == "last-k":
        rows.append(("last_k", settings.last_k))
    if settings.split.cut:
        split = settings.split
        rows += [("split.cut", split.cut), ("split.codec", trained.resolved.codec), ("split.labels", split.labels)]
    rows += [(name, getattr(trained.resolved, name)) for name in ("precision", "attention")]
    rows += [(f"version of {name}", value) for name, value in _versions(trained).items()]
    shown = ((name, _value(value)) for name, value in rows if value is not None and not isinstance(value, Path))
    return _table(("setting", "value"), shown)


def _costs(trained: Trained) -> list[str]:
    """The method against full fine-tuning, where that was measured."""
    summary, method = trained.summary, trained.settings.method_name
    if summary is None or "compared_batch_size" not in summary.costs:
        return []
    rows, costs = [], summary.costs
    for name, field, style, unit in COST_ROWS:
        value, full = costs.get(field), costs.get(f"full_{field}")
        if value is None:
            continue
        of_full = "does not fit" if full is None else f"{full / unit:{style}}"
        ratio = f"{full / value:.2f}x" if full and value else ""
        rows.append((name, f"{value / unit:{style}}", of_full, ratio))
    if not rows:
        return []
    where = f"Measured after the run on its machine ({summary.device}), batch {costs['compared_batch_size']}:"
    return ["## Cost of training", where, _table(("", method, "full", f"full / {method}"), rows)]


def _traffic(summary: Summary | None) -> list[str]:
    """What crossed the cut, where there was one."""
    if summary is None or summary.traffic is None:
        return []
    up, down = summary.traffic.uplink_bytes, summary.traffic.downlink_bytes
    text = (
        f"Trained across a cut after block {summary.traffic.cut}: {up / 1e6:.2f} MB up and {down / 1e6:.2f} MB down, "
        f"{summary.traffic.uncompressed_bytes / (up + down):.1f}x less than uncompressed."
    )
    return ["## Traffic of training", text]


def _table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [headings, ("---",) * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _value(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return _quoted(text) if isinstance(value, (str, list, tuple)) else text


def _quoted(text: str) -> str:
    """A name as Markdown shows it letter by letter, on one line, whatever it is made of."""
    text = printable(text).replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
