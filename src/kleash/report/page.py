"""From run directories to report.html and report.json.

The page is one file that needs no network and asks for none: its content security policy admits
exactly the style and the script it was written with, by their hashes. Text from models, prompts and
configurations is untrusted: it enters through autoescaping or as JSON that the script only
ever shows as text.
"""

import base64
import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from kleash.diagnostics.drift import drift_findings, efficiency, last_third, series
from kleash.diagnostics.overoptimisation import overoptimisation_findings
from kleash.errors import RunError
from kleash.files import plain, plain_json, replace_file
from kleash.report import charts
from kleash.report.charts import Drawing, draw, format_number, format_with_error
from kleash.report.curves import chart_groups, responses_per_step
from kleash.report.glossary import GLOSSARY
from kleash.report.heatmap import KL_LEVELS, page_samples
from kleash.runs import Run, read_run

SCHEMA = "kleash.report/1"


def write_report(
    runs: Sequence[Path | str], *, into: Path | str | None = None
) -> tuple[Path, Path]:
    """Write the page of one run, or a comparison of several, and its JSON twin.

    Args:
        runs: run directories.
        into: where to; the run's own directory, or the parent of the first where there are several.

    Returns:
        Paths of report.html and report.json.

    Raises:
        RunError: if a directory holds no readable run, holds no step, or cannot be written to.
    """
    if not runs:
        raise RunError("a report needs at least one run directory, got none")
    read = [read_run(path) for path in runs]
    for run in read:
        if not run.metrics:
            raise RunError(f"{str(run.path)!r} has no step to report yet; let the run write one")
    folder = Path(into) if into is not None else read[0].path
    if into is None and len(read) > 1:
        folder = read[0].path.resolve().parent
    page, twin = folder / "report.html", folder / "report.json"
    report = build_report(read)
    replace_file(twin, plain_json(report) + "\n")
    replace_file(page, render(report, read))
    return page, twin


def build_report(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything the page says, as plain data: the content of report.json."""
    samples, left_out = page_samples(runs)
    return {
        "schema": SCHEMA,
        "runs": [
            {"name": name, **_run_report(run)} for run, name in zip(runs, _names(runs), strict=True)
        ],
        "samples": samples,
        "samples_left_out": left_out,
        "kl_levels": list(KL_LEVELS),
    }


def render(report: dict[str, Any], runs: Sequence[Run]) -> str:
    """The page of a report that `build_report` made from the same runs."""
    style, script = resource("page.css"), resource("page.js")
    names = [entry["name"] for entry in report["runs"]]
    drawn = [
        (heading, [draw(chart) for chart in group]) for heading, group in chart_groups(runs, names)
    ]
    numbers = itertools.count()
    data = {
        "runs": names,
        "samples": report["samples"],
        "levels": report["kl_levels"],
        "charts": [_pointer_data(drawing) for _, group in drawn for drawing in group],
        "area": [charts.LEFT, charts.WIDTH - charts.RIGHT, charts.WIDTH],
    }
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            report=report,
            groups=[(heading, [(next(numbers), one) for one in group]) for heading, group in drawn],
            geometry=charts,
            glossary=GLOSSARY,
            configs=[(run.path / "config.yaml").read_text(encoding="utf-8") for run in runs],
            metas=[json.dumps(plain(run.meta), indent=2) for run in runs],
            style=Markup(style),
            script=Markup(script),
            style_hash=source_hash(style),
            script_hash=source_hash(script),
            data=Markup(_embed(data)),
        )
    )


def _run_report(run: Run) -> dict[str, Any]:
    found = [*overoptimisation_findings(run.metrics), *drift_findings(run.metrics)]
    return {
        "status": run.status,
        "meta": dict(run.meta),
        "notes": list(run.notes),
        "summary": _summary(run),
        "findings": [vars(finding) for finding in found],
        "metrics": list(run.metrics),
        "samples": len(run.samples),
    }


def _summary(run: Run) -> dict[str, Any]:
    """The headline numbers: of the last step, and of the first, before any update."""
    last = run.metrics[-1]
    keys = {
        "score": "objective/scores",
        "score_se": "objective/scores_se",
        "objective": "objective/rlhf_reward",
        "kl": "objective/kl_ref",
        "kl_se": "objective/kl_ref_se",
        "beta": "objective/beta",
        "target_kl": "objective/target_kl",
        "entropy": "objective/entropy",
        "seconds": "seconds",
        "episodes": "episodes",
    }
    scores, golds = series(run.metrics, "objective/scores"), series(run.metrics, "heldout/gold")
    earned = efficiency(run.metrics)
    return {
        "steps": last["step"],
        **{name: last.get(key) for name, key in keys.items()},
        "kl_last_third": last_third(run.metrics, "objective/kl_ref"),
        "first_step": scores[0][0] if scores else None,
        "score_first": scores[0][1] if scores else None,
        "gold_first": golds[0][1] if golds else None,
        "gold": golds[-1][1] if golds else None,
        "responses_per_step": responses_per_step(run.metrics),
        "efficiency": vars(earned) if earned else None,
    }


def _names(runs: Sequence[Run]) -> list[str]:
    """Directory names; with their parents where two are alike, and a number where that fails."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.path.resolve().parent.name}/{run.name}" for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, start=1)]
    return names


