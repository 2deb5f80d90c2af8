"""Where the trackers write: inside the run directory, and nowhere else."""

from pathlib import Path
from typing import Any

import pytest
from training_material import material as material  # the fixture
from training_material import settings

from kleash.training import trackers
from kleash.training.loop import train


def test_tensorboard_writes_into_the_run_itself(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = settings(material, Path("run"), steps=1, logging={"trackers": ["tensorboard"]})
    train(config)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (events,) = tmp_path.rglob("*tfevents*")
    assert events.parent == tmp_path / "run"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_others_are_given_the_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    seen: dict[str, Any] = {}

    class Accelerator:
        def __init__(self, **given: Any) -> None:
            pass

        def init_trackers(self, project: str, init_kwargs: dict[str, dict[str, Any]]) -> None:
            import os

            seen.update(project=project, kwargs=init_kwargs, trackio=os.environ.get("TRACKIO_DIR"))

        def end_training(self) -> None:
            pass

    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    monkeypatch.setattr(trackers, "Accelerator", Accelerator)
    monkeypatch.setenv("TRACKIO_DIR", "")  # so that it is put back afterwards
    monkeypatch.delenv("TRACKIO_DIR")
    run = tmp_path / "first"
    with trackers.Trackers([name], run):
        pass
    assert seen["project"] == "first"
    if name == "wandb":
        assert seen["kwargs"]["wandb"]["dir"] == str(run)
    else:
        assert seen["trackio"] == str(run / "trackio")
