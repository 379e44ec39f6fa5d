"""What a run's method does to pictures, found out from the run's folder alone, for its report.

run.py         `Run`: settings, pictures and model of a run, each read once
tokens.py      which tokens of some held-out pictures are left after each block
crossing.py    the same across a cut: what the codec lets through
merged.py      pictures that a codec averaged with each other
mistakes.py    what the model says of held-out pictures, and which to show
data.py        how many pictures there are, and whether some are there twice; the machine
flops.py       what each step of the run cost
files.py       pictures and values as files

What is found is written into the run's folder report/, a JSON file for each part and the pictures beside them.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from snello.errors import SnelloError, one_line
from snello.explain import data, flops, merged, mistakes, tokens
from snello.explain.files import Part
from snello.explain.run import Run

PARTS: dict[str, Callable[[Run], Part | None]] = {
    "mistakes": mistakes.mistakes,  # first: it may find out what the model says of pictures, which others need
    "pictures": tokens.pictures,
    "merged": merged.merged,
    "data": data.data,
    "flops": flops.flops,
}
"""By the names of their files; None where a run has nothing to say of it."""


def explain(run_folder: Path) -> list[str]:
    """Writes all that can be found out about a run into its folder report/; what cannot is returned, a line each.

    It computes on the CPU, and leaves PyTorch's noise as it was.
    """
    problems: list[str] = []
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # said in training already
        try:
            run = Run(run_folder)
        except Exception as error:
            return [_line(error)]
        for name, make in PARTS.items():
            try:
                part = make(run)
                if part is not None:
                    part.write(run.report, name)
            except Exception as error:  # a report is never worth more than what it is about
                problems.append(f"{name}: {_line(error)}")
    return problems


def _line(error: Exception) -> str:
    return str(error) if isinstance(error, SnelloError) else f"{type(error).__name__}: {one_line(error)}"
