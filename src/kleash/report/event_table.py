"""The events of runs: as marks on the curves of the leash, and as rows of a table."""

from collections.abc import Sequence
from typing import Any, cast

from kleash.report.svg_chart import Mark
from kleash.storage.events import Event, EventKind
from kleash.storage.run_directory import Run

WORDS: dict[EventKind, str] = {
    "refused": "refused",
    "stopped": "stopped",
    "rolled_back": "rolled back",
    "restarted": "begun again",
    "reanchored": "anchor moved",
    "alarm": "alarm",
}
_OF_A_RESPONSE = ("step", "kl", "score", "prompt", "response")
SHOWN = 60
"""Rows of the table; report.json holds all."""


def event_marks(runs: Sequence[Run], names: Sequence[str]) -> list[Mark]:
    """A mark for each event; of several runs in the run's colour and with its name."""
    several = len(runs) > 1
    return [
        Mark(
            x=float(event.step),
            kind=WORDS[event.kind],
            text=f"{name}: {event.sentence}" if several else event.sentence,
            style=event.kind,
            colour=colour if several else None,
        )
        for colour, (run, name) in enumerate(zip(runs, names, strict=True))
        for event in run.events
    ]


def event_rows(runs: Sequence[Run], names: Sequence[str]) -> list[dict[str, Any]]:
    """What the table says: run, step, kind, sentence; run by run, in the order of happening."""
    return [
        {
            "run": run_number,
            "name": name,
            "step": event.step,
            "style": event.kind,
            "kind": WORDS[event.kind],
            "sentence": event.sentence,
            "worst": _worst_responses(event),
        }
        for run_number, (run, name) in enumerate(zip(runs, names, strict=True))
        for event in run.events
    ]


def _worst_responses(event: Event) -> list[dict[str, str]]:
    """The responses that stand beside an event, as texts; what is none of them is left out."""
    given: object = event.details.get("worst")
    entries = cast("list[object]", given) if isinstance(given, list) else []
    return [
        {key: _text(cast("dict[str, object]", entry).get(key)) for key in _OF_A_RESPONSE}
        for entry in entries
        if isinstance(entry, dict)
    ]


def _text(value: object) -> str:
    if value is None:
        return "—"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
