"""Line charts as geometry: data in, positions in a small SVG out.

The drawing itself is a template. Left out on purpose: zoom, export, other kinds of chart. A
chart is 440 × 240 units wide whatever the screen, so that its text stays readable on a phone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

WIDTH, HEIGHT = 440, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 12, 34
SIGN = 9
"""Space for the sign of a mark."""
SPOKEN_MARKS = 6
MAX_BARS = 12
"""More dots than this have no error bars: they would hide each other."""
MAX_POINTS = 400
"""More points than this cannot be distinguished; the extremes of each stretch are kept."""


@dataclass(frozen=True)
class Point:
    """A value, and its standard error where there is one."""

    x: float
    y: float
    error: float | None = None


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[Point]
    style: Literal["line", "faint", "dots", "spot"] = "line"
    """Dots are joined by a faint trail; spots are larger and stand alone."""
    colour: int = 0
    """Index of a colour of the page; the faint line of a run shares its run's colour."""


@dataclass(frozen=True)
class Band:
    """A horizontal stretch that says where values should be, with its middle line."""

    name: str
    points: Sequence[Point]
    """The middle, over x."""
    relative: float
    """Half width as a share of the middle."""


@dataclass(frozen=True)
class Mark:
    """Something that happened at a place along the horizontal axis."""

    x: float
    kind: str
    """What kind of thing, in a word or two: the legend says it."""
    text: str
    """What happened, for the pointer."""
    style: Literal["refused", "stopped", "rolled_back", "restarted", "reanchored", "alarm"]
    colour: int | None = None
    """Index of a colour of the page; None: the colour of its style."""


@dataclass(frozen=True)
class Chart:
    """What a chart shows, in words and numbers."""

    title: str
    unit: str
    sample: str
    """What n is, for the title."""
    key: str
    """The key of metrics.jsonl that defines it."""
    series: Sequence[Series]
    bands: Sequence[Band] = ()
    x_title: str = "step"
    include: Sequence[float] = ()
    """Values that the vertical axis must reach."""
    marks: Sequence[Mark] = ()


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class DrawnSeries:
    """A series in the units of the drawing."""

    name: str
    style: str
    colour: int
    path: str
    error_path: str
    """A band around a line; a bar on each dot, where they are few."""
    dots: Sequence[tuple[float, float]]
    lost: Sequence[float]
    """Where a value was NaN or infinite: marked at the top, never dropped in silence."""


@dataclass(frozen=True)
class DrawnBand:
    """A band in the units of the drawing."""

    name: str
    area: str
    line: str


@dataclass(frozen=True)
class DrawnMark:
    """Marks of one style that stand too close to be distinguished, as one."""

    at: float
    height: float
    """Where its sign stands: signs at one place stand one below the other."""
    style: str
    colour: int | None


@dataclass(frozen=True)
class Drawing:
    """A chart ready for its template, and the numbers behind it for the pointer."""

    chart: Chart
    series: Sequence[DrawnSeries]
    bands: Sequence[DrawnBand]
    marks: Sequence[DrawnMark]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    x_domain: tuple[float, float]

    @property
    def spoken(self) -> str:
        """The chart in a sentence, for who cannot see it."""
        ends = [
            f"{series.name}: {format_number(series.points[0].y)} at first, "
            f"{format_number(series.points[-1].y)} at last"
            for series in self.chart.series
            if series.points
        ]
        described = [f"{mark.kind} at {format_number(mark.x)}" for mark in self.chart.marks]
        more = (
            [f"and {len(described) - SPOKEN_MARKS} more"] if len(described) > SPOKEN_MARKS else []
        )
        sentences = ["; ".join(ends), ", ".join([*described[:SPOKEN_MARKS], *more])]
        said = ". ".join(sentence for sentence in sentences if sentence)
        return f"{self.chart.title}, {self.chart.unit}. {said}"

    @property
    def mark_kinds(self) -> list[Mark]:
        """One mark of each kind, for the legend."""
        kinds: dict[str, Mark] = {}
        for mark in self.chart.marks:
            kinds.setdefault(mark.kind, mark)
        return list(kinds.values())


