"""From an audit to audit.html: charts, tables and the responses, in one file that runs alone.

What the page is made of, and why nothing of a model's text can run in it, is in `report.shell`.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kleash.auditing.console import WRITERS, closing, titles
from kleash.auditing.glossary import GLOSSARY
from kleash.auditing.result import Audit, AuditedResponse, Part, Share
from kleash.auditing.run_context import charts_over_root_kl
from kleash.report import svg_chart
from kleash.report.html_template import pointer_data, render_page
from kleash.report.svg_chart import Chart, Drawing, Point, Series, draw
from kleash.report.token_heatmap import KL_LEVELS
from kleash.storage.atomic_files import replace_file

SHOWN_SHARES = 30
"""Rows of a table of groups."""


def write_audit(audit: Audit, folder: Path) -> Path:
    """Write audit.json and audit.html into a directory that is there.

    Returns:
        Path of the page.

    Raises:
        RunError: if they cannot be written.
    """
    replace_file(folder / "audit.json", audit.to_json() + "\n")
    write_page(audit, folder / "audit.html")
    return folder / "audit.html"


def write_page(audit: Audit, file: Path) -> None:
    """Write the page of an audit.

    Raises:
        RunError: if it cannot be written.
    """
    replace_file(file, render(audit))


def render(audit: Audit) -> str:
    """The page of an audit."""
    drawings = _drawings(audit)
    samples = [_page_sample(part, sample) for part in audit.parts for sample in part.samples]
    data = {
        "runs": [audit.policy.path],
        "samples": samples,
        "levels": list(KL_LEVELS),
        "words": audit.token_texts,
        "charts": [pointer_data(drawing) for drawing in drawings],
        "area": [svg_chart.LEFT, svg_chart.WIDTH - svg_chart.RIGHT, svg_chart.WIDTH],
    }
    return render_page(
        "audit.html.j2",
        "page.js",
        data,
        audit=audit,
        titles={key: name for part in audit.parts for key, name in titles(part).items()},
        writers=WRITERS,
        closing=closing(audit),
        drawings=list(enumerate(drawings)),
        geometry=svg_chart,
        glossary=GLOSSARY,
        levels=KL_LEVELS,
        several=len(audit.parts) > 1,
        writers_here=[part.by for part in audit.parts],
        shown_shares=SHOWN_SHARES,
        about=json.dumps(
            {
                "policy": asdict(audit.policy),
                "reference": asdict(audit.reference),
                "settings": audit.settings,
            },
            indent=2,
        ),
    )


def _drawings(audit: Audit) -> list[Drawing]:
    found: list[Chart] = []
    if any(_drawable(part.positions) for part in audit.parts):
        found.append(_by_position(audit))
    if any(len(part.histogram) > 1 for part in audit.parts):
        found.append(_distribution(audit))
    if audit.standing is not None and audit.parts:
        found += charts_over_root_kl([(audit.kl.per_response, audit.standing)])
    return [draw(chart) for chart in found]


def _drawable(shares: list[Share]) -> bool:
    return len(shares) > 1 and any(math.isfinite(one.kl.mean) for one in shares)


def _by_position(audit: Audit) -> Chart:
    return Chart(
        title="KL by position",
        unit="nats per token ± s.e.",
        sample=_sample_size(audit),
        key="kl",
        series=[
            Series(
                WRITERS[part.by],
                [Point(one.start, one.kl.mean, one.kl.standard_error) for one in part.positions],
                colour=colour,
            )
            for colour, part in enumerate(audit.parts)
            if _drawable(part.positions)
        ],
        x_title="position in the response, tokens",
        include=(0.0,),
    )


def _distribution(audit: Audit) -> Chart:
    return Chart(
        title="Distribution over tokens",
        unit="share of tokens with at least so large a KL",
        sample=_sample_size(audit),
        key="percentiles",
        series=[
            Series(WRITERS[part.by], _survival(part), colour=colour)
            for colour, part in enumerate(audit.parts)
            if len(part.histogram) > 1
        ],
        x_title="log₁₀ of the KL, nats",
        include=(0.0, 1.0),
    )


def _survival(part: Part) -> list[Point]:
    left = part.tokens
    points: list[Point] = []
    for start, count in part.histogram:
        points.append(Point(start, left / part.tokens))
        left -= count
    return points


def _sample_size(audit: Audit) -> str:
    """What the error of a point rests on: prompts, or texts, and how many tokens they have."""
    counts = [
        f"{part.prompts:,} {'texts' if part.by == 'text' else 'prompts'} ({part.tokens:,} tokens)"
        for part in audit.parts
    ]
    return "n = " + " and ".join(counts)


def _page_sample(part: Part, sample: AuditedResponse) -> dict[str, Any]:
    """A response as the script of the page expects it; see `report.heatmap`."""
    forward = part.headline == "kl"
    return {
        "run": 0,
        "step": None,
        "kind": sample.kind,
        "who": sample.by,
        "prompt": sample.prompt,
        "response": sample.response,
        "score": None,
        "gold": None,
        "kl": sample.kl,
        "tokens": sample.tokens,
        "logprobs": _short(sample.logprobs),
        "ref_logprobs": _short(sample.ref_logprobs),
        "token_kl": _short(sample.token_kl if forward else sample.reverse_kl),
        "other_kl": _short(sample.reverse_kl if forward else sample.token_kl),
        "entropy": _short(sample.entropy),
        "ref_entropy": _short(sample.ref_entropy),
        "policy_top": [[one.ids, one.probabilities] for one in sample.policy_top],
        "reference_top": [[one.ids, one.probabilities] for one in sample.reference_top],
        "tokens_cut": 0,
    }


def _short(values: list[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
