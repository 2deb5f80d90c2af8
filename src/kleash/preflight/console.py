"""The findings on a screen: a table of all of them, then each fault in words."""

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from kleash.preflight.findings import Report, Verdict
from kleash.report.terminal import TableColumn, print_table

_COLOURS: dict[Verdict, str] = {"ok": "green", "warn": "yellow", "fail": "red", "skipped": "dim"}


def print_report(report: Report, console: Console) -> None:
    """Print every finding; those that are not `ok` with cause and remedy underneath."""
    columns = (
        TableColumn("check", "name"),
        TableColumn("verdict", "name"),
        TableColumn("measured", "words"),
    )
    rows = [
        (
            finding.name,
            Text(finding.verdict, style=_COLOURS[finding.verdict]),
            finding.cause if finding.verdict == "skipped" else finding.measured,
        )
        for finding in report.findings
    ]
    print_table(console, columns, rows)
    for finding in (*report.fails, *report.warnings):
        colour = _COLOURS[finding.verdict]
        console.print(f"\n[{colour}]{finding.verdict}[/{colour}] {finding.name}")
        for label in ("measured", "expected", "cause", "remedy"):
            text = Text(f"{label:<10}") + Text(str(getattr(finding, label)))
            console.print(Padding(text, (0, 0, 0, 2)))
    count = len(report.findings)
    console.print(
        f"\n{count} checks in {report.seconds:.1f} s: {len(report.fails)} failed, "
        f"{len(report.warnings)} warned."
    )
