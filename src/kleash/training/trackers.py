"""Metrics to TensorBoard, Weights & Biases or trackio, through accelerate.

What they write to the disk lies in the run directory; a `TRACKIO_DIR` that is set already stays.
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator

from kleash.errors import ConfigError
from kleash.training.callbacks import StepEvent


class Trackers:
    """Send each step's numbers to the trackers asked for; to none, at no cost, if none are."""

    def __init__(self, names: Sequence[str], directory: Path) -> None:
        """Check that the trackers are installed.

        Raises:
            ConfigError: naming the one that is not.
        """
        for name in names:
            if find_spec(name) is None:
                raise ConfigError(
                    f"the tracker {name!r} is not installed: pip install 'kleash[{name}]', or "
                    "leave it out of logging.trackers"
                )
        self._names: list[Any] = list(names)
        self._directory = directory
        self._accelerator: Accelerator | None = None

    def __enter__(self) -> "Trackers":
        if self._names:
            run = self._directory.resolve()
            # TensorBoard's files go into project_dir/name, which is the run directory itself.
            self._accelerator = Accelerator(log_with=self._names, project_dir=str(run.parent))
            if "trackio" in self._names:
                # Read when trackio is imported; it has no argument for it.
                os.environ.setdefault("TRACKIO_DIR", str(run / "trackio"))
            options = {"wandb": {"dir": str(run)}} if "wandb" in self._names else {}
            self._accelerator.init_trackers(run.name, init_kwargs=options)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._accelerator is not None:
            self._accelerator.end_training()

    def on_step(self, event: StepEvent) -> None:
        """Send the numbers of a step; those that do not exist are left out."""
        if self._accelerator is not None:
            numbers = {key: value for key, value in event.metrics.items() if value is not None}
            self._accelerator.log(numbers, step=event.step)
