"""The result of a check: what was measured and expected; if they differ, cause and remedy."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "fail", "skipped"]


@dataclass(frozen=True)
class Finding:
    """The answer of one check."""

    name: str
    """`module.check`, such as `logprobs.left_padding`."""
    verdict: Verdict
    measured: str
    expected: str
    cause: str = ""
    """One sentence: what is wrong, or why the check was skipped."""
    remedy: str = ""
    """One sentence: what to change."""

    def __post_init__(self) -> None:
        """A verdict that is not `ok` owes its reader a cause, and bad news a remedy."""
        assert self.verdict == "ok" or self.cause, self
        assert self.verdict in ("ok", "skipped") or self.remedy, self


@dataclass(frozen=True)
class Check:
    """A check: its name and what it expects. Each method gives its finding."""

    name: str
    expected: str

    def ok(self, measured: str) -> Finding:
        """As expected."""
        return Finding(self.name, "ok", measured, self.expected)

    def warn(self, measured: str, cause: str, remedy: str) -> Finding:
        """Not as expected; a run goes on with it."""
        return Finding(self.name, "warn", measured, self.expected, cause, remedy)

    def fail(self, measured: str, cause: str, remedy: str) -> Finding:
        """Not as expected; a run would be in vain."""
        return Finding(self.name, "fail", measured, self.expected, cause, remedy)

    def skip(self, why: str) -> Finding:
        """Not applicable here."""
        return skipped(self.name, why)


@dataclass(frozen=True)
class Report:
    """All findings of one examination."""

    findings: tuple[Finding, ...]
    seconds: float

    @property
    def fails(self) -> tuple[Finding, ...]:
        """The findings that stop a run."""
        return tuple(finding for finding in self.findings if finding.verdict == "fail")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that a run goes on with."""
        return tuple(finding for finding in self.findings if finding.verdict == "warn")

    def as_json(self) -> dict[str, object]:
        """Plain values, for `--json` and the run's record."""
        return {
            "verdict": "fail" if self.fails else "warn" if self.warnings else "ok",
            "seconds": round(self.seconds, 3),
            "findings": [asdict(finding) for finding in self.findings],
        }


def skipped(name: str, why: str) -> Finding:
    """A check that does not apply to this run."""
    return Finding(name, "skipped", measured="–", expected="–", cause=why)


def some(items: Sequence[str], *, most: int = 3) -> str:
    """The first few of a list, and how many more there are.

    Example:
        >>> some(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"
