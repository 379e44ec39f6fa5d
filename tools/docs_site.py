"""What `mkdocs build` needs beyond mkdocs: pages made of the source, and files that lie outside docs/.

A hook of mkdocs.yml. The flags come from the dataclasses that the command line itself is made of, and the public names
from `snello.__all__`, so that neither list can grow old.
"""

import ast
import inspect
import textwrap
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import snello
from snello import cli
from snello.config.values import default_of, flag

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages that lie at the top, where people and GitHub look for them, and what they are called in the site."""
POSITIONAL = tyro.conf.Positional[int].__metadata__[0]  # type: ignore[attr-defined]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages at the top of the repository, and the pictures among the results."""
    for source, target in OUTSIDE.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    for picture in sorted((ROOT / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Ends the generated pages, and points links to where files are in the site."""
    made = {"flags.md": flags, "names.md": names}.get(page.file.src_uri)
    markdown += "\n" + made() if made else ""
    if page.file.src_uri in OUTSIDE.values():
        markdown = markdown.replace("](docs/", "](").replace("](README.md", "](index.md")
    for source, target in OUTSIDE.items():
        markdown = markdown.replace(f"](../{source}", f"]({target}").replace(f"]({source}", f"]({target}")
    return markdown.replace("](../results/", "](results/")


def flags() -> str:
    """A table of flags for every verb."""
    return "\n".join(text for name, verb in cli.VERBS.items() for text in _verb(name, verb))


def _verb(name: str, verb: Any) -> list[str]:
    config = get_type_hints(verb)["config"]
    lines = [f"## snello {name}", "", str(verb.__doc__), "", "| | default | |", "|---|---|---|"]
    return [*lines, *_rows(config, ""), ""]


def _rows(config: Any, prefix: str) -> list[str]:
    """A row for every setting, those of a group under its prefix."""
    hints, texts, rows = get_type_hints(config, include_extras=True), _texts(config), []
    for field in fields(config):
        hint, default = hints[field.name], default_of(field)
        if is_dataclass(default):
            rows += _rows(type(default), f"{prefix}{field.name}.")
            continue
        positional = POSITIONAL in getattr(hint, "__metadata__", ())
        called = field.name.upper() if positional else _called(f"{prefix}{field.name}", default)
        shown = "" if default in (MISSING, None, ()) else f"`{_shown(default)}`"
        text = (_choices(hint) + texts.get(field.name, "")).replace("|", "\\|")
        rows.append(f"| `{called}` | {shown} | {text} |")
    return rows


def _called(name: str, default: object) -> str:
    """The flag that changes a setting: of one that is on by itself, the one that switches it off."""
    group, _, last = name.rpartition(".")
    return flag(f"{group}.no_{last}" if group else f"no_{last}") if default is True else flag(name)


def _shown(default: object) -> str:
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return {True: "on", False: "off"}[default] if isinstance(default, bool) else str(default)


def _choices(hint: Any) -> str:
    """The values that a setting may have, where they are listed."""
    kinds = [hint, *get_args(hint), *(inner for outer in get_args(hint) for inner in get_args(outer))]
    choices = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
    return f"One of {', '.join(f'`{choice}`' for choice in choices)}. " if choices else ""


def _texts(config: type) -> dict[str, str]:
    """What stands below each field in the source of a dataclass and of those that it extends."""
    found = {}
    for cls in reversed([cls for cls in config.__mro__ if is_dataclass(cls)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(definition, ast.ClassDef)
        for item, after in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and isinstance(after, ast.Expr):
                found[item.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    return found


def names() -> str:
    """What mkdocstrings is asked for: every public name, where it is defined."""
    lines = []
    for name in snello.__all__:
        where = snello._LAZY.get(name)
        module, _, attribute = where.partition(":") if where else (getattr(snello, name).__module__, "", name)
        lines += [f"## snello.{name}", "", f"::: {module}.{attribute}", ""]
    return "\n".join(lines)
