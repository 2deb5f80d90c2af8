"""The card beside a checkpoint speaks of the very policy that lies there."""

import os
import signal
from pathlib import Path

import pytest
import small_run
import yaml
from training_hooks import before_each_step
from training_material import material as material
from training_material import settings

from kleash.storage.run_directory import read_run
from kleash.training.interruption import RunInterrupted
from kleash.training.loop import train
from kleash.training.session import Session
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


def test_without_heldout_prompts_the_training_kl_stands_in_and_says_so(
    material: Path, tmp_path: Path
) -> None:
    prompts = {"train": str(material / "prompts.jsonl"), "heldout": None}
    config = small_run.settings(material, tmp_path / "run", steps=3, prompts=prompts)
    card = card_of(train(config))
    last = read_run(tmp_path / "run").metrics[-1]
    kl, error = last["objective/kl_ref"], last["objective/kl_ref_se"]
    assert kl is not None and error is not None
    assert (
        f"{kl:.4g} nats per response, 95 % interval {kl - 1.96 * error:.4g} to "
        f"{kl + 1.96 * error:.4g}, 8 responses to training prompts, by the policy before the "
        "updates of step 3"
    ) in card
    assert f"{last['objective/scores']:+.4g}" in card


def test_a_run_that_was_stopped_has_a_card_too(material: Path, tmp_path: Path) -> None:
    logging = {"checkpoint_every": 0, "checkpoint_minutes": 0}

    def stop(session: Session) -> None:
        if session.state.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        before_each_step(patch, stop)
        with pytest.raises(RunInterrupted):
            train(settings(material, tmp_path / "run", logging=logging, heldout={"every": 0}))
    assert "by the policy before the updates of step" in card_of(tmp_path / "run")


def test_an_adapter_has_a_card_of_its_own(material: Path, tmp_path: Path) -> None:
    lora = {"lora": {"rank": 2, "targets": ["q_proj"]}}
    card = card_of(train(settings(material, tmp_path / "run", steps=1, policy=lora)))
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    assert "More Information Needed" not in card
