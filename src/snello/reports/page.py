"""report.html: one file, drawn from the files of a run folder, that opens anywhere and asks nobody for anything."""

import base64
import hashlib
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from snello.files import replacing
from snello.reports.facts import Facts
from snello.reports.sections import SECTIONS
from snello.runs.folder import RunFolder


class Part(NamedTuple):
    """A section of a page."""

    id: str
    name: str
    """In the contents."""
    template: str
    section: dict[str, Any] | None
    """What its template says; None leaves it out."""


def page_of(facts: Facts) -> str:
    """The report of one run, as the text of an HTML file."""
    made = [Part(name, title, f"{name}.html.jinja", make(facts)) for name, (title, make) in SECTIONS.items()]
    config = facts.config
    what = f"{config.model}, {config.method_name}, {len(facts.classes)} classes"
    return render(
        made,
        title=facts.name,
        folder=str(facts.path),
        again=shlex.join(["snello", "report", str(facts.path)]),
        pictures=any(facts.parts[name] for name in ("pictures", "merged", "mistakes")),
        problems=facts.problems,
        what=what,
    )


def render(parts: Sequence[Part], **values: Any) -> str:
    """The page with these parts, without those that have nothing to say."""
    environment = Environment(
        loader=PackageLoader("snello.reports"),
        autoescape=True,  # class and file names are the user's, and may be anything
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script, style = (_asset(environment, name) for name in ("script.js", "style.css"))
    return environment.get_template("report.html.jinja").render(
        parts=[part for part in parts if part.section is not None],
        style=Markup(style),
        script=Markup(script),
        # Only this script may run, whatever a name in the page would smuggle in.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=version("snello"),
        **values,
    )


def _asset(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def write_page(path: Path, problems: Sequence[str] = (), out: Path | None = None) -> Path:
    """Draws the report of the run in a folder into it, or into `out`, and returns the file.

    Raises:
        CheckpointError: where the folder is not that of a run, or the file cannot be written.
    """
    text, file = page_of(Facts.read(path, problems)), out or RunFolder(path).report_file
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return file
