"""An audit on the terminal: a bar while it runs, a table at the end."""

from types import TracebackType

from rich.console import Console
from rich.text import Text

from kleash.auditing.confidence_intervals import ConfidenceInterval
from kleash.auditing.result import Audit, Part
from kleash.auditing.runner import Progress as Step
from kleash.report.html_template import visible
from kleash.report.svg_chart import format_number, format_with_error
from kleash.report.terminal import ProgressLine, TableColumn, print_log_line, print_table

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
        self._progress = ProgressLine(console)

    def __enter__(self) -> "AuditDisplay":
        self._progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.__exit__(kind, error, traceback)

    def show(self, step: Step) -> None:
        """Show one more batch."""
        title = WRITERS[step.by]
        line = f"KL {plus_minus(step.headline)}"
        self._progress.show(title, done=step.done, total=step.total, line=line)
        if not self._progress.live and step.done == step.total:
            print_log_line(self._console, f"{title}: {step.done} of {step.total}")


def print_audit(console: Console, audit: Audit) -> None:
    """The audit as a table, with what must be known to read it."""
    for part in audit.parts:
        _print_measures(console, part)
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
            "undecided": "not distinguished from the threshold",
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


def _print_measures(console: Console, part: Part) -> None:
    columns = (
        TableColumn("nats, mean ± 95 %", "name"),
        TableColumn("per token"),
        TableColumn("per response"),
    )
    rows: list[tuple[str, str, str]] = []
    for name, measure in part.measures.items():
        per_response = "" if name == "same_top" else plus_minus(measure.per_response)
        rows.append((titles(part)[part.by, name], plus_minus(measure.per_token), per_response))
    styles = ["bold" if name == part.headline else "" for name in part.measures]
    for who, one in part.perplexity.items():
        rows.append((f"perplexity, {who}", f"{one.mean:.4g}", ""))
        styles.append("")
    console.print(WRITERS[part.by], style="italic")
    print_table(console, columns, rows, styles=styles)


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
