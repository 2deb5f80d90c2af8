"""The run directory as every process but the first sees it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from kleash.storage.events import Event
from kleash.storage.samples import Sample


@dataclass(frozen=True)
class SilentRun:
    """A run directory that another process writes: what `RunWriter` would write is left to it."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """See `RunWriter`."""
        return self.path / "checkpoints"

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Nothing."""

    def append_samples(self, samples: Iterable[Sample]) -> None:
        """Nothing."""

    def append_event(self, event: Event) -> None:
        """Nothing."""

    def change_config(
        self,
        settings: Mapping[str, Any],
        changes: Sequence[tuple[str, Any, Any]],
        *,
        after_step: int,
    ) -> None:
        """Nothing."""

    def rewind(self, through_step: int) -> None:
        """Nothing."""

    def update_meta(self, **values: Any) -> None:
        """Nothing."""

    def __enter__(self) -> "SilentRun":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Nothing: the first process says how the run ended."""
