"""Charts: what they draw is what they were given, and names in them are text."""

import re
from xml.etree import ElementTree

import pytest

from snello.reports.charts import HEIGHT, WIDTH, Mark, Series, heat_map, line_chart, thinned


def drawn(markup: str) -> ElementTree.Element:
    """The chart as a tree: what is no XML fails here."""
    return ElementTree.fromstring(f"<figure>{markup}</figure>")


def circles(markup: str) -> list[tuple[float, float]]:
    return [(float(one.get("cx", "")), float(one.get("cy", ""))) for one in drawn(markup).iter("circle")]


def test_points_stand_in_order_within_the_frame_and_higher_values_higher() -> None:
    places = circles(line_chart([Series("a", [(0, 1.0), (5, 3.0), (10, 2.0)], dots=True)], alt="a", x="step"))
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert places[1][1] < places[2][1] < places[0][1]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)


def test_a_series_keeps_its_colour_where_another_has_no_points() -> None:
    chart = line_chart([Series("a", []), Series("b", [(0, 1), (1, 2)])], alt="b", x="step")
    assert 'class="line c1"' in chart and 'class="line c0"' not in chart


def test_a_legend_names_what_there_is_more_than_one_of() -> None:
    one = line_chart([Series("a", [(0, 1), (1, 2)])], alt="a", x="step")
    two = line_chart([Series("a", [(0, 1), (1, 2)])], alt="a", x="step", marks=[Mark("goal", y=3)])
    assert "legend" not in one and re.findall(r"</span>(\w+)</li>", two) == ["a", "goal"]


def test_names_are_text() -> None:
    chart = line_chart(
        [Series('<script>"', [(0, 1)], dots=True), Series("&", [(0, 2)])], alt='"><script>', x="<b>", percent=True
    )
    texts = ["".join(one.itertext()) for one in drawn(chart).iter("li")]
    assert texts == ['<script>"', "&"] and "<script" not in chart and "<b>" not in chart


def test_nothing_is_drawn_of_nothing() -> None:
    assert line_chart([Series("a", [])], alt="a", x="step") == "" and heat_map([], [], alt="", x="", row_name="") == ""


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-9, 1e12])
def test_values_that_are_all_the_same_have_an_axis(value: float) -> None:
    (place, other) = circles(line_chart([Series("a", [(7, value), (7, value)], dots=True)], alt="a", x="step"))
    assert place == other and 0 < place[0] < WIDTH and 0 < place[1] < HEIGHT


def test_many_points_are_thinned_to_means() -> None:
    points = [(float(i), float(i % 2)) for i in range(1000)]
    few = thinned(points, 100)
    assert len(few) == 100 and all(y == 0.5 for _, y in few)
    assert few[0][0] == 4.5 and few[-1][0] == 994.5
    assert thinned(points[:100], 100) == points[:100]


def test_cells_of_a_heat_map_that_look_alike_are_one() -> None:
    tree = drawn(heat_map([[1, 1, 0.5, 0.5001], [0, 0, 0, 0]], [1, 2, 3, 4], alt="b", x="step", row_name="block"))
    cells = [(one.get("fill-opacity"), one.get("data-tip")) for one in tree.iter("path") if one.get("class") == "cell"]
    assert cells == [("1", "block 0, step 1 to 2: 1.00"), ("0.25", "block 0, step 3 to 4: 0.50")]
    assert [one.text for one in tree.iter("text")][:2] == ["0", "1"]  # the first row is the lowest
