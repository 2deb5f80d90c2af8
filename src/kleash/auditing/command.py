"""What `kleash audit` does with its arguments: one audit, or a row of them, and where they go."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from kleash.auditing.bits_per_byte import audit_bytes
from kleash.auditing.console import AuditDisplay, print_audit
from kleash.auditing.drift_curve import Drift, drift_of, write_drift
from kleash.auditing.html import write_audit, write_page
from kleash.auditing.inputs import Source
from kleash.auditing.model_pair import AuditDtype, ModelPair, check_pair, open_checkpoint
from kleash.auditing.partial_results import NAME
from kleash.auditing.result import Audit
from kleash.auditing.runner import Settings, audit_pair
from kleash.errors import UsageError


@dataclass(frozen=True)
class AuditCommand:
    """A command line, understood."""

    policies: Sequence[str]
    reference: str
    source: Source
    settings: Settings
    dtype: AuditDtype
    device: str
    into: Path | None
    resume: bool
    as_json: bool
    bytewise: bool


def run_command(order: AuditCommand) -> int:
    """Carry it out; the exit code of the gate, or 0.

    Raises:
        UsageError: if the arguments contradict each other.
        KleashError: as the audit does.
    """
    if order.resume and order.into is None:
        raise UsageError("--resume needs the directory to resume: --into DIR")
    if order.bytewise:
        _check_bytewise(order)
    console = Console(highlight=False, stderr=order.as_json)
    folders = _folders(order)
    audits = [_one(order, policy, folders[n], console) for n, policy in enumerate(order.policies)]
    drift = None
    if len(audits) > 1:
        drift = drift_of(audits)
        if order.into is not None:
            write_drift(drift, audits, order.into)
    _say(order, audits, drift, console)
    codes = [audit.gate.exit_code for audit in audits if audit.gate is not None]
    # Above (3) outranks undecided (4), which outranks below (0).
    return max(codes, key=(0, 4, 3).index, default=0)


def _check_bytewise(order: AuditCommand) -> None:
    if order.source.kind != "texts":
        raise UsageError("--bytes compares whole texts: give --texts FILE with it")
    settings = order.settings
    if settings.precision is not None or settings.fail_above is not None or order.resume:
        raise UsageError("--bytes gives no KL: leave out --precision, --fail-above and --resume")


def _one(order: AuditCommand, policy: str, into: Path | None, console: Console) -> Audit:
    pair = ModelPair(
        open_checkpoint(policy, dtype=order.dtype, device=order.device),
        open_checkpoint(order.reference, dtype=order.dtype, device=order.device),
    )
    if order.bytewise:
        found = audit_bytes(pair, order.source, order.settings)
        if into is not None:
            into.mkdir(parents=True, exist_ok=True)
    else:
        check_pair(pair)
        try:
            with AuditDisplay(console) as display:
                found = audit_pair(
                    pair,
                    order.source,
                    order.settings,
                    into=into,
                    resume=order.resume,
                    watch=display.show,
                )
        except KeyboardInterrupt:
            _say_stopped(into, console)
            raise
    if into is not None:
        write_audit(found, into)
    return found


def _say_stopped(into: Path | None, console: Console) -> None:
    """After Ctrl-C: what was found so far is there, and can be gone on with."""
    if into is not None and (into / "audit.json").is_file():
        write_page(Audit.from_json((into / "audit.json").read_text("utf-8")), into / "audit.html")
        console.print(f"{into} holds what was found so far; --resume goes on", markup=False)


def _say(
    order: AuditCommand, audits: Sequence[Audit], drift: Drift | None, console: Console
) -> None:
    if order.as_json:
        print(audits[0].to_json() if drift is None else drift.to_json())
        return
    for audit in audits:
        console.print(
            f"[bold]{_plain(audit.policy.path)}[/] against {_plain(audit.reference.path)}"
        )
        print_audit(console, audit)
    if order.into is not None:
        name = "audit" if drift is None else "drift"
        console.print(f"{order.into / name}.html, {name}.json and {NAME}", markup=False)


def _folders(order: AuditCommand) -> list[Path | None]:
    """Where each audit goes: the directory itself, or one below it for each of several."""
    if order.into is None or len(order.policies) == 1:
        return [order.into] * len(order.policies)
    names = [Path(policy).name or "policy" for policy in order.policies]
    return [order.into / f"{n}-{name}" for n, name in enumerate(names, start=1)]


def _plain(text: str) -> str:
    return text.replace("[", "\\[")
