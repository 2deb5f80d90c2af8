"""What the demo prints of each part of its story, in few lines."""

from dataclasses import dataclass

from rich.console import Console

from kleash.auditing.console import plus_minus
from kleash.auditing.result import Audit
from kleash.errors import PreflightError
from kleash.preflight.console import print_report
from kleash.preflight.findings import Report
from kleash.report.html_template import visible
from kleash.report.plan_page import plus_minus as planned
from kleash.report.terminal import TableColumn, print_table
from kleash.storage.plan_file import Frontier
from kleash.storage.run_directory import Run
from kleash.storage.samples import Sample

_SAMPLE_PROMPTS = 2


@dataclass(frozen=True)
class Row:
    """One policy on the held-out prompts."""

    name: str
    proxy: tuple[float, float]
    """Reward-model score, which training sees, and its standard error."""
    gold: tuple[float, float]
    """Score of the rubric, which is never trained on, and its standard error."""
    kl: tuple[float, float]
    """Exact KL to the reference in nats per response, and its standard error."""
    distinct_2: float


def print_checks(console: Console, report: Report) -> None:
    """One line if all is well; every check if not.

    Raises:
        PreflightError: a check failed.
    """
    if report.fails or report.warnings:
        print_report(report, console)
    if report.fails:
        raise PreflightError(f"{report.fails[0].name}: {report.fails[0].cause}")
    verdicts = [finding.verdict for finding in report.findings]
    floor = next(f.measured for f in report.findings if f.name == "logprobs.floor")
    console.print(
        f"{verdicts.count('ok')} checks ok, {verdicts.count('skipped')} not applicable; "
        f"rounding alone makes a KL of {floor.split(';')[0]}",
        markup=False,
    )


def print_frontier(console: Console, frontier: Frontier) -> None:
    """A row for each β: what the best policy there is would spend and gain."""
    headers = ("β", "KL*, nats", "E*[score]", "effective samples", "known")
    rows = [
        (
            f"{row.beta.value:g}",
            planned(row.kl),
            planned(row.score),
            f"{row.effective_samples:.1f}",
            "yes" if row.known else "no",
        )
        for row in frontier.rows
    ]
    styles = ["" if row.known else "dim" for row in frontier.rows]
    print_table(console, [TableColumn(header) for header in headers], rows, styles=styles)
    prompts, responses = frontier.scores.shape
    console.print(f"± 95 %, {prompts} prompts × {responses} replies of the reference", style="dim")


def print_reached(
    console: Console, frontier: Frontier, reached: Row, *, beta: float | None
) -> None:
    """What a run came to beside what was planned for its β."""
    (row,) = (row for row in frontier.rows if row.beta.value == beta)
    share = frontier.efficiency(score=reached.proxy[0], kl=reached.kl[0])
    beside = "" if share is None else f", {share:.0%} of the gain that so many nats can buy"
    console.print(
        f"planned for β = {beta:g}: {row.kl.value:.2f} nats for a score of "
        f"{row.score.value:+.2f}; reached: {reached.kl[0]:.2f} nats, "
        f"{reached.proxy[0]:+.2f}{beside}",
        markup=False,
    )


def print_audit(console: Console, found: Audit) -> None:
    """How far, and the words that moved most."""
    kl, part = found.kl, found.parts[0]
    moved = [
        f"“{visible(found.token_texts[str(word)]).strip()}” {sign}{mass:.3f}"
        for words, sign in ((part.gained[:2], "+"), (part.lost[:1], "−"))
        for word, mass in words
    ]
    console.print(
        f"audited: {plus_minus(kl.per_response)} nats per response, {plus_minus(kl.per_token)} per "
        f"token (± 95 %, {part.responses} replies); moved most, per token: {', '.join(moved)}",
        markup=False,
    )


def row_of(name: str, run: Run, *, first: bool = False) -> Row:
    """The first or the last held-out evaluation of a run."""
    evaluations = [line for line in run.metrics if "heldout/gold" in line]
    line = evaluations[0 if first else -1]

    def pair(key: str) -> tuple[float, float]:
        return float(line[key] or 0), float(line[f"{key}_se"] or 0)

    return Row(
        name=name,
        proxy=pair("heldout/scores"),
        gold=pair("heldout/gold"),
        kl=pair("heldout/kl_ref"),
        distinct_2=float(line["heldout/distinct_2"] or 0),
    )


def print_rows(console: Console, rows: tuple[Row, ...]) -> None:
    """The policies beside each other."""
    headers = ("proxy score", "gold score", "KL, nats/response", "distinct-2")
    columns = [TableColumn("policy", "name"), *map(TableColumn, headers)]
    cells: list[tuple[str, ...]] = []
    for row in rows:
        scores = [f"{mean:+.2f} ± {error:.2f}" for mean, error in (row.proxy, row.gold)]
        distance, error = row.kl
        cells.append((row.name, *scores, f"{distance:.2f} ± {error:.2f}", f"{row.distinct_2:.2f}"))
    print_table(console, columns, cells)
    console.print("± one standard error, clustered by prompt", style="dim")


def print_samples(console: Console, leashed: Run, free: Run) -> None:
    """What the policies answer to the same questions."""

    def replies(run: Run, *, last: bool) -> dict[str, Sample]:
        heldout = [sample for sample in run.samples if sample.kind == "heldout"]
        step = max(s.step for s in heldout) if last else min(s.step for s in heldout)
        return {sample.prompt: sample for sample in heldout if sample.step == step}

    replies_of = {
        "reference": replies(leashed, last=False),
        "on the leash": replies(leashed, last=True),
        "off the leash": replies(free, last=True),
    }
    for prompt in list(replies_of["reference"])[:_SAMPLE_PROMPTS]:
        console.print(f"\n{prompt}", style="bold", markup=False)
        for name, samples in replies_of.items():
            sample = samples[prompt]
            gold = "" if sample.gold is None else f"  (gold {sample.gold:+.1f})"
            console.print(
                f"  {name:<14}{sample.response.strip()}{gold}", markup=False, soft_wrap=True
            )
    console.print()
