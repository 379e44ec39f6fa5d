"""The checks of pages themselves: each lets a good page pass, and finds what is wrong with a bad one."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers import browser as look

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = [pytest.mark.slow, pytest.mark.skipif(look.missing() is not None, reason=str(look.missing()))]

DOT = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
GOOD = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>A run</title>
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<style>
:root {{ color-scheme: light dark; background: light-dark(#fff, #111); color: light-dark(#111, #eee) }}
.wide {{ overflow-x: auto }} .wide td, .wide th {{ min-width: 12em }}
.reader {{ position: absolute; width: 1px; height: 1px; overflow: hidden }}
.picture {{ position: relative; width: 60px }} .label {{ position: absolute; top: 0; left: 0 }}
[data-block] img {{ width: 60px; height: 60px; display: block }}
</style></head><body><main>
<h1>A run</h1>
<section id="result"><h2>Result</h2>
<p>Accuracy 43.2 %<span class="reader"> of the held-out pictures</span></p></section>
<section id="pictures"><h2>Pictures</h2>
<label id="slider" hidden>Block <input type="range" min="1" max="2" value="1"></label>
<div class="picture"><div data-block="1"><img src="{DOT}" alt="a shoe, all patches"></div>
<div data-block="2"><img src="{DOT}" alt="a shoe, half of the patches"></div><b class="label">shoe</b></div></section>
<section id="data"><h2>Data</h2>
<div class="wide" tabindex="0"><table class="sortable"><thead><tr>
<th aria-sort="none"><button>class</button></th><th aria-sort="ascending"><button>pictures</button></th></tr></thead>
<tbody><tr><td>shoe</td><td>9</td></tr><tr><td>bag</td><td>10</td></tr></tbody></table></div>
<svg role="img" aria-label="a line" width="50" height="20"><text x="2" y="9">a</text><text x="4" y="9">b</text></svg>
</section></main>
<script>
const slider = document.querySelector('input'), frames = document.querySelectorAll('[data-block]');
const show = () => frames.forEach(frame => frame.hidden = frame.dataset.block !== slider.value);
slider.oninput = show; show();
document.querySelector('#slider').hidden = false;
</script></body></html>"""


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with look.launched() as browser:
        yield browser


def page_of(folder: Path, *changes: tuple[str, str]) -> Path:
    text = GOOD
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file = folder / "report.html"
    file.write_text(text)
    return file


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_good_page_has_no_findings(browser: "Browser", tmp_path: Path, width: int, scheme: look.Scheme) -> None:
    with look.opened(browser, page_of(tmp_path), width=width, scheme=scheme) as (page, _):
        assert look.sections(page) == ["result", "pictures", "data"]
        for check in (look.sideways, look.overlaps, look.without_alternative, look.violations):
            assert check(page) == []
        assert (look.brightness(page) > 0.9) if scheme == "light" else (look.brightness(page) < 0.1)


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("console.error('gone')", "error: gone"),
        ("console.warn('odd')", "warning: odd"),
        ("nothing.at.all", "exception: nothing is not defined"),
        ("setTimeout(() => { throw new Error('late') }, 100)", "exception: late"),
        ("alert(1)", "dialog: 1"),
        ("fetch('https://example.org/a').catch(() => 0)", "https://example.org/a"),
        ("document.body.append(new Image()); document.images[0].src = 'x'", "/x'"),
        ("document.head.innerHTML += '<link rel=stylesheet href=https://example.org/b.css>'", "https://example.org/b"),
        ("document.body.style.background = 'url(//example.org/c.png)'", "//example.org/c.png"),
        ("new WebSocket('ws://127.0.0.1:9/')", "127.0.0.1:9"),
        ("setTimeout(() => fetch('late.json').catch(() => 0), 100)", "late.json"),
    ],
)
def test_what_a_page_does_is_noticed(browser: "Browser", tmp_path: Path, script: str, found: str) -> None:
    file = page_of(tmp_path, ("<script>", f"<script>{script};"))
    with pytest.raises(AssertionError) as caught, look.opened(browser, file):
        pass
    assert found in str(caught.value)


def test_a_page_that_is_watched_loosely_is_not_judged(browser: "Browser", tmp_path: Path) -> None:
    file = page_of(tmp_path, ("<script>", "<script>console.error('gone');"))
    with look.opened(browser, file, strict=False) as (_, watch):
        pass
    assert watch.complaints == ["error: gone"] and watch.requests == [file.as_uri()]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (("<p>", '<p style="margin-top: -45px">'), '"Result" over "Accuracy 43.2 %"'),
        (("<h2>Data</h2>", '<h2 style="margin-top: -40px">Data</h2>'), '"Data" over <img>'),
        (("<h2>Result</h2>", '<h2 style="height: 0">Result</h2>'), '"Result" over "Accuracy 43.2 %"'),
        (("<h2>Data</h2>", '<h2 style="width: 30px; overflow: hidden">Data</h2>'), '#data: "Data" is cut off'),
        (("<h2>Data</h2>", '<h2 style="height: 9px; overflow: clip">Data</h2>'), '#data: "Data" is cut off'),
        (("<h2>Data</h2>", '<h2 style="margin-left: -20px">Data</h2>'), '#data: "Data" is cut off'),
    ],
)
def test_overlaps_are_found(browser: "Browser", tmp_path: Path, change: tuple[str, str], found: str) -> None:
    with look.opened(browser, page_of(tmp_path, change)) as (page, _):
        assert found in "\n".join(look.overlaps(page))


