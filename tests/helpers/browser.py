"""A real Chromium looks at a page: what it asks for, what it complains about, what overlaps, what is hard to use.

Every check returns what it finds, as lines that name the place; none of them changes the page.
"""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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


def sections(page: "Page") -> list[str]:
    """The ids of the sections of <main>, in their order."""
    found: list[str] = page.eval_on_selector_all("main > section[id]", "all => all.map(section => section.id)")
    return found


def sideways(page: "Page") -> list[str]:
    """What makes the page wider than its window, so that it scrolls sideways."""
    found: list[str] = page.evaluate(_SIDEWAYS)
    return found


def overlaps(page: "Page") -> list[str]:
    """Texts that lie over one another or over a picture, or are cut off: `over`, `cut off`, with their section.

    Looked at is where the lines of a text are painted. Not looked at: what is hidden, also from all but screen
    readers, the inside of SVGs, and labels that are placed over a picture on purpose (position: absolute).
    """
    found: list[str] = page.evaluate(_OVERLAPS)
    return found


def without_alternative(page: "Page") -> list[str]:
    """Pictures that say nothing to who does not see them, and are not marked as decoration."""
    found: list[str] = page.evaluate(_WITHOUT_ALTERNATIVE)
    return found


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
    found: list[list[str]] = page.evaluate(_VISIBLE_FRAMES)
    return found


def column(table: "Locator", index: int) -> list[str]:
    """The texts of a column, top to bottom."""
    found: list[str] = table.evaluate(
        "(table, i) => [...table.tBodies[0].rows].map(row => row.cells[i].innerText.trim())", index
    )
    return found


def rows(table: "Locator") -> list[str]:
    """The texts of a table's rows, top to bottom, without what only says how it is sorted."""
    found: list[str] = table.evaluate(
        "table => [...table.tBodies[0].rows].map(row => [...row.cells].map(c => c.innerText.trim()).join(' | '))"
    )
    return found


def sorted_by(table: "Locator") -> dict[int, str]:
    """The columns that say that a table is sorted by them, with the direction."""
    found: list[list[object]] = table.evaluate(
        """table => [...table.querySelectorAll('th[aria-sort]')].map(th => [th.cellIndex, th.ariaSort])
                    .filter(([, sort]) => sort !== 'none')"""
    )
    return {int(str(index)): str(sort) for index, sort in found}


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


_SIDEWAYS = """() => {
  const root = document.documentElement;
  if (root.scrollWidth <= root.clientWidth) return [];
  const wide = [...document.body.querySelectorAll('*')]
    .filter(e => e.getBoundingClientRect().right > root.clientWidth + 1)
    .map(e => `<${e.tagName.toLowerCase()} class="${e.getAttribute('class') ?? ''}"> in #` +
      `${e.closest('section')?.id ?? ''}, to ${Math.round(e.getBoundingClientRect().right)}`);
  return [`${root.scrollWidth} px wide in a window of ${root.clientWidth}`, ...wide.slice(0, 8)];
}"""

