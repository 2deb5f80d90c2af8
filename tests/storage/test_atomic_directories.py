"""Checkpoints are whole or absent, and damage is named."""

import json
from pathlib import Path

import pytest
import torch

from kleash.errors import RunError
from kleash.storage.atomic_directories import (
    list_checkpoints,
    load_tensors,
    save_tensors,
    verify_checkpoint,
    write_checkpoint,
)


def fill(directory: Path) -> None:
    (directory / "inner").mkdir()
    save_tensors(directory / "inner" / "weights.safetensors", {"w": torch.arange(6.0).view(2, 3)})
    (directory / "state.json").write_text(json.dumps({"step": 3}))


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 3, fill, keep=2)
    verify_checkpoint(path)
    assert path.name == "step-000003"
    assert torch.equal(
        load_tensors(path / "inner" / "weights.safetensors")["w"], torch.arange(6.0).view(2, 3)
    )


def test_the_oldest_go_and_the_same_step_is_replaced(tmp_path: Path) -> None:
    for step in (1, 2, 10, 10):
        write_checkpoint(tmp_path, step, fill, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002", "step-000010"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_older_checkpoint_and_nothing_else(
    tmp_path: Path, failure: BaseException
) -> None:
    write_checkpoint(tmp_path, 1, fill, keep=1)

    def break_off(directory: Path) -> None:
        fill(directory)
        raise failure

    expected = RunError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_checkpoint(tmp_path, 2, break_off, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    verify_checkpoint(tmp_path / "step-000001")


def test_leftovers_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    (tmp_path / ".step-000001.999.tmp").mkdir()
    write_checkpoint(tmp_path, 2, fill, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_every_kind_of_damage_is_named(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1, fill, keep=1)
    weights = path / "inner" / "weights.safetensors"
    whole = weights.read_bytes()

    weights.write_bytes(whole[:-1])
    with pytest.raises(RunError, match=r"inner/weights.safetensors should have \d+ bytes, got"):
        verify_checkpoint(path)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RunError, match=r"bytes of inner/weights.safetensors changed"):
        verify_checkpoint(path)
    weights.unlink()
    with pytest.raises(RunError, match=r"weights.safetensors is missing"):
        verify_checkpoint(path)
    (path / "manifest.json").unlink()
    with pytest.raises(RunError, match="not a whole checkpoint"):
        verify_checkpoint(path)


def test_the_best_is_spared(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step, fill, keep=1, spare=(2,))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002", "step-000004"]


def test_a_failed_replacement_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rename fails after the old directory was put aside: it comes back."""
    path = write_checkpoint(tmp_path, 1, fill, keep=1)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(RunError, match=r"cannot write the checkpoint .*Input/output error"):
            write_checkpoint(tmp_path, 1, fill, keep=1)
    verify_checkpoint(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000001"]