def test_what_is_too_wide_is_found(browser: "Browser", tmp_path: Path) -> None:
    file = page_of(tmp_path, ('class="wide"', 'class="other"'), (".wide td", "td"))
    with look.opened(browser, file, width=390) as (page, _):
        found = look.sideways(page)
        assert "in a window of 390" in found[0] and any("<table" in line and "#data" in line for line in found)
    with look.opened(browser, file, width=1280) as (page, _):
        assert look.sideways(page) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ((' alt="a shoe, all patches"', ""), "#pictures: <img"),
        ((' role="img" aria-label="a line"', ""), "#data: <svg"),
        ((' aria-label="a line"', ' aria-labelledby="nowhere"'), "#data: <svg"),
        (('role="img" aria-label="a line"', 'aria-label="a line"'), "#data: <svg"),
    ],
)
def test_pictures_without_alternative_are_found(
    browser: "Browser", tmp_path: Path, change: tuple[str, str], found: str
) -> None:
    with look.opened(browser, page_of(tmp_path, change)) as (page, _):
        assert [line.startswith(found) for line in look.without_alternative(page)] == [True]


@pytest.mark.parametrize(
    ("change", "scheme", "found"),
    [
        (("<label id", "<div id"), "light", "label (critical)"),
        (("<p>", '<p style="color: #999">'), "light", "color-contrast (serious)"),
        (("<p>", '<p style="color: #444">'), "dark", "color-contrast (serious)"),
        ((' lang="en"', ""), "light", "html-has-lang (serious)"),
    ],
)
def test_violations_are_found(
    browser: "Browser", tmp_path: Path, change: tuple[str, str], scheme: look.Scheme, found: str
) -> None:
    with look.opened(browser, page_of(tmp_path, change), scheme=scheme) as (page, _):
        assert [line.startswith(found) for line in look.violations(page)] == [True]


def test_frames_that_can_be_seen_are_told(browser: "Browser", tmp_path: Path) -> None:
    file = page_of(tmp_path)
    with look.opened(browser, file) as (page, _):
        assert look.visible_frames(page) == [["1"]]
        page.get_by_role("slider").press("ArrowRight")
        assert look.visible_frames(page) == [["2"]]
    with look.opened(browser, file, java_script=False) as (page, _):
        assert look.visible_frames(page) == [["1", "2"]] and page.get_by_role("slider").count() == 0


def test_tables_are_read(browser: "Browser", tmp_path: Path) -> None:
    numbers = (("<td>9</td>", '<td data-value="9">9</td>'), ("<td>10</td>", '<td data-value="10">10</td>'))
    with look.opened(browser, page_of(tmp_path)) as (page, _):
        table = page.locator("table")
        assert look.sorted_by(table) == {1: "ascending"} and look.rows(table) == ["shoe | 9", "bag | 10"]
        assert [look.orders(table, i) for i in (0, 1)] == [
            {"descending"},
            {"ascending", "descending"},
        ]  # "9", "10": as said
    with look.opened(browser, page_of(tmp_path, *numbers)) as (page, _):
        assert look.orders(page.locator("table"), 1) == {"ascending"}
    with look.opened(browser, page_of(tmp_path, ("bag", "shoe"))) as (page, _):
        assert look.orders(page.locator("table"), 0) == {"ascending", "descending"}
    row = ("<tr><td>bag</td>", "<tr><td>bag</td><td>1</td></tr><tr><td>hat</td>")
    with look.opened(browser, page_of(tmp_path, row)) as (page, _):
        assert look.orders(page.locator("table"), 0) == set()


def test_texts_that_can_be_seen_are_told(browser: "Browser", tmp_path: Path) -> None:
    with look.opened(browser, page_of(tmp_path, ("<h2>Data", "<h2>Some\n data"), ("<p>", "<p hidden>"))) as (page, _):
        assert {"Result", "Some data", "shoe"} <= look.texts(page)
        assert not {"Accuracy 43.2 %", "of the held-out pictures", "a"} & look.texts(page)


def test_what_paper_would_cut_off_is_found(browser: "Browser", tmp_path: Path) -> None:
    with look.opened(browser, page_of(tmp_path), width=390) as (page, _):
        assert [line.startswith('#data: <div class="wide"') for line in look.cut_by_scrolling(page)] == [True]
    with look.opened(browser, page_of(tmp_path), width=700) as (page, _):
        assert look.cut_by_scrolling(page) == []


def test_broken_pictures_are_found(browser: "Browser", tmp_path: Path) -> None:
    file = page_of(tmp_path, (' alt="a shoe, all', ' loading="lazy" style="margin-top: 9000px" alt="a shoe, all'))
    with look.opened(browser, file) as (page, _):
        assert look.broken_pictures(page) == []
    file = page_of(tmp_path, (f'{DOT}" alt="a shoe, all', 'data:image/gif;base64,R0lG" alt="a shoe, all'))
    with look.opened(browser, file, strict=False) as (page, _):
        assert [line.startswith("#pictures: <img") for line in look.broken_pictures(page)] == [True]


def test_what_is_printed_is_read(browser: "Browser", tmp_path: Path) -> None:
    with look.opened(browser, page_of(tmp_path, ("<h2>Data", "<h2>Daten → (ü)"))) as (page, _):
        assert look.printed_headings(page) == {"A run", "Result", "Pictures", "Daten → (ü)"}
    hidden = ("</style>", "@media print { #data { display: none } }</style>")
    with look.opened(browser, page_of(tmp_path, hidden)) as (page, _):
        assert look.printed_headings(page) == {"A run", "Result", "Pictures"}


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpers.browser.find_spec", lambda name: None)
    assert re.fullmatch(r"pip install '\.\[browser\]': no playwright, axe_playwright_python", look.missing() or "")
    monkeypatch.setenv("PATH", "")
    assert "none of chromium, " in (look.missing() or "")
