"""What the algorithms share: the leash, truncated responses, the policy's loss, minibatches.

Left out: everything in which PPO, GRPO and RLOO differ, which is how advantages come about.
"""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, NoReturn, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kleash.algorithms.losses import clipped_policy_loss, policy_ratio
from kleash.algorithms.rewards import beta_of_each, kl_shaped_rewards, missing_eos_penalty
from kleash.errors import NonFiniteError
from kleash.kl.estimators import sampled_kl
from kleash.kl.placements import (
    DIFFERENTIATES_KL,
    Placement,
    charges,
    check_placement,
    loss_terms,
    loss_weights,
)
from kleash.masked import masked_sum
from kleash.types import Beta, Experience, Fresh, Loss, Rollout, ScoredRollout

Truncated = Literal["score", "penalise", "drop", "bootstrap"]
"""A response cut by the length limit: score it as it stands, subtract a penalty from the score,
leave it out of the losses, or continue it with the value of its last state."""

Rows = TypeVar("Rows", Experience, ScoredRollout, Rollout, Fresh)


def check_leash(placement: Placement, *, mixing: float | None, allow_biased: bool) -> None:
    """Refuse a placement with the wrong gradient, and a mixing coefficient that does not fit it.

    Raises:
        ValueError: as `kleash.kl.placements.check_placement` and `loss_weights` do.
    """
    check_placement(placement, allow_biased=allow_biased)
    loss_weights(placement, mask=torch.tensor([[True]]), mixing=mixing)


def check_truncated(truncated: Truncated, penalty: float | None, *, critic: bool) -> None:
    """A penalty goes with `penalise`, and `bootstrap` with an algorithm that has a critic.

    Raises:
        ValueError: if they do not.
    """
    if truncated == "bootstrap" and not critic:
        raise ValueError(
            "`truncated: bootstrap` continues a response by a critic's value and needs a critic, "
            "got an algorithm without a critic: use PPO, or score, penalise or drop"
        )
    if (truncated == "penalise") != (penalty is not None):
        raise ValueError(
            "`missing_eos_penalty` goes with `truncated: penalise` and with nothing else, got "
            f"truncated: {truncated}, missing_eos_penalty: {penalty}"
        )


def settle_truncated(
    scored: ScoredRollout, truncated: Truncated, penalty: float | None
) -> tuple[Float[Tensor, " batch"], Bool[Tensor, "batch token"]]:
    """Scores after the penalty, and the tokens that take part in the losses.

    Raises:
        ValueError: if every response is dropped.
    """
    rollout = scored.rollout
    scores, mask = scored.scores, trained_tokens(rollout, truncated)
    if penalty is not None:
        scores = missing_eos_penalty(scores, rollout.ended, penalty)
    if truncated == "drop" and not mask.any():
        raise ValueError(
            f"at least one response must have ended to be learnt from, got {len(mask)} that "
            "the length limit cut off and truncated='drop': raise the limit or score them"
        )
    return scores, mask


def trained_tokens(rollout: Rollout, truncated: Truncated) -> Bool[Tensor, "batch token"]:
    """The tokens that take part in the losses: all, or those of responses that have ended."""
    mask = rollout.response_mask
    return mask & rollout.ended[:, None] if truncated == "drop" else mask


def leash(
    scored: ScoredRollout,
    scores: Float[Tensor, " batch"],
    beta: Beta,
    placement: Placement,
    *,
    mixing: float | None,
) -> tuple[Float[Tensor, "batch token"], Float[Tensor, "batch token"] | None]:
    """Rewards that charge the KL, and β × weight of its differentiable part, None without one.

    At β = 0 and for `measure` no KL reaches either of them.

    Raises:
        ValueError: if `beta` is negative, or a response is empty.
    """
    mask = scored.rollout.response_mask
    charge = charges(
        placement,
        logprobs=scored.rollout_logprobs,
        ref_logprobs=scored.ref_logprobs,
        kl=scored.kl,
        mask=mask,
        mixing=mixing,
    )
    rewards = kl_shaped_rewards(scores, charge, beta, mask)
    weight = loss_weights(placement, mask=mask, mixing=mixing, dtype=rewards.dtype)
    betas = beta_of_each(beta, rewards)
    if weight is None or not betas.any():
        return rewards, None
    return rewards, betas[:, None] * weight


