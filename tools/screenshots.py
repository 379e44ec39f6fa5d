"""Takes screenshots of a page, for a person to look at: whole and by section, at two widths, light and dark.

    PYTHONPATH=tests python tools/screenshots.py runs/photos/report.html /tmp/screenshots

It needs the extra `browser` and an installed Chromium. What it writes is not kept.
"""

import sys
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.browser import Scheme, broken_pictures, launched, missing, opened, sections

if TYPE_CHECKING:
    from playwright.sync_api import Browser

WIDTHS = (390, 1280)
HIGHEST = 16_000
"""What a browser can paint at once."""
SCHEMES: tuple[Scheme, ...] = ("light", "dark")


def take(browser: "Browser", file: Path, width: int, scheme: Scheme, out: Path) -> list[Path]:
    """The pictures of one width and scheme: the whole page, then its sections."""
    with opened(browser, file, width=width, scheme=scheme, strict=False) as (page, watch):
        for line in (*watch.complaints, *watch.requests[1:]):
            print(f"{width} {scheme}: {line}", file=sys.stderr)
        height = page.evaluate("document.documentElement.scrollHeight")
        page.set_viewport_size({"width": width, "height": min(height, HIGHEST)})  # what is drawn late is drawn now
        for line in broken_pictures(page):
            print(f"{width} {scheme}: not drawn: {line}", file=sys.stderr)
        whole = out / f"{width}-{scheme}.png"
        page.screenshot(path=whole, full_page=True)
        taken = [whole]
        for name in sections(page):
            taken.append(out / f"{width}-{scheme}-{name}.png")
            page.locator(f"#{name}").screenshot(path=taken[-1])
    return taken


def main() -> None:
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_file():
        sys.exit("usage: screenshots.py PAGE FOLDER: PAGE is an HTML file, FOLDER is made where it is not there")
    if missing():
        sys.exit(missing())
    file, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    with launched() as browser:
        for width, scheme in product(WIDTHS, SCHEMES):
            for taken in take(browser, file, width, scheme, out):
                print(taken)


if __name__ == "__main__":
    main()
