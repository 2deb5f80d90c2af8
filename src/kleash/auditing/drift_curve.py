"""Several checkpoints against one reference: the curve of drift."""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kleash.auditing.confidence_intervals import ConfidenceInterval
from kleash.auditing.glossary import GLOSSARY
from kleash.auditing.result import Audit, Measure, Part
from kleash.auditing.run_context import CheckpointInRun, charts_over_root_kl
from kleash.errors import UsageError
from kleash.report import svg_chart
from kleash.report.html_template import pointer_data, render_page, short_path
from kleash.report.svg_chart import Chart, Point, Series, draw
from kleash.storage.atomic_files import plain_json, replace_file

SCHEMA = "kleash.drift/1"
_DEFINED = ("kl", "root_kl", "standing", "interval")


@dataclass(frozen=True)
class DriftPoint:
    """One checkpoint of the curve."""

    policy: str
    at: float
    """The last number in its name if these grow, else its place in the row."""
    kl: Measure
    standing: CheckpointInRun | None = None
    """Where it stands in the run that it is a checkpoint of."""


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
    # Of leashed/checkpoints/step-000040/policy it is the step that is its name.
    numbers = [re.findall(r"\d+", short_path(path).split("/")[-1]) for path in paths]
    places = [float(found[-1]) for found in numbers if found]
    grow = len(places) == len(paths) and all(a < b for a, b in itertools.pairwise(places))
    if not grow:
        places = [float(n) for n in range(1, len(paths) + 1)]
    points = [
        DriftPoint(path, at, audit.kl, audit.standing)
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
    drawings = [draw(chart) for chart in _charts(drift, audits[0].parts[0])]
    data = {
        "runs": [drift.reference],
        "samples": [],
        "levels": [],
        "words": {},
        "charts": [pointer_data(drawing) for drawing in drawings],
        "area": [svg_chart.LEFT, svg_chart.WIDTH - svg_chart.RIGHT, svg_chart.WIDTH],
    }
    return render_page(
        "drift.html.j2",
        "page.js",
        data,
        drift=drift,
        drawings=list(enumerate(drawings)),
        geometry=svg_chart,
        glossary=[metric for metric in GLOSSARY if metric.key in _DEFINED],
    )


def _charts(drift: Drift, part: Part) -> list[Chart]:
    """KL over checkpoints, its root, which grows steadily under a steady pull, and the score."""
    per_response = [(point.at, point.kl.per_response) for point in drift.points]
    curves = {
        ("KL per token", "nats per token ± s.e.", "kl"): [
            Point(point.at, one.mean, one.standard_error)
            for point in drift.points
            for one in [point.kl.per_token]
        ],
        ("KL per response", "nats per response ± s.e.", "kl"): [
            Point(at, one.mean, one.standard_error) for at, one in per_response
        ],
        ("√KL per response", "√nats ± s.e.", "root_kl"): [
            Point(at, math.sqrt(max(0.0, one.mean)), _root_error(one)) for at, one in per_response
        ],
    }
    found = [
        Chart(
            title=title,
            unit=unit,
            sample=f"n = {part.prompts:,} {'texts' if part.by == 'text' else 'prompts'} a point",
            key=key,
            series=[Series("exact KL" if key == "kl" else "√ of the exact KL", points)],
            x_title=drift.x_title,
            include=(0.0,),
        )
        for (title, unit, key), points in curves.items()
    ]
    placed = [
        (point.kl.per_response, point.standing)
        for point in drift.points
        if point.standing is not None
    ]
    return found + charts_over_root_kl(placed)


def _root_error(kl: ConfidenceInterval) -> float | None:
    """Standard error of √KL, by the delta method; none where there is no slope."""
    if kl.standard_error is None or not kl.mean > 0:
        return None
    return kl.standard_error / (2 * math.sqrt(kl.mean))
