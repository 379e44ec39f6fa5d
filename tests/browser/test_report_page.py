"""report.html of real runs in a real browser: it works, reads well at any width, and asks nobody for anything."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import write_pictures
from helpers import browser as look

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = [pytest.mark.slow, pytest.mark.skipif(look.missing() is not None, reason=str(look.missing()))]

HOSTILE = ("<img src=x onerror=alert(1)>", "<script>alert(1)<", "a&amp;b \"c\" 'd' {{ 7 * 7 }}", "long" * 20)
"""Names of classes, which a file system allows and a page must not take for its own."""
FILE = '" onload=alert(3) <b> '
PLAIN = ("blue", "green", "red")
MANY = tuple(f"class {i}" for i in range(25))
"""Too many for a matrix."""
MODEL = "vit_micro_patch4_32"
"""The one whose weights ship with snello."""
MOST_BYTES = 1_500_000
WIDTHS = (390, 1280)
PAPER = 718
"""Width of a page of A4 between its margins, in CSS pixels."""
ORDER = ("result", "pictures", "curves", "mistakes", "costs", "traffic", "data")


@dataclass(frozen=True)
class Kind:
    """A run whose report is looked at."""

    flags: str = ""
    data: str = ""
    """Folder of pictures; those that ship with snello where there is none."""
    classes: tuple[str, ...] = ()
    out: str = "run"
    without: tuple[str, ...] = ("costs", "traffic")
    """Sections that it has nothing to say in."""


KINDS = {
    "shipped": Kind("--epochs 1 --no-compare"),
    # A slash cannot be in a name, but in a path: these folders are called so that one tag ends and another starts.
    "own": Kind(
        "--epochs 2 --batch-size 8 --no-compare",
        "own</script><script>alert(1)</script>",
        HOSTILE,
        "out</script><script>alert(2)</script>",
    ),
    "compared": Kind("--epochs 1 --batch-size 8", "plain", PLAIN, without=("traffic",)),
    "cut": Kind("--epochs 1 --batch-size 8 --split.cut 3 --split.codec adc(0.25)", "many", MANY, without=("costs",)),
}
SIDE_BY_SIDE = "side by side"
ALL = [*KINDS, SIDE_BY_SIDE]


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with look.launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds pictures, and the runs in folders of their own."""
    folder = tmp_path_factory.mktemp("reports")
    for kind in KINDS.values():
        if kind.data:
            write_data(folder / kind.data, kind.classes)
    return folder


