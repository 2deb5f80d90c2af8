"""Group-relative policy optimisation: scores in units of their group's spread, no critic.

β leashes the *normalised* score: it is in group standard deviations per nat. KL never enters the
normalisation, so a group of equal scores pays the same price per nat as any other.

As published, GRPO puts k3 in the loss. That follows another divergence at each token alone (see
`kleash.kl.placements`), so the default here is k1 in the reward, and `loss_k3` has to be asked for
with `allow_biased`. Left out: division of each response's loss by its own length, which favours
long bad answers over short ones.
"""

from dataclasses import dataclass, replace

from kleash.algorithms.advantages import group_relative, leave_one_out
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
class GRPOSettings:
    """The numbers of GRPO."""

    clip_range: float = 0.2
    """ε of the clipped policy loss."""
    epsilon: float = 1e-4
    """Added to a group's standard deviation, in units of the score."""
    placement: Placement = "reward_k1"
    """Where the KL is charged, and by which estimator; as published: `loss_k3`, which is biased."""
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


def prepare(scored: ScoredRollout, beta: Beta, settings: GRPOSettings) -> Experience:
    r"""Rewards and advantages of a rollout.

        ŝ_i = (score_i − mean) / (sd + ε)        K_i = Σ_t charge_t
        A_i = ŝ_i − β · (K_i − 1/(n−1) Σ_{j≠i} K_j)

    over the n responses to the same prompt; every token of response i has the advantage A_i.
    Dropped responses still count in the mean and spread of the others.

    Args:
        scored: the rollout, at least two responses to each prompt.
        beta: strength of the leash, in group standard deviations per nat, for all responses or for
            each. At 0 no KL is used.
        settings: the numbers of GRPO.

    Returns:
        What `loss` learns from; `rewards` sum to ŝ_i − β·K_i, which `returns` holds at every token.

    Raises:
        ValueError: if a prompt has a single response, `beta` is negative, a response is empty,
            or no response is left.
        NonFiniteError: if an advantage is not finite.
        ScoringError: if a correction has no finite weight, or leaves nothing to learn from.

    References:
        Shao et al., "DeepSeekMath", 2024, section 4.1, https://arxiv.org/abs/2402.03300
    """
    scores, mask = settle_truncated(scored, settings.truncated, settings.missing_eos_penalty)
    prompts = scored.rollout.prompt_index
    relative = group_relative(scores, prompts, epsilon=settings.epsilon)
    rewards, weight = leash(scored, relative, beta, settings.placement, mixing=settings.mixing)
    objective = masked_sum(rewards, scored.rollout.response_mask, dim=-1)
    # Centred apart from the score: leaving a response out keeps the KL's gradient whole.
    advantages = relative + leave_one_out(objective - relative, prompts)
    experience = response_experience(
        replace(scored, scores=scores),
        mask=mask,
        rewards=rewards,
        advantages=advantages,
        objective=objective,
        pathwise=weight,
    )
    return corrected(experience, settings.correction, settings.correction_clip, settings.placement)


def loss(experience: Experience, fresh: Fresh, settings: GRPOSettings, *, tokens: int) -> Loss:
    """See `kleash.algorithms.common.critic_free_loss`."""
    return critic_free_loss(
        experience,
        fresh,
        placement=settings.placement,
        clip_range=settings.clip_range,
        tokens=tokens,
    )
