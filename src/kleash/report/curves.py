"""Which charts a report shows: from the metrics of one or several runs to charts."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kleash.beta.planning import PlanRow
from kleash.frontier import PLAN_FILE, holds_plan, read_frontier
from kleash.report.charts import Band, Chart, Point, Series, thin
from kleash.report.glossary import define
from kleash.runs import Metrics, Run

_BAND = 0.2
"""KL within 20 % of its target counts as on budget."""
_NORMAL_95 = 1.96
"""Standard errors from the middle of a 95 % interval to its end."""


@dataclass(frozen=True)
class _Plot:
    """A chart over steps, by the keys it draws; the first is the main one."""

    keys: tuple[str, ...]
    title: str
    errors: tuple[str, ...] = ()
    faint: tuple[str, ...] = ()
    include: tuple[float, ...] = ()
    target: str | None = None
    averaged: bool = True
    """Whether a point is a mean over responses, so that it has an n."""


_GROUPS: tuple[tuple[str, tuple[_Plot, ...]], ...] = (
    (
        "The leash",
        (
            _Plot(
                ("objective/kl_ref",),
                "KL to the reference",
                errors=("objective/kl_ref_se",),
                faint=("objective/kl_ref_k1",),
                include=(0.0,),
                target="objective/target_kl",
            ),
            _Plot(("objective/beta",), "β, the price of a nat", include=(0.0,), averaged=False),
        ),
    ),
    (
        "What it earned",
        (
            _Plot(("objective/scores",), "Score", errors=("objective/scores_se",)),
            _Plot(("objective/rlhf_reward",), "Objective: score − β·KL"),
            _Plot(
                ("heldout/scores", "heldout/objective/scores"),
                "Score, held-out prompts",
                errors=("heldout/scores_se", "heldout/objective/scores_se"),
            ),
            _Plot(("heldout/gold",), "Gold score, held-out prompts", errors=("heldout/gold_se",)),
        ),
    ),
    (
        "How it writes",
        (
            _Plot(("objective/entropy",), "Entropy", include=(0.0,)),
            _Plot(("rollout/length",), "Response length", include=(0.0,)),
            _Plot(("rollout/eos_fraction",), "Ended by itself", include=(0.0, 1.0)),
            _Plot(("rollout/distinct_2",), "Distinct-2", include=(0.0, 1.0)),
        ),
    ),
    (
        "The updates",
        (
            _Plot(("policy/approx_kl",), "KL of the update", include=(0.0,)),
            _Plot(("policy/clipfrac",), "Clipped fraction", include=(0.0,)),
            _Plot(("loss/value",), "Value loss", include=(0.0,)),
            _Plot(("value/explained_variance",), "Explained variance", include=(0.0, 1.0)),
            _Plot(("optim/grad_norm",), "Gradient norm", include=(0.0,), averaged=False),
            _Plot(("tokens_per_second",), "Throughput", include=(0.0,), averaged=False),
        ),
    ),
)


def chart_groups(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, list[Chart]]]:
    """The charts of a report, in groups with a heading; what has no numbers has no chart.

    Args:
        runs: the runs, overlaid in each chart.
        names: what each is called.
    """
    groups: list[tuple[str, list[Chart]]] = []
    for heading, plots in _GROUPS:
        charts = [chart for plot in plots if (chart := _chart(plot, runs, names)) is not None]
        if heading == "The leash" and (frontier := _score_over_root_kl(runs, names)) is not None:
            charts.append(frontier)
        if heading == "What it earned":
            charts += _rewards(runs, names)
        if charts:
            groups.append((heading, charts))
    return groups


def _chart(plot: _Plot, runs: Sequence[Run], names: Sequence[str]) -> Chart | None:
    series: list[Series] = []
    bands: list[Band] = []
    shown = plot.keys[0]
    for colour, (run, name) in enumerate(zip(runs, names, strict=True)):
        key = next((key for key in plot.keys if _points(run.metrics, key)), None)
        if key is None:
            continue
        shown = key
        error = next((e for e in plot.errors if _points(run.metrics, e)), None)
        label = name if len(runs) > 1 else _label(plot)
        series.append(Series(label, thin(_points(run.metrics, key, error)), "line", colour))
        for faint in plot.faint:
            points = _points(run.metrics, faint)
            if points:
                sampled = f"{name}, sampled k1" if len(runs) > 1 else "sampled k1"
                series.append(Series(sampled, thin(points), "faint", colour))
        if plot.target and (target := _finite(_points(run.metrics, plot.target))):
            bands.append(Band(f"target ± {_BAND:.0%}", thin(target), _BAND))
    if len({tuple(band.points) for band in bands}) == 1:
        bands = bands[:1]
    sample = _sample(runs, shown) if plot.averaged else ""
    return _finish(plot.title, shown, sample, series, bands=bands, include=plot.include)


def _rewards(runs: Sequence[Run], names: Sequence[str]) -> list[Chart]:
    """The raw score where normalisation changed it, and each reward where several are summed."""
    keys = sorted({key for run in runs for line in run.metrics for key in line if _is_reward(key)})
    plots: list[_Plot] = []
    if any(_normalised(line) for run in runs for line in run.metrics):
        plots.append(_Plot(("reward/total",), "Score, before normalisation"))
    if len(keys) > 1:
        plots += [_Plot((key,), f"Reward: {key.removeprefix('reward/')}") for key in keys]
    return [chart for plot in plots if (chart := _chart(plot, runs, names)) is not None]


def _is_reward(key: str) -> bool:
    return key.startswith("reward/") and key != "reward/total"


def _normalised(line: Metrics) -> bool:
    total, score = line.get("reward/total"), line.get("objective/scores")
    return (
        total is not None
        and score is not None
        and not math.isclose(total, score, rel_tol=1e-5, abs_tol=1e-6)
    )


def _score_over_root_kl(runs: Sequence[Run], names: Sequence[str]) -> Chart | None:
    """Score against √KL: straight where the reward model is good for it, bent where it ends."""
    series: list[Series] = []
    for colour, (run, name) in enumerate(zip(runs, names, strict=True)):
        points = [
            Point(math.sqrt(kl), score)
            for line in run.metrics
            if (kl := line.get("objective/kl_ref")) is not None
            and (score := line.get("objective/scores")) is not None
            and 0 <= kl < math.inf
        ]
        label = name if len(runs) > 1 else "a step; later ones are stronger"
        if points:
            series.append(Series(label, thin(points), "dots", colour))
            series += _planned(run, name if len(runs) > 1 else "", colour)
    title = "Score against √KL"
    key = "objective/scores"
    return _finish(title, key, _sample(runs, key), series, x_title="√KL, √nats")


def _planned(run: Run, name: str, colour: int) -> list[Series]:
    """What the run's plan held possible, as far as it knew."""
    if not holds_plan(run.path):
        return []
    points = frontier_points([r for r in read_frontier(run.path / PLAN_FILE).rows if r.known])
    label = f"{name}, plan" if name else "the optimum, as planned"
    return [Series(label, points, "line", colour)] if points else []