def _pointer_data(drawing: Drawing) -> dict[str, Any]:
    """What the page needs to say the numbers under the pointer."""
    return {
        "unit": drawing.chart.unit,
        "x": drawing.chart.x_title,
        "domain": list(drawing.x_domain),
        "series": [
            {
                "name": one.name,
                "colour": one.colour,
                "style": one.style,
                "points": [
                    [_digits(p.x), _digits(p.y), None if p.error is None else _digits(p.error)]
                    for p in one.points
                ],
            }
            for one in drawing.chart.series
        ],
    }


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


def _embed(data: dict[str, Any]) -> str:
    """JSON that cannot leave its script element, whatever its strings hold."""
    text = plain_json(data)
    # plain_json is ASCII, which covers U+2028 and U+2029; these three end or open markup.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def source_hash(text: str) -> str:
    """How a content security policy names a style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def resource(name: str) -> str:
    """The text of a file beside the templates."""
    return (files("kleash.report") / "templates" / name).read_text(encoding="utf-8")


def environment() -> jinja2.Environment:
    """The templates, with autoescaping and the filters of every page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kleash.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Typed by jinja2 as a union of its own filters.
    filters: dict[str, Any] = environment.filters
    filters |= {
        "duration": _duration,
        "error": _error,
        "moment": _moment,
        "number": _number,
        "percent": "{:.0%}".format,
        "slug": _slug,
        "visible": visible,
        "with_error": _with_error,
    }
    return environment


def _number(value: float | int | None) -> str:
    return "—" if value is None else format_number(float(value))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _with_error(value: float | None, error: float | None) -> str:
    if value is None or error is None:
        return _number(value)
    return format_with_error(float(value), float(error))


def _error(value: float, error: float) -> str:
    return format_with_error(float(value), float(error)).split(" ± ")[1]


def _moment(text: object) -> str:
    """A time from run.json for people; whatever else stands there is shown as it is."""
    try:
        return datetime.fromisoformat(str(text)).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return str(text)


def _duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "—"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def visible(text: str) -> str:
    """Show what would not show, or would mislead: controls, direction marks, lone surrogates.

    Example:
        >>> visible("a\\x00b \\u202e \\ud800")
        'a[U+0000]b [U+202E] [U+D800]'
    """
    return "".join(f"[U+{ord(c):04X}]" if _is_hidden(c) else c for c in text)


def _is_hidden(character: str) -> bool:
    code = ord(character)
    return (
        (code < 0x20 and character not in "\n\t")
        or 0x7F <= code <= 0x9F
        or code in (0x061C, 0x200B, 0x200E, 0x200F, 0x2028, 0x2029, 0x2060, 0xFEFF)
        or 0x202A <= code <= 0x202E
        or 0x2066 <= code <= 0x2069
        or 0xD800 <= code <= 0xDFFF
    )
