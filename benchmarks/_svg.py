"""Log-log line charts as SVG text: no library, the same file for the same numbers."""

import math
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 430, 320, 58, 12, 34, 44
INK, GRID = "#333", "#ddd"


@dataclass(frozen=True)
class Series:
    """A line: its name, colour and points (x, y), all positive."""

    name: str
    colour: str
    points: tuple[tuple[float, float], ...]


def chart(
    title: str, x_label: str, y_label: str, series: list[Series], offset: float = 0.0
) -> list[str]:
    """SVG elements of one log-log chart, `offset` pixels to the right."""
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    x_low, x_high = math.log10(min(xs)), math.log10(max(xs))
    y_low, y_high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x_low) / (x_high - x_low)
        up = (math.log10(y) - y_low) / (y_high - y_low)
        return (
            offset + LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )

    out = [_text(offset + LEFT, 18, title, weight="bold")]
    out.append(_text(offset + (LEFT + WIDTH) / 2, HEIGHT - 6, x_label, anchor="middle"))
    out.append(_text(offset + LEFT - 48, TOP - 4, y_label))
    for power in range(y_low, y_high + 1):
        left, y = place(min(xs), 10.0**power)
        right, _ = place(max(xs), 10.0**power)
        out.append(f'<path d="M{left:.1f} {y:.1f}H{right:.1f}" stroke="{GRID}"/>')
        out.append(_text(left - 6, y + 4, f"{10.0**power:g}", anchor="end"))
    for x in sorted(set(xs)):
        out.append(_text(place(x, min(ys))[0], HEIGHT - BOTTOM + 18, f"{x:,.0f}", anchor="middle"))
    for index, line in enumerate(series):
        points = [place(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        out.append(
            f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="2"/>'
        )
        out += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{line.colour}"/>' for x, y in points
        ]
        out.append(_text(offset + LEFT + 8, TOP + 14 + 15 * index, line.name, colour=line.colour))
    return out


def page(charts: list[list[str]]) -> str:
    """Charts made with offsets 0, WIDTH, 2 · WIDTH … as one SVG file."""
    width = WIDTH * len(charts)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12"><rect width="{width}" height="{HEIGHT}" '
        'fill="white"/>'
    )
    return "\n".join([head, *(element for elements in charts for element in elements), "</svg>\n"])


def _text(
    x: float, y: float, text: str, anchor: str = "start", weight: str = "normal", colour: str = INK
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="{colour}">{escape(text)}</text>'
    )
