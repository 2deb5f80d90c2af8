"""Ten steps, a new process's worth of forgetting, ten more: the run of twenty, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tensors import everything
from small_run import numbers
from training_hooks import interrupt_after
from training_material import material as material  # the fixture
from training_material import settings

from kleash.config.schema import Config
from kleash.errors import RunError
from kleash.storage.atomic_directories import save_tensors
from kleash.training.assembly import assemble
from kleash.training.loop import train
from kleash.training.state import latest_checkpoint

LORA = {"rank": 2, "targets": ["q_proj"]}
REFERENCES: dict[str, dict[str, Any]] = {
    "copy": {"reference": {"kind": "copy"}},
    "copy beside an adapter": {"reference": {"kind": "copy"}, "policy": {"lora": LORA}},
    "adapter_off": {"reference": {"kind": "adapter_off"}, "policy": {"lora": LORA}},
    "cpu_offload": {"reference": {"kind": "cpu_offload"}},
    "cached": {"reference": {"kind": "cached", "cache": "CACHE"}},
    "moved": {"leash": {"reanchor_every": 4}},
}
CONTROLLERS: dict[str, dict[str, Any]] = {
    "fixed": {"beta": 0.1},
    "budget": {"beta": None, "target_kl": 0.5},
    "ziegler_paper": {"beta": None, "target_kl": 0.5, "controller": "ziegler_paper"},
    "ziegler_code": {
        "beta": None,
        "target_kl": 0.5,
        "controller": "ziegler_code",
        "initial_beta": 0.2,
        "horizon": 100,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("reference", REFERENCES)
def test_twenty_steps_are_ten_and_ten(
    material: Path, tmp_path: Path, reference: str, controller: str
) -> None:
    def made(name: str) -> Config:
        changes = dict(REFERENCES[reference])
        changes["leash"] = {**CONTROLLERS[controller], **changes.get("leash", {})}
        if reference == "cached":
            changes["reference"] = {"kind": "cached", "cache": str(tmp_path / f"{name} cache")}
        return settings(
            material,
            tmp_path / name,
            **changes,
            rollout={"prompts_per_step": 4, "max_new_tokens": 3},
            algorithm={"epochs": 1},
            logging={"checkpoint_every": 10, "samples_per_step": 0},
            heldout={"every": 0},
            steps=20,
        )

    whole = train(made("whole"))
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 10)
        with pytest.raises(KeyboardInterrupt):
            train(made("halves"))
    train(made("halves"))
    assert numbers(tmp_path / "halves") == numbers(whole)
    ours, theirs = everything(tmp_path / "halves"), everything(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_replacement_that_was_killed_half_way(material: Path, tmp_path: Path) -> None:
    """The old checkpoint had just been put aside: it is the newest again."""
    parent = tmp_path / "checkpoints"
    (parent / ".step-000002.replaced").mkdir(parents=True)
    (parent / ".step-000002.77.tmp").mkdir()
    (parent / "step-000001").mkdir()
    assert latest_checkpoint(parent) == parent / "step-000002"
    assert [path.name for path in parent.iterdir() if path.name.startswith(".")] == []
    (parent / ".step-000002.replaced").mkdir()  # and here the new one was already in its place
    assert latest_checkpoint(parent) == parent / "step-000002"
    assert not (parent / ".step-000002.replaced").exists()
    assert latest_checkpoint(tmp_path / "none") is None


def test_a_checkpoint_of_another_model(material: Path, tmp_path: Path) -> None:
    components = assemble(settings(material, tmp_path / "run"))
    path = tmp_path / "policy"
    path.mkdir()
    save_tensors(path / "model.safetensors", {"stranger": torch.zeros(2)})
    with pytest.raises(RunError, match=r"holds another model: .*unknown \['stranger'\]"):
        components.policy.restore(path)
