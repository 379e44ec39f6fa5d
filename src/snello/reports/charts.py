"""Charts as plain SVG: text stays text, colours follow the page's light or dark scheme, no library draws them.

All are drawn in a frame of 420 units, about what a phone shows in pixels, so that letters keep a readable size.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 38
MOST_POINTS = 160
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[Point]
    dots: bool = False
    """Whether each point is marked, as of evaluations."""
    dashed: bool = False

    @property
    def values(self) -> list[float]:
        """Its y values."""
        return [y for _, y in self.points]


@dataclass(frozen=True)
class Mark:
    """A dashed line across a chart, at one value of x or y."""

    name: str
    x: float | None = None
    y: float | None = None


def line_chart(
    series: Iterable[Series],
    *,
    alt: str,
    x: str,
    percent: bool = False,
    marks: Sequence[Mark] = (),
    from_zero: bool = False,
) -> Markup:
    """Lines over a common x axis, with a legend below where there is more than one; empty without points.

    `percent` writes shares on the y axis as per cent; `from_zero` lets it begin there.
    """
    numbered = [(number, one) for number, one in enumerate(series) if one.points]  # a run has one colour in all charts
    if not numbered:
        return Markup("")
    lines = [one for _, one in numbered]
    xs = [point[0] for one in lines for point in one.points] + [mark.x for mark in marks if mark.x is not None]
    ys = [point[1] for one in lines for point in one.points] + [mark.y for mark in marks if mark.y is not None]
    across = _Axis.of(min(0.0, *xs), max(xs), LEFT, WIDTH - RIGHT)
    up = _Axis.of(0.0 if from_zero else min(ys), max(ys), HEIGHT - BOTTOM, TOP)
    parts = [*_grid(across, up, percent), _below(x)]
    marked = list(enumerate(marks, start=numbered[-1][0] + 1))
    parts += [_mark(mark, number, across, up) for number, mark in marked]
    parts += [_line(one, number, across, up, percent) for number, one in numbered]
    names = [(number, one.name, one.dashed) for number, one in numbered]
    names += [(number, mark.name, True) for number, mark in marked]
    return _svg(parts, alt) + (_legend(names) if len(names) > 1 else Markup(""))


def heat_map(values: Sequence[Sequence[float]], at: Sequence[float], *, alt: str, x: str, row_name: str) -> Markup:
    """Rows of values in [0, 1] over the positions `at`, the stronger the more; the first row is the lowest.

    Neighbours in a row that look alike are one rectangle.
    """
    if not values or not at:
        return Markup("")
    edges = _edges(at)
    across = _Axis(edges[0], edges[-1], LEFT, WIDTH - RIGHT, ())
    tall = (HEIGHT - BOTTOM - TOP) / len(values)
    plot = Markup('<rect class="plot" x="{}" y="{}" width="{}" height="{}"/>')
    parts = [plot.format(LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - BOTTOM - TOP)]
    cell = Markup('<path class="cell" d="M{:.1f} {:.1f}H{:.1f}V{:.1f}H{:.1f}z" fill-opacity="{}" data-tip="{}"/>')
    for row, cells in enumerate(values):
        lower = HEIGHT - BOTTOM - row * tall
        for first, last in _stretches(cells):
            left, right = across.place(edges[first]), across.place(edges[last])
            tip = f"{row_name} {row}, {x} {at[first]:g} to {at[last - 1]:g}: {cells[first]:.2f}"
            opacity = _short(cells[first] ** 2)  # squared: most budgets are near 1, and would look the same
            if opacity != "0":
                parts.append(cell.format(left, lower - tall + 0.3, right, lower - 0.3, left, opacity, tip))
    shown = range(0, len(values), max(1, math.ceil(len(values) / 12)))
    parts += [_text(LEFT - 6, HEIGHT - BOTTOM - (row + 0.5) * tall + 4, str(row), "end") for row in shown]
    ticks = _ticks(at[0], at[-1])
    parts += [_text(across.place(tick), HEIGHT - BOTTOM + 15, f"{tick:g}", "middle") for tick in ticks]
    return _svg([*parts, _below(x)], alt)


@dataclass(frozen=True)
class _Axis:
    """A linear axis: values low..high stand at start..end; `ticks` are round values on it."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]

    @classmethod
    def of(cls, low: float, high: float, start: float, end: float) -> "_Axis":
        if high <= low:
            low, high = low - abs(low) * 0.05 - 0.01, high + abs(high) * 0.05 + 0.01
        ticks = _ticks(low, high)
        return cls(min(low, ticks[0]), max(high, ticks[-1]), start, end, ticks)

    def place(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _ticks(low: float, high: float) -> list[float]:
    """Four to seven round values within low..high, or the two ends of a range that is no range."""
    if high <= low:
        return [low]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((power * factor for factor in (1, 2, 2.5, 5, 10)), key=lambda one: abs(one - rough))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)] or [low]


