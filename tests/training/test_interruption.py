"""Ctrl-C and SIGTERM lose nothing: the step is finished, kept, and the run goes on from it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_run import numbers, weights
from training_hooks import before_each_step
from training_material import material as material  # the fixture
from training_material import settings

from kleash.config.loading import dump_config
from kleash.storage.atomic_directories import list_checkpoints
from kleash.storage.run_directory import read_run
from kleash.training import interruption
from kleash.training.interruption import RunInterrupted, StopRequest, catch_signals
from kleash.training.loop import train
from kleash.training.session import Session


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_keeps_it_and_says_how_to_go_on(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    whole = train(settings(material, tmp_path / "whole", logging={"checkpoint_every": 0}))
    config = settings(material, tmp_path / "broken", logging={"checkpoint_every": 0})
    before = signal.getsignal(number)

    def act(session: Session) -> None:
        if session.state.step == 2:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        before_each_step(patch, act)
        with pytest.raises(RunInterrupted) as caught:
            train(config)
    assert signal.getsignal(number) == before
    run = tmp_path / "broken"
    assert str(caught.value) == (
        f"stopped by {number.name} after step 3 of 4; kept in "
        f"{run / 'checkpoints' / 'step-000003'}; go on with: kleash train --resume {run}"
    )
    assert caught.value.exit_code == 128 + number
    assert read_run(run).status == "interrupted"
    assert read_run(run).meta["message"] == str(caught.value)
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-000003"]

    train(config)
    assert numbers(run) == numbers(whole)
    ours, theirs = weights(run), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_signal_before_the_first_step_keeps_the_beginning(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(settings(material, tmp_path / "whole"))
    config = settings(material, tmp_path / "broken")

    class AtStart:
        def on_start(self, event: object) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunInterrupted, match="after step 0 of 4"):
        train(config, callbacks=[AtStart()])
    train(config)
    assert numbers(tmp_path / "broken") == numbers(whole)


def test_a_second_signal_ends_at_once() -> None:
    noted: list[signal.Signals | None] = []
    with pytest.raises(KeyboardInterrupt) as caught, catch_signals() as request:
        os.kill(os.getpid(), signal.SIGINT)
        noted.append(request.signal)
        os.kill(os.getpid(), signal.SIGTERM)
    assert noted == [signal.SIGINT]
    assert not isinstance(caught.value, RunInterrupted)


def test_a_checkpoint_is_kept_once_so_many_minutes_are_at_risk(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logging = {"checkpoint_every": 0, "keep": 9}
    plain = train(settings(material, tmp_path / "plain", logging=logging))
    now = 0.0

    def act(session: Session) -> None:
        nonlocal now
        now += 240.0

    monkeypatch.setattr("kleash.training.session.monotonic", lambda: now)
    before_each_step(monkeypatch, act)
    timed = train(settings(material, tmp_path / "timed", logging=logging, steps=4))
    kept = [path.name for path in list_checkpoints(timed / "checkpoints")]
    assert kept == ["step-000003", "step-000004"]  # after 12 minutes, and the last
    assert numbers(timed) == numbers(plain)
    never = settings(material, tmp_path / "never", logging={**logging, "checkpoint_minutes": 0})
    kept = list_checkpoints(train(never) / "checkpoints")
    assert [path.name for path in kept] == ["step-000004"]


def test_a_process_that_is_stopped_says_so_and_its_exit_code(
    material: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(dump_config(settings(material, run, steps=100_000)))
    process = subprocess.Popen(
        [sys.executable, "-m", "kleash", "train", str(tmp_path / "run.yaml"), "--no-check"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 1):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"no step within a minute: {process.communicate()}")
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143
    assert interruption.NOTICE.format(name="SIGTERM") in errors
    last = errors.splitlines()[-1]
    assert last.startswith("kleash: stopped by SIGTERM after step")
    assert last.endswith(f"kleash train --resume {run}")


def test_nothing_is_caught_outside_the_main_thread() -> None:
    from threading import Thread

    found: list[StopRequest] = []

    def inside() -> None:
        with catch_signals() as request:
            found.append(request)

    thread = Thread(target=inside)
    thread.start()
    thread.join()
    assert found[0].signal is None
