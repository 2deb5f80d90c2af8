"""A refused step leaves no trace: by a copy, by a checkpoint, or because nothing was made yet."""

from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
from small_run import numbers, save_material, two_words

import kleash.training.loop
import kleash.training.recovery
from kleash.config.schema import Config
from kleash.errors import NonFiniteError
from kleash.preflight.checks.resources import undo
from kleash.preflight.probe_batch import QUICK, draw
from kleash.training.assembly import assemble
from kleash.training.components import Components
from kleash.training.loop import train
from kleash.training.snapshot import remember

ONE_UPDATE = {"prompts": {"heldout": None}, "algorithm": {"epochs": 1, "minibatches": 1}}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    return save_material(folder, prompts=two_words(range(6)), heldout=[])


def settings(material: Path, output: Path, **changes: Any) -> Config:
    """A small run with a single update a step, unless a test says otherwise."""
    return small_run.settings(material, output, ONE_UPDATE, **changes)


def poisoned_at(call: int, patch: pytest.MonkeyPatch) -> None:
    """The gradients of one minibatch are infinite."""
    backward, calls = Components.backward_of_minibatch, [0]

    def poison(components: Any, minibatch: Any, **rest: Any) -> Any:
        passed = backward(components, minibatch, **rest)
        calls[0] += 1
        if calls[0] == call:
            next(iter(components.policy.parameters())).grad[0] = float("inf")
        return passed

    patch.setattr(Components, "backward_of_minibatch", poison)


def test_a_single_update_needs_no_copy(material: Path, tmp_path: Path) -> None:
    whole = train(settings(material, tmp_path / "whole"))
    copies: list[bool] = []
    begin_step = kleash.training.loop.begin_step

    def seen(*arguments: Any) -> Any:
        pending = begin_step(*arguments)
        copies.append(pending.undo.weights is not None)
        return pending

    config = settings(material, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kleash.training.loop, "begin_step", seen)
        poisoned_at(3, patch)
        with pytest.raises(NonFiniteError, match=r"step 3 was not made, the run stands at .*00002"):
            train(config)
    assert copies == [False] * 3
    train(config)
    assert numbers(tmp_path / "run") == numbers(whole)


@pytest.mark.parametrize("limit", [0, 1024])
def test_a_large_model_goes_back_to_its_checkpoint(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """The second update of step 4 is refused; a copy has step 3, the checkpoint step 2."""
    wires = {"undo_copy_mib": limit}
    config = settings(material, tmp_path / "run", algorithm={"minibatches": 2}, tripwires=wires)
    stands = "000003" if limit else "000002"
    with monkeypatch.context() as patch:
        poisoned_at(8, patch)
        with pytest.raises(NonFiniteError, match=f"the run stands at .*{stands}"):
            train(config)
    train(config)
    whole = settings(material, tmp_path / "whole", algorithm={"minibatches": 2}, tripwires=wires)
    assert numbers(tmp_path / "run") == numbers(train(whole))


def test_the_memory_of_a_copy_is_used_again(material: Path, tmp_path: Path) -> None:
    components = assemble(settings(material, tmp_path / "run"))
    for parameter in components.policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    first = remember(components.optimizer, weights=True)
    components.optimizer.step()
    second = remember(components.optimizer, weights=True, reuse=first)
    third = remember(components.optimizer, weights=True, reuse=second)
    assert first.weights is not None
    assert third.weights is not None
    for old, new, parameter in zip(
        first.weights, third.weights, components.optimizer.param_groups[0]["params"], strict=False
    ):
        assert old.data_ptr() == new.data_ptr()
        torch.testing.assert_close(new, parameter.detach(), rtol=0, atol=0)
    moments = [m["exp_avg"] for m in third.moments if m]
    assert [m["exp_avg"].data_ptr() for m in second.moments if m] == [m.data_ptr() for m in moments]


@pytest.mark.parametrize(
    ("changes", "limit", "verdict", "measured"),
    [
        ({}, 0, "ok", "one update a step"),
        ({"algorithm": {"epochs": 2}}, 1024, "ok", "a copy of"),
        ({"algorithm": {"epochs": 2}}, 0, "ok", "at most 2 steps"),
        (
            {
                "algorithm": {"epochs": 2},
                "logging": {"checkpoint_every": 0, "checkpoint_minutes": 0},
            },
            0,
            "warn",
            "the beginning",
        ),
    ],
)
def test_the_preflight_says_how_a_step_is_undone(
    material: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    limit: int,
    verdict: str,
    measured: str,
) -> None:
    config = settings(material, tmp_path / "run", tripwires={"undo_copy_mib": limit}, **changes)
    finding = undo(draw(config, assemble(config), QUICK))
    assert finding.verdict == verdict
    assert measured in finding.measured
    if verdict == "warn":
        fixed = settings(
            material, tmp_path / "run", algorithm={"epochs": 2}, tripwires={"undo": "memory"}
        )
        assert undo(draw(fixed, assemble(fixed), QUICK)).verdict == "ok"