def format_number(value: float) -> str:
    """Three significant digits, with a true minus, and no exponent where none is needed.

    Example:
        >>> format_number(-0.12345), format_number(12345.6), format_number(0.0)
        ('−0.123', '12,346', '0')
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1000:
        text = f"{value:,.0f}" if size < 1e7 else f"{value:.2e}"
    elif size >= 1e-3:
        decimals = max(0, 2 - math.floor(math.log10(size)))
        text = f"{value:.{decimals}f}"
    else:
        text = f"{value:.1e}"
    return text.replace("-", "−")


def format_with_error(value: float, error: float) -> str:
    """A value to the digits that its standard error leaves it, two of them uncertain.

    Example:
        >>> format_with_error(5.04863, 0.0957), format_with_error(39.8, 0.0)
        ('5.049 ± 0.096', '39.8 ± 0')
    """
    if not (math.isfinite(error) and math.isfinite(value) and error > 0):
        return f"{format_number(value)} ± {format_number(error)}"
    decimals = 1 - math.floor(math.log10(error))
    if not 0 <= decimals <= 6:
        return f"{format_number(value)} ± {format_number(error)}"
    return f"{value:,.{decimals}f} ± {error:.{decimals}f}".replace("-", "−")


def labelled_ticks(
    low: float, high: float, *, count: int = 5, least_step: float = 0.0
) -> list[tuple[float, str]]:
    """Round numbers, about `count` of them, within [low, high], with no more digits than needed.

    Example:
        >>> labelled_ticks(0.0, 7.0)
        [(0.0, '0'), (2.0, '2'), (4.0, '4'), (6.0, '6')]
        >>> [label for _, label in labelled_ticks(-0.1, 0.12)]
        ['−0.10', '−0.05', '0', '0.05', '0.10']
        >>> labelled_ticks(1.0, 2.0, least_step=1.0)
        [(1.0, '1'), (2.0, '2')]
    """
    if not high > low:
        return [(low, format_number(low))]
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs((high - low) / s - count))
    step = max(step, least_step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [round(step * k, 12) for k in range(first, last + 1)]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if decimals > 4 or high >= 1e7:
        return [(value, "0" if value == 0 else f"{value:.0e}") for value in values]
    labels = [f"{value:,.{decimals}f}".replace("-", "−") if value else "0" for value in values]
    return list(zip(values, labels, strict=True))


def thin(points: Sequence[Point], *, limit: int = MAX_POINTS) -> list[Point]:
    """At most about `limit` points, keeping first, last, and the extremes of each stretch.

    Example:
        >>> spike = [Point(float(x), float(x == 777)) for x in range(1000)]
        >>> max(point.y for point in thin(spike, limit=50)), len(thin(spike, limit=50)) <= 52
        (1.0, True)
    """
    if len(points) <= limit:
        return list(points)
    stretch = math.ceil(len(points) / (limit // 2))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), stretch):
        rows = range(start, min(start + stretch, len(points)))
        # A NaN is an extreme too: it must be seen.
        kept.add(max(rows, key=lambda row: _or(points[row].y, math.inf)))
        kept.add(min(rows, key=lambda row: _or(points[row].y, math.inf)))
    return [points[row] for row in sorted(kept)]


def draw(chart: Chart) -> Drawing:
    """Lay a chart out.

    Raises:
        ValueError: if no series has a finite value.
    """
    everything = [point for series in chart.series for point in series.points]
    if not any(math.isfinite(point.y) for point in everything):
        raise ValueError(f"chart {chart.title!r} has nothing to draw")
    heights = [height for point in everything for height in _reach(point)]
    for band in chart.bands:
        heights += [p.y * (1 + side * band.relative) for p in band.points for side in (-1, 1)]
    places = [*(point.x for point in everything), *(mark.x for mark in chart.marks)]
    scale = _Scale(
        _domain(places, margin=0.0, fixed=()),
        _domain([*heights, *chart.include], margin=0.06, fixed=chart.include),
    )
    # Steps and checkpoints are counted: there is none at 1.2.
    counted = 1.0 if all(float(place).is_integer() for place in places) else 0.0
    x_ticks = labelled_ticks(*scale.x, least_step=counted)
    return Drawing(
        chart=chart,
        series=[_draw_series(series, scale) for series in chart.series],
        bands=[_draw_band(band, scale) for band in chart.bands],
        marks=_draw_marks(chart.marks, scale),
        x_ticks=[Tick(scale.place(x, 0.0)[0], label) for x, label in x_ticks],
        y_ticks=[Tick(scale.place(0.0, y)[1], label) for y, label in labelled_ticks(*scale.y)],
        x_domain=scale.x,
    )


@dataclass(frozen=True)
class _Scale:
    """From values to places in the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )


