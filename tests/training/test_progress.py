"""The line that says what is being done: on a terminal, and nowhere else."""

import io

from rich.console import Console

from kleash.training.progress import saying


def said(console: Console) -> None:
    with saying("check", console) as say:
        say("loading [models]")


def test_a_terminal_shows_what_is_being_done_and_is_left_clean() -> None:
    stream = io.StringIO()
    said(Console(file=stream, force_terminal=True, width=80))
    assert "check: loading [models] …" in stream.getvalue()
    # The last thing written takes the line away.
    assert stream.getvalue().endswith("\x1b[2K")


def test_nothing_is_said_in_a_pipe_or_to_who_asks_for_json() -> None:
    for console in (Console(file=io.StringIO()), Console(file=io.StringIO(), quiet=True)):
        said(console)
        assert console.file.getvalue() == ""  # type: ignore[attr-defined]
