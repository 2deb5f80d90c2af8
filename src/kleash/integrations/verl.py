"""What verl's registries take of kleash: a KL budget, and a policy loss without clamps.

verl has no registry for its KL controller, and its policy losses see log-probabilities alone: no
hidden states, so no exact KL, and no reference. What can be plugged in:

    VERL_USE_EXTERNAL_MODULES=kleash.integrations.verl      registers the policy loss "kleash"
    actor_rollout_ref.actor.policy_loss.loss_mode=kleash    uses it
    trainer.checkpoint_callback_class=kleash.integrations.verl.BudgetCheckpointCallback

The last puts a budget in the place of the reward's KL controller and saves its state, which verl
itself does not, beside each checkpoint. Exact KL is had from the checkpoints afterwards: merge one
to Hugging Face format with verl's own `verl.model_merger`, and give it to `kleash audit`.

Nothing here imports verl until it is registered or called.
"""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.errors import ConfigError, RunError
from kleash.kl.control.controllers import BetaState, BudgetBeta, Measurement
from kleash.masked import masked_mean
from kleash.storage.atomic_files import plain_json, replace_file

__all__ = ["BudgetCheckpointCallback", "BudgetKLController", "policy_loss", "register"]

NAME = "kleash"
"""Of the policy loss, in verl's registry."""
STATE_FILE = "kleash_kl_controller.json"


class BudgetKLController:
    """`BudgetBeta` behind the two names that verl's trainers use: `value` and `update`.

    verl tells a controller the mean over responses of the mean *per token*, of the estimator that
    it charges, and no standard error. So the budget is in nats per token here, and the noise counts
    as none; a reading below 0, which k1 can give, is counted and not acted upon.

    Args:
        target_kl: the budget, in nats per token.
        initial: β at the start, in score per nat, as verl's `kl_coef`.
        state: of an earlier controller, to go on with.

    Raises:
        ValueError: if a number cannot be.

    Example:
        >>> controller = BudgetKLController(target_kl=0.05, initial=0.1)
        >>> controller.update(current_kl=0.2, n_steps=64)
        >>> controller.value > 0.1
        True
    """

    def __init__(
        self, target_kl: float, initial: float, state: Mapping[str, Any] | None = None
    ) -> None:
        self.controller = BudgetBeta(target_kl, initial=initial)
        self.state = self.controller.init() if state is None else BetaState(**state)

    @property
    def value(self) -> float:
        """β in force."""
        return self.state.beta

    def update(self, current_kl: float, n_steps: int) -> None:
        """One reading: nats per token, and the number of responses."""
        reading = Measurement(float(current_kl), math.nan, int(n_steps))
        self.state = self.controller.update(self.state, reading)


class BudgetCheckpointCallback:
    """Puts a budget in the place of the reward's KL controller, and saves it with each checkpoint.

    verl calls it after a save alone. Until the first one, also after a restart, verl's own
    controller is in force: save early, or call `attach` where the trainer is made.

    The target is `algorithm.kl_ctrl.target_kl`, in nats per token.
    """

    def __init__(self, config: Any = None) -> None:
        self.config = config

    def attach(self, trainer: Any, checkpoint: Path | None = None) -> BudgetKLController:
        """Replace the trainer's controller, going on from a checkpoint's state where it has one.

        Raises:
            ConfigError: if the trainer takes no KL off its rewards, or has no target.
            RunError: if the state cannot be read.
        """
        before = getattr(trainer, "kl_ctrl_in_reward", None)
        if before is None or not hasattr(before, "value"):
            raise ConfigError(
                "expected algorithm.use_kl_in_reward=True, got a trainer without a KL controller: "
                "the coefficient of a KL loss in the actor (kl_loss_coef) is constant in verl"
            )
        if isinstance(before, BudgetKLController):
            return before
        settings = self.config if self.config is not None else trainer.config
        target = float(settings.algorithm.kl_ctrl.target_kl)
        saved = None if checkpoint is None else _read_state(checkpoint / STATE_FILE)
        made = BudgetKLController(target, initial=float(before.value), state=saved)
        trainer.kl_ctrl_in_reward = made
        return made

    def on_save(
        self,
        trainer: Any,
        global_step: int,
        checkpoint_dir: str,
        async_save: bool = False,
        **more: Any,
    ) -> None:
        """Called by verl: replace the controller if that was not done, and save its state.

        Raises:
            ConfigError: if the trainer takes no KL off its rewards, or has no target.
            RunError: if the state cannot be read or written.
        """
        folder = Path(checkpoint_dir)
        controller = self.attach(trainer, _newest_before(folder, global_step))
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / STATE_FILE, plain_json(asdict(controller.state)) + "\n")


