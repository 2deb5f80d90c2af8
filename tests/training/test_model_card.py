"""The card beside a checkpoint speaks of the very policy that lies there."""

from pathlib import Path

import yaml
from training_material import material as material
from training_material import settings

from kleash.storage.run_directory import read_run
from kleash.training.loop import train
from kleash.training.state import latest_checkpoint


def card_of(path: Path) -> str:
    checkpoint = latest_checkpoint(path / "checkpoints")
    assert checkpoint is not None
    return (checkpoint / "policy" / "README.md").read_text(encoding="utf-8")


def test_a_checkpoint_says_how_far_its_policy_is(material: Path, tmp_path: Path) -> None:
    config = settings(material, tmp_path / "run", steps=2)
    card = card_of(train(config))
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == config.policy.path
    last = read_run(tmp_path / "run").metrics[-1]
    assert f"{last['heldout/kl_ref']:.3g}" in card
    assert f"{last['objective/kl_ref']:.6g}" not in card


def test_an_adapter_has_a_card_of_its_own(material: Path, tmp_path: Path) -> None:
    lora = {"lora": {"rank": 2, "targets": ["q_proj"]}}
    card = card_of(train(settings(material, tmp_path / "run", steps=1, policy=lora)))
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    assert "More Information Needed" not in card
