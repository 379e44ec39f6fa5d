"""A real Chromium looks at a page: what it asks for, what it complains about, what overlaps, what is hard to use.

Every check returns what it finds, as lines that name the place; none of them changes the page.
"""

import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # an extra of its own
    from playwright.sync_api import Browser, Dialog, Locator, Page

Scheme = Literal["light", "dark"]
NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
FLAGS = (
    "--no-sandbox",  # root, as in a container, has none
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # no name is looked up, whatever a page asks for
)
SECONDS = 2.0
"""In which a picture that is in the window has to be drawn."""
SCRIPT = Path(__file__).with_suffix(".js").read_text()


def missing() -> str | None:
    """What keeps a browser from being started here; None where nothing does."""
    if not any(map(shutil.which, NAMES)):
        return f"no browser: none of {', '.join(NAMES)} is installed"
    absent = [name for name in ("playwright", "axe_playwright_python") if find_spec(name) is None]
    return f"pip install '.[browser]': no {', '.join(absent)}" if absent else None


@contextmanager
def launched() -> Iterator["Browser"]:
    """A browser with a profile of its own, which is deleted afterwards."""
    from playwright.sync_api import sync_playwright

    path = next(path for name in NAMES if (path := shutil.which(name)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Watch:
    """What a page did while it was open."""

    complaints: list[str] = field(default_factory=list)
    """Errors and warnings on the console, exceptions that nothing caught, dialogs."""
    requests: list[str] = field(default_factory=list)
    """What it asked for, the page itself first; `data:` URLs are part of it."""


@contextmanager
def opened(
    browser: "Browser",
    file: Path,
    *,
    width: int = 1280,
    scheme: Scheme = "light",
    java_script: bool = True,
    strict: bool = True,
) -> Iterator[tuple["Page", Watch]]:
    """The page of a file, with all that it does watched.

    Raises:
        AssertionError: In the end, if it complained or asked for anything but itself, unless `strict` is off.
    """
    watch = Watch()
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=java_script
    )
    try:
        page = context.new_page()
        page.on("console", lambda message: _heard(watch, message.type, message.text))
        page.on("pageerror", lambda error: watch.complaints.append(f"exception: {error}"))
        page.on("dialog", lambda dialog: _spoken_to(watch, dialog))
        page.on("popup", lambda other: watch.complaints.append(f"window: {other.url}"))
        page.on("websocket", lambda socket: watch.requests.append(socket.url))
        context.on("request", lambda request: _asked(watch, request.url))
        page.goto(file.resolve().as_uri())
        yield page, watch
        page.wait_for_load_state("networkidle")  # half a second in which it could ask for something
    finally:
        context.close()
    if strict:
        others = [url for url in watch.requests if url != file.resolve().as_uri()]
        assert not others and not watch.complaints, f"it asked for {others}, it complained: {watch.complaints}"


def _heard(watch: Watch, kind: str, text: str) -> None:
    if kind in ("error", "warning", "assert"):
        watch.complaints.append(f"{kind}: {text}")


def _spoken_to(watch: Watch, dialog: "Dialog") -> None:
    watch.complaints.append(f"dialog: {dialog.message}")
    dialog.dismiss()  # else the page would wait


def _asked(watch: Watch, url: str) -> None:
    if not url.startswith("data:"):
        watch.requests.append(url)


def _run(where: "Page | Locator", function: str, *arguments: object) -> Any:
    """What a function of browser.js finds in a page, or in an element, which it is given first."""
    return where.evaluate(f"(...all) => {{ {SCRIPT}\n return {function}(...all); }}", *arguments)


def _texts(values: Iterable[object]) -> list[str]:
    return [str(value) for value in values]


def sections(page: "Page") -> list[str]:
    """The ids of the sections of <main>, in their order."""
    return _texts(_run(page, "sections"))


def texts(page: "Page") -> set[str]:
    """The texts that can be seen in <main>."""
    return set(_texts(_run(page, "texts")))


def sideways(page: "Page") -> list[str]:
    """What makes the page wider than its window, so that it scrolls sideways."""
    return _texts(_run(page, "sideways"))


def overlaps(page: "Page") -> list[str]:
    """Texts that lie over one another or over a picture, or are cut off: `over`, `cut off`, with their section.

    Looked at is where the lines of a text are painted. Not looked at: what is hidden, also from all but screen
    readers, the inside of SVGs, and labels that are placed over a picture on purpose (position: absolute).
    """
    return _texts(_run(page, "overlaps"))


def cut_by_scrolling(page: "Page") -> list[str]:
    """What can be seen only by scrolling sideways in it: on paper, it is cut off."""
    return _texts(_run(page, "cutByScrolling"))


def broken_pictures(page: "Page") -> list[str]:
    """Pictures that are not drawn, not even when they are scrolled to."""
    found = _texts(_run(page, "brokenPictures"))
    end = time.monotonic() + SECONDS
    while found and time.monotonic() < end:
        page.wait_for_timeout(20)
        left = _texts(_run(page, "brokenPictures"))
        if len(left) < len(found):
            end = time.monotonic() + SECONDS
        found = left
    page.evaluate("scrollTo(0, 0)")
    return found


def without_alternative(page: "Page") -> list[str]:
    """Pictures that say nothing to who does not see them, and are not marked as decoration."""
    return _texts(_run(page, "withoutAlternative"))


def violations(page: "Page", impacts: Sequence[str] = ("serious", "critical")) -> list[str]:
    """Rules of accessibility that axe-core finds broken: rule, impact, and the first element."""
    page.evaluate((resources.files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8"))
    broken = page.evaluate("axe.run({resultTypes: ['violations']}).then(found => found.violations)")
    return [
        f"{rule['id']} ({rule['impact']}), {len(rule['nodes'])} times: {rule['nodes'][0]['html'][:200]}: "
        f"{' '.join(rule['nodes'][0]['failureSummary'].split())}"
        for rule in broken
        if rule["impact"] in impacts
    ]


def brightness(page: "Page") -> float:
    """How light the page is as it is painted, 0 to 1: the median of its window, which is background."""
    import numpy as np
    from PIL import Image

    picture = Image.open(BytesIO(page.screenshot())).convert("L")
    return float(np.median(np.asarray(picture))) / 255


def visible_frames(page: "Page") -> list[list[str]]:
    """For every picture, the blocks (`data-block`) whose frames can be seen."""
    return [_texts(picture) for picture in _run(page, "visibleFrames")]


def rows(table: "Locator") -> list[str]:
    """The texts of a table's rows, top to bottom."""
    return _texts(_run(table, "rows"))


def orders(table: "Locator", index: int) -> set[str]:
    """How a column is ordered: `ascending`, `descending`, both where all is equal, neither.

    Numbers are compared where every cell has one in `data-value`, else texts as the browser's language compares them,
    with numbers in them by their digits or their size.
    """
    return set(_texts(_run(table, "orders", index)))


def sorted_by(table: "Locator") -> dict[int, str]:
    """The columns that say that a table is sorted by them, with the direction."""
    return {int(column): str(direction) for column, direction in _run(table, "sortedBy")}


def printed_headings(page: "Page") -> set[str]:
    """The headings of the page as it is printed to a PDF, from the file's outline."""
    pdf = page.pdf(format="A4", outline=True, tagged=True, print_background=True)
    assert pdf.startswith(b"%PDF-"), pdf[:20]
    titles = re.findall(rb"/Title\s*(\((?:\\.|[^\\)])*\)|<[0-9A-Fa-f\s]*>)\s*/Dest", pdf, flags=re.S)
    return {_pdf_text(title) for title in titles}


def _pdf_text(token: bytes) -> str:
    if token.startswith(b"<"):
        raw = bytes.fromhex(token[1:-1].decode())
    else:
        raw = re.sub(rb"\\(\d{3}|.)", _unescaped, token[1:-1], flags=re.S)
    return raw[2:].decode("utf-16-be") if raw.startswith(b"\xfe\xff") else raw.decode("latin-1")


def _unescaped(match: re.Match[bytes]) -> bytes:
    escape = match[1]
    if escape.isdigit():
        return bytes([int(escape, 8)])
    return {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"b": b"\b", b"f": b"\f"}.get(escape, escape)
