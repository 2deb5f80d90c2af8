"""Several checkpoints against one reference: the curve of drift."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kleash.auditing.glossary import GLOSSARY
from kleash.auditing.result import Audit, Measure
from kleash.errors import UsageError
from kleash.files import plain_json, replace_file
from kleash.report import charts
from kleash.report.charts import Chart, Point, Series, draw
from kleash.report.shell import pointer_data, render_page

SCHEMA = "kleash.drift/1"


@dataclass(frozen=True)
class DriftPoint:
    """One checkpoint of the curve."""

    policy: str
    at: float
    """The last number in its name if these grow, else its place in the row."""
    kl: Measure


@dataclass(frozen=True)
class Drift:
    """How far each of several checkpoints is from the same reference."""

    reference: str
    points: list[DriftPoint]
    x_title: str
    schema: str = SCHEMA

    def to_json(self) -> str:
        """The curve as strict JSON."""
        return plain_json(asdict(self), indent=1)


def drift_of(audits: Sequence[Audit]) -> Drift:
    """The curve through several audits against one reference.

    Raises:
        UsageError: if they have no KL, being of different tokens.
    """
    if any(not audit.parts for audit in audits):
        raise UsageError("a drift curve needs a KL; with --bytes give one policy at a time")
    paths = [audit.policy.path for audit in audits]
    numbers = [re.findall(r"\d+", Path(path).name) for path in paths]
    places = [float(found[-1]) for found in numbers if found]
    grow = len(places) == len(paths) and all(a < b for a, b in itertools.pairwise(places))
    if not grow:
        places = [float(n) for n in range(1, len(paths) + 1)]
    points = [
        DriftPoint(path, at, audit.kl)
        for path, at, audit in zip(paths, places, audits, strict=True)
    ]
    title = "number in the checkpoint's name" if grow else "checkpoint, in the order given"
    return Drift(audits[0].reference.path, points, title)


def write_drift(drift: Drift, audits: Sequence[Audit], into: Path) -> None:
    """Write drift.json and drift.html.

    Raises:
        RunError: if they cannot be written.
    """
    replace_file(into / "drift.json", drift.to_json() + "\n")
    replace_file(into / "drift.html", _render(drift, audits))


def _render(drift: Drift, audits: Sequence[Audit]) -> str:
    drawings = [
        draw(
            Chart(
                title=f"KL per {per}",
                unit=f"nats per {per} ± s.e.",
                sample=f"n = {audits[0].parts[0].responses:,} responses a point",
                key="kl",
                series=[
                    Series(
                        "exact KL",
                        [
                            Point(point.at, one.mean, one.standard_error)
                            for point in drift.points
                            for one in [getattr(point.kl, f"per_{per}")]
                        ],
                    )
                ],
                x_title=drift.x_title,
                include=(0.0,),
            )
        )
        for per in ("token", "response")
    ]
    data = {
        "runs": [drift.reference],
        "samples": [],
        "levels": [],
        "words": {},
        "charts": [pointer_data(drawing) for drawing in drawings],
        "area": [charts.LEFT, charts.WIDTH - charts.RIGHT, charts.WIDTH],
    }
    return render_page(
        "drift.html.j2",
        "page.js",
        data,
        drift=drift,
        drawings=list(enumerate(drawings)),
        geometry=charts,
        glossary=[metric for metric in GLOSSARY if metric.key in ("kl", "interval")],
    )
