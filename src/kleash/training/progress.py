"""The live display of a training run: one line that always says where the leash is.

On a terminal the line is redrawn in place; elsewhere (a log file, a pipe) one plain line is
printed for each step, so that a log can be read and searched.
"""

import contextlib
from collections.abc import Callable, Generator
from types import TracebackType

from rich.console import Console
from rich.markup import escape

from kleash.report.terminal import ProgressLine, print_log_line
from kleash.training.callbacks import RefusalEvent, StartEvent, StepEvent


class TrainingDisplay:
    """Show steps, score, KL against its target, β, speed and the time left."""

    target_kl: float | None = None
    """The budget in nats per response, shown beside the KL."""

    def __init__(self, steps: int, *, title: str, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._steps = steps
        self._title = title
        self._progress = ProgressLine(self._console)

    def __enter__(self) -> "TrainingDisplay":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.__exit__(kind, error, traceback)

    def on_start(self, event: StartEvent) -> None:
        """Print the objective, the warnings and where β starts."""
        self._progress = ProgressLine(self._console, done=event.done)
        self._progress.show(self._title, done=event.done, total=self._steps)
        self._progress.__enter__()
        for line in event.lines:
            print_log_line(self._console, line)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        print_log_line(self._console, line)

    def on_refusal(self, event: RefusalEvent) -> None:
        """Print that a step was refused, and why."""
        print_log_line(self._console, f"step {event.step} refused: {event.reason}")

    def on_step(self, event: StepEvent) -> None:
        """Show the numbers of a finished step."""
        metrics = event.metrics
        target = "" if self.target_kl is None else f" of {self.target_kl:g}"
        line = (
            f"score {_number(metrics['objective/scores'], '+.3f')}  "
            f"KL {_number(metrics['objective/kl_ref'], '.2f')}"
            f"±{_number(metrics['objective/kl_ref_se'], '.2f')}{target} nats  "
            f"β {_number(metrics['objective/beta'], '.4g')}  "
            f"{_number(metrics['tokens_per_second'], '.0f')} tok/s"
        )
        step = int(metrics["step"] or 0)
        self._progress.show(self._title, done=step, total=self._steps, line=line)
        if not self._progress.live:
            print_log_line(self._console, f"{self._title} {step}/{self._steps}  {line}")


@contextlib.contextmanager
def saying(title: str, console: Console) -> Generator[Callable[[str], None]]:
    """A line that says what is being done and is gone afterwards; no line but on a terminal.

    Args:
        title: stands before what is said.
        console: where the line is; a pipe or a file stays as it is.
    """
    if not console.is_terminal:
        yield lambda doing: None
        return
    with console.status(escape(title)) as status:
        yield lambda doing: status.update(escape(f"{title}: {doing} …"))


def _number(value: float | int | None, style: str) -> str:
    return "–" if value is None else format(value, style)
