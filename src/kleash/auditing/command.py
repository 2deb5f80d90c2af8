"""What `kleash audit` does with its arguments: one audit or several, and where results go."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from kleash.auditing.bits_per_byte import audit_bytes
from kleash.auditing.console import AuditDisplay, print_audit
from kleash.auditing.drift_curve import Drift, drift_of, write_drift
from kleash.auditing.html import write_audit, write_page
from kleash.auditing.inputs import Source
from kleash.auditing.model_pair import (
    ModelPair,
    comparable_pair,
    open_checkpoint,
    open_reference,
)
from kleash.auditing.options import AuditOptions
from kleash.auditing.partial_results import NAME
from kleash.auditing.result import Audit
from kleash.auditing.runner import audit_pair
from kleash.models.policy import Policy


@dataclass(frozen=True)
class AuditCommand:
    """A parsed command line."""

    policies: Sequence[str]
    reference: str
    source: Source
    options: AuditOptions
    as_json: bool = False
    bytewise: bool = False


def run_command(command: AuditCommand) -> int:
    """Audit each policy, print and write the results.

    Returns:
        The exit code of the gate, or 0.

    Raises:
        KleashError: as the audit does.
    """
    console = Console(highlight=False, stderr=command.as_json)
    outputs = _outputs(command)
    options = command.options
    dtype, device = options.dtype, options.device or "cpu"
    audits: list[Audit] = []
    theirs: Policy | None = None
    for path, output in zip(command.policies, outputs, strict=True):
        ours = open_checkpoint(path, dtype=dtype, device=device)
        if theirs is None:
            theirs = open_reference(command.reference, (path, ours), dtype, device)
        audits.append(_audit_one(command, (ours, theirs), output, console))
    drift = None
    if len(audits) > 1:
        drift = drift_of(audits)
        if command.options.output is not None:
            write_drift(drift, audits, command.options.output)
    _print_results(command, audits, drift, console)
    codes = [audit.gate.exit_code for audit in audits if audit.gate is not None]
    # Above (3) outranks undecided (4), which outranks below (0).
    return max(codes, key=(0, 4, 3).index, default=0)


def _audit_one(
    command: AuditCommand, models: tuple[Policy, Policy], output: Path | None, console: Console
) -> Audit:
    options = replace(command.options, output=output)
    ours, theirs = models
    if command.bytewise:
        found = audit_bytes(ModelPair(ours, theirs), command.source, options)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
    else:
        pair = comparable_pair(ours, theirs)
        try:
            with AuditDisplay(console) as display:
                found = audit_pair(pair, command.source, options, display.show)
        except KeyboardInterrupt:
            _print_stopped(output, console)
            raise
    if output is not None:
        write_audit(found, output)
    return found


def _print_stopped(output: Path | None, console: Console) -> None:
    """After Ctrl-C: what was found so far is there, and can be gone on with."""
    if output is not None and (output / "audit.json").is_file():
        write_page(
            Audit.from_json((output / "audit.json").read_text("utf-8")), output / "audit.html"
        )
        console.print(f"{output} holds what was found so far; --resume goes on", markup=False)


def _print_results(
    command: AuditCommand, audits: Sequence[Audit], drift: Drift | None, console: Console
) -> None:
    if command.as_json:
        print(audits[0].to_json() if drift is None else drift.to_json())
        return
    for audit in audits:
        console.print(
            f"[bold]{_plain(audit.policy.path)}[/] against {_plain(audit.reference.path)}"
        )
        print_audit(console, audit)
    if command.options.output is not None:
        name = "audit" if drift is None else "drift"
        console.print(f"{command.options.output / name}.html, {name}.json and {NAME}", markup=False)


def _outputs(command: AuditCommand) -> list[Path | None]:
    """Where each audit goes: the directory itself, or one below it for each of several."""
    if command.options.output is None or len(command.policies) == 1:
        return [command.options.output] * len(command.policies)
    names = [Path(policy).name or "policy" for policy in command.policies]
    return [command.options.output / f"{n}-{name}" for n, name in enumerate(names, start=1)]


def _plain(text: str) -> str:
    return text.replace("[", "\\[")
