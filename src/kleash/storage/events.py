"""What happened to a run beside its steps: refusals, rollbacks, restarts, anchors moved, alarms.

One JSON a line. Events are never taken back, also where the steps around them are: a rollback drops
metrics, not the reason for it. A run that was killed and goes over the same steps again comes to
the same events, and each is written once.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast, get_args

from kleash.errors import RunError
from kleash.storage.atomic_files import append_whole, cannot_write, plain, plain_json

FILE = "events.jsonl"

EventKind = Literal["refused", "stopped", "rolled_back", "restarted", "reanchored", "alarm"]


@dataclass(frozen=True)
class Event:
    """One thing that happened."""

    step: int
    """The step it happened in, or after which it happened."""
    kind: EventKind
    sentence: str
    details: Mapping[str, Any] = field(default_factory=dict)
    """Plain values that belong to its kind."""
    time: str = field(default="", compare=False)
    """When it was written, UTC; two events that differ in nothing else are one."""


def append_event(directory: Path, event: Event) -> None:
    """Write an event into a run directory.

    Args:
        directory: the run directory.
        event: what happened, with its time.

    Raises:
        RunError: it cannot be written; nothing of it remains then.
    """
    file = directory / FILE
    try:
        file.touch()
    except OSError as error:
        raise cannot_write(file, error) from error
    append_whole(file, event_line(event))


def event_line(event: Event) -> str:
    """An event as a line of the file."""
    return plain_json(asdict(event)) + "\n"


def read_event(where: str, line: Mapping[str, Any]) -> Event:
    """One line of the file.

    Raises:
        RunError: it is not what an event holds; the message says where.
    """
    step, kind, sentence, details = (line.get(k) for k in ("step", "kind", "sentence", "details"))
    if type(step) is not int or kind not in get_args(EventKind):
        raise RunError(f"{where}: expected an event's step and kind, got {step!r} and {kind!r}")
    if not isinstance(sentence, str) or not isinstance(details, dict):
        raise RunError(f"{where}: expected an event's sentence and details, got {str(line)[:60]!r}")
    details = cast("dict[str, Any]", details)
    return Event(step, cast(EventKind, kind), sentence, details, str(line.get("time", "")))


def new_event(step: int, kind: EventKind, sentence: str, **details: Any) -> Event:
    """An event of now, its details as they will be read back, so that both compare equal.

    Example:
        >>> new_event(3, "refused", "too far", kl=float("inf"), rows=(1, 2)).details
        {'kl': 'Infinity', 'rows': [1, 2]}
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Event(step, kind, sentence, cast("dict[str, Any]", plain(details)), now)