def _draw_series(series: Series, scale: _Scale) -> DrawnSeries:
    runs = _unbroken(series.points)
    alone = series.style in ("dots", "spot")
    return DrawnSeries(
        name=series.name,
        style=series.style,
        colour=series.colour,
        path=" ".join(_line([scale.place(p.x, p.y) for p in run]) for run in runs if len(run) > 1),
        error_path=_error_bars(runs, scale) if alone else _error_bands(runs, scale),
        dots=[scale.place(p.x, p.y) for run in runs for p in run if alone or len(run) == 1],
        lost=[scale.place(p.x, 0.0)[0] for p in series.points if not math.isfinite(p.y)],
    )


def _error_bands(runs: Sequence[Sequence[Point]], scale: _Scale) -> str:
    bands = [_errors(run) for run in runs]
    return " ".join(
        _area(
            [scale.place(p.x, p.y + error) for p, error in band],
            [scale.place(p.x, p.y - error) for p, error in band],
        )
        for band in bands
        if len(band) > 1
    )


def _error_bars(runs: Sequence[Sequence[Point]], scale: _Scale) -> str:
    ends = [(p, error) for run in runs for p, error in _errors(run)]
    if len(ends) > MAX_BARS:
        return ""
    return " ".join(
        _line([scale.place(p.x, p.y + error), scale.place(p.x, p.y - error)]) for p, error in ends
    )


def _errors(points: Sequence[Point]) -> list[tuple[Point, float]]:
    return [(p, p.error) for p in points if p.error is not None and math.isfinite(p.error)]


def _draw_band(band: Band, scale: _Scale) -> DrawnBand:
    upper = [scale.place(p.x, p.y * (1 + band.relative)) for p in band.points]
    lower = [scale.place(p.x, p.y * (1 - band.relative)) for p in band.points]
    return DrawnBand(
        name=band.name,
        area=_area(upper, lower),
        line=_line([scale.place(p.x, p.y) for p in band.points]),
    )


def _draw_marks(marks: Sequence[Mark], scale: _Scale) -> list[DrawnMark]:
    drawn: list[DrawnMark] = []
    for mark in sorted(marks, key=lambda mark: mark.x):
        at = scale.place(mark.x, 0.0)[0]
        near = [one for one in drawn if at - one.at < SIGN]
        if any((one.style, one.colour) == (mark.style, mark.colour) for one in near):
            continue
        height = TOP + SIGN * (0.5 + len(near))
        drawn.append(DrawnMark(at, height, mark.style, mark.colour))
    return drawn


def _reach(point: Point) -> list[float]:
    """The heights that a point and its error bar need."""
    if not math.isfinite(point.y):
        return []
    if point.error is None or not math.isfinite(point.error):
        return [point.y]
    return [point.y - point.error, point.y + point.error]


def _domain(
    values: Sequence[float], *, margin: float, fixed: Sequence[float]
) -> tuple[float, float]:
    """The stretch an axis shows. An end that is a fixed value gets no margin beyond it."""
    low, high = min(values), max(values)
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        return (low if low in fixed else low - pad), high + pad
    margins = margin * (high - low)
    return (low if low in fixed else low - margins), high + margins


def _unbroken(points: Sequence[Point]) -> list[list[Point]]:
    """Split at values that are not finite: a line must not bridge what is not known."""
    runs: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point.y):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _line(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in places)


def _area(upper: Sequence[tuple[float, float]], lower: Sequence[tuple[float, float]]) -> str:
    return _line([*upper, *reversed(lower)]) + "Z"


def _or(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else value
