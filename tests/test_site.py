"""The site of docs/ builds without a warning, asks nobody for anything, and has every flag and every public name."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.pages import PAGES, ROOT

import snello
from snello import cli

pytest.importorskip("material", reason="pip install '.[docs]'")
pytestmark = pytest.mark.slow
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}
"""Tags that a browser fetches something for, and where they say what."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    source = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": source}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


class Fetches(HTMLParser):
    """What a browser fetches for a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in FETCHED and values.get("rel") not in ("canonical", "next", "prev"):
            self.found.append(values.get(FETCHED[tag]) or "")


def elsewhere(address: str) -> bool:
    return re.match(r"(?i)(https?:)?//", address) is not None


def test_no_page_asks_anybody_else_for_anything(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    fetched = [(page.name, address) for page in pages for address in Fetches(page.read_text()).found]
    assert len(fetched) > 100
    assert [row for row in fetched if elsewhere(row[1])] == []


def test_no_style_sheet_does(site: Path) -> None:
    sheets = sorted(site.rglob("*.css"))
    assert sheets
    named = [name for sheet in sheets for name in re.findall(r"(?:url\(|@import )[\"']?([^\"')]+)", sheet.read_text())]
    assert [name for name in named if elsewhere(name)] == []


def test_what_would_be_seen_as_fetched_elsewhere() -> None:
    text = '<link rel="canonical" href="https://a.b/"><script src="//a.b/c.js"></script><img src="d.png">'
    assert [elsewhere(address) for address in Fetches(text).found] == [True, False]


def test_every_page_is_in_it(site: Path) -> None:
    missing = [page for page in PAGES if page.startswith("docs/") and not _page(site, page).is_file()]
    assert missing == []
    assert "Unreleased" in (site / "changelog" / "index.html").read_text()


def _page(site: Path, page: str) -> Path:
    name = Path(page).stem
    return site / "index.html" if name == "index" else site / name / "index.html"


def test_it_lists_the_flags_of_every_verb_as_the_command_line_has_them(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    sections = re.split(r'<h2 id="snello-([\w-]+)">', (site / "flags" / "index.html").read_text())
    listed = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert listed.keys() == cli.VERBS.keys()
    for verb, section in listed.items():
        flags = set(re.findall(r"<td><code>(--[\w.-]+)</code></td>", section))
        assert cli.main([verb, "--help-all"]) == 0
        known = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", capsys.readouterr().out))
        assert flags and flags <= known, verb
        assert len(re.findall(r"<tr>", section)) > len(flags), verb


def test_it_describes_every_public_name(site: Path) -> None:
    text = (site / "names" / "index.html").read_text()
    for name in snello.__all__:
        assert re.search(rf'<h2 id="snello{name.lower()}">', text), name
    assert text.count("doc-object") >= len(snello.__all__)
