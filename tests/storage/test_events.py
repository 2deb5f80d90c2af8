"""Events come back as they were, once each, whatever happened to the file."""

from pathlib import Path

import pytest

from kleash.errors import RunError
from kleash.storage.events import Event, append_event, new_event, read_event
from kleash.storage.run_directory import RunWriter, read_run


def writer(path: Path) -> RunWriter:
    return RunWriter.create(path, settings={}, meta={})


def test_what_was_written_is_read(tmp_path: Path) -> None:
    event = new_event(3, "refused", "too far: “∞”", wire="stop_kl", kl=float("inf"), row=None)
    with writer(tmp_path / "run") as run:
        run.append_event(event)
    assert list(read_run(tmp_path / "run").events) == [event]
    assert read_run(tmp_path / "run").events[0].time.startswith("20")


def test_a_run_without_events_has_no_file_of_them(tmp_path: Path) -> None:
    with writer(tmp_path / "run"):
        pass
    assert read_run(tmp_path / "run").events == []
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_a_resumed_run_comes_to_the_same_event_once(tmp_path: Path) -> None:
    first, second = (new_event(step, "refused", "too far") for step in (3, 5))
    with writer(tmp_path / "run") as run:
        run.append_event(first)
    with (tmp_path / "run" / "events.jsonl").open("a") as stream:
        stream.write('{"step": 5, "kind": "refu')  # killed here
    with RunWriter.reopen(tmp_path / "run", through_step=1) as run:
        run.append_event(first)
        run.append_event(second)
    found = read_run(tmp_path / "run")
    assert list(found.events) == [first, second]
    assert found.notes == ()


def test_going_back_drops_metrics_and_no_event(tmp_path: Path) -> None:
    with writer(tmp_path / "run") as run:
        for step in (1, 2, 3):
            run.append_metrics({"step": step})
        run.append_event(new_event(4, "rolled_back", "back to 1"))
        run.rewind(1)
        run.append_metrics({"step": 2})
    found = read_run(tmp_path / "run")
    assert [line["step"] for line in found.metrics] == [1, 2]
    assert len(found.events) == 1


@pytest.mark.parametrize(
    "line",
    [
        {"kind": "refused", "sentence": "", "details": {}},
        {"step": 1, "kind": "exploded", "sentence": "", "details": {}},
        {"step": 1, "kind": "refused", "sentence": 3, "details": {}},
        {"step": 1, "kind": "refused", "sentence": "", "details": []},
    ],
)
def test_what_is_no_event_is_refused(line: dict[str, object]) -> None:
    with pytest.raises(RunError, match="here: expected an event's"):
        read_event("here", line)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot write"):
        append_event(tmp_path / "no" / "run", Event(1, "refused", ""))
