"""Tables and progress on a terminal of any width: nothing is cut, what does not fit goes below.

A table that is wider than the terminal is printed in blocks of columns, each beginning with the
first columns again; where nothing fits beside those, row by row as `name: value`.
Left out: borders, and colours other than what a caller gives.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.text import Text

_GAP = "  "
_LEAST_TEXT = 28
"""Cells that a column of words needs to be readable; it wraps within what is left for it."""
_BAR = 20


@dataclass(frozen=True)
class TableColumn:
    """One column of a table: numbers to the right and whole, names to the left, words wrapped."""

    title: str
    kind: Literal["number", "name", "words"] = "number"


def print_table(
    console: Console,
    columns: Sequence[TableColumn],
    rows: Sequence[Sequence[str | Text]],
    *,
    styles: Sequence[str] = (),
    repeated: int = 1,
) -> None:
    """Print a table no wider than the console, with every value whole.

    Args:
        console: where to.
        columns: titles and kinds.
        rows: a cell for each column; text is shown as it is, never read as markup.
        styles: of each row; none if empty.
        repeated: how many of the first columns, which say what a row is about, begin each block.
    """
    cells = [[Text(c) if isinstance(c, str) else c for c in row] for row in rows]
    looks = list(styles) or [""] * len(rows)
    widths = [
        max([cell_len(column.title), *(row[place].cell_len for row in cells)])
        for place, column in enumerate(columns)
    ]
    blocks = _blocks(columns, widths, console.width, repeated=repeated)
    if blocks is None:
        for row, look in zip(cells, looks, strict=True):
            for column, cell in zip(columns, row, strict=True):
                console.print(Text(f"{column.title}: ") + cell, style=look, overflow="fold")
        return
    for number, block in enumerate(blocks):
        if number:
            console.print()
        fitted = _fitted(columns, widths, block, console.width)
        _print_row(console, columns, fitted, [Text(column.title) for column in columns], "bold")
        for row, look in zip(cells, looks, strict=True):
            _print_row(console, columns, fitted, row, look)


def _blocks(
    columns: Sequence[TableColumn], widths: Sequence[int], width: int, *, repeated: int
) -> list[list[int]] | None:
    """Places of the columns that stand beside each other; None if not even one fits the first."""
    least = [
        min(width, max(_LEAST_TEXT, cell_len(column.title))) if column.kind == "words" else width
        for column, width in zip(columns, widths, strict=True)
    ]
    begun = sum(least[:repeated]) + len(_GAP) * (repeated - 1)
    blocks, used = [list(range(repeated))], begun
    for place in range(repeated, len(columns)):
        wanted = len(_GAP) + least[place]
        if used + wanted > width and len(blocks[-1]) > repeated:
            blocks.append(list(range(repeated)))
            used = begun
        if used + wanted > width:
            return None
        blocks[-1].append(place)
        used += wanted
    return blocks


def _fitted(
    columns: Sequence[TableColumn], widths: Sequence[int], block: Sequence[int], width: int
) -> dict[int, int]:
    """The width of each column of a block; those of words share what the others leave."""
    wordy = [place for place in block if columns[place].kind == "words"]
    taken = sum(widths[place] for place in block if place not in wordy)
    left = width - taken - len(_GAP) * (len(block) - 1)
    fitted = {place: widths[place] for place in block}
    for number, place in enumerate(wordy):
        fitted[place] = min(widths[place], left // (len(wordy) - number))
        left -= fitted[place]
    return fitted


def _print_row(
    console: Console,
    columns: Sequence[TableColumn],
    widths: dict[int, int],
    row: Sequence[Text],
    style: str,
) -> None:
    wrapped = {
        place: list(row[place].wrap(console, max(1, width), overflow="fold")) or [Text()]
        for place, width in widths.items()
    }
    for number in range(max(map(len, wrapped.values()))):
        line = Text(style=style)
        for place, width in widths.items():
            lines = wrapped[place]
            cell = lines[number] if number < len(lines) else Text()
            cell.rstrip()
            space = " " * (width - cell.cell_len)
            right = columns[place].kind == "number"
            line.append(_GAP if place != next(iter(widths)) else "")
            line.append_text(Text(space) + cell if right else cell + Text(space))
        line.rstrip()
        console.print(line, soft_wrap=True)


def print_log_line(console: Console, text: str) -> None:
    """One line of a log: wrapped on a terminal, whole in a pipe or a file, to be searched there."""
    console.print(text, markup=False, soft_wrap=not console.is_terminal)


class ProgressLine:
    """Where a long task is: `title ━━━── 12/300  numbers  time left`, drawn anew in place.

    On a narrow terminal the bar is left out and the line wraps. Nothing is drawn off a terminal;
    `live` says whether it is.
    """

    def __init__(self, console: Console, *, done: int = 0) -> None:
        self.live = console.is_terminal
        self._console = console
        self._title, self._line = "", ""
        self._done, self._total = done, 0
        self._first, self._began = done, time.monotonic()
        self._live = Live(get_renderable=self._draw, console=console, refresh_per_second=4)

    def __enter__(self) -> "ProgressLine":
        if self.live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.live:
            self._live.stop()

    def show(self, title: str, *, done: int, total: int, line: str = "") -> None:
        """Say how much is done; another title begins another task, whose time is its own."""
        if self._title and title != self._title:
            self._first, self._began = 0, time.monotonic()
        self._title, self._line, self._done, self._total = title, line, done, total
        if self.live:
            self._live.refresh()

    def _draw(self) -> Text:
        full = round(_BAR * self._done / self._total) if self._total else 0
        counted = f"{self._done}/{self._total}"
        parts = [self._title, counted, self._line, self._left()]
        bare = Text(_GAP.join(part for part in parts if part), overflow="fold")
        if not self._total or bare.cell_len + _BAR + len(_GAP) > self._console.width:
            return bare
        bar = Text("━" * full, style="green") + Text("━" * (_BAR - full), style="dim")
        rest = Text(_GAP.join(part for part in parts[1:] if part))
        return Text(self._title + _GAP) + bar + Text(_GAP) + rest

    def _left(self) -> str:
        steps = self._done - self._first
        if steps <= 0 or self._done >= self._total:
            return ""
        each = (time.monotonic() - self._began) / steps
        minutes, seconds = divmod(round(each * (self._total - self._done)), 60)
        hours, minutes = divmod(minutes, 60)
        return (
            f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"
        )
