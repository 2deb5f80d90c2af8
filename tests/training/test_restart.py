"""A run that was killed before its first checkpoint begins again, and comes to the same.

The oracle is the uninterrupted run: lines, responses and every bit of the weights.
"""

from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import small_run
import tiny_models
import torch
from ranks import Ranks
from small_run import numbers, save_material, two_words, weights
from training_hooks import interrupt_after

from kleash.config.schema import Config
from kleash.errors import RunError
from kleash.storage.run_directory import holds_run, read_run
from kleash.training.loop import train

LAYER: dict[str, Any] = {
    "leash": {"beta": None, "target_kl": 0.3},
    "plan": {"prompts": 4, "responses": 8},
    "rollout": {"prompts_per_step": 4, "max_new_tokens": 6},
    "logging": {"checkpoint_every": 2, "samples_per_step": 2},
    "steps": 3,
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    return save_material(folder, prompts=two_words(range(8)), heldout=two_words(range(9, 12)))


@pytest.fixture(scope="module")
def ranks() -> Generator[Ranks]:
    started = Ranks()
    yield started
    started.close()


@pytest.fixture(scope="module")
def whole(material: Path, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The uninterrupted run, by one process and by two."""
    folder = tmp_path_factory.mktemp("whole")
    return [
        ranks.train(settings(material, folder / str(size)), size=size, checked=True)
        for size in (1, 2)
    ]


def settings(material: Path, output: Path, **changes: Any) -> Config:
    return small_run.settings(material, output, LAYER, **changes)


def require_identical(ours: Path, theirs: Path) -> None:
    """Lines, responses and every bit of the weights."""
    assert numbers(ours) == numbers(theirs)
    assert [asdict(s) for s in read_run(ours).samples] == [
        asdict(s) for s in read_run(theirs).samples
    ]
    for name, tensor in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("place", "size", "victim", "made"),
    [
        ("making the directory", 1, 0, 0),
        ("before the first line", 2, 1, 0),
        ("after the first line", 1, 0, 1),
        ("after the first line", 2, 1, 1),
        ("in the first checkpoint", 1, 0, 2),
        ("in the first checkpoint", 2, 0, 2),
    ],
)
def test_a_run_killed_before_its_first_checkpoint_is_the_uninterrupted_one(
    material: Path,
    tmp_path: Path,
    ranks: Ranks,
    whole: list[Path],
    place: str,
    size: int,
    victim: int,
    made: int,
) -> None:
    config = settings(material, tmp_path / "run", distributed={"timeout_s": 30.0})
    fault = {"kind": "killed at", "place": place, "rank": victim}
    ended = ranks.run(config, size=size, checked=True, fault=fault)
    assert ended[victim] is None
    assert holds_run(tmp_path / "run")
    resumed = ranks.train(config, size=size, checked=True)
    require_identical(resumed, whole[size - 1])
    # What the check before the run warned of stays in its record too.
    run = read_run(resumed)
    assert run.status == "finished"
    assert run.meta["warnings"] == read_run(whole[size - 1]).meta["warnings"]
    restarts = [event for event in run.events if event.kind == "restarted"]
    assert [dict(event.details) for event in restarts] == (
        [{"steps": made, "restarts": 1}] if made else []
    )
    assert [event for event in run.events if event not in restarts] == list(
        read_run(whole[size - 1]).events
    )


def test_every_restart_is_said_and_recorded(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = settings(material, tmp_path / "run", logging={"checkpoint_every": 0})
    for _ in range(3):
        with monkeypatch.context() as patch:
            interrupt_after(patch, 2)
            with pytest.raises(KeyboardInterrupt):
                train(config)
    said = "interrupted after step 2 and before its first checkpoint: it begins again"
    assert said in " ".join(capsys.readouterr().out.split())
    events = read_run(tmp_path / "run").events
    assert [(e.kind, e.step, e.details["restarts"]) for e in events] == [
        ("restarted", 0, 1),
        ("restarted", 0, 2),
    ]
    assert all(said in event.sentence for event in events)


@pytest.mark.parametrize("model", ["policy", "reference"])
def test_a_run_does_not_begin_again_with_other_weights(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    for name in ("policy", "reference"):
        tiny_models.save_model(tmp_path / name)
    config = settings(
        material,
        tmp_path / "run",
        policy={"path": str(tmp_path / "policy")},
        reference={"path": str(tmp_path / "reference"), "reference_differs": True},
    )
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    tiny_models.save_model(tmp_path / model, seed=5)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match=f"would begin again with another {model}: expected the"):
        train(config)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
