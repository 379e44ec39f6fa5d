#!/usr/bin/env python3
"""Writes the tables of README.md from the JSON in results/: no figure there is typed by hand.

python benchmarks/tables.py            # rewrites the blocks between <!-- NAME --> and <!-- /NAME -->
python benchmarks/tables.py --check    # exit code 1 where README.md is not what the results say
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def step_cost(result: dict[str, Any]) -> str:
    """Ratios of a step of full fine-tuning over one of ALaST."""
    lines = ["| | precision | FLOPs | saved bytes | step time |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        r = row["ratios"]
        if row["variant"] == "full":
            flops, saved = row["flops_per_sample"] / 1e9, row["saved_bytes_per_sample"] / 2**20
            figures = f"{flops:.1f} GFLOPs/picture | {saved:.1f} MiB/picture | {row['step_time_s']:.2f} s"
        else:
            figures = f"{r['flops']:.2f}x less | {r['saved_bytes']:.2f}x less | {r['step_time']:.2f}x faster"
        lines.append(f"| {row['variant']} | {row['precision']} | {figures} |")
    config, env = result["config"], result["environment"]
    return "\n".join(
        [
            *lines,
            "",
            f"{config['model']}, batch {config['batch_size']}, {env['device']}, {env['threads']} threads, torch "
            f"{env['versions']['torch']}; steps taken in turn, medians of {config['rounds']}.",
        ]
    )


def alast_quality(result: dict[str, Any]) -> str:
    """Accuracy beside the ratio of step times."""
    lines = ["| | epochs | seeds | accuracy, % | step time | FLOPs |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        spread = "" if row["spread"] is None else f" ± {100 * row['spread']:.1f}"
        speed = f"{row['step_time_ratio']:.2f}x faster | {row['flops_ratio']:.2f}x less"
        seeds = len(row["seeds"])
        lines.append(
            f"| {row['setting']} | {row['epochs']} | {seeds} | {100 * row['accuracy']:.1f}{spread} | {speed} |"
        )
    config, env = result["config"], result["environment"]
    return "\n".join(
        [
            *lines,
            "",
            f"Micro ViT, {5 * config['per_class']} pictures to train, 5 000 to test, batch {config['batch_size']}, lr "
            f"{config['lr']}, mean ± standard deviation over seeds, {env['device']}.",
        ]
    )


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"step_cost": step_cost, "alast_quality": alast_quality}


def render(text: str) -> str:
    """`text` with every table block made anew from results/NAME.json."""
    for name, table in TABLES.items():
        file = ROOT / "results" / f"{name}.json"
        block = table(json.loads(file.read_text()))
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, b=block: f"{m[1]}{b}\n{m[2]}", text, flags=re.S
        )
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    made = render(text)
    if args.check:
        return int(made != text)
    readme.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