def write_data(folder: Path, classes: tuple[str, ...]) -> None:
    """Pictures that are quickly learned; two in each class are of another."""
    write_pictures(folder / "train", dict.fromkeys(classes, 96 // len(classes)), size=32)
    write_pictures(folder / "val", dict.fromkeys(classes, 2), seed=1, size=32)
    wrong = write_pictures(folder.parent / "wrong", dict.fromkeys((*classes[1:], classes[0]), 2), seed=2, size=32)
    for file in wrong.glob("*/*.png"):
        file.rename(folder / "val" / file.parent.name / f"{FILE}{file.name}")


@pytest.fixture(scope="module")
def reports(folder: Path) -> dict[str, tuple[Path, str]]:
    """The report of each kind of run, as `snello finetune` leaves it, and what that said."""
    outs = {name: folder / name / kind.out for name, kind in KINDS.items()}
    started = {}
    for name, kind in KINDS.items():
        data = ("--data", str(folder / kind.data), "--model", MODEL) if kind.data else ()
        started[name] = snello("finetune", *data, *kind.flags.split(), "--out", str(outs[name]))
    said = {name: process.communicate(timeout=300)[0] for name, process in started.items()}
    return {name: (out / "report.html", said[name]) for name, out in outs.items()}


@pytest.fixture
def report(request: pytest.FixtureRequest, reports: dict[str, tuple[Path, str]], folder: Path) -> Path:
    """The report of the kind that a test is given."""
    if request.param != SIDE_BY_SIDE:
        file, said = reports[request.param]
        assert file.is_file(), said
        return file
    file = folder / "side by side.html"
    if not file.exists():
        runs = [str(one.parent) for one, _ in reports.values()]
        said, _ = snello("report", *runs, "--out", str(file)).communicate(timeout=120)
        assert file.is_file(), said
    return file


def snello(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "snello", *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def each(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("report", names, indirect=True)


@each(*KINDS)
def test_the_sections_stand_in_their_order(browser: "Browser", report: Path, request: pytest.FixtureRequest) -> None:
    without = KINDS[request.node.callspec.params["report"]].without
    with look.opened(browser, report) as (page, _):
        assert look.sections(page) == [section for section in ORDER if section not in without]
        for section in look.sections(page):
            assert len(page.locator(f"#{section}").inner_text()) > 40, section


@each(SIDE_BY_SIDE)
def test_runs_stand_side_by_side(browser: "Browser", report: Path) -> None:
    with look.opened(browser, report) as (page, _):
        assert "runs" in look.sections(page)
        assert len(look.rows(page.locator("#runs table.sortable").first)) == len(KINDS)


@each(*ALL)
def test_it_is_one_small_file(report: Path) -> None:
    assert 10_000 < report.stat().st_size < MOST_BYTES


@each(*ALL)
@pytest.mark.parametrize("width", WIDTHS)
def test_it_can_be_read(browser: "Browser", report: Path, width: int) -> None:
    with look.opened(browser, report, width=width) as (page, _):
        assert look.brightness(page) > 0.85
        none(page, look.sideways, look.overlaps, look.without_alternative, look.broken_pictures, look.violations)
        page.emulate_media(color_scheme="dark")
        assert look.brightness(page) < 0.2
        none(page, look.violations)


def none(page: "Page", *checks: Callable[["Page"], list[str]]) -> None:
    """Asserts that the checks find nothing."""
    found = [f"{check.__name__}: {line}" for check in checks for line in check(page)]
    assert not found, "\n".join(found)


@each(*KINDS)
def test_the_slider_moves_through_the_blocks(browser: "Browser", report: Path) -> None:
    from playwright.sync_api import expect

    with look.opened(browser, report) as (page, _):
        slider = page.locator("#pictures input[type=range]")
        expect(slider).to_have_count(1)
        expect(slider).to_have_accessible_name(re.compile(r"\w"))
        blocks = sorted(all_blocks(page), key=int)
        num = len(look.visible_frames(page))
        assert num >= 1 and len(blocks) >= 2
        slider.fill(str(slider.get_attribute("min")))
        seen = [look.visible_frames(page)]
        for _ in blocks[1:]:
            slider.press("ArrowRight")
            seen.append(look.visible_frames(page))
        assert seen == [[[block]] * num for block in blocks]
        slider.press("ArrowRight")
        assert look.visible_frames(page) == seen[-1]  # it ends there
        slider.fill(str(slider.get_attribute("min")))
        assert look.visible_frames(page) == seen[0]


@each("shipped", "own", "compared")
def test_frames_show_that_tokens_become_fewer(browser: "Browser", report: Path) -> None:
    with look.opened(browser, report) as (page, _):
        slider, frames = page.locator("#pictures input[type=range]"), page.locator("#pictures [data-block]")
        slider.fill(str(slider.get_attribute("min")))
        first = frames.locator("visible=true").first.screenshot()
        slider.fill(str(slider.get_attribute("max")))
        assert frames.locator("visible=true").first.screenshot() != first


@each(*ALL)
def test_tables_can_be_sorted(browser: "Browser", report: Path) -> None:
    with look.opened(browser, report) as (page, _):
        tables = page.locator("table.sortable")
        assert tables.count() >= 1
        for table in tables.all():
            assert_sorts(table)


def assert_sorts(table: "Locator") -> None:
    before = sorted(look.rows(table))
    heads = table.locator("thead th")
    assert heads.count() >= 2
    moved = False
    for index, head in enumerate(heads.all()):
        button = head.locator("button")
        assert button.count() == 1 and button.inner_text().strip()
        orders = {}
        for _ in range(2):  # one way, then the other; with the keyboard as well as with a pointer
            button.press("Enter") if orders else button.click()
            said = look.sorted_by(table)
            assert list(said) == [index] and said[index] in look.orders(table, index), (button.inner_text(), said)
            assert sorted(look.rows(table)) == before  # no row is lost
            orders[said[index]] = look.rows(table)
        assert set(orders) == {"ascending", "descending"}
        moved |= orders["ascending"] != orders["descending"]
    assert moved or len(before) == 1


@each(*ALL)
def test_without_javascript_everything_is_there(browser: "Browser", report: Path) -> None:
    with look.opened(browser, report) as (page, _):
        sections, texts, rows = look.sections(page), texts_of(page), rows_of(page)
    with look.opened(browser, report, java_script=False) as (page, _):
        assert look.sections(page) == sections and rows_of(page) == rows
        assert sorted(texts - look.texts(page)) == []
        assert_all_frames(page)
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 800})
            none(page, look.sideways, look.overlaps, look.broken_pictures)  # axe-core needs JavaScript itself


@each(*ALL)
def test_all_of_it_is_printed(browser: "Browser", report: Path) -> None:
    with look.opened(browser, report) as (page, _):
        texts = texts_of(page)
        printed = {unspaced(text) for text in look.printed_headings(page)}
        assert {unspaced(text) for text in headings_of(page)} - printed == set()
        page.emulate_media(media="print")
        page.set_viewport_size({"width": PAPER, "height": 1000})
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert sorted(texts - look.texts(page)) == []
        assert_all_frames(page)
        none(page, look.sideways, look.overlaps, look.cut_by_scrolling, look.broken_pictures)


def assert_all_frames(page: "Page") -> None:
    """Where nothing moves, all frames of a picture stand side by side."""
    blocks = all_blocks(page)
    assert all(set(picture) == blocks for picture in look.visible_frames(page))
    assert page.locator("input[type=range]").locator("visible=true").count() == 0


@each(*ALL)
def test_a_pointer_that_moves_over_it_breaks_nothing(browser: "Browser", report: Path) -> None:
    with look.opened(browser, report) as (page, _):
        for element in page.locator("main svg, main td, main summary").locator("visible=true").all()[:60]:
            element.hover(force=True)


@each("own")
def test_names_are_text_whatever_they_look_like(browser: "Browser", report: Path) -> None:
    with look.opened(browser, report) as (page, _):
        for section in ("mistakes", "data"):
            for name in HOSTILE:
                assert page.locator(f"#{section}").get_by_text(name, exact=False).count() > 0, (section, name)
        assert page.locator("script").count() <= 1
        assert page.locator("img[src=x], main b:empty, [onload], [onerror]").count() == 0


def all_blocks(page: "Page") -> set[str]:
    found = page.locator("#pictures [data-block]").all()
    return {str(frame.get_attribute("data-block")) for frame in found}


def texts_of(page: "Page") -> set[str]:
    """The texts that can be seen, but for those that name the slider."""
    labels: list[str] = page.locator("#pictures input[type=range]").evaluate_all(
        "sliders => sliders.flatMap(slider => [...slider.labels].map(label => label.innerText.trim()))"
    )
    return look.texts(page) - set(labels)


def headings_of(page: "Page") -> list[str]:
    return page.locator("main h1, main h2, main h3").all_text_contents()


def unspaced(text: str) -> str:
    """A PDF's outline leaves the space out where a heading goes on in a new line."""
    return "".join(text.split())


def rows_of(page: "Page") -> list[list[str]]:
    return [look.rows(table) for table in page.locator("main table").all()]