def response_experience(
    scored: ScoredRollout,
    *,
    mask: Bool[Tensor, "batch token"],
    rewards: Float[Tensor, "batch token"],
    advantages: Float[Tensor, " batch"],
    objective: Float[Tensor, " batch"],
    pathwise: Float[Tensor, "batch token"] | None,
) -> Experience:
    """What is learnt from responses that are each one action: every token has its advantage.

    Args:
        scored: the rollout, its scores after the penalty of truncated responses.
        mask: tokens that take part in the losses.
        rewards: per token.
        advantages: of each response.
        objective: of each response, which `returns` holds at every kept token.
        pathwise: weight of the differentiable KL, where there is one.

    Raises:
        NonFiniteError: if an advantage is not finite.
    """
    of_tokens = advantages[:, None].expand_as(rewards)
    require_finite("advantage", of_tokens, mask)
    return Experience(
        scored=scored,
        mask=mask,
        rewards=rewards,
        advantages=torch.where(mask, of_tokens, 0.0),
        returns=torch.where(mask, objective[:, None], 0.0),
        pathwise=pathwise,
    )


def critic_free_loss(
    experience: Experience,
    fresh: Fresh,
    *,
    placement: Placement,
    clip_range: float,
    tokens: int,
) -> Loss:
    """Clipped policy loss, and the differentiable KL where the placement has one.

    Args:
        experience: the rows of this microbatch.
        fresh: what the policy gives for them now.
        placement: where the KL is charged.
        clip_range: ε of the clipped policy loss.
        tokens: kept tokens of the whole minibatch, so that microbatches add.

    Returns:
        The loss to differentiate, and metrics as described at `finish`.

    Raises:
        ValueError: if the exact KL of a pathwise term is missing.
        NonFiniteError: if a ratio or KL is not finite; it names response and token.
    """
    losses = policy_losses(
        experience, fresh, placement=placement, clip_range=clip_range, tokens=tokens
    )
    return finish(losses, experience, fresh, weights={}, clip_range=clip_range, tokens=tokens)


def policy_losses(
    experience: Experience,
    fresh: Fresh,
    *,
    placement: Placement,
    clip_range: float,
    tokens: int,
) -> dict[str, Float[Tensor, ""]]:
    r"""The clipped policy loss, and the differentiable KL where the placement has one.

        loss/kl = 1/tokens · Σ_t pathwise_t · term_t

    Raises:
        ValueError: if the term is the exact KL and `Fresh.kl` is missing, or the experience was
            prepared for a placement without such a term.
    """
    scored, mask = experience.scored, experience.mask
    losses = {
        "loss/policy": clipped_policy_loss(
            fresh.logprobs,
            scored.rollout_logprobs,
            experience.advantages,
            mask,
            clip_range=clip_range,
            tokens=tokens,
        )
    }
    spent = leash_loss(experience, fresh, placement=placement, tokens=tokens)
    return losses if spent is None else {**losses, "loss/kl": spent}


def leash_loss(
    experience: Experience, fresh: Fresh, *, placement: Placement, tokens: int
) -> Float[Tensor, ""] | None:
    """`loss/kl` of `policy_losses`; None where the placement has no differentiable KL.

    Raises:
        ValueError: as it does.
    """
    scored, mask = experience.scored, experience.mask
    if experience.pathwise is None:
        return None
    if fresh.kl is None and placement in DIFFERENTIATES_KL:
        raise ValueError(
            f"placement {placement!r} differentiates the exact KL, got Fresh.kl=None: score the "
            "minibatch with the reference too"
        )
    terms = loss_terms(
        placement,
        logprobs=fresh.logprobs,
        rollout_logprobs=scored.rollout_logprobs,
        ref_logprobs=scored.ref_logprobs,
        kl=scored.kl if fresh.kl is None else fresh.kl,
        mask=mask,
    )
    if terms is None:
        raise ValueError(
            f"placement {placement!r} has no term in the loss, got an experience with pathwise "
            "weights: use the settings it was prepared with"
        )
    return masked_sum(experience.pathwise * terms, mask) / tokens