def policy_loss(
    old_log_prob: Float[Tensor, "batch token"],
    log_prob: Float[Tensor, "batch token"],
    advantages: Float[Tensor, "batch token"],
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Float[Tensor, "batch token"] | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    r"""PPO's clipped loss in verl's signature, with nothing clamped beyond the clip.

        loss_t = max(−ρ_t A_t, −clip(ρ_t, 1−ε_low, 1+ε_high) A_t)        ρ_t = π(y_t)/π_old(y_t)

    Unlike "vanilla" it neither clamps log ρ to ±20 nor bounds the loss of negative advantages by
    `clip_ratio_c`. A number outside the mask can reach neither the loss nor its gradient.

    Args:
        old_log_prob: log π_old of the sampled tokens, in nats.
        log_prob: log π now; gradients flow.
        advantages: of each token.
        response_mask: 1 or True on the policy's tokens.
        loss_agg_mode: verl's way to aggregate.
        config: verl's actor configuration.
        rollout_is_weights: importance weights of the sampler's tokens.

    Returns:
        The loss, and verl's metrics of the same names.
    """
    from verl.trainer.ppo.core_algos import agg_loss  # pyright: ignore[reportMissingImports]

    mask = response_mask.bool()
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    log_ratio = torch.where(mask, log_prob - old_log_prob, 0.0)
    gain = torch.where(mask, advantages, 0.0)
    ratio = log_ratio.exp()
    plain, clipped = -ratio * gain, -ratio.clamp(1 - low, 1 + high) * gain
    each = torch.maximum(plain, clipped)
    if rollout_is_weights is not None:
        each = each * torch.where(mask, rollout_is_weights, 0.0)
    loss = agg_loss(
        loss_mat=each,
        loss_mask=response_mask,
        loss_agg_mode=loss_agg_mode,
        **config.global_batch_info,
    )
    metrics = {
        "actor/pg_clipfrac": float(masked_mean((clipped > plain).to(each), mask)),
        "actor/ppo_kl": float(masked_mean(-log_ratio.detach(), mask)),
        "actor/pg_clipfrac_lower": 0.0,
    }
    return loss, metrics


def register() -> None:
    """Enter the policy loss into verl's registry; done by itself where verl loads this module."""
    from verl.trainer.ppo.core_algos import (  # pyright: ignore[reportMissingImports]
        register_policy_loss,
    )

    register_policy_loss(NAME)(policy_loss)


def _newest_before(folder: Path, step: int) -> Path | None:
    """The newest earlier checkpoint beside this one that has a controller's state."""
    found: dict[int, Path] = {}
    for path in folder.parent.glob("global_step_*"):
        number = path.name.removeprefix("global_step_")
        if number.isdigit() and int(number) <= step and (path / STATE_FILE).is_file():
            found[int(number)] = path
    return found[max(found)] if found else None


def _read_state(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        BetaState(**state)
    except (OSError, ValueError, TypeError) as error:
        raise RunError(
            f"expected the state of a KL controller in {str(file)!r}: {error}"
        ) from error
    return state


if "verl" in sys.modules:
    register()
