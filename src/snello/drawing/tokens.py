"""A picture with what has become of its patches, as SVG that can stand in any page, light or dark.

Patches that were dropped are faded, patches that were merged are outlined together, with their number. The patches of
a token need not lie side by side: every piece has an outline, and a colour tells which pieces are one token.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from html import escape

UNIT = 10
"""Of the drawing, along a patch."""
TEXT = 9.0
"""Height of the figures in pixels of the page; pieces that have no room for it get none."""
DIGIT, MARGIN = 0.62, 2.0
"""Width of a figure over its height, and pixels that are to be free around a number."""
HUES = ("#ff5a5f", "#ffb000", "#4fd36b", "#25c9d8", "#6f8cff", "#d66bff")
"""What pieces of one token have in common; neighbours differ."""
# `Canvas` is the page's own background where the page says which it has; what knows no CSS takes the attribute.
FADE = 'fill="#888" style="fill:var(--token-veil,Canvas)"'
VEIL = f'{FADE} fill-opacity=".8"'
HATCH = 'fill="none" stroke="#888" stroke-opacity=".6" stroke-width=".9" vector-effect="non-scaling-stroke"'

Cell = tuple[int, int]
"""Row and column."""


def token_svg(
    image_href: str,
    grid: tuple[int, int],
    groups: Sequence[int],
    *,
    alt: str,
    size: int = 224,
    lost: Sequence[float | None] | None = None,
) -> str:
    """A picture whose patches are marked by the token that each is part of.

    Args:
        image_href: of the picture, as a path or `data:` URL; or `#ID` of a symbol that stands elsewhere in the page.
        grid: rows and columns of patches.
        groups: the token of each patch, row by row; negative where it was dropped.
        alt: what is to be seen, in words; it is shown where the pointer rests.
        size: width in pixels of the page.
        lost: of each patch the share, in [0, 1], of which nothing is left: it is veiled by so much.

    Raises:
        ValueError: where there are not as many groups, or shares, as patches.
    """
    rows, cols = grid
    if len(groups) != rows * cols or (lost is not None and len(lost) != rows * cols):
        raise ValueError(f"{rows} x {cols} patches need as many groups, got {len(groups)}")
    width, height = cols * UNIT, rows * UNIT
    table = [list(groups[row * cols : (row + 1) * cols]) for row in range(rows)]
    counts = Counter(group for group in groups if group >= 0)
    merged = {group for group, count in counts.items() if count > 1}
    label, tag = escape(alt, quote=True), "use" if image_href.startswith("#") else "image"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" viewBox="0 0 {width} {height}" '
        f'width="{size}" height="{round(size * rows / cols)}"><title>{escape(alt)}</title>'
        f'<{tag} href="{escape(image_href, quote=True)}" width="{width}" height="{height}" preserveAspectRatio="none"/>'
    ]
    parts += _veil(table)
    if lost is not None:
        parts += _losses([list(lost[row * cols : (row + 1) * cols]) for row in range(rows)])
    if merged:
        parts += _tints(table, merged)
        parts += _outline(table, merged, min(width / size, UNIT / 14))
        parts += _numbers(table, counts, merged, width / size)
    return "".join([*parts, "</svg>"])


def _veil(table: Sequence[Sequence[int]]) -> Iterator[str]:
    """Over the patches that were dropped; hatched, since a picture may be as light or dark as the page."""
    dropped = [[group < 0 for group in row] for row in table]
    if path := _areas(dropped):
        yield f'<path d="{path}" {VEIL}/><path d="{_hatching(dropped)}" {HATCH}/>'


def _losses(table: Sequence[Sequence[float | None]]) -> Iterator[str]:
    """Over patches of which something is lost, in ten strengths."""
    for tenth in range(1, 11):
        marked = [[share is not None and min(10, round(10 * share)) == tenth for share in row] for row in table]
        if path := _areas(marked):
            yield f'<path d="{path}" {FADE} fill-opacity="{0.09 * tenth:.2f}"/>'


def _tints(table: Sequence[Sequence[int]], merged: set[int]) -> Iterator[str]:
    """Over the patches of each token that lies in several pieces."""
    scattered = {group: len(pieces) for group, pieces in _pieces(table, merged).items() if len(pieces) > 1}
    hues = _hues(table, scattered)
    for number, colour in enumerate(HUES):
        marked = [[hues.get(group) == number for group in row] for row in table]
        if path := _areas(marked):
            yield f'<path d="{path}" fill="{colour}" fill-opacity=".25"/>'


def _outline(table: Sequence[Sequence[int]], merged: set[int], pixel: float) -> Iterator[str]:
    """Around the patches of each merged token: light on dark, to be seen on any picture; `pixel` wide or so."""
    path = _edges(table, merged)
    for colour, opacity, pixels in (("#000", 0.55, 2.6), ("#fff", 0.95, 1.1)):
        width = f"{pixels * pixel:.2f}".rstrip("0").rstrip(".")
        yield (
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-opacity="{opacity}" stroke-width="{width}" '
            'stroke-linecap="square"/>'
        )


def _numbers(table: Sequence[Sequence[int]], counts: Counter[int], merged: set[int], pixel: float) -> Iterator[str]:
    """How many patches a merged token has, in its largest piece with room for that."""
    height, free = TEXT * pixel, 2 * MARGIN * pixel
    texts = []
    for group, pieces in _pieces(table, merged).items():
        text = str(counts[group])
        if (place := _room(pieces, len(text) * DIGIT * height + free, height + free)) is not None:
            x, y = (f"{value:.1f}".removesuffix(".0") for value in (place[0], place[1] + 0.35 * height))
            texts.append(f'<text x="{x}" y="{y}">{text}</text>')
    if texts:
        yield (
            f'<g font-family="system-ui,sans-serif" font-weight="600" font-size="{height:.2f}" text-anchor="middle" '
            f'fill="#fff" stroke="#000" stroke-opacity=".65" stroke-width="{2 * pixel:.2f}" paint-order="stroke" '
            f'stroke-linejoin="round">{"".join(texts)}</g>'
        )


def _areas(marked: Sequence[Sequence[bool]]) -> str:
    """A path over the cells that are marked, a rectangle for each run in a row, of runs that are equal one for all."""
    rectangles: dict[tuple[int, int], list[tuple[int, int]]] = {}  # from..to columns, with their rows from..to
    for row, cells in enumerate(marked):
        for run in _runs(cells):
            known = rectangles.setdefault(run, [])
            if known and known[-1][1] == row:
                known[-1] = known[-1][0], row + 1
            else:
                known.append((row, row + 1))
    return "".join(
        f"M{left * UNIT} {top * UNIT}h{(right - left) * UNIT}v{(bottom - top) * UNIT}h{(left - right) * UNIT}z"
        for (left, right), rows in rectangles.items()
        for top, bottom in rows
    )


def _hatching(marked: Sequence[Sequence[bool]]) -> str:
    """A path along the rising diagonals of the cells that are marked, each run of them in one stroke."""
    rows, cols = len(marked), len(marked[0])
    parts = []
    for total in range(rows + cols - 1):
        top = max(0, total - cols + 1)
        for start, stop in _runs([marked[row][total - row] for row in range(top, min(rows, total + 1))]):
            x, y, length = (total - top - start + 1) * UNIT, (top + start) * UNIT, (stop - start) * UNIT
            parts.append(f"M{x} {y}l-{length} {length}")
    return "".join(parts)


def _edges(table: Sequence[Sequence[int]], merged: set[int]) -> str:
    """A path along all sides of patches where a merged token ends, each run of sides in one stroke."""

    def ends(one: int | None, other: int | None) -> bool:
        return one != other and (one in merged or other in merged)

    rows, cols = len(table), len(table[0])
    parts = []
    for row in range(rows + 1):
        above = table[row - 1] if row else [None] * cols
        below = table[row] if row < rows else [None] * cols
        for start, stop in _runs([ends(a, b) for a, b in zip(above, below, strict=True)]):
            parts.append(f"M{start * UNIT} {row * UNIT}h{(stop - start) * UNIT}")
    for col in range(cols + 1):
        left = [line[col - 1] if col else None for line in table]
        right = [line[col] if col < cols else None for line in table]
        for start, stop in _runs([ends(a, b) for a, b in zip(left, right, strict=True)]):
            parts.append(f"M{col * UNIT} {start * UNIT}v{(stop - start) * UNIT}")
    return "".join(parts)


def _runs(marked: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Where runs of marked cells begin and end."""
    start = None
    for index, mark in enumerate([*marked, False]):
        if mark and start is None:
            start = index
        elif not mark and start is not None:
            yield start, index
            start = None