def finish(
    losses: Mapping[str, Float[Tensor, ""]],
    experience: Experience,
    fresh: Fresh,
    *,
    weights: Mapping[str, float],
    clip_range: float,
    tokens: int,
) -> Loss:
    r"""Add the parts of a loss, each with its weight (1 if not given), and read the metrics.

    Of the policy, per token and with ρ = π/π_rollout:

        policy/approx_kl   1/tokens · Σ (ρ − 1 − log ρ): k3 of the rollout's policy against now
        policy/clipfrac    share of tokens with ρ outside 1 ± ε
        policy/ratio_max, policy/ratio_min

    The one synchronisation with the device is here, one transfer for all metrics; whatever is not
    finite shows in them, and only then is it searched for.

    Raises:
        NonFiniteError: if a ratio, value or KL is not finite.
    """
    total = torch.stack([weights.get(key, 1.0) * part for key, part in losses.items()]).sum()
    with torch.no_grad():
        numbers = {
            **losses,
            **_policy_numbers(experience, fresh.logprobs, clip_range=clip_range, tokens=tokens),
        }
        read = torch.stack([total, *(number.to(total.dtype) for number in numbers.values())])
        total_now, *metrics_now = read.tolist()
    metrics = dict(zip(numbers, metrics_now, strict=True))
    # k3 is infinite or NaN as soon as one log-ratio is, also where clipping hides it from the loss.
    if not math.isfinite(total_now) or not math.isfinite(metrics["policy/approx_kl"]):
        _refuse(experience, fresh)
    return Loss(total=total, metrics=metrics)


def _policy_numbers(
    experience: Experience,
    logprobs: Float[Tensor, "batch token"],
    *,
    clip_range: float,
    tokens: int,
) -> dict[str, Float[Tensor, ""]]:
    mask, old = experience.mask, experience.scored.rollout_logprobs
    ratio = policy_ratio(logprobs, old, mask)
    return {
        "policy/approx_kl": masked_sum(sampled_kl(old, logprobs, "k3"), mask) / tokens,
        "policy/clipfrac": masked_sum(((ratio - 1).abs() > clip_range).float(), mask) / tokens,
        "policy/ratio_max": torch.where(mask, ratio, -torch.inf).amax(),
        "policy/ratio_min": torch.where(mask, ratio, torch.inf).amin(),
    }


def _refuse(experience: Experience, fresh: Fresh) -> NoReturn:
    """Name what is not finite in a loss that is not."""
    mask = experience.mask
    ratio = policy_ratio(fresh.logprobs, experience.scored.rollout_logprobs, mask)
    suspects = {
        "policy ratio": ratio,
        "log-probability": fresh.logprobs,
        "value": fresh.values,
        "exact KL": fresh.kl,
        "divergence from the teacher": fresh.divergence,
    }
    for name, numbers in suspects.items():
        if numbers is not None:
            require_finite(name, numbers, mask)
    raise NonFiniteError(
        "the loss must be finite, got an overflow from finite ratios, values and KL: lower the "
        "learning rate, or check the size of the scores"
    )


def require_finite(
    name: str, numbers: Float[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
) -> None:
    """Refuse NaN and infinity on kept tokens; reads from the device, so not for the hot path.

    Raises:
        NonFiniteError: naming the first response and token.
    """
    bad = (mask & ~numbers.isfinite()).nonzero()
    if len(bad):
        row, token = bad[0].tolist()
        raise NonFiniteError(
            f"every {name} must be finite, got {float(numbers[row, token])} at {{place}} (and "
            f"{len(bad) - 1} more): the update was not made",
            response=row,
            token=token,
        )


def trained_rows(rollout: Rollout, truncated: Truncated) -> Int[Tensor, " kept"]:
    """`kept_rows` of what an algorithm will make of a rollout: known before it is scored."""
    return trained_tokens(rollout, truncated).any(-1).nonzero().flatten()


def kept_rows(experience: Experience) -> Int[Tensor, " kept"]:
    """Responses with a token in the losses: what minibatches are to be made of."""
    return experience.mask.any(-1).nonzero().flatten()


def select(experience: Rows, rows: Int[Tensor, " rows"]) -> Rows:
    """The given responses of an experience, in the order given; no column is trimmed.

    Example:
        >>> from kleash.types import Rollout
        >>> ids, mask = torch.tensor([[1], [2], [3]]), torch.ones(3, 1) > 0
        >>> rollout = Rollout(ids, mask, ids, mask, mask[:, 0], ids[:, 0])
        >>> zero = torch.zeros(3, 1)
        >>> scored = ScoredRollout(rollout, zero, zero, zero, zero, zero[:, 0])
        >>> select(scored, torch.tensor([2, 0])).rollout.response_ids
        tensor([[3],
                [1]])
    """
    return replace(experience, **_rows_of(experience, rows))


def _rows_of(data: Any, rows: Int[Tensor, " rows"]) -> dict[str, Any]:
    """Rows of every tensor of a dataclass, and of the dataclasses it holds."""
    chosen: dict[str, Any] = {}
    for field in fields(data):
        value = getattr(data, field.name)
        if isinstance(value, Tensor):
            chosen[field.name] = value[rows]
        elif is_dataclass(value) and not isinstance(value, type):
            chosen[field.name] = replace(value, **_rows_of(value, rows))
    return chosen
