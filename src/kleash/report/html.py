"""From run directories to report.html and report.json.

What a page is made of, and why nothing in it can run, is in `shell`.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kleash.errors import RunError
from kleash.report import svg_chart
from kleash.report.diagnostics.drift import (
    Diagnosis,
    drift_findings,
    efficiency,
    last_third,
    series,
)
from kleash.report.diagnostics.overoptimisation import overoptimisation_findings
from kleash.report.event_table import SHOWN, event_rows
from kleash.report.glossary import GLOSSARY
from kleash.report.html_template import pointer_data, render_page
from kleash.report.metric_charts import chart_groups, responses_per_step
from kleash.report.svg_chart import draw, format_number
from kleash.report.token_heatmap import KL_LEVELS, page_samples
from kleash.storage.atomic_files import plain, plain_json, replace_file
from kleash.storage.run_directory import Run, read_run

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
    samples, words, left_out = page_samples(runs)
    names = _names(runs)
    return {
        "schema": SCHEMA,
        "runs": [{"name": name, **_run_report(run)} for run, name in zip(runs, names, strict=True)],
        "events": event_rows(runs, names),
        "samples": samples,
        "words": words,
        "samples_left_out": left_out,
        "kl_levels": list(KL_LEVELS),
    }


def render(report: dict[str, Any], runs: Sequence[Run]) -> str:
    """The page of a report that `build_report` made from the same runs."""
    names = [entry["name"] for entry in report["runs"]]
    drawn = [
        (heading, [draw(chart) for chart in group]) for heading, group in chart_groups(runs, names)
    ]
    numbers = itertools.count()
    data = {
        "runs": names,
        "samples": report["samples"],
        "words": report["words"],
        "levels": report["kl_levels"],
        "charts": [pointer_data(drawing) for _, group in drawn for drawing in group],
        "area": [svg_chart.LEFT, svg_chart.WIDTH - svg_chart.RIGHT, svg_chart.WIDTH],
    }
    return render_page(
        "page.html.j2",
        "page.js",
        data,
        report=report,
        groups=[(heading, [(next(numbers), one) for one in group]) for heading, group in drawn],
        geometry=svg_chart,
        shown_events=SHOWN,
        glossary=GLOSSARY,
        configs=[(run.path / "config.yaml").read_text(encoding="utf-8") for run in runs],
        metas=[json.dumps(plain(run.meta), indent=2) for run in runs],
    )


def _run_report(run: Run) -> dict[str, Any]:
    found = [*overoptimisation_findings(run.metrics), *drift_findings(run.metrics)]
    summary = _summary(run)
    return {
        "status": run.status,
        "meta": dict(run.meta),
        "notes": list(run.notes),
        "summary": summary,
        "answer": _answer(summary, found),
        "findings": [vars(finding) for finding in found],
        "metrics": list(run.metrics),
        "samples": len(run.samples),
    }


def _answer(summary: dict[str, Any], findings: Sequence[Diagnosis]) -> dict[str, Any]:
    """What a reader asks first: on its leash, what was gained, and where it went wrong."""
    kl, target, earned = (summary[key] for key in ("kl_last_third", "target_kl", "efficiency"))
    budget = next((finding for finding in findings if finding.name == "budget"), None)
    if kl is None:
        leash = "its KL is not known"
    elif budget is None:
        leash = f"no budget was given: {format_number(kl)} nats over the last third"
    else:
        where = budget.sentence.split(":")[0].lower()
        leash = f"{where}: {format_number(kl)} of {format_number(target)} nats over the last third"
    gained = "the score it gained is not known"
    if earned is not None:
        gain, per_nat = (format_number(earned[key]) for key in ("score_gain", "per_nat"))
        gained = f"{gain} of score, {per_nat} per nat"
    wrong = [finding.sentence for finding in findings if finding.level == "warning"]
    return {"leash": leash, "gained": gained, "wrong": wrong}


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
        "beta_unit": "group sd per nat" if _algorithm(run) == "grpo" else "score per nat",
        "efficiency": vars(earned) if earned else None,
    }


def _algorithm(run: Run) -> object:
    """Its name; runs of earlier versions hold it without a section."""
    algorithm = run.config.get("algorithm")
    return algorithm.get("name") if isinstance(algorithm, Mapping) else algorithm


def _names(runs: Sequence[Run]) -> list[str]:
    """Directory names; with their parents where two are alike, and a number where that fails."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.path.resolve().parent.name}/{run.name}" for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, start=1)]
    return names
