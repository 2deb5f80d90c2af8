"""A plan as a table, as sentences, and as one small page: score against √KL.

The page has no script and asks for nothing. Left out: the numbers under the pointer; the table
holds them.
"""

from collections.abc import Callable, Sequence

from kleash.kl.planning.frontier import Interval, NoRow, PlanRow
from kleash.kl.planning.initial_beta import Start
from kleash.report import svg_chart
from kleash.report.html_template import render_page
from kleash.report.metric_charts import ROOT_KL, frontier_points
from kleash.report.svg_chart import Chart, Point, Series, draw, format_number, format_with_error
from kleash.storage.plan_file import Frontier

HEADERS = ("β", "KL*, nats", "E*[score]", "objective", "eff. n", "best of", "its score", "known")


def table_rows(
    frontier: Frontier, interval: Callable[[Interval], str]
) -> list[tuple[PlanRow | NoRow, tuple[str, ...]]]:
    """Each row of a plan with its cells, under `HEADERS`; what is not known carries its reason."""
    rows = [*frontier.rows, *frontier.budgets]
    return [(row, _cells(row, frontier.mean_score, interval)) for row in rows]


def bracketed(interval: Interval) -> str:
    """Value and both bounds."""
    value, low, high = (format_number(x) for x in (interval.value, interval.low, interval.high))
    return value if low == high else f"{value} [{low}, {high}]"


def plus_minus(interval: Interval) -> str:
    """Value and the farther bound, for narrow tables."""
    value, low, high = interval.value, interval.low, interval.high
    return (
        format_number(value)
        if low == high
        else format_with_error(value, max(high - value, value - low))
    )


def start_sentence(asked: str, start: Start) -> str:
    """Where β starts for what was asked, and why: the words of a run's log.

    Args:
        asked: such as "leash.target_kl 5".
        start: β and its source.

    Example:
        >>> start_sentence("leash.target_kl 5", Start(0.18114, "plan"))
        "β starts at 0.1811: the plan's for leash.target_kl 5"
    """
    match start.source:
        case "given":
            how = f"from leash.initial_beta, for {asked}"
        case "plan":
            how = f"the plan's for {asked}"
        case "edge":
            how = (
                f"carried on from the last β that the plan knows, for {asked}, because "
                f"{start.reason}"
            )
        case _:
            how = f"from the spread of the reference's scores, for {asked}, because {start.reason}"
    return f"β starts at {start.beta:.4g}: {how}"


def frontier_chart(frontier: Frontier) -> Chart | None:
    """Score against √KL, with best-of-n beside it; None if no row has a number."""
    rows = [row for row in (*frontier.rows, *frontier.budgets) if isinstance(row, PlanRow)]
    known = frontier_points(row for row in rows if row.known)
    unknown = frontier_points(row for row in rows if not row.known)
    if not known and not unknown:
        return None
    mean = frontier.mean_score
    best = [
        Point(point.x, mean + row.best_of_n_gain)
        for row in rows
        for point in frontier_points([row])
        if row.best_of_n is not None and row.best_of_n_gain is not None and row.best_of_n >= 2
    ]
    series = [
        Series("the optimum ± s.e.", [Point(0.0, mean), *known], "line", 0),
        Series("not known", [*known[-1:], *unknown], "faint", 0),
        Series("best of n", sorted(best, key=lambda point: point.x), "dots", 1),
    ]
    prompts, responses = frontier.scores.shape
    return Chart(
        title="Score against √KL",
        unit="score",
        sample=f"{prompts} prompts × {responses} responses",
        key="",
        series=[one for one in series if one.points],
        x_title=ROOT_KL,
    )


def plan_page(frontier: Frontier, *, title: str, sentences: Sequence[str]) -> str:
    """The page of a plan."""
    chart = frontier_chart(frontier)
    return render_page(
        "plan.html.j2",
        None,
        {},
        title=title,
        plan=frontier,
        sentences=sentences,
        charts=[] if chart is None else [draw(chart)],
        geometry=svg_chart,
        headers=HEADERS,
        rows=[cells for _, cells in table_rows(frontier, bracketed)],
    )


def _cells(
    row: PlanRow | NoRow, mean_score: float, interval: Callable[[Interval], str]
) -> tuple[str, ...]:
    if isinstance(row, NoRow):
        return ("—", f"{row.budget:g}", *["—"] * 5, f"no: {row.reason}")
    n, gain = row.best_of_n, row.best_of_n_gain
    return (
        interval(row.beta),
        interval(row.kl),
        interval(row.score),
        format_number(row.objective.value),
        f"{row.effective_samples:.1f}",
        "—" if n is None else f"{n:.1f}",
        "—" if gain is None else format_number(mean_score + gain),
        "yes" if row.known else f"no: {row.reason}",
    )
