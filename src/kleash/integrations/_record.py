"""A kleash run directory beside another trainer's own output, so that `kleash report` opens it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kleash.storage.events import EventKind, new_event
from kleash.storage.run_directory import RunWriter, Status, holds_run
from kleash.storage.samples import Sample

DIRECTORY = "kleash"
"""Where a run directory lies in a trainer's output if nothing else was said."""


class TrainerRecord:
    """The run directory of a trainer; on all processes but the first it writes nothing."""

    def __init__(self, writer: RunWriter | None) -> None:
        self._writer = writer
        self._open = writer is not None

    @classmethod
    def begin(
        cls,
        path: Path,
        *,
        settings: Mapping[str, Any],
        meta: Mapping[str, Any],
        after_step: int,
        writes: bool,
    ) -> "TrainerRecord":
        """Begin a run, or go on with the one that the trainer resumes.

        Args:
            path: the run directory.
            settings: what stands in its config.yaml.
            meta: what identifies the run.
            after_step: the step that training goes on after; 0 begins.
            writes: whether this process is the one that writes.

        Raises:
            RunError: if a new run finds one in its place, or the directory cannot be used.
        """
        if not writes:
            return cls(None)
        if after_step > 0 and holds_run(path):
            return cls(RunWriter.reopen(path, through_step=after_step))
        return cls(RunWriter.create(path, settings=settings, meta=meta))

    def step(self, metrics: Mapping[str, Any], samples: Sequence[Sample] = ()) -> None:
        """Append the numbers of one step and the responses kept of it."""
        if self._writer is not None:
            self._writer.append_metrics(metrics)
            self._writer.append_samples(samples)

    def event(self, step: int, kind: EventKind, sentence: str, **details: Any) -> None:
        """Append what happened beside the steps."""
        if self._writer is not None:
            self._writer.append_event(new_event(step, kind, sentence, **details))

    def close(self, status: Status, message: str | None = None) -> None:
        """TrainerRecord how the run ended; what is said first stays."""
        if self._writer is not None and self._open:
            self._writer.close(status, message)
            self._open = False
