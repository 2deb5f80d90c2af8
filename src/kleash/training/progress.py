"""The live display of a training run: one line that always says where the leash is.

On a terminal the line is redrawn in place; elsewhere (a log file, a pipe) one plain line is
printed for each step, so that a log can be read and searched.
"""

import contextlib
from collections.abc import Callable, Generator, Mapping
from types import TracebackType

from rich.console import Console
from rich.markup import escape

from kleash.report.terminal import ProgressLine, print_log_line


class TrainingDisplay:
    """Show steps, score, KL against its target, β, speed and the time left."""

    def __init__(
        self,
        steps: int,
        *,
        title: str,
        target_kl: float | None,
        done: int = 0,
        console: Console | None = None,
    ) -> None:
        self._console = console or Console(highlight=False)
        self._steps = steps
        self._title = title
        self._target = "" if target_kl is None else f" of {target_kl:g}"
        self._progress = ProgressLine(self._console, done=done)
        self._progress.show(title, done=done, total=steps)

    def __enter__(self) -> "TrainingDisplay":
        self._progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.__exit__(kind, error, traceback)

    def say(self, sentence: str) -> None:
        """Print a sentence above the line."""
        print_log_line(self._console, sentence)

    def show(self, metrics: Mapping[str, float | int | None]) -> None:
        """Show the numbers of a finished step."""
        line = (
            f"score {_number(metrics['objective/scores'], '+.3f')}  "
            f"KL {_number(metrics['objective/kl_ref'], '.2f')}"
            f"±{_number(metrics['objective/kl_ref_se'], '.2f')}{self._target} nats  "
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
