"""Tables and progress at any width: every value whole, no line longer than the terminal."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from kleash.report.terminal import ProgressLine, TableColumn, print_log_line, print_table

COLUMNS = [
    TableColumn("name", "name"),
    *(TableColumn(title) for title in ("first", "second value", "third", "fourth")),
    TableColumn("why", "words"),
]
ROWS = [
    ("a", "1,234.5 ± 0.1", "−0.422 ± 0.031", "1e-6", "7", "words that go on for a whole line"),
    ("longer name", "—", "12,345,678.90 ± 1.23", "[0.1, 0.2]", "", "short"),
]


def printed(width: int, rows: list[tuple[str, ...]] = ROWS, **more: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    print_table(console, COLUMNS, rows, **more)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("repeated", [1, 2])
@pytest.mark.parametrize("width", [16, 20, 30, 45, 60, 80, 120, 200])
def test_every_value_is_whole_and_no_line_too_long(width: int, repeated: int) -> None:
    lines = printed(width, repeated=repeated)
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    assert "…" not in text
    for row in ROWS:
        # Where a value is longer than a line, it goes on in the next.
        assert all(cell in text or width < 24 for cell in row[:-1])
    assert {"words", "that", "whole", "line"} <= set(text.split())


def test_a_table_that_fits_is_one_block() -> None:
    lines = printed(120)
    assert len(lines) == 3 and lines[0].split()[0] == "name"
    assert lines[1].index("1e-6") + 4 == lines[2].index("[0.1, 0.2]") + len("[0.1, 0.2]")


def test_a_split_table_begins_each_block_with_what_its_rows_are_about() -> None:
    lines = printed(60, repeated=2)
    heads = [line for line in lines if line.startswith("name")]
    assert len(heads) > 1 and all("first" in head for head in heads)
    titles = [
        word for head in heads for word in ("second", "third", "fourth", "why") if word in head
    ]
    assert titles == ["second", "third", "fourth", "why"]


def test_a_cell_is_never_read_as_markup() -> None:
    console = Console(file=io.StringIO(), width=40)
    print_table(console, [TableColumn("[bold]x", "name")], [("[red]text[/red]",)])
    assert "[red]text[/red]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_log_line_is_one_line_in_a_pipe_and_wrapped_on_a_terminal() -> None:
    text = "kl " * 60
    piped = Console(file=io.StringIO(), width=80)
    print_log_line(piped, text)
    assert piped.file.getvalue().count("\n") == 1  # type: ignore[attr-defined]
    shown = Console(file=io.StringIO(), width=80, force_terminal=True)
    print_log_line(shown, text)
    assert shown.file.getvalue().count("\n") == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_progress_line_shows_every_number_on_a_terminal(width: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, color_system=None)
    line = "score +0.123  KL 12.34±0.56 of 5 nats  β 0.1234  1234 tok/s"
    with ProgressLine(console) as progress:
        progress.show("train", done=3, total=40, line=line)
    last = stream.getvalue().split("\x1b[2K")[-1]
    shown = " ".join(Text.from_ansi(last).plain.split())
    for number in ("3/40", "+0.123", "12.34±0.56", "0.1234", "1234 tok/s", "left"):
        assert number in shown
    assert ("━" in shown) == (width == 120) and "…" not in shown


def test_the_time_left_is_that_of_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("kleash.report.terminal.time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    with ProgressLine(console, done=10) as progress:
        progress.show("one", done=10, total=100)
        clock[0] += 30
        progress.show("one", done=13, total=100)  # 10 s each, 87 to go
        assert "14:30 left" in stream.getvalue()
        progress.show("two", done=0, total=10)
        clock[0] += 3600
        progress.show("two", done=5, total=10)
        assert "1:00:00 left" in stream.getvalue()


def test_nothing_is_drawn_in_a_pipe() -> None:
    console = Console(file=io.StringIO())
    with ProgressLine(console) as progress:
        progress.show("train", done=1, total=2)
    assert not progress.live and console.file.getvalue() == ""  # type: ignore[attr-defined]