_OVERLAPS = """() => {
  const said = [];
  const shown = e => e.checkVisibility({opacityProperty: true, visibilityProperty: true});
  const box = r => ({left: r.left, right: r.right, top: r.top, bottom: r.bottom});
  const meet = (a, b) => ({left: Math.max(a.left, b.left), right: Math.min(a.right, b.right),
                           top: Math.max(a.top, b.top), bottom: Math.min(a.bottom, b.bottom)});
  const wide = r => r.right - r.left, high = r => r.bottom - r.top;
  const place = e => `#${e.closest('section')?.id ?? ''}`;
  const ancestors = function*(e) { for (; e && e !== document.documentElement; e = e.parentElement) yield e; };

  // What of a rectangle is painted, and whether an ancestor hides a part of it for good.
  const painted = (rect, element) => {
    let part = rect, lost = false, scrolls = false;
    for (const a of ancestors(element)) {
      const style = getComputedStyle(a);
      if (style.overflowX === 'visible' && style.overflowY === 'visible') continue;
      const frame = a.getBoundingClientRect();
      if (frame.width <= 2 || frame.height <= 2) return {part: null};  // for screen readers only
      const before = part;
      part = meet(part, frame);
      const hides = o => o === 'hidden' || o === 'clip';
      scrolls ||= !hides(style.overflowX);
      if (style.textOverflow !== 'ellipsis' && !scrolls)
        lost ||= (hides(style.overflowX) && wide(before) - wide(part) > 2)
              || (hides(style.overflowY) && high(before) - high(part) > 0.3 * high(before));
    }
    const outside = !scrolls && (rect.left < -1 || rect.right > document.documentElement.clientWidth + 1);
    return {part: wide(part) > 2 && high(part) > 2 ? part : null, lost: lost || outside};
  };

  const texts = [], media = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const range = document.createRange();
  for (let node; (node = walker.nextNode());) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest('svg, script, style, template, select') || !shown(element)) continue;
    range.selectNodeContents(node);
    for (const rect of range.getClientRects()) {
      const {part, lost} = painted(box(rect), element);
      const text = node.data.trim().slice(0, 40);
      if (lost) said.push(`${place(element)}: "${text}" is cut off`);
      if (part) texts.push({node, element, part, text});
    }
  }
  for (const element of document.body.querySelectorAll('img, svg, canvas, video, input, select')) {
    if (!shown(element) || element.parentElement.closest('svg')) continue;
    const {part} = painted(box(element.getBoundingClientRect()), element);
    if (part) media.push({element, part});
  }

  const over = (a, b) => {
    const both = meet(a, b);
    return wide(both) > 2 && high(both) > Math.max(3, 0.25 * Math.min(high(a), high(b)));
  };
  texts.forEach((one, i) => {
    for (const other of texts.slice(i + 1))
      if (one.node !== other.node && over(one.part, other.part))
        said.push(`${place(one.element)}: "${one.text}" over "${other.text}"`);
    const placed = [...ancestors(one.element)].find(a => getComputedStyle(a).position === 'absolute');
    for (const {element, part} of media) {
      if (placed && !placed.contains(element) && placed.parentElement.contains(element)) continue;
      if (!element.contains(one.node) && over(one.part, part))
        said.push(`${place(one.element)}: "${one.text}" over <${element.tagName.toLowerCase()}>`);
    }
  });
  return said;
}"""

_WITHOUT_ALTERNATIVE = """() => [...document.querySelectorAll('img, svg, canvas, [role=img]')].filter(e => {
  if (e.parentElement.closest('svg') || e.closest('[aria-hidden=true]')) return false;
  if (['presentation', 'none'].includes(e.getAttribute('role'))) return false;
  const labels = (e.getAttribute('aria-labelledby') ?? '').split(' ');
  const named = labels.map(id => document.getElementById(id)?.textContent);
  const names = [e.getAttribute('aria-label'), e.getAttribute('alt'), ...named];
  if (e.tagName === 'svg') {
    names.push(e.querySelector(':scope > title')?.textContent);
    if (e.getAttribute('role') !== 'img') return true;  // else it is read out as its parts
  }
  return !names.some(name => name?.trim());
}).map(e => `#${e.closest('section')?.id ?? ''}: ${e.outerHTML.slice(0, 120)}`)"""

_VISIBLE_FRAMES = """() => {
  const pictures = new Map();
  for (const frame of document.querySelectorAll('#pictures [data-block]')) {
    const seen = pictures.get(frame.parentElement) ?? [];
    pictures.set(frame.parentElement, seen);
    const box = frame.getBoundingClientRect();
    if (frame.checkVisibility({opacityProperty: true, visibilityProperty: true}) && box.width > 1 && box.height > 1)
      seen.push(frame.dataset.block);
  }
  return [...pictures.values()];
}"""
