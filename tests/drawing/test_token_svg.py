"""What is drawn of a picture's patches: read back from the SVG, patch by patch."""

import random
import re
from collections import Counter, defaultdict
from xml.etree import ElementTree

import pytest

from snello.drawing.tokens import HUES, UNIT, token_svg

SVG = "{http://www.w3.org/2000/svg}"


def drawn(grid, groups, **options):
    return ElementTree.fromstring(token_svg("pictures/3.jpg", grid, groups, alt="a cat", **options))


def paths(svg, **attributes):
    return [p.get("d") for p in svg.iter(f"{SVG}path") if all(p.get(k) == v for k, v in attributes.items())]


def covered(path):
    """The cells that a path of rectangles covers."""
    cells = Counter()
    for left, top, wide, high, back in re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)h-(\d+)z", path):
        assert wide == back
        left, top, wide, high = (int(value) // UNIT for value in (left, top, wide, high))
        cells.update((top + row, left + col) for row in range(high) for col in range(wide))
    assert set(cells.values()) <= {1}
    assert re.sub(r"M\d+ \d+h\d+v\d+h-\d+z", "", path) == ""
    return set(cells)


def sides(path):
    """The sides of patches that a path runs along, as ((row, col), down) of where each begins."""
    found = Counter()
    for x, y, way, length in re.findall(r"M(\d+) (\d+)([hv])(\d+)", path):
        x, y, length = (int(value) // UNIT for value in (x, y, length))
        found.update(((y + i * (way == "v"), x + i * (way == "h")), way == "v") for i in range(length))
    assert set(found.values()) <= {1}
    return set(found)


def crossed(path):
    """The cells whose rising diagonal a path runs along."""
    found = Counter()
    for x, y, left, down in re.findall(r"M(\d+) (\d+)l-(\d+) (\d+)", path):
        x, y, left, down = (int(value) // UNIT for value in (x, y, left, down))
        assert left == down
        found.update((y + i, x - 1 - i) for i in range(left))
    assert set(found.values()) <= {1}
    return set(found)


def expected_sides(rows, cols, groups):
    counts = Counter(groups)
    at = {(row, col): groups[row * cols + col] for row in range(rows) for col in range(cols)}
    found = set()
    for (row, col), group in at.items():
        if group < 0 or counts[group] == 1:
            continue
        for other, side in (
            ((row - 1, col), ((row, col), False)),
            ((row + 1, col), ((row + 1, col), False)),
            ((row, col - 1), ((row, col), True)),
            ((row, col + 1), ((row, col + 1), True)),
        ):
            if at.get(other) != group:
                found.add(side)
    return found


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 5), (4, 3), (6, 6)])
@pytest.mark.parametrize("seed", range(6))
def test_outlines_are_where_merged_tokens_end_and_veils_where_patches_were_dropped(rows, cols, seed):
    chance = random.Random(seed)
    groups = [chance.randint(-1, rows * cols // 2) for _ in range(rows * cols)]
    svg, counts = drawn((rows, cols), groups), Counter(groups)
    lines = [*paths(svg, stroke="#000"), *paths(svg, stroke="#fff")]
    assert len(lines) == (2 if any(group >= 0 and count > 1 for group, count in counts.items()) else 0)
    assert all(sides(line) == expected_sides(rows, cols, groups) for line in lines)
    veils = paths(svg, fill="#888")
    hidden = {(i // cols, i % cols) for i, group in enumerate(groups) if group < 0}
    assert (covered(veils[0]) if hidden else set()) == hidden and len(veils) == bool(hidden)
    hatching = paths(svg, stroke="#888")
    assert (crossed(hatching[0]) if hidden else set()) == hidden and len(hatching) == bool(hidden)


def test_patches_that_stay_alone_are_as_they_are():
    svg = drawn((2, 2), [3, 1, 0, 2])
    assert [child.tag.removeprefix(SVG) for child in svg] == ["title", "image"]


def test_pieces_of_one_token_have_a_colour_and_others_have_none():
    svg = drawn((2, 4), [0, 1, 1, 0, 2, 3, 4, 2])
    marked = {colour: covered(path) for colour in HUES for path in paths(svg, fill=colour)}
    assert sorted(map(sorted, marked.values())) == [[(0, 0), (0, 3)], [(1, 0), (1, 3)]]


def test_numbers_stand_in_the_token_that_they_count():
    groups = [0, 0, 0, 1, 0, 2, 0, 3, 0, 0, 0, 4, 5, 5, 6, 6]
    svg = drawn((4, 4), groups)
    texts = defaultdict(list)
    for text in svg.iter(f"{SVG}text"):
        texts[text.text].append((float(text.get("x")) / UNIT, float(text.get("y")) / UNIT))
    assert sorted(texts) == ["2", "8"] and [x for x, _ in texts["2"]] == [1, 3]  # between the two patches
    ((x, y),) = texts["8"]
    assert groups[int(y) * 4 + int(x)] == 0  # not in the hole that its middle is


@pytest.mark.parametrize(("size", "numbers"), [(224, 2), (12, 0)])
def test_numbers_need_room(size, numbers):
    assert len(list(drawn((2, 2), [0, 0, 1, 1], size=size).iter(f"{SVG}text"))) == numbers


def test_it_says_what_it_is_to_those_who_do_not_see_it_and_escapes_what_it_is_given():
    made = token_svg('a"b.jpg?x=1&y=2', (1, 2), [0, -1], alt='<b>"cat" & dog</b>', size=100)
    svg = ElementTree.fromstring(made)
    assert svg.get("role") == "img" and svg.get("aria-label") == '<b>"cat" & dog</b>'
    assert svg.find(f"{SVG}title").text == '<b>"cat" & dog</b>'
    assert svg.find(f"{SVG}image").get("href") == 'a"b.jpg?x=1&y=2'
    assert (svg.get("width"), svg.get("height")) == ("100", "50") and "<b>" not in made and "\n" not in made


def test_as_many_groups_as_patches():
    with pytest.raises(ValueError, match="2 x 2 patches need as many groups, got 3"):
        token_svg("a.jpg", (2, 2), [0, 1, 2], alt="")


@pytest.mark.parametrize(("side", "most"), [(14, 20_000), (37, 60_000)])
@pytest.mark.parametrize("share", [2, 3, 8])
@pytest.mark.parametrize("dropped", [0, 2])
@pytest.mark.parametrize("order", ["scattered", "in-rows"])
def test_it_stays_small(side, most, share, dropped, order):
    groups = [-1 if dropped and i % dropped else i // share for i in range(side * side)]
    if order == "scattered":
        random.Random(0).shuffle(groups)
    assert len(token_svg("pictures/3.jpg", (side, side), groups, alt="a cat")) < most


def test_a_symbol_of_the_page_is_used_where_it_is_named() -> None:
    svg = token_svg("#picture-1", (2, 2), [0, 1, 2, 3], alt="a")
    assert '<use href="#picture-1"' in svg and "<image" not in svg


def test_patches_are_veiled_by_what_is_lost_of_them() -> None:
    svg = token_svg("a.jpg", (1, 4), [0, 1, 2, 3], alt="a", lost=[0.0, 0.5, 0.5, 2.0])
    assert re.findall(r'd="(.*?)".*?fill-opacity="(.*?)"', svg) == [
        ("M10 0h20v10h-20z", "0.45"),
        ("M30 0h10v10h-10z", "0.90"),
    ]
    assert token_svg("a.jpg", (1, 2), [0, 1], alt="a", lost=[None, 0.0]).count("<path") == 0
    with pytest.raises(ValueError, match="as many"):
        token_svg("a.jpg", (1, 2), [0, 1], alt="a", lost=[0.1])
