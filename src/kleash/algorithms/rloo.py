"""REINFORCE with a leave-one-out baseline: no critic, several responses to each prompt.

The whole response is one action: its objective, score − β·Σ_t charge_t, is compared with that of
its siblings, and every token gets the difference. Left out: a ratio of whole responses. Ratios are
per token and clipped, as in PPO; on the first minibatch, where all are 1, this is REINFORCE.
"""

from dataclasses import dataclass, replace

from kleash.algorithms.advantages import leave_one_out
from kleash.algorithms.common import (
    Truncated,
    check_leash,
    check_truncated,
    critic_free_loss,
    leash,
    response_experience,
    settle_truncated,
)
from kleash.algorithms.sampler_correction import Correction, check_correction, corrected
from kleash.kl.placements import Placement
from kleash.masked import masked_sum
from kleash.types import Beta, Experience, Fresh, Loss, ScoredRollout


@dataclass(frozen=True, kw_only=True)
class RLOOSettings:
    """The numbers of RLOO."""

    clip_range: float = 0.2
    """ε of the clipped policy loss."""
    placement: Placement = "reward_k1"
    """Where the KL is charged, and by which estimator."""
    mixing: float | None = None
    """c of the placement `mixed`: 0 is `reward_k1`, 1 is `exact`; None for all other placements."""
    allow_biased: bool = False
    """Permit a placement whose gradient is known to be wrong."""
    truncated: Truncated = "score"
    """What becomes of a response that the length limit cut off; there is no critic to bootstrap."""
    missing_eos_penalty: float | None = None
    """Taken off the score of a truncated response when `truncated` is `penalise`."""
    correction: Correction = "none"
    """How tokens are weighted that another law than the policy's wrote."""
    correction_clip: float | None = None
    """c of the correction, above 1; None: no clip."""

    def __post_init__(self) -> None:
        check_leash(self.placement, mixing=self.mixing, allow_biased=self.allow_biased)
        check_truncated(self.truncated, self.missing_eos_penalty, critic=False)
        check_correction(self.correction, self.correction_clip)


def prepare(scored: ScoredRollout, beta: Beta, settings: RLOOSettings) -> Experience:
    r"""Rewards and advantages of a rollout.

        R_i = score_i − β · Σ_t charge_t        A_i = R_i − 1/(n−1) Σ_{j≠i} R_j

    over the n responses to the same prompt; every token of response i has the advantage A_i.
    Dropped responses still serve as a baseline of the others.

    Args:
        scored: the rollout, at least two responses to each prompt.
        beta: strength of the leash, in score per nat, for all responses or for each. At 0 no KL is
            used.
        settings: the numbers of RLOO.

    Returns:
        What `loss` learns from; `returns` holds R_i at every token.

    Raises:
        ValueError: if a prompt has a single response, `beta` is negative, a response is empty,
            or no response is left.
        NonFiniteError: if an advantage is not finite.
        ScoringError: if a correction has no finite weight, or leaves nothing to learn from.

    References:
        Ahmadian et al., 2024, https://arxiv.org/abs/2402.14740
    """
    scores, mask = settle_truncated(scored, settings.truncated, settings.missing_eos_penalty)
    rewards, weight = leash(scored, scores, beta, settings.placement, mixing=settings.mixing)
    objective = masked_sum(rewards, scored.rollout.response_mask, dim=-1)
    advantages = leave_one_out(objective, scored.rollout.prompt_index)
    experience = response_experience(
        replace(scored, scores=scores),
        mask=mask,
        rewards=rewards,
        advantages=advantages,
        objective=objective,
        pathwise=weight,
    )
    return corrected(experience, settings.correction, settings.correction_clip, settings.placement)


def loss(experience: Experience, fresh: Fresh, settings: RLOOSettings, *, tokens: int) -> Loss:
    """See `kleash.algorithms.common.critic_free_loss`."""
    return critic_free_loss(
        experience,
        fresh,
        placement=settings.placement,
        clip_range=settings.clip_range,
        tokens=tokens,
    )
