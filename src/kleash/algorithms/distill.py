r"""On-policy distillation: the student writes, and is drawn towards the teacher at every token.

    L = E_student[ Σ_t D_t ]          D_t: a divergence of the two next-token distributions

exact over the vocabulary, whichever it is: `reverse_kl` KL(student‖teacher), `forward_kl`
KL(teacher‖student), `jensen_shannon`. Its gradient has two parts, as that of any KL on one's own
samples (see `kleash.kl.placements`):

    ∇L  =  E[ Σ_t ∇D_t ]  +  E[ Σ_t ∇log π(a_t) Σ_{s>t} D_s ]
           token             what a_t does to all that follows

`gradient: token` is the first alone, with the sampled prefixes held fixed: what is usually called
on-policy distillation. `gradient: sequence` is the whole, by the prefix weights of
`exact_weighted`; with `reverse_kl` it is the gradient of KL(student‖teacher) of whole responses.

No reward takes part. A leash to another model than the teacher (the student's own start) is a
second term of the loss, β · KL, by a placement that is one. Left out: a baseline for the second
part of the gradient.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.algorithms.common import (
    Truncated,
    check_leash,
    check_truncated,
    finish,
    leash,
    leash_loss,
    settle_truncated,
)
from kleash.kl.placements import Placement, prefix_weights
from kleash.masked import masked_sum
from kleash.scoring.divergences import Divergence
from kleash.types import Beta, Experience, Fresh, Loss, ScoredRollout

DistillGradient = Literal["token", "sequence"]

LEASHES: tuple[Placement, ...] = (
    "measure",
    "exact_weighted",
    "loss_exact",
    "loss_k1",
    "loss_k2",
    "loss_k3",
    "loss_k3_weighted",
)
"""Placements that are a term of the loss, or none: there are no rewards to charge."""
_RATIO_RANGE = 0.2
"""ε of `policy/clipfrac`, which is only read here: nothing is clipped."""


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """The choices of distillation."""

    divergence: Divergence = "reverse_kl"
    """Of student and teacher, at each token."""
    gradient: DistillGradient = "token"
    """`token`: the prefixes held fixed; `sequence`: with what a token does to those that follow."""
    placement: Placement = "measure"
    """How the leash to the reference is charged, where there is one beside the teacher."""
    mixing: None = None
    """There is no `mixed` here."""
    allow_biased: bool = False
    """Permit a placement whose gradient is known to be wrong."""
    truncated: Truncated = "score"
    """`score`: learn from a response that the length limit cut off, or `drop` it."""
    missing_eos_penalty: None = None
    """There is no score to take it off."""
    correction: Literal["none"] = "none"
    """Of a sampler with weights of its own: there are no advantages to weigh."""
    correction_clip: None = None
    """It goes with a correction."""

    def __post_init__(self) -> None:
        check_leash(self.placement, mixing=None, allow_biased=self.allow_biased)
        check_truncated(self.truncated, None, critic=False)
        check_distillation_leash(self.placement)


def check_distillation_leash(placement: Placement) -> None:
    """Refuse a placement that charges rewards.

    Raises:
        ValueError: if it does.
    """
    if placement not in LEASHES:
        raise ValueError(
            f"placement {placement!r} charges the KL in the reward, and distillation has no "
            "rewards: use 'exact_weighted', or 'measure' for no leash"
        )


def prepare(scored: ScoredRollout, beta: Beta, settings: DistillSettings) -> Experience:
    """Which tokens are learnt from; rewards, advantages and returns are 0.

    Args:
        scored: the rollout; its scores play no part.
        beta: strength of the leash to the reference, in divergence per nat.
        settings: the choices of distillation.

    Raises:
        ValueError: if every response is dropped, or `beta` is negative.
    """
    scores, mask = settle_truncated(scored, settings.truncated, None)
    nothing = torch.zeros_like(scores)
    rewards, weight = leash(scored, nothing, beta, settings.placement, mixing=None)
    zero = torch.zeros_like(rewards)
    return Experience(
        scored=scored, mask=mask, rewards=rewards, advantages=zero, returns=zero, pathwise=weight
    )


def loss(experience: Experience, fresh: Fresh, settings: DistillSettings, *, tokens: int) -> Loss:
    r"""The divergence from the teacher, and the leash where there is one.

        loss/distill = 1/tokens · Σ_t w_t · D_t          w_t = 1, or w_{<t} for `sequence`
        loss/kl      = 1/tokens · Σ_t β · term_t

    Args:
        experience: the rows of this microbatch.
        fresh: what the student gives for them now, with `divergence`.
        settings: the choices of distillation.
        tokens: kept tokens of the whole minibatch, so that microbatches add.

    Raises:
        ValueError: if a divergence or KL is missing.
        NonFiniteError: if a number is not finite; it names response and token.
    """
    if fresh.divergence is None:
        raise ValueError("distillation needs Fresh.divergence, got None: score with the teacher")
    terms = distillation_terms(experience, fresh, fresh.divergence, settings.gradient)
    losses = {"loss/distill": masked_sum(terms, experience.mask) / tokens}
    spent = leash_loss(experience, fresh, placement=settings.placement, tokens=tokens)
    if spent is not None:
        losses["loss/kl"] = spent
    return finish(losses, experience, fresh, weights={}, clip_range=_RATIO_RANGE, tokens=tokens)


def distillation_terms(
    experience: Experience,
    fresh: Fresh,
    divergence: Float[Tensor, "batch token"],
    gradient: DistillGradient,
) -> Float[Tensor, "batch token"]:
    """Each token's term in the loss, 0 outside the mask."""
    kept = torch.where(experience.mask, divergence, 0.0)
    if gradient == "token":
        return kept
    then = experience.scored.rollout_logprobs
    return prefix_weights(fresh.logprobs, then, experience.mask) * kept
