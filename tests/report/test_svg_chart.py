"""Charts as geometry: where lines, bands, ticks and marks stand, and how numbers read."""

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kleash.report import svg_chart
from kleash.report.svg_chart import (
    Band,
    Chart,
    Mark,
    Point,
    Series,
    draw,
    format_number,
    labelled_ticks,
)


def chart(*points, **more):
    series = Series("s", [Point(float(x), float(y)) for x, y in points])
    return Chart(title="t", unit="nats", sample="", key="", series=[series], **more)


def places(path):
    return [tuple(map(float, pair.split())) for pair in re.findall(r"[-\d.e]+ [-\d.e]+", path)]


def test_a_line_goes_from_corner_to_corner():
    drawn = draw(chart((0, 0), (10, 5), include=(0.0,)))
    (x0, y0), (x1, y1) = places(drawn.series[0].path)
    assert (x0, y0) == (svg_chart.LEFT, svg_chart.HEIGHT - svg_chart.BOTTOM)
    assert x1 == svg_chart.WIDTH - svg_chart.RIGHT
    assert y1 == pytest.approx(svg_chart.TOP + 0.06 / 1.06 * (y0 - svg_chart.TOP), abs=0.1)


def test_what_is_not_finite_breaks_the_line_and_is_marked():
    points = [(0, 1), (1, 2), (2, math.nan), (3, 2), (4, math.inf), (5, 1)]
    (series,) = draw(chart(*points)).series
    assert series.path.count("M") == 1 and len(places(series.path)) == 2
    assert len(series.dots) == 2 and len(series.lost) == 2
    with pytest.raises(ValueError, match="nothing to draw"):
        draw(chart((0, math.nan)))


def test_errors_and_bands_fit_in_the_drawing():
    line = Series("s", [Point(0.0, 1.0, 0.5), Point(1.0, 2.0, 3.0), Point(2.0, 2.0, math.nan)])
    band = Band("b", [Point(0.0, 9.0), Point(2.0, 9.0)], 0.2)
    drawn = draw(Chart("t", "", "", "", [line], [band]))
    everything = places(drawn.series[0].error_path) + places(drawn.bands[0].area)
    assert len(places(drawn.series[0].error_path)) == 4
    assert all(svg_chart.TOP <= y <= svg_chart.HEIGHT - svg_chart.BOTTOM for _, y in everything)


@given(low=st.floats(-1e6, 1e6), width=st.floats(1e-4, 1e6))
def test_ticks_are_round_inside_and_told_apart(low, width):
    high = low + width
    marks = labelled_ticks(low, high)
    assert 2 <= len(marks) <= 11
    assert all(low - 1e-6 * width <= at <= high + 1e-6 * width for at, _ in marks)
    if width > 1e-2:
        assert len({label for _, label in marks}) == len(marks)


@given(st.floats())
def test_numbers_are_readable(value):
    text = format_number(value)
    assert "-" not in text.replace("e-", "e") and len(text) <= 12
    if 1e-3 < abs(value) < 1e6:
        back = float(text.replace("−", "-").replace(",", ""))
        assert back == pytest.approx(value, rel=6e-3, abs=0.5 if abs(value) >= 1000 else 0)


def test_marks_stand_where_they_happened_and_widen_the_axis() -> None:
    marks = [
        Mark(5.0, "refused", "too far", "refused"),
        Mark(5.0, "rolled back", "back to 3", "rolled_back"),
        Mark(5.01, "refused", "again", "refused"),
        Mark(12.0, "stopped", "no more", "stopped", 2),
    ]
    drawn = draw(chart((0, 0), (10, 5), marks=marks))
    assert drawn.x_domain == (0.0, 12.0)
    width = svg_chart.WIDTH - svg_chart.LEFT - svg_chart.RIGHT
    found = [(one.style, one.colour) for one in drawn.marks]
    assert found == [("refused", None), ("rolled_back", None), ("stopped", 2)]
    at = [one.at for one in drawn.marks]
    middle = svg_chart.LEFT + width * 5 / 12
    assert at == pytest.approx([middle, middle, svg_chart.WIDTH - svg_chart.RIGHT], abs=0.1)
    assert drawn.marks[0].height < drawn.marks[1].height == drawn.marks[0].height + svg_chart.SIGN
    assert [one.kind for one in drawn.mark_kinds] == ["refused", "rolled back", "stopped"]
    assert drawn.spoken.endswith("rolled back at 5.00, refused at 5.01, stopped at 12.0")
    many = draw(chart((0, 0), (10, 5), marks=marks * 4))
    assert len(many.marks) == 3 and many.spoken.endswith("and 10 more")


def test_spots_stand_alone() -> None:
    line = chart((0, 0), (10, 5)).series[0]
    (series,) = draw(replace(chart((0, 0)), series=[replace(line, style="spot")])).series
    assert len(series.dots) == 2


def test_few_dots_have_bars_and_many_have_none() -> None:
    def drawn(count: int):
        points = [Point(float(n % 3), float(n), 0.5) for n in range(count)]
        return draw(Chart("t", "", "", "", [Series("s", points, "dots")])).series[0]

    bars = places(drawn(4).error_path)
    assert len(bars) == 8 and all(bars[k][0] == bars[k + 1][0] for k in range(0, 8, 2))
    assert drawn(svg_chart.MAX_BARS + 1).error_path == ""
