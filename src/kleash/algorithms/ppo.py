"""Proximal policy optimisation with a critic: a score at the end, a leash at every token.

`prepare` runs once per rollout, `loss` once per microbatch; neither sees a model. Left out: the
adaptive step on KL and early stopping of OpenAI's baselines; the leash is the reference's.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kleash.algorithms.advantages import gae
from kleash.algorithms.common import (
    Truncated,
    check_leash,
    check_truncated,
    finish,
    kept_rows,
    leash,
    policy_losses,
    require_finite,
    select,
    settle_truncated,
)
from kleash.algorithms.losses import clipped_value_loss
from kleash.algorithms.sampler_correction import Correction, check_correction, corrected
from kleash.kl.placements import Placement
from kleash.masked import WHITENING_EPSILON, masked_variance, whiten
from kleash.types import Beta, Experience, Fresh, Loss, ScoredRollout

__all__ = ["PPOSettings", "kept_rows", "loss", "prepare", "select"]


@dataclass(frozen=True, kw_only=True)
class PPOSettings:
    """The numbers of PPO; each field's default is that of Stiennon et al. 2020 where it has one."""

    gamma: float = 1.0
    """Discount per token; 1 keeps the return the plain sum of the rewards."""
    lam: float = 0.95
    """λ of generalised advantage estimation."""
    clip_range: float = 0.2
    """ε of the clipped policy loss."""
    value_clip_range: float | None = 0.2
    """ε of the clipped value loss, in score; None: not clipped."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1 over the kept tokens of the rollout."""
    placement: Placement = "reward_k1"
    """Where the KL is charged, and by which estimator."""
    mixing: float | None = None
    """c of the placement `mixed`: 0 is `reward_k1`, 1 is `exact`; None for all other placements."""
    allow_biased: bool = False
    """Permit a placement whose gradient is known to be wrong."""
    truncated: Truncated = "score"
    """What becomes of a response that the length limit cut off."""
    missing_eos_penalty: float | None = None
    """Taken off the score of a truncated response when `truncated` is `penalise`."""
    correction: Correction = "none"
    """How tokens are weighted that another law than the policy's wrote."""
    correction_clip: float | None = None
    """c of the correction, above 1; None: no clip."""

    def __post_init__(self) -> None:
        check_leash(self.placement, mixing=self.mixing, allow_biased=self.allow_biased)
        check_truncated(self.truncated, self.missing_eos_penalty, critic=True)
        check_correction(self.correction, self.correction_clip)


def prepare(scored: ScoredRollout, beta: Beta, settings: PPOSettings) -> Experience:
    r"""Rewards, advantages and returns of a rollout.

        r_t = −β · charge_t + score · 1[t last]        A = GAE(r, V)        R = A + V

    With `whiten_advantages`, A is then shifted and scaled to mean 0 and variance 1 over the kept
    tokens, and the weight of the differentiable KL is divided by the same standard deviation:
    otherwise β would mean another thing in every rollout.

    Args:
        scored: the rollout, with values.
        beta: strength of the leash, in score per nat, for all responses or for each. At 0 no KL is
            used.
        settings: the numbers of PPO.

    Returns:
        What `loss` learns from; no gradient flows through it.

    Raises:
        ValueError: if there are no values (or no final values to bootstrap with), `beta` is
            negative, a response is empty, or no response is left.
        NonFiniteError: if an advantage is not finite.
        ScoringError: if a correction has no finite weight, or leaves nothing to learn from.
    """
    if scored.values is None:
        raise ValueError("PPO needs the values of a critic, got values=None: use GRPO or RLOO")
    scores, mask = settle_truncated(scored, settings.truncated, settings.missing_eos_penalty)
    rewards, weight = leash(scored, scores, beta, settings.placement, mixing=settings.mixing)
    advantages, returns = gae(
        rewards,
        scored.values,
        scored.rollout.response_mask,
        gamma=settings.gamma,
        lam=settings.lam,
        final_values=_continuations(scored, settings.truncated),
    )
    require_finite("advantage", advantages, mask)
    if settings.whiten_advantages:
        if weight is not None:
            weight = weight * torch.rsqrt(masked_variance(advantages, mask) + WHITENING_EPSILON)
        advantages = whiten(advantages, mask)
    experience = Experience(
        scored=replace(scored, scores=scores),
        mask=mask,
        rewards=rewards,
        advantages=_kept(advantages, mask),
        returns=_kept(returns, mask),
        pathwise=weight,
    )
    return corrected(experience, settings.correction, settings.correction_clip, settings.placement)


def _continuations(scored: ScoredRollout, truncated: Truncated) -> Float[Tensor, " batch"] | None:
    """What a truncated response is worth after its last token; 0 for one that ended."""
    if truncated != "bootstrap":
        return None
    if scored.final_values is None:
        raise ValueError(
            "truncated='bootstrap' continues responses by their final values, got "
            "final_values=None: have the critic value the state after the last token"
        )
    return torch.where(scored.rollout.ended, 0.0, scored.final_values)


def _kept(
    numbers: Float[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch token"]:
    return torch.where(mask, numbers, 0.0)


def loss(experience: Experience, fresh: Fresh, settings: PPOSettings, *, tokens: int) -> Loss:
    r"""PPO's loss on a microbatch.

        L = L_policy + value_coef · L_value + 1/tokens · Σ_t weight_t · KL_t

    the last term only where the placement differentiates a KL (`Experience.pathwise`).

    Args:
        experience: the rows of this microbatch, cut out by `select`.
        fresh: what the models give for them now.
        settings: the numbers of PPO.
        tokens: kept tokens of the whole minibatch, so that microbatches add.

    Returns:
        The loss to differentiate, and its metrics. `policy/ratio_max` and `policy/ratio_min` are
        extremes, everything else adds over microbatches: `kleash.algorithms.losses.combine`.
        `policy/approx_kl` is k3 of the rollout's policy against the policy now, per token.

    Raises:
        ValueError: if values, or the exact KL of a pathwise term, are missing.
        NonFiniteError: if a ratio, value or KL is not finite; it names response and token.
    """
    old_values = experience.scored.values
    if fresh.values is None or old_values is None:
        raise ValueError("PPO needs the critic's values, got None: pass Fresh.values")
    losses = policy_losses(
        experience,
        fresh,
        placement=settings.placement,
        clip_range=settings.clip_range,
        tokens=tokens,
    )
    losses["loss/value"] = clipped_value_loss(
        fresh.values,
        old_values,
        experience.returns,
        experience.mask,
        clip_range=settings.value_clip_range,
        tokens=tokens,
    )
    weights = {"loss/value": settings.value_coef}
    return finish(
        losses, experience, fresh, weights=weights, clip_range=settings.clip_range, tokens=tokens
    )