def _pieces(table: Sequence[Sequence[int]], merged: set[int]) -> dict[int, list[set[Cell]]]:
    """The connected pieces of each merged token, the largest first."""
    pieces: dict[int, list[set[Cell]]] = defaultdict(list)
    left = {(row, col) for row, line in enumerate(table) for col, group in enumerate(line) if group in merged}
    for cell in sorted(left):
        if cell not in left:
            continue
        left.remove(cell)
        group, piece, waiting = table[cell[0]][cell[1]], {cell}, [cell]
        while waiting:
            for row, col in _beside(waiting.pop()):
                if (row, col) in left and table[row][col] == group:
                    left.remove((row, col))
                    piece.add((row, col))
                    waiting.append((row, col))
        pieces[group].append(piece)
    return {group: sorted(found, key=len, reverse=True) for group, found in pieces.items()}


def _beside(cell: Cell) -> Iterable[Cell]:
    row, col = cell
    return (row, col + 1), (row + 1, col), (row, col - 1), (row - 1, col)


def _hues(table: Sequence[Sequence[int]], scattered: dict[int, int]) -> dict[int, int]:
    """The number of a hue for each of the tokens: the one that is rarest among those beside it, then at all."""
    beside: dict[int, set[int]] = defaultdict(set)
    for row, line in enumerate(table):
        for col, group in enumerate(line):
            for other in (line[col + 1 : col + 2], [below[col] for below in table[row + 1 : row + 2]]):
                if group in scattered and other and other[0] in scattered and other[0] != group:
                    beside[group].add(other[0])
                    beside[other[0]].add(group)
    hues: dict[int, int] = {}
    used = Counter[int]()
    for group in sorted(scattered, key=lambda group: -len(beside[group])):
        near = Counter(hues[other] for other in beside[group] if other in hues)
        hues[group] = min(range(len(HUES)), key=lambda hue: (near[hue], used[hue]))
        used[hues[group]] += 1
    return hues


def _room(pieces: Sequence[set[Cell]], width: float, height: float) -> tuple[float, float] | None:
    """The middle of a box of this size in the first piece that has room for it, as near to its middle as can be."""
    across, down = int(-(-width // UNIT)), int(-(-height // UNIT))  # patches
    # With a patch more than is needed the text can also stand on the border of two.
    boxes = [(down + more, across + wider) for more in (0, 1) for wider in (0, 1)]
    for piece in pieces:
        middle_y, middle_x = (sum(cell[axis] + 0.5 for cell in piece) / len(piece) for axis in (0, 1))
        fits = [
            (abs(row + high / 2 - middle_y) + abs(col + wide / 2 - middle_x), row + high / 2, col + wide / 2)
            for high, wide in boxes
            for row, col in piece
            if all((row + r, col + c) in piece for r in range(high) for c in range(wide))
        ]
        if fits:
            _, y, x = min(fits)
            return x * UNIT, y * UNIT
    return None
