"""verl's plug-ins: beside its own functions where it can be imported, and alone where it cannot."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kleash.errors import ConfigError, RunError
from kleash.integrations.verl import STATE_FILE, BudgetCheckpointCallback, BudgetKLController
from kleash.kl.control.controllers import BudgetBeta, Measurement

ROOT = Path(__file__).parents[2]
VERL = ROOT / ".venv-verl"
"""verl and what it imports (300 MB), in a folder of its own."""


def trainer_with(coefficient: float) -> SimpleNamespace:
    fixed = SimpleNamespace(value=coefficient, update=lambda current_kl, n_steps: None)
    return SimpleNamespace(kl_ctrl_in_reward=fixed)


def config_for(target: float) -> SimpleNamespace:
    return SimpleNamespace(algorithm=SimpleNamespace(kl_ctrl=SimpleNamespace(target_kl=target)))


def test_a_thousand_ragged_batches_give_verls_numbers() -> None:
    if not (VERL / "verl").is_dir():
        reason = f"verl is not in {VERL.name}: `make {VERL.name}` puts it there"
        print(reason)
        pytest.skip(reason)
    path = [str(VERL), str(ROOT / "src"), str(ROOT / "tests" / "support")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "tests/support/verl_differences.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["verl"] == "0.9.1" and found["registered"]
    assert len(found["worst"]) == 18
    assert max(found["worst"].values()) <= 1e-6, found["worst"]
    differ = found["differences"]
    e5 = float(torch.tensor(5.0, dtype=torch.float64).exp())
    assert differ["k3 far from the reference"] == pytest.approx([e5 - 5 - 1, 10.0])
    assert differ["negative advantage, ratio e^5"] == pytest.approx([e5, 3.0])
    assert differ["one response to a prompt"] == pytest.approx(2.0, rel=1e-5)
    assert differ["adaptive after a negative reading"] == pytest.approx(0.098)
    assert found["callback"]["before"] == found["callback"]["after"] != 0.1


def test_the_controller_is_the_budgets() -> None:
    ours, theirs = BudgetBeta(0.05, initial=0.1), BudgetKLController(0.05, initial=0.1)
    state = ours.init()
    for kl in (0.01, 0.2, -0.01, 0.1):
        theirs.update(current_kl=kl, n_steps=16)
        state = ours.update(state, Measurement(kl, float("nan"), 16))
    assert theirs.value == state.beta != 0.1
    assert theirs.state.ignored == 1


def test_a_restarted_trainer_goes_on_with_its_beta(tmp_path: Path) -> None:
    trainer = trainer_with(0.1)
    callback = BudgetCheckpointCallback(config_for(0.05))
    callback.on_save(trainer, 1, str(tmp_path / "global_step_1"))
    for kl in (0.2, 0.3, 0.1):
        trainer.kl_ctrl_in_reward.update(current_kl=kl, n_steps=16)
    callback.on_save(trainer, 10, str(tmp_path / "global_step_10"), async_save=True, later=1)
    again = trainer_with(0.1)
    BudgetCheckpointCallback(config_for(0.05)).attach(again, tmp_path / "global_step_10")
    assert again.kl_ctrl_in_reward.state == trainer.kl_ctrl_in_reward.state
    # Without `attach`, from the first save on.
    late = trainer_with(0.1)
    BudgetCheckpointCallback(config_for(0.05)).on_save(late, 11, str(tmp_path / "global_step_11"))
    assert late.kl_ctrl_in_reward.state == trainer.kl_ctrl_in_reward.state


def test_what_has_no_controller_or_state_is_refused(tmp_path: Path) -> None:
    callback = BudgetCheckpointCallback(config_for(0.05))
    with pytest.raises(ConfigError, match=r"expected algorithm\.use_kl_in_reward=True"):
        callback.attach(SimpleNamespace())
    (tmp_path / STATE_FILE).write_text('{"beta": "no", "unknown": 1}')
    with pytest.raises(RunError, match="expected the state of a KL controller"):
        callback.attach(trainer_with(0.1), tmp_path)
