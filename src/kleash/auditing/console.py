"""An audit on the terminal: a bar while it runs, a table at the end."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kleash.auditing.confidence_intervals import ConfidenceInterval
from kleash.auditing.result import Audit, Part
from kleash.auditing.runner import Progress as Step
from kleash.report.html_template import visible
from kleash.report.svg_chart import format_number, format_with_error

WRITERS = {
    "policy": "written by the policy",
    "reference": "written by the reference",
    "text": "given texts",
    "given": "given responses",
}
_TITLES = {
    "kl": "KL(policy ‖ reference)",
    "reverse_kl": "KL(reference ‖ policy)",
    "k1": "estimated by k1",
    "k3": "estimated by k3",
    "entropy": "entropy of the policy",
    "ref_entropy": "entropy of the reference",
    "nll": "negative log-likelihood, policy",
    "ref_nll": "negative log-likelihood, reference",
    "same_top": "top-1 agreement",
}


def titles(part: Part) -> dict[tuple[str, str], str]:
    """Names of a part's measures, by writer and key; an estimate is of the writer's direction."""
    return {
        (part.by, name): f"{_TITLES[part.headline]}, {_TITLES[name]}"
        if name in ("k1", "k3")
        else _TITLES[name]
        for name in part.measures
    }


class AuditDisplay:
    """A bar with the KL so far, its interval and the time left; plain lines off a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}  {task.fields[line]}"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._task: TaskID | None = None
        self._by = ""

    def __enter__(self) -> "AuditDisplay":
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live:
            self._progress.stop()

    def show(self, step: Step) -> None:
        """Show one more batch."""
        line = f"KL {plus_minus(step.headline)}"
        if self._task is None or step.by != self._by:
            self._by = step.by
            self._task = self._progress.add_task(WRITERS[step.by], total=step.total, line=line)
        self._progress.update(self._task, completed=step.done, line=line)
        if not self._live and step.done == step.total:
            self._console.print(f"{WRITERS[step.by]}: {step.done} of {step.total}", markup=False)


def print_audit(console: Console, audit: Audit) -> None:
    """The audit as a table, with what must be known to read it."""
    for part in audit.parts:
        console.print(_table(part))
        console.print(_sentence(part), markup=False)
        console.print()
    if audit.bits_per_byte is not None:
        for name, one in vars(audit.bits_per_byte).items():
            console.print(
                f"{name.replace('_', '-')}: {plus_minus(one)} bits per byte", markup=False
            )
    for sentence in (*audit.notes, *closing(audit)):
        console.print(Text(visible(sentence)))


def closing(audit: Audit) -> list[str]:
    """What the precision and the gate came to."""
    found: list[str] = []
    if (asked := audit.precision) is not None and not asked.reached:
        cost = "" if asked.prompts_needed is None else f"; about {asked.prompts_needed:,} would do"
        half = "unknown" if asked.half_width is None else f"± {format_number(asked.half_width)}"
        seen = audit.parts[0].prompts
        found.append(
            f"± {asked.asked:g} per {asked.per} was not reached with {seen:,} prompts "
            f"({half}){cost}."
        )
    if (gate := audit.gate) is not None:
        said = {
            "above": "above the threshold",
            "below": "below the threshold",
            "undecided": "not told apart from the threshold",
        }[gate.decision]
        found.append(
            f"The KL is {said} of {gate.threshold:g} nats per {gate.per} (exit {gate.exit_code})."
        )
    return found


def plus_minus(one: ConfidenceInterval) -> str:
    """Mean ± half of the 95 % interval."""
    if one.half_width is None:
        return format_number(one.mean)
    return format_with_error(one.mean, one.half_width)


def _table(part: Part) -> Table:
    table = Table(box=None, pad_edge=False, title=WRITERS[part.by], title_justify="left")
    table.add_column("nats, mean ± 95 %")
    table.add_column("per token", justify="right")
    table.add_column("per response", justify="right")
    for name, measure in part.measures.items():
        title = titles(part)[part.by, name]
        per_response = "" if name == "same_top" else plus_minus(measure.per_response)
        cell = plus_minus(measure.per_token)
        style = "bold" if name == part.headline else ""
        table.add_row(title, cell, per_response, style=style)
    for who, one in part.perplexity.items():
        table.add_row(f"perplexity, {who}", f"{one.mean:.4g}", "")
    return table


def _sentence(part: Part) -> str:
    quantiles = ", ".join(
        f"{'max' if name == 'max' else name + ' %'} {format_number(value)}"
        for name, value in part.percentiles.items()
    )
    state = {
        "identical": "identical",
        "not resolvable": f"not resolvable (floor {format_number(part.floor)})",
        "resolved": f"floor {format_number(part.floor)}",
    }[part.verdict]
    unit = "texts" if part.by == "text" else "responses"
    return (
        f"{part.responses:,} {unit} to {part.prompts:,} prompts, {part.tokens:,} tokens; "
        f"per token {quantiles}; {state}"
        if part.by != "text"
        else f"{part.responses:,} {unit}, {part.tokens:,} tokens; per token {quantiles}; {state}"
    )
