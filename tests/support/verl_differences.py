"""Run where verl can be imported: its functions beside ours on random ragged batches, as JSON."""

import json
import math
import os
from types import SimpleNamespace
from typing import Any

os.environ["VERL_USE_EXTERNAL_MODULES"] = "kleash.integrations.verl"

import numpy as np
import torch
import verl.trainer.ppo.core_algos as theirs
from omegaconf import OmegaConf

from kleash.algorithms.advantages import gae, group_relative, leave_one_out
from kleash.algorithms.losses import clipped_policy_loss, clipped_value_loss
from kleash.integrations.verl import BudgetCheckpointCallback, BudgetKLController, policy_loss
from kleash.kl.control.controllers import AdaptiveBeta, Measurement
from kleash.kl.estimators import sampled_kl
from kleash.masked import whiten

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean")
worst: dict[str, float] = {}


def compare(name: str, ours: Any, other: Any, mask: Any = None) -> None:
    ours, other = torch.as_tensor(ours).double(), torch.as_tensor(other).double()
    if mask is not None:
        ours, other = ours[mask], other[mask]
    worst[name] = max(worst.get(name, 0.0), float((ours - other).abs().max()))


def config(**changes: Any) -> Any:
    settings = {
        "clip_ratio": 0.2,
        "clip_ratio_low": None,
        "clip_ratio_high": None,
        "clip_ratio_c": 1e9,
        "global_batch_info": {},
    }
    return OmegaConf.create({**settings, **changes})


def gradient(function: Any, log_prob: Any, *rest: Any, **named: Any) -> tuple[Any, Any]:
    leaf = log_prob.clone().requires_grad_()
    found = function(leaf, *rest, **named)
    loss = found[0] if isinstance(found, tuple) else found
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def one_batch(draw: torch.Generator) -> None:
    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    prompts = int(torch.randint(1, 4, (1,), generator=draw))
    group = int(torch.randint(2, 5, (1,), generator=draw))
    rows, width = prompts * group, int(torch.randint(2, 10, (1,), generator=draw))
    lengths = torch.randint(1, width + 1, (rows, 1), generator=draw)
    lengths[0] = width
    mask = torch.arange(width) < lengths
    number = mask.double()
    old = -noise(rows, width).abs()
    now, ref = old + 0.3 * noise(rows, width), old + 0.5 * noise(rows, width)
    advantages, values = noise(rows, width), noise(rows, width)
    rewards = noise(rows, width) * number
    for name, kind in (("k1", "kl"), ("k2", "mse"), ("k3", "low_var_kl")):
        compare(name, sampled_kl(now, ref, name), theirs.kl_penalty(now, ref, kind), mask)
    ours = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    other = theirs.compute_gae_advantage_return(rewards, values, number, 0.9, 0.8)
    compare("gae returns", ours[1], other[1], mask)
    # verl divides by the spread with n − 1, we by that with n.
    spread = math.sqrt((int(mask.sum()) - 1) / int(mask.sum()))
    compare("gae advantages", spread * whiten(ours[0], mask), other[0], mask)
    index = torch.arange(rows) // group
    every = rewards.sum(-1)
    found = theirs.compute_grpo_outcome_advantage(rewards.clone(), number, index.numpy(), 1e-6)[0]
    compare("grpo", group_relative(every, index, epsilon=1e-6)[:, None] * number, found)
    found = theirs.compute_rloo_outcome_advantage(rewards.clone(), number, index.numpy())[0]
    compare("rloo", leave_one_out(every, index)[:, None] * number, found)
    vanilla = theirs.get_policy_loss_fn("vanilla")
    for mode in MODES:
        pair = [
            gradient(
                lambda leaf, f=f, m=mode: f(old, leaf, advantages, number, m, config=config()), now
            )
            for f in (policy_loss, vanilla)
        ]
        compare(f"policy loss, {mode}", pair[0][0], pair[1][0])
        compare(f"policy gradient, {mode}", pair[0][1], pair[1][1])
    tokens = int(mask.sum())
    own = clipped_policy_loss(now, old, advantages, mask, clip_range=0.2, tokens=tokens)
    compare("clipped_policy_loss", own, vanilla(old, now, advantages, number, config=config())[0])
    target = noise(rows, width)
    new = values + 0.3 * noise(rows, width)
    own = clipped_value_loss(new, values, target, mask, clip_range=0.2, tokens=tokens)
    compare(
        "value loss",
        own,
        theirs.compute_value_loss(new, target, values, number, cliprange_value=0.2)[0],
    )
    kl = float(noise(1).abs())
    controller = AdaptiveBeta(target_kl=1.0, initial=0.1, gain="code", horizon=1000)
    adaptive = theirs.AdaptiveKLController(0.1, 1.0, 1000)
    adaptive.update(kl, rows)
    state = controller.update(controller.init(), Measurement(kl, 0.1, rows))
    compare("adaptive controller", state.beta, adaptive.value)


def differences() -> dict[str, Any]:
    """Where the two mean to differ."""
    one, far = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[5.0]], dtype=torch.float64)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    bounded = config(clip_ratio_c=3.0)
    vanilla = theirs.get_policy_loss_fn("vanilla")
    adaptive = theirs.AdaptiveKLController(0.1, 1.0, 1000)
    adaptive.update(-0.5, 100)
    return {
        "k3 far from the reference": [
            float(sampled_kl(-far, zero, "k3")),
            float(theirs.kl_penalty(-far, zero, "low_var_kl")),
        ],
        "negative advantage, ratio e^5": [
            float(f(zero, far, -one, one, config=bounded)[0]) for f in (policy_loss, vanilla)
        ],
        "one response to a prompt": float(
            theirs.compute_grpo_outcome_advantage(2 * one, one, np.array([0]))[0]
        ),
        "adaptive after a negative reading": float(adaptive.value),
    }


def callback() -> dict[str, Any]:
    """verl's own loader makes the callback, and its reward penalty works with the controller."""
    import tempfile
    from pathlib import Path

    from verl.trainer.ppo.checkpoint_callback import build_checkpoint_callback

    name = "kleash.integrations.verl.BudgetCheckpointCallback"
    tree = {
        "trainer": {"checkpoint_callback_class": name},
        "algorithm": {"kl_ctrl": {"target_kl": 0.05}},
    }
    made = build_checkpoint_callback(OmegaConf.create(tree))
    trainer = SimpleNamespace(kl_ctrl_in_reward=theirs.FixedKLController(0.1))
    folder = Path(tempfile.mkdtemp())
    made.on_save(trainer=trainer, global_step=1, checkpoint_dir=str(folder / "global_step_1"))
    for kl in (0.2, 0.1, 0.3):
        trainer.kl_ctrl_in_reward.update(current_kl=kl, n_steps=16)
    made.on_save(trainer=trainer, global_step=4, checkpoint_dir=str(folder / "global_step_4"))
    again = SimpleNamespace(kl_ctrl_in_reward=theirs.FixedKLController(0.1))
    BudgetCheckpointCallback(OmegaConf.create(tree)).on_save(
        again, 8, str(folder / "global_step_8")
    )
    assert isinstance(again.kl_ctrl_in_reward, BudgetKLController)
    return {"before": trainer.kl_ctrl_in_reward.value, "after": again.kl_ctrl_in_reward.value}


if __name__ == "__main__":
    import verl

    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        one_batch(generator)
    registered = theirs.get_policy_loss_fn("kleash") is policy_loss
    print(
        json.dumps(
            {
                "verl": verl.__version__,
                "registered": registered,
                "worst": worst,
                "differences": differences(),
                "callback": callback(),
            }
        )
    )
