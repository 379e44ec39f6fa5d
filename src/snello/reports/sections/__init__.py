"""What each section of a report says, as plain values for its template; None where a run has nothing to say there.

result.py    the result in one sentence with its cost
pictures.py  which tokens of some pictures are left after each block
curves.py    how it was learned
mistakes.py  which classes and pictures go wrong
costs.py     where time and memory went
traffic.py   what crossed a cut
data.py      pictures, settings, machine
"""

from collections.abc import Callable
from typing import Any

from snello.reports.facts import Facts
from snello.reports.sections.costs import costs
from snello.reports.sections.curves import curves
from snello.reports.sections.data import data
from snello.reports.sections.mistakes import mistakes
from snello.reports.sections.pictures import pictures
from snello.reports.sections.result import result
from snello.reports.sections.traffic import traffic

Section = dict[str, Any]

SECTIONS: dict[str, tuple[str, Callable[[Facts], Section | None]]] = {
    "result": ("Result", result),
    "pictures": ("Pictures", pictures),
    "curves": ("Curves", curves),
    "mistakes": ("Mistakes", mistakes),
    "costs": ("Cost", costs),
    "traffic": ("Traffic", traffic),
    "data": ("Data and settings", data),
}
"""In the order of the page: what the contents call them, and what they say."""
