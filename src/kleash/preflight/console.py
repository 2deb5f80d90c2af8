"""The findings on a screen: a table of all of them, then each fault in words."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kleash.preflight.findings import Report, Verdict

_COLOURS: dict[Verdict, str] = {"ok": "green", "warn": "yellow", "fail": "red", "skipped": "dim"}


def print_report(report: Report, console: Console) -> None:
    """Print every finding; those that are not `ok` with cause and remedy underneath."""
    table = Table(box=None, pad_edge=False)
    for header in ("check", "verdict", "measured"):
        table.add_column(header, overflow="fold")
    for finding in report.findings:
        colour = _COLOURS[finding.verdict]
        shown = finding.cause if finding.verdict == "skipped" else finding.measured
        table.add_row(finding.name, f"[{colour}]{finding.verdict}[/{colour}]", escape(shown))
    console.print(table)
    for finding in (*report.fails, *report.warnings):
        colour = _COLOURS[finding.verdict]
        console.print(f"\n[{colour}]{finding.verdict}[/{colour}] {finding.name}")
        words = Table.grid(padding=(0, 2))
        for label in ("measured", "expected", "cause", "remedy"):
            words.add_row(f"  {label}", escape(str(getattr(finding, label))))
        console.print(words)
    count = len(report.findings)
    console.print(
        f"\n{count} checks in {report.seconds:.1f} s: {len(report.fails)} failed, "
        f"{len(report.warnings)} warned."
    )