def frontier_points(rows: Iterable[PlanRow]) -> list[Point]:
    """Score over √KL of a plan's rows, each with the standard error that its interval implies."""
    return sorted(
        (
            Point(
                math.sqrt(max(0.0, row.kl.value)),
                row.score.value,
                (row.score.high - row.score.low) / (2 * _NORMAL_95),
            )
            for row in rows
        ),
        key=lambda point: point.x,
    )


def _finish(
    title: str,
    key: str,
    sample: str,
    series: Sequence[Series],
    *,
    bands: Sequence[Band] = (),
    include: Sequence[float] = (),
    x_title: str = "step",
) -> Chart | None:
    if not any(math.isfinite(point.y) for one in series for point in one.points):
        return None
    metric = define(key)
    return Chart(
        title=title,
        unit=metric.unit if metric else "",
        sample=sample,
        key=metric.key if metric else "",
        series=series,
        bands=bands,
        x_title=x_title,
        include=include,
    )


def _label(plot: _Plot) -> str:
    if plot.faint:
        return "exact ± s.e."
    return "mean ± s.e." if plot.errors else "mean"


def _sample(runs: Sequence[Run], key: str) -> str:
    """What a point of the chart is a mean of, as far as the run says."""
    if key.startswith("heldout/"):
        counts = [n for run in runs for n in _column(run.metrics, "heldout/responses")]
        n = sorted({int(count) for count in counts})
    else:
        n = sorted({count for run in runs if (count := responses_per_step(run.metrics))})
    if not n:
        return ""
    many = f"{n[0]:,}" if len(n) == 1 else f"{n[0]:,} to {n[-1]:,}"
    return f"n = {many} responses a point"


def responses_per_step(metrics: Sequence[Metrics]) -> int | None:
    """How many responses a step has, from the running count; the most common gain."""
    counts = [(0.0, 0.0)]
    for line in metrics:
        step, episodes = line["step"], line.get("episodes")
        if step and episodes is not None and math.isfinite(episodes):
            counts.append((float(step), float(episodes)))
    gains = [
        (after - before) / (step - earlier)
        for (earlier, before), (step, after) in pairwise(counts)
        if step > earlier
    ]
    return round(sorted(gains)[len(gains) // 2]) if gains else None


def _column(metrics: Sequence[Metrics], key: str) -> list[float]:
    values = [line.get(key) for line in metrics]
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def _points(metrics: Sequence[Metrics], key: str, error: str | None = None) -> list[Point]:
    points: list[Point] = []
    for line in metrics:
        x, y = line["step"], line.get(key)
        if x is not None and y is not None:
            e = line.get(error) if error else None
            points.append(Point(float(x), float(y), None if e is None else float(e)))
    return points


def _finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point.y)]
