"""Metrics to TensorBoard, Weights & Biases or trackio, through accelerate."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from accelerate import Accelerator

from kleash.errors import ConfigError


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
        self._accelerator = (
            Accelerator(log_with=list(names), project_dir=str(directory)) if names else None
        )
        self._name = directory.name

    def __enter__(self) -> "Trackers":
        if self._accelerator is not None:
            self._accelerator.init_trackers(self._name)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._accelerator is not None:
            self._accelerator.end_training()

    def log(self, metrics: Mapping[str, float | int | None]) -> None:
        """Send the numbers of a step; those that do not exist are left out."""
        if self._accelerator is not None:
            numbers = {key: value for key, value in metrics.items() if value is not None}
            self._accelerator.log(numbers, step=int(metrics["step"] or 0))
