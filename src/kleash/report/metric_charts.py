"""Which charts a report shows: from the metrics of one or several runs to charts."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from kleash.kl.planning.frontier import PlanRow
from kleash.report.diagnostics.kl_by_position import kl_by_position
from kleash.report.event_table import event_marks
from kleash.report.glossary import define
from kleash.report.svg_chart import Band, Chart, Point, Series, thin
from kleash.storage.plan_file import PLAN_FILE, Frontier, holds_plan, read_frontier
from kleash.storage.run_directory import Metrics, Run

_BAND = 0.2
"""KL within 20 % of its target counts as on budget."""
ROOT_KL = "√KL, √nats"
"""Title of the axis."""
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
    marked: bool = False
    """Whether the run's events stand on it."""


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
                marked=True,
            ),
            _Plot(
                ("objective/beta",),
                "β, the price of a nat",
                include=(0.0,),
                averaged=False,
                marked=True,
            ),
        ),
    ),
    (
        "The teacher",
        (
            _Plot(
                ("distill/reverse_kl",),
                "KL(student‖teacher)",
                errors=("distill/reverse_kl_se",),
                include=(0.0,),
            ),
            _Plot(
                ("distill/forward_kl",),
                "KL(teacher‖student), same states",
                errors=("distill/forward_kl_se",),
                include=(0.0,),
            ),
            _Plot(
                ("heldout/reverse_kl",),
                "KL(student‖teacher), held-out prompts",
                errors=("heldout/reverse_kl_se",),
                include=(0.0,),
            ),
            _Plot(("loss/distill",), "Distillation loss", include=(0.0,)),
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
        if heading == "The leash":
            more = (f(runs, names) for f in (_score_over_root_kl, _gold_over_root_kl, _by_position))
            charts += [chart for chart in more if chart is not None]
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
    marks = event_marks(runs, names) if plot.marked else ()
    chart = _titled_chart(plot.title, shown, sample, series)
    return chart and replace(chart, bands=bands, include=plot.include, marks=marks)


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
        points = over_root_kl(run.metrics, "objective/kl_ref", "objective/scores")
        label = name if len(runs) > 1 else "a step; later ones are stronger"
        if points:
            series.append(Series(label, thin(points), "dots", colour))
            series += _planned(run, name if len(runs) > 1 else "", colour)
    title = "Score against √KL"
    key = "objective/scores"
    return _titled_chart(title, key, _sample(runs, key), series, x_title=ROOT_KL)


def _gold_over_root_kl(runs: Sequence[Run], names: Sequence[str]) -> Chart | None:
    """The gold score, which is never trained on, against √KL; a fall is over-optimisation."""
    series: list[Series] = []
    key = "heldout/gold"
    for colour, (run, name) in enumerate(zip(runs, names, strict=True)):
        points = over_root_kl(run.metrics, "heldout/kl_ref", key, error="heldout/gold_se")
        if len(points) > 1:
            label = name if len(runs) > 1 else "an evaluation; later ones are stronger"
            series.append(Series(label, thin(points), "dots", colour))
    return _titled_chart("Gold score against √KL", key, _sample(runs, key), series, x_title=ROOT_KL)


def over_root_kl(
    metrics: Sequence[Metrics], kl_key: str, key: str, *, error: str | None = None
) -> list[Point]:
    """A metric over √KL, in the order of steps; steps without either, or of infinite KL, left out.

    References:
        Gao, Schulman, Hilton, "Scaling Laws for Reward Model Overoptimization", 2022, for the axis:
        along it a proxy and a gold score are simple curves, https://arxiv.org/abs/2210.10760
    """
    return [
        Point(math.sqrt(kl), value, line.get(error) if error else None)
        for line in metrics
        if (kl := line.get(kl_key)) is not None
        and (value := line.get(key)) is not None
        and 0 <= kl < math.inf
    ]


def _by_position(runs: Sequence[Run], names: Sequence[str]) -> Chart | None:
    """KL per token against position, from the responses that were kept last."""
    series: list[Series] = []
    samples: list[str] = []
    for colour, (run, name) in enumerate(zip(runs, names, strict=True)):
        responses = responses_per_step(run.metrics)
        found = None if responses is None else kl_by_position(run.samples, responses)
        if found is None or len(found.starts) < 2:
            continue
        points = [
            Point(float(start), one.mean, one.standard_error)
            for start, one in zip(found.starts, found.kl, strict=True)
        ]
        series.append(Series(name if len(runs) > 1 else "mean ± s.e.", points, "line", colour))
        first, last = found.steps
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        samples.append(f"{found.responses} kept responses of {steps}")
    key = "samples/kl_by_position"
    sample = " and ".join(dict.fromkeys(samples))
    if len(samples) > len(set(samples)):
        sample += " each"
    title = "position in the response, tokens"
    chart = _titled_chart("KL by position", key, sample, series, x_title=title)
    return chart and replace(chart, include=(0.0,))


def _planned(run: Run, name: str, colour: int) -> list[Series]:
    """What the run's plan held possible, as far as it knew."""
    if not holds_plan(run.path):
        return []
    points = known_frontier(read_frontier(run.path / PLAN_FILE))
    label = f"{name}, plan" if name else "the optimum, as planned"
    return [Series(label, points, "line", colour)] if points else []


def known_frontier(frontier: Frontier) -> list[Point]:
    """Score over √KL as far as a plan knows it, from the reference on; empty if it knows no row."""
    points = frontier_points(row for row in frontier.rows if row.known)
    return [Point(0.0, frontier.mean_score), *points] if points else []


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


def _titled_chart(
    title: str, key: str, sample: str, series: Sequence[Series], *, x_title: str = "step"
) -> Chart | None:
    """A chart with the unit and definition of its metric; None if it would show no number."""
    if not any(math.isfinite(point.y) for one in series for point in one.points):
        return None
    metric = define(key)
    return Chart(
        title=title,
        unit=metric.unit if metric else "",
        sample=sample,
        key=metric.key if metric else "",
        series=series,
        x_title=x_title,
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
