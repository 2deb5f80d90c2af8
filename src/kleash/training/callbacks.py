"""What a run reports while it goes on, and to whom.

A callback is any object with one or more of the methods `on_start`, `on_rollout`, `on_step`,
`on_refusal` and `on_checkpoint`; each is given one frozen event. What a callback raises ends the
run, which can then be resumed from its newest checkpoint.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kleash.config.schema import Config
from kleash.errors import ConfigError
from kleash.storage.events import Event
from kleash.training.components import Components
from kleash.training.responses import JudgedResponses
from kleash.types import ScoredRollout

EVENTS = ("on_start", "on_rollout", "on_step", "on_refusal", "on_checkpoint")
Number = float | int | None


@dataclass(frozen=True)
class StartEvent:
    """The run directory is open; the next step follows."""

    path: Path
    done: int
    """Steps made so far."""
    steps: int
    lines: Sequence[str]
    """The objective, warnings and where β starts, in sentences."""


@dataclass(frozen=True, eq=False)
class RolloutEvent:
    """Responses were written, judged and scored; nothing is learnt from them yet."""

    step: int
    config: Config
    components: Components
    """The models as they were when they wrote and scored; not to be changed."""
    judged: JudgedResponses
    scored: ScoredRollout
    folder: Path
    """The run directory."""
    append_event: Callable[[Event], None]
    """Adds an event to the run's log."""
    sampler_floor: float | None = None
    """KL of sampler against trainer in the run's first rollout, in nats per token; None: this is
    that rollout, or nothing is known of it."""
    written_ahead: bool = False
    """Whether the weights before the last update wrote it (`rollout.ahead`)."""


@dataclass(frozen=True)
class StepEvent:
    """A step was made; its numbers are in the run directory."""

    step: int
    metrics: Mapping[str, Number]


@dataclass(frozen=True)
class RefusalEvent:
    """A step was refused and undone; the run stops or goes back to a checkpoint."""

    step: int
    reason: str
    response: int | None
    token: int | None
    evidence: Path
    """Where the batch is kept."""


@dataclass(frozen=True)
class CheckpointEvent:
    """A checkpoint was written."""

    step: int
    path: Path


class Callbacks:
    """Several callbacks as one, in their order."""

    def __init__(self, callbacks: Sequence[object]) -> None:
        """Check that each has a method that will be called.

        Raises:
            ConfigError: naming one that has none.
        """
        for callback in callbacks:
            if not any(callable(getattr(callback, name, None)) for name in EVENTS):
                raise ConfigError(
                    f"expected a callback with one of the methods {', '.join(EVENTS)}, got "
                    f"{type(callback).__name__}, which has none of them"
                )
        self._callbacks = list(callbacks)

    def _call(self, name: str, event: Any) -> None:
        for callback in self._callbacks:
            method = getattr(callback, name, None)
            if method is not None:
                method(event)

    def on_start(self, event: StartEvent) -> None:
        """Before the first step of this process."""
        self._call("on_start", event)

    def on_rollout(self, event: RolloutEvent) -> None:
        """Before anything is learnt from a rollout."""
        self._call("on_rollout", event)

    def on_step(self, event: StepEvent) -> None:
        """After a step."""
        self._call("on_step", event)

    def on_refusal(self, event: RefusalEvent) -> None:
        """After a refused step was undone."""
        self._call("on_refusal", event)

    def on_checkpoint(self, event: CheckpointEvent) -> None:
        """After a checkpoint was written."""
        self._call("on_checkpoint", event)
