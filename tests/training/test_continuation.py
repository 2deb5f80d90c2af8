"""What a run directory can be continued with, and what an output may be."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from small_run import numbers
from training_hooks import interrupt_after
from training_material import mark_unfinished, settings
from training_material import material as material  # the fixture

from kleash.config.loading import dump_config
from kleash.errors import RunError
from kleash.storage.run_directory import FORMAT, read_run
from kleash.training.loop import train


def test_a_finished_run_is_extended(material: Path, tmp_path: Path) -> None:
    whole = train(settings(material, tmp_path / "whole"))
    part = train(settings(material, tmp_path / "part", steps=2))
    longer = settings(material, tmp_path / "part", steps=4, logging={"keep": 5})
    train(longer)
    assert numbers(part) == numbers(whole)
    run = read_run(part)
    assert run.status == "finished"
    assert run.config == yaml.safe_load(dump_config(longer))
    assert run.meta["changes"] == [
        {"after_step": 2, "key": "logging.keep", "old": 2, "new": 5},
        {"after_step": 2, "key": "steps", "old": 2, "new": 4},
    ]


def test_a_finished_run_says_that_it_is_finished(material: Path, tmp_path: Path) -> None:
    config = settings(material, tmp_path / "run", steps=2)
    train(config)
    for same in (config, settings(material, tmp_path / "run", steps=2, logging={"keep": 1})):
        with pytest.raises(
            RunError, match="holds this run, finished after step 2 of 2: give more `steps`"
        ):
            train(same)
    with pytest.raises(RunError, match="`steps: 1` is fewer than the 2 that the run has made"):
        train(settings(material, tmp_path / "run", steps=1))
    assert read_run(tmp_path / "run").config == yaml.safe_load(dump_config(config))


def test_what_would_change_the_past_is_listed(material: Path, tmp_path: Path) -> None:
    train(settings(material, tmp_path / "run", steps=1))
    other = settings(
        material,
        tmp_path / "run",
        steps=2,
        seed=3,
        leash={"beta": 0.2},
        rollout={"max_new_tokens": 5},
    )
    with pytest.raises(RunError) as caught:
        train(other)
    assert (
        "of another configuration (leash.beta: 0.1, now 0.2; rollout.max_new_tokens: 6, now 5; "
        "seed: 0, now 3)"
    ) in str(caught.value)


@pytest.mark.parametrize("inside", ["model.safetensors", ".git/config", "config.yaml", "notes.txt"])
def test_an_output_that_is_something_else_is_refused(
    material: Path, tmp_path: Path, inside: str
) -> None:
    folder = tmp_path / "taken"
    (folder / inside).parent.mkdir(parents=True)
    (folder / inside).write_text("kept")
    with pytest.raises(RunError, match="is a folder of something else"):
        train(settings(material, folder))
    assert [path for path in folder.rglob("*") if path.is_file()] == [folder / inside]
    with pytest.raises(RunError, match="is a file"):
        train(settings(material, folder / inside))


def test_an_empty_folder_is_a_free_output(material: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert read_run(train(settings(material, tmp_path / "empty", steps=1))).status == "finished"


@pytest.mark.parametrize("version", ["this", "an earlier one"])
def test_a_run_whose_weights_are_lost_is_not_begun_again_over_its_numbers(
    material: Path, tmp_path: Path, version: str
) -> None:
    config = settings(material, tmp_path / "run", steps=2)
    train(config)
    mark_unfinished(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    if version != "this":
        meta = json.loads((tmp_path / "run" / "run.json").read_text())
        del meta["saved_step"]
        (tmp_path / "run" / "run.json").write_text(json.dumps(meta))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="made 2 steps and its checkpoints are gone"):
        train(config)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_run_that_made_no_step_begins_anew(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(settings(material, tmp_path / "whole"))
    config = settings(material, tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 0)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert numbers(train(config)) == numbers(whole)


def test_a_run_of_another_format(material: Path, tmp_path: Path) -> None:
    config = settings(material, tmp_path / "run", steps=2)
    train(config)
    file = tmp_path / "run" / "run.json"
    meta = json.loads(file.read_text())
    assert meta["format"] == FORMAT
    mark_unfinished(tmp_path / "run")
    file.write_text(json.dumps({**meta, "status": "running", "format": FORMAT + 1}))
    with pytest.raises(RunError, match=f"format {FORMAT + 1}, which this version .* does not know"):
        train(config)
    # Written before there was a number: it goes on, and has one from then on.
    del meta["format"]
    file.write_text(json.dumps({**meta, "status": "running"}))
    train(config)
    assert json.loads(file.read_text())["format"] == FORMAT


@pytest.mark.parametrize("change", ["without", "with"])
def test_a_checkpoint_of_another_version_names_the_version_to_use(
    material: Path, tmp_path: Path, change: str
) -> None:
    from kleash.storage.atomic_directories import _write_manifest

    config = settings(material, tmp_path / "run", steps=2)
    train(config)
    mark_unfinished(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    state = json.loads((checkpoint / "state.json").read_text())
    if change == "without":
        del state["rollbacks"]
    else:
        state["betas"]["others"]["mood"] = 1.0
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    _write_manifest(checkpoint)
    with pytest.raises(
        RunError, match=r"was written by another version of kleash .* see `versions` in"
    ):
        train(config)


def test_a_run_that_was_moved_goes_on_where_it_lies(material: Path, tmp_path: Path) -> None:
    from kleash.training.continuation import config_of_run

    run = train(settings(material, tmp_path / "old", steps=2))
    shutil.move(run, tmp_path / "new")
    train(config_of_run(tmp_path / "new", {"steps": "3"}))
    assert len(read_run(tmp_path / "new").metrics) == 4
    assert not (tmp_path / "old").exists()


def test_a_resumed_run_says_the_beta_that_is_in_force(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(
        material,
        tmp_path / "run",
        leash={"beta": None, "target_kl": 0.01, "initial_beta": 0.5},
        optimizer={"lr": 1e-2},
        heldout={"every": 0},
    )
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert "β from 0.5, moved" in capsys.readouterr().out
    train(config)
    said = capsys.readouterr().out
    lines = read_run(tmp_path / "run").metrics
    (in_force,) = [line["objective/beta"] for line in lines if line["step"] == 3]
    assert in_force is not None and in_force != 0.5
    assert f"β {in_force:.4g} after step 2, moved to hold 0.01" in said
    assert "β from" not in said and "starts at" not in said