def _edges(at: Sequence[float]) -> list[float]:
    """Where cells around the positions `at` begin, and the last one ends."""
    if len(at) == 1:
        return [at[0] - 0.5, at[0] + 0.5]
    between = [(one + other) / 2 for one, other in pairwise(at)]
    return [at[0] - (between[0] - at[0]), *between, at[-1] + (at[-1] - between[-1])]


def _stretches(cells: Sequence[float]) -> Iterable[tuple[int, int]]:
    """Runs of cells that look alike: the first, and the one after the last."""
    first = 0
    for index in range(1, len(cells) + 1):
        if index == len(cells) or _short(cells[index]) != _short(cells[first]):
            yield first, index
            first = index


def _short(value: float) -> str:
    return f"{round(value, 2):g}"


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most so many points, each the mean of its neighbours: noise goes, the course stays."""
    if len(points) <= most:
        return list(points)
    bounds = [round(number * len(points) / most) for number in range(most + 1)]
    parts = [points[first:last] for first, last in pairwise(bounds)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _grid(across: _Axis, up: _Axis, percent: bool) -> list[Markup]:
    parts = []
    for tick in up.ticks:
        at = up.place(tick)
        parts.append(Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(LEFT, at, WIDTH - RIGHT))
        parts.append(_text(LEFT - 6, at + 4, f"{100 * tick:g} %" if percent else f"{tick:g}", "end"))
    parts += [_text(across.place(tick), HEIGHT - BOTTOM + 15, f"{tick:g}", "middle") for tick in across.ticks]
    return parts


def _below(x: str) -> Markup:
    return _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, x, "middle")


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _line(one: Series, number: int, across: _Axis, up: _Axis, percent: bool) -> Markup:
    points = one.points if one.dots else thinned(one.points)
    places = [(across.place(x), up.place(y)) for x, y in points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dashed = " dashed" if one.dashed else ""
    drawn = Markup('<path class="line c{}{}" d="{}"/>').format(number % 5, dashed, path)
    for (x, y), (left, high) in zip(points, places, strict=True):
        value = f"{100 * y:.2f} %" if percent else f"{y:.4g}"
        kind = "dot" if one.dots else "spot"
        drawn += Markup('<circle class="{} c{}" cx="{:.1f}" cy="{:.1f}" r="{}" data-tip="{}"/>').format(
            kind, number % 5, left, high, 3.5 if one.dots else 5, f"{one.name} at {x:.5g}: {value}"
        )
    return drawn


def _mark(mark: Mark, number: int, across: _Axis, up: _Axis) -> Markup:
    if mark.x is not None:
        path = f"M{across.place(mark.x):.1f} {TOP}V{HEIGHT - BOTTOM}"
    else:
        assert mark.y is not None, "a mark has an x or a y"
        path = f"M{LEFT} {up.place(mark.y):.1f}H{WIDTH - RIGHT}"
    return Markup('<path class="line c{} dashed" d="{}"/>').format(number % 5, path)


def _legend(names: Iterable[tuple[int, str, bool]]) -> Markup:
    key = Markup('<li><span class="key c{}{}" aria-hidden="true"></span>{}</li>')
    keys = (key.format(number % 5, " dashed" if dashed else "", name) for number, name, dashed in names)
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(keys))


def _svg(parts: Iterable[Markup], alt: str) -> Markup:
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        WIDTH, HEIGHT, escape(alt)
    )
    return head + Markup("").join(parts) + Markup("</svg>")
