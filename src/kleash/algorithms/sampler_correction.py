r"""Weights for a rollout that another law wrote: σ, the generation engine's, in place of π.

An engine with other kernels, a narrower number format or weights of the step before writes tokens
from σ and reports log σ; the trainer scores the same tokens as π_rollout. With the ratio

    r_t = π_rollout(y_t) / σ(y_t)

a correction multiplies what token t adds to the policy's loss by a weight that has no gradient:

    none                 1
    token_truncated      min(r_t, c)
    sequence_truncated   min(Π_s r_s, c), the same for every token of the response
    masked               r_t where 1/c ≤ r_t ≤ c, else 0: the token leaves the update

and the differentiable KL of the placement by `kl_weights`. What the expected gradient under σ is
then, `correction_gradient` says; it is proved by enumeration in
`tests/algorithms/test_sampler_correction.py`. The ratio of the update itself, π / π_rollout, stays
in the loss and is clipped there: the two multiply to π/σ.

Left out: dividing by the mean weight, which would make every weight depend on all responses. A
critic is fitted to all tokens alike: as a baseline it biases nothing.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kleash.errors import ScoringError
from kleash.kl.placements import (
    DIFFERENTIATES_KL,
    Placement,
    effective_sample_size,
    gradient_of,
    prefix_weights,
)
from kleash.types import Experience, ScoredRollout

Correction = Literal["none", "token_truncated", "sequence_truncated", "masked"]

CorrectionKind = Literal["uncorrected", "token-local", "truncated", "exact"]


@dataclass(frozen=True)
class CorrectionGradient:
    """What the expected gradient of a corrected rollout is."""

    kind: CorrectionKind
    """exact: that of the policy's own samples · truncated: the same but for what the clip cuts off
    · token-local: each token's own choice corrected, the states it is met in still the sampler's ·
    uncorrected: nothing is corrected."""
    why: str
    """One sentence."""


def check_correction(correction: str, clip: float | None) -> None:
    """Refuse a name that does not exist and a clip that does not fit it.

    Args:
        correction: one of the names of `Correction`.
        clip: c, above 1; None: no clip.

    Raises:
        ValueError: naming what was expected.

    Example:
        >>> check_correction("masked", None)
        Traceback (most recent call last):
            ...
        ValueError: the correction 'masked' leaves out what is beyond its clip and needs one, got
        None: give a number above 1, such as 2
    """
    if correction not in get_args(Correction):
        names = ", ".join(get_args(Correction))
        raise ValueError(f"the correction must be one of {names}, got {correction!r}")
    if clip is not None and not 1 < clip < math.inf:
        raise ValueError(
            f"the clip of a correction must be above 1 and finite, got {clip}: a ratio of 1 is a "
            "sampler that agrees; give None for no clip"
        )
    if correction == "masked" and clip is None:
        raise ValueError(
            "the correction 'masked' leaves out what is beyond its clip and needs one, got None: "
            "give a number above 1, such as 2"
        )


def correction_gradient(
    correction: Correction, clip: float | None, placement: Placement
) -> CorrectionGradient:
    """What the expected gradient of the leash is when σ wrote the responses and π learns.

    `exact_weighted` carries the ratio of the whole prefix in its loss, and `corrected` lets it
    begin at σ: its KL is exact under every correction, whatever the clip.

    Args:
        correction: one of the names of `Correction`.
        clip: c; None: no clip.
        placement: where the KL is charged.

    Returns:
        Its kind and the reason, in one sentence.

    Raises:
        ValueError: as `check_correction`, or if there is no such placement.

    Example:
        >>> correction_gradient("sequence_truncated", None, "reward_k1").kind
        'exact'
        >>> correction_gradient("token_truncated", None, "reward_k1").kind
        'token-local'
        >>> correction_gradient("token_truncated", 2.0, "exact_weighted").kind
        'exact'
    """
    check_correction(correction, clip)
    gradient_of(placement)
    if correction == "none":
        return CorrectionGradient("uncorrected", "tokens count as if the policy had written them")
    if placement == "exact_weighted":
        return CorrectionGradient(
            "exact",
            "the KL of each state is weighted by how much likelier the policy is than the sampler "
            "to come there",
        )
    if correction == "sequence_truncated":
        if clip is None:
            return CorrectionGradient(
                "exact", "each response counts by how much likelier the policy is to write it"
            )
        return CorrectionGradient(
            "truncated",
            "each response counts by how much likelier the policy is to write it, up to the clip",
        )
    return CorrectionGradient(
        "token-local",
        "each token is weighted by its own ratio, but the states before it and the returns after "
        "it are still the sampler's",
    )


def sampler_weights(
    correction: Correction,
    *,
    rollout_logprobs: Float[Tensor, "batch token"],
    sampler_logprobs: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    clip: float | None,
) -> Float[Tensor, "batch token"]:
    r"""Weight of each token in the policy's loss; the formulas are those of this module.

    Args:
        correction: one of the names of `Correction`.
        rollout_logprobs: log π_rollout of the tokens, in nats.
        sampler_logprobs: log σ of the same tokens as the engine that wrote them reports it.
        mask: True on the tokens of the response.
        clip: c, above 1; None: no clip.

    Returns:
        Weights, float64 and at least 0; 0 outside the mask. No gradient flows through them.

    Raises:
        ValueError: as `check_correction`.
        ScoringError: if a weight is not finite, naming response and token.

    Example:
        >>> then, now = torch.tensor([[[0.5, 0.2]], [[0.25, 0.8]]]).log()
        >>> row = dict(rollout_logprobs=now, sampler_logprobs=then, mask=torch.ones(1, 2) > 0)
        >>> sampler_weights("token_truncated", **row, clip=3.0)
        tensor([[0.5000, 3.0000]], dtype=torch.float64)
        >>> sampler_weights("sequence_truncated", **row, clip=3.0)
        tensor([[2.0000, 2.0000]], dtype=torch.float64)
        >>> sampler_weights("masked", **row, clip=3.0)
        tensor([[0.5000, 0.0000]], dtype=torch.float64)

    References:
        Ionides, "Truncated importance sampling", 2008. Espeholt et al., "IMPALA", 2018,
        https://arxiv.org/abs/1802.01561 (the token's ratio, truncated).
    """
    check_correction(correction, clip)
    if correction == "none":
        return mask.double()
    log_ratio = _log_ratio(correction, rollout_logprobs, sampler_logprobs, mask)
    beyond = _beyond_clip(log_ratio, correction, clip)
    if correction == "masked":
        weights = torch.where(beyond, 0.0, log_ratio.exp())
    else:
        weights = torch.where(beyond, clip or math.inf, log_ratio.exp())
    _require_finite(weights, rollout_logprobs, sampler_logprobs)
    return torch.where(mask, weights, 0.0)


def kl_weights(
    weights: Float[Tensor, "batch token"],
    correction: Correction,
    placement: Placement,
    *,
    rollout_logprobs: Float[Tensor, "batch token"],
    sampler_logprobs: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
) -> Float[Tensor, "batch token"]:
    r"""Weight of each token's differentiable KL, beside that of the placement.

    An exact KL_t belongs to the state before token t, whatever token follows; an estimate of it
    (k1, k2, k3) belongs to the token:

        exact_weighted                  Π_{s<t} r_s: the placement's own ratios begin at σ
        other exact KL, token weights   1; masked: 0 where the token left the update
        everything else                 the weight of the token

    Args:
        weights: `sampler_weights` of the same correction.
        correction: one of the names of `Correction`.
        placement: where the KL is charged.
        rollout_logprobs: log π_rollout of the tokens, in nats.
        sampler_logprobs: log σ of the same tokens.
        mask: True on the tokens of the response.

    Returns:
        Weights, 0 outside the mask.

    Raises:
        ScoringError: if a weight is not finite, naming response and token.
    """
    if correction == "none" or placement not in DIFFERENTIATES_KL:
        return weights
    if placement == "exact_weighted":
        found = prefix_weights(rollout_logprobs.double(), sampler_logprobs.double(), mask)
        _require_finite(found, rollout_logprobs, sampler_logprobs)
        return found
    if correction == "token_truncated":
        return mask.double()
    if correction == "masked":
        return (weights > 0).double()
    return weights


def prefix_start(
    scored: ScoredRollout, correction: Correction, placement: Placement
) -> Float[Tensor, "batch token"]:
    """log-probabilities of the law at which a placement's prefix weights begin.

    The sampler's, where `exact_weighted` is corrected; else those of the trainer's score.
    """
    written = scored.rollout.sampler_logprobs
    if correction == "none" or placement != "exact_weighted" or written is None:
        return scored.rollout_logprobs
    return written


def corrected(
    experience: Experience, correction: Correction, clip: float | None, placement: Placement
) -> Experience:
    """An experience whose advantages and KL weights account for who wrote the responses.

    Args:
        experience: as the algorithm prepared it.
        correction: one of the names of `Correction`.
        clip: c, above 1; None: no clip.
        placement: where the KL is charged.

    Returns:
        The same, with advantages multiplied by `sampler_weights` and the weights of the
        differentiable KL by `kl_weights`; unchanged for `none`.

    Raises:
        ValueError: if the sampler gave no log-probabilities.
        ScoringError: if a weight is not finite, or no token is left to learn from.
    """
    if correction == "none":
        return experience
    scored = experience.scored
    written, mask = scored.rollout.sampler_logprobs, scored.rollout.response_mask
    if written is None:
        raise ValueError(
            f"the correction {correction!r} needs the sampler's log-probabilities, got "
            "sampler_logprobs=None: take an engine that reports them, or no correction"
        )
    laws = {
        "rollout_logprobs": scored.rollout_logprobs,
        "sampler_logprobs": written,
        "mask": mask,
    }
    weights = sampler_weights(correction, **laws, clip=clip)
    if correction == "masked" and not bool((weights[experience.mask] > 0).any()):
        raise ScoringError(
            f"expected some tokens with a ratio π/σ within 1/{clip:g} and {clip:g} "
            "(rollout.correction: masked), got none: the engine does not write with the policy's "
            "weights, temperature and number format"
        )
    dtype, pathwise = experience.advantages.dtype, experience.pathwise
    if pathwise is not None:
        pathwise = pathwise * kl_weights(weights, correction, placement, **laws).to(pathwise.dtype)
    return replace(
        experience,
        advantages=torch.where(experience.mask, experience.advantages * weights.to(dtype), 0.0),
        pathwise=pathwise,
    )


def correction_numbers(
    correction: Correction,
    rollout_logprobs: Float[Tensor, "batch token"],
    sampler_logprobs: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    clip: float | None,
) -> dict[str, float]:
    r"""How much a correction has to do; arguments as of `sampler_weights`.

    Returns:
        `effective_samples`, Kish's (Σ w)²/Σ w² as a share of the tokens; `clipped`, the share of
        tokens whose weight the clip changed; and `mean_weight`, which without a clip is 1 in
        expectation: what it lacks is the probability that the clip cut off.
    """
    laws = {
        "rollout_logprobs": rollout_logprobs,
        "sampler_logprobs": sampler_logprobs,
        "mask": mask,
    }
    weights = sampler_weights(correction, **laws, clip=clip)
    log_ratio = _log_ratio(correction, **laws)
    beyond = mask & _beyond_clip(log_ratio, correction, clip)
    tokens = int(mask.sum())
    return {
        "effective_samples": float(effective_sample_size(weights, mask)) / tokens,
        "clipped": int(beyond.sum()) / tokens,
        "mean_weight": float(weights.sum()) / tokens,
    }


def _log_ratio(
    correction: Correction,
    rollout_logprobs: Float[Tensor, "batch token"],
    sampler_logprobs: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
) -> Float[Tensor, "batch token"]:
    """log of the ratio that a correction looks at, of the token or of the whole response.

    In float64, for a product over a long response; 0 outside the mask.
    """
    difference = rollout_logprobs.detach().double() - sampler_logprobs.detach().double()
    log_ratio = torch.where(mask, difference, 0.0)
    # Before any clip: a token that its own sampler gives no probability is not to become a weight.
    _require_finite(log_ratio, rollout_logprobs, sampler_logprobs)
    if correction == "sequence_truncated":
        return log_ratio.sum(-1, keepdim=True).expand_as(log_ratio)
    return log_ratio


def _beyond_clip(
    log_ratio: Float[Tensor, "batch token"], correction: Correction, clip: float | None
) -> Bool[Tensor, "batch token"]:
    """Which ratios the clip changes: large ones, and for `masked` small ones too."""
    if clip is None:
        return torch.zeros_like(log_ratio, dtype=torch.bool)
    size = log_ratio.abs() if correction == "masked" else log_ratio
    return size > math.log(clip)


def _require_finite(
    numbers: Float[Tensor, "batch token"],
    rollout_logprobs: Float[Tensor, "batch token"],
    sampler_logprobs: Float[Tensor, "batch token"],
) -> None:
    bad = (~numbers.isfinite()).nonzero()
    if len(bad):
        row, token = bad[0].tolist()
        raise ScoringError(
            "expected a finite ratio π/σ, got log π = "
            f"{float(rollout_logprobs[row, token]):.6g} and log σ = "
            f"{float(sampler_logprobs[row, token]):.6g} at {{place}}: the engine does not write "
            "with the policy's weights, or rollout.correction needs a clip",
            response=row,
            token=token,
        )
