r"""Where the KL penalty enters the update, and which gradient each place really has.

The penalty is β·KL(π‖π_ref) of whole responses, and its gradient has two parts:

    ∇ Σ_t E[KL_t]  =  E[ Σ_t ∇KL_t ]  +  E[ Σ_t ∇log π(a_t) Σ_{s>t} KL_s ]
                      pathwise           score: what a_t does to all that follows

with KL_t the exact KL of the next-token distributions in the state c_t before token t. A placement
is a way to estimate it, in up to two pieces:

    charge_t     detached, subtracted (times β) from the reward of token t, so that the policy
                 gradient multiplies ∇log π(a_t) by the charges from t on;
    loss term_t  differentiable, added (times β and a weight) to the loss.

`charges` gives the first, `loss_terms` and `loss_weights` the second, `gradient_of` says what the
two together really follow. Proved by enumeration in `tests/test_placements.py`. Left out: clamps.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kleash.kl.estimators import Estimator, sampled_kl
from kleash.masked import at_least_float32, masked_sum

Placement = Literal[
    "reward_k1",
    "exact",
    "exact_weighted",
    "mixed",
    "measure",
    "reward_k2",
    "reward_k3",
    "reward_exact",
    "loss_k1",
    "loss_k2",
    "loss_k3",
    "loss_k3_weighted",
    "loss_exact",
]

GradientKind = Literal["exact", "token-local", "biased", "zero", "none"]


@dataclass(frozen=True)
class PlacementGradient:
    """What the expected gradient of a placement is."""

    kind: GradientKind
    """exact: of the KL of whole responses · token-local: its pathwise part alone · biased: of
    something else · zero: of nothing, though a penalty is meant · none: no penalty, by choice."""
    why: str
    """One sentence."""

    @property
    def sound(self) -> bool:
        """Whether the placement does what its user expects of it."""
        return self.kind in ("exact", "none")


_ESTIMATOR: dict[Placement, Estimator] = {
    "reward_k1": "k1",
    "reward_k2": "k2",
    "reward_k3": "k3",
    "loss_k1": "k1",
    "loss_k2": "k2",
    "loss_k3": "k3",
}

DIFFERENTIATES_KL: tuple[Placement, ...] = ("exact", "exact_weighted", "mixed", "loss_exact")
"""Placements whose loss needs the exact KL of the policy now, with its gradient."""

_GRADIENTS: dict[Placement, PlacementGradient] = {
    "reward_k1": PlacementGradient(
        "exact", "each token pays for the log-ratio of itself and all it led to"
    ),
    "exact": PlacementGradient(
        "exact",
        "the loss holds the pathwise gradient of the exact KL, the return the exact KL of strictly"
        " later states",
    ),
    "exact_weighted": PlacementGradient(
        "exact",
        "the loss holds every state's exact KL, weighted by how much likelier the policy now is to"
        " come there, also where another policy sampled",
    ),
    "mixed": PlacementGradient(
        "exact",
        "any mixture of reward_k1 and exact is unbiased if its coefficient does not depend on the"
        " responses it multiplies",
    ),
    "measure": PlacementGradient("none", "nothing is penalised; the KL is only measured"),
    "reward_k2": PlacementGradient(
        "biased",
        "k2 in the reward follows the gradient of E[k2] less a part of it, and can point away from"
        " the KL's",
    ),
    "reward_k3": PlacementGradient(
        "biased",
        "k3 in the reward follows the gradient of E[k3] less the part that k3 in the loss would"
        " add, and can point away from the KL's",
    ),
    "reward_exact": PlacementGradient(
        "biased",
        "a state's exact KL does not depend on the token chosen there, so as a reward it is only a"
        " baseline and the pathwise part is lost",
    ),
    "loss_k1": PlacementGradient(
        "zero", "differentiating k1 gives Σ_t ∇log π, whose expectation is 0"
    ),
    "loss_k2": PlacementGradient(
        "token-local",
        "differentiating k2 gives the gradient of each token's own KL without the states that"
        " follow, and that on fresh samples only",
    ),
    "loss_k3": PlacementGradient(
        "biased",
        "differentiating k3 follows KL(π_ref‖π), the other direction, at each token alone",
    ),
    "loss_k3_weighted": PlacementGradient(
        "token-local",
        "differentiating ρ·k3 gives the gradient of each token's own KL without the states that"
        " follow",
    ),
    "loss_exact": PlacementGradient(
        "token-local",
        "differentiating the exact KL of each token ignores that tokens change which states follow",
    ),
}


def gradient_of(placement: Placement) -> PlacementGradient:
    """What the expected gradient of a placement really is, and why, in one sentence.

    Args:
        placement: one of the names of `Placement`.

    Returns:
        Its kind and the reason.

    Raises:
        ValueError: if there is no such placement.

    Example:
        >>> gradient_of("reward_k1").kind, gradient_of("loss_k3").kind
        ('exact', 'biased')

    References:
        Tang and Munos, 2025, https://arxiv.org/abs/2506.09477. Amini, Vieira and Cotterell,
        2025, https://arxiv.org/abs/2504.10637. Liu et al., 2025,
        https://arxiv.org/abs/2510.01555.
    """
    if placement not in _GRADIENTS:
        names = ", ".join(get_args(Placement))
        raise ValueError(f"placement must be one of {names}, got {placement!r}")
    return _GRADIENTS[placement]


def check_placement(placement: Placement, *, allow_biased: bool) -> None:
    """Refuse a placement whose gradient is not that of the penalty it stands for.

    Args:
        placement: one of the names of `Placement`.
        allow_biased: accept it all the same.

    Raises:
        ValueError: if there is no such placement, or its gradient is token-local, biased or zero
            and `allow_biased` is False.

    Example:
        >>> check_placement("loss_k1", allow_biased=False)
        Traceback (most recent call last):
            ...
        ValueError: placement 'loss_k1' has a zero gradient instead of the KL's: differentiating
        k1 gives Σ_t ∇log π, whose expectation is 0; use 'reward_k1' or 'exact', or set
        allow_biased
    """
    gradient = gradient_of(placement)
    if not (gradient.sound or allow_biased):
        raise ValueError(
            f"placement {placement!r} has a {gradient.kind} gradient instead of the KL's:"
            f" {gradient.why}; use 'reward_k1' or 'exact', or set allow_biased"
        )


def charges(
    placement: Placement,
    *,
    logprobs: Float[Tensor, "batch token"],
    ref_logprobs: Float[Tensor, "batch token"],
    kl: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    mixing: float | Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch token"]:
    r"""What each token is charged in the reward: r_t = −β·charge_t (+ score at the end).

        reward_k1      k1_t
        exact          KL_{t+1}, the exact KL of the state the token led to; 0 at the last token
        mixed          (1 − c)·k1_t + c·KL_{t+1}
        reward_k2, _k3 k2_t, k3_t
        reward_exact   KL_t
        others         0

    KL_t is a function of the state alone: `exact` leaves it to the loss term, so that a value
    model fitted to these returns leaves out the KL of the present state.

    Args:
        placement: one of the names of `Placement`.
        logprobs: log π of the sampled tokens under the policy that sampled them, in nats.
        ref_logprobs: the same under the reference.
        kl: exact KL(π‖π_ref) in the state before each token, in nats.
        mask: True on the tokens of the response.
        mixing: c of `mixed`: one number, or one per response; None for all other placements.

    Returns:
        Charges in nats, 0 outside the mask. No gradient flows through them.

    Raises:
        ValueError: if there is no such placement, or `mixing` is missing or out of place.

    Example:
        >>> row = dict(
        ...     logprobs=torch.tensor([[-1.0, -2.0]]),
        ...     ref_logprobs=torch.tensor([[-1.5, -1.0]]),
        ...     kl=torch.tensor([[0.2, 0.4]]),
        ...     mask=torch.tensor([[True, True]]),
        ... )
        >>> charges("reward_k1", **row), charges("exact", **row)
        (tensor([[ 0.5000, -1.0000]]), tensor([[0.4000, 0.0000]]))
    """
    coefficient = _mixing(placement, mixing).to(at_least_float32(kl))
    match placement:
        case "reward_k1" | "reward_k2" | "reward_k3":
            charge = sampled_kl(logprobs, ref_logprobs, _ESTIMATOR[placement])
        case "exact":
            charge = _next_kl(kl, mask)
        case "mixed":
            k1 = sampled_kl(logprobs, ref_logprobs)
            charge = k1 + coefficient * (_next_kl(kl, mask) - k1)
        case "reward_exact":
            charge = at_least_float32(kl)
        case _:
            charge = torch.zeros_like(at_least_float32(kl))
    return torch.where(mask, charge, 0.0).detach()


def loss_weights(
    placement: Placement,
    *,
    mask: Bool[Tensor, "batch token"],
    mixing: float | Float[Tensor, " batch"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "batch token"] | None:
    r"""Weight of each token's `loss_terms` in the loss, to be multiplied by β.

    1 for `exact`, `exact_weighted` and the `loss_*` placements, c for `mixed`. Together with a
    policy loss that sums −A_t log π(a_t) over tokens, the penalty is β·Σ_t weight_t·term_t; divide
    both by the same number. Where advantages are divided by their standard deviation, divide the
    weights by it too, or the two parts of the gradient no longer fit.

    Args:
        placement: one of the names of `Placement`.
        mask: True on the tokens of the response.
        mixing: c of `mixed`: one number, or one per response; None for all other placements.
        dtype: of the result.

    Returns:
        Weights, 0 outside the mask; None where the placement has no loss term.

    Raises:
        ValueError: as for `charges`.

    Example:
        >>> loss_weights("mixed", mask=torch.tensor([[True, False]]), mixing=0.25)
        tensor([[0.2500, 0.0000]])
    """
    coefficient = _mixing(placement, mixing).to(mask.device)
    if placement in ("reward_k1", "measure", "reward_k2", "reward_k3", "reward_exact"):
        return None
    return torch.where(mask, coefficient, 0.0).to(dtype)


def loss_terms(
    placement: Placement,
    *,
    logprobs: Float[Tensor, "batch token"],
    rollout_logprobs: Float[Tensor, "batch token"],
    ref_logprobs: Float[Tensor, "batch token"],
    kl: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
) -> Float[Tensor, "batch token"] | None:
    r"""The differentiable term of each token in the loss, before weight and β.

        exact, mixed, loss_exact   KL_t, exact, of the policy now
        exact_weighted             w_{<t}·KL_t with `prefix_weights`, differentiable in both
        loss_k1, _k2, _k3          k1_t, k2_t, k3_t of the policy now
        loss_k3_weighted           ρ_t·k3_t with ρ_t = π(a_t)/π_rollout(a_t) differentiable
        others                     none

    Args:
        placement: one of the names of `Placement`.
        logprobs: log π of the sampled tokens under the policy now; gradients flow.
        rollout_logprobs: the same under the policy that sampled them.
        ref_logprobs: the same under the reference.
        kl: exact KL(π‖π_ref) of the policy now in the state before each token; gradients flow.
        mask: True on the tokens of the response.

    Returns:
        Terms in nats, 0 outside the mask; None where the placement has none.

    Raises:
        ValueError: if there is no such placement.
    """
    # Selected before anything non-linear: outside the mask its gradient could be NaN.
    now, reference = (torch.where(mask, x, 0.0) for x in (logprobs, ref_logprobs))
    match placement:
        case "exact" | "mixed" | "loss_exact":
            term = at_least_float32(kl)
        case "exact_weighted":
            weights = prefix_weights(logprobs, rollout_logprobs, mask)
            term = weights * torch.where(mask, at_least_float32(kl), 0.0)
        case "loss_k1" | "loss_k2" | "loss_k3":
            term = sampled_kl(now, reference, _ESTIMATOR[placement])
        case "loss_k3_weighted":
            ratio = _masked_log_ratio(logprobs, rollout_logprobs, mask).exp()
            term = ratio * sampled_kl(now, reference, "k3")
        case _:
            gradient_of(placement)
            return None
    return torch.where(mask, term, 0.0)


def prefix_weights(
    logprobs: Float[Tensor, "batch token"],
    rollout_logprobs: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
) -> Float[Tensor, "batch token"]:
    r"""w_{<t} = Π_{s<t} π(a_s)/π_rollout(a_s): how much likelier c_t has become; w_{<0} = 1.

    The expectation over rollouts of Σ_t w_{<t}·f(c_t) is that of Σ_t f(c_t) under the policy now.

    Args:
        logprobs: log π of the sampled tokens under the policy now; gradients flow.
        rollout_logprobs: the same under the policy that sampled them.
        mask: True on the tokens of the response.

    Returns:
        Weights, differentiable in `logprobs`, 0 outside the mask.

    Example:
        >>> then, now = torch.tensor([[[0.25, 0.6, 0.3]], [[0.5, 0.6, 0.9]]]).log()
        >>> prefix_weights(now, then, torch.ones(1, 3, dtype=torch.bool))
        tensor([[1., 2., 2.]])
    """
    log_ratio = _masked_log_ratio(logprobs, rollout_logprobs, mask)
    before = log_ratio.cumsum(-1) - log_ratio
    return torch.where(mask, before.exp(), 0.0)


def off_policy_exact_loss(
    logprobs: Float[Tensor, "batch token"],
    rollout_logprobs: Float[Tensor, "batch token"],
    kl: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
) -> Float[Tensor, " batch"]:
    r"""The exact KL of the policy now, from another policy's responses, and its exact gradient.

        loss = Σ_t w_{<t}·KL_t,     E_rollout[loss] = KL(π‖π_ref) of whole responses

    Gradients flow through both factors: KL_t gives the pathwise part, w_{<t} the score part. On
    fresh samples it equals the placement `exact`, response by response. It is the sum of the terms
    of the placement `exact_weighted`, which charges nothing beside it.

    Args:
        logprobs: log π of the sampled tokens under the policy now; gradients flow.
        rollout_logprobs: the same under the policy that sampled them.
        kl: exact KL(π‖π_ref) of the policy now in the state before each token; gradients flow.
        mask: True on the tokens of the response.

    Returns:
        One unbiased estimate per response, in nats.
    """
    weights = prefix_weights(logprobs, rollout_logprobs, mask)
    return masked_sum(weights * torch.where(mask, at_least_float32(kl), 0.0), mask, dim=-1)


def effective_sample_size(
    weights: Float[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
) -> Float[Tensor, ""]:
    r"""Kish's effective sample size (Σ w)²/Σ w²: how many equally weighted tokens are as good.

    Between 1 and the number of kept tokens, which it equals when all weights are the same. A
    small share of that number means that a few responses decide the estimate.

    Args:
        weights: importance weights, such as `prefix_weights`.
        mask: True on the tokens that count.

    Returns:
        The effective number of tokens. No gradient flows through it.

    Raises:
        ValueError: if no kept weight is positive.

    Example:
        >>> effective_sample_size(torch.tensor([[1.0, 1.0, 2.0]]), torch.ones(1, 3) > 0)
        tensor(2.6667)
    """
    # Divided by the largest, so that squares of large weights do not overflow.
    kept = torch.where(mask, at_least_float32(weights.detach()), 0.0)
    largest = kept.max() if kept.numel() else kept.sum()
    if not float(largest) > 0:
        raise ValueError(f"weights must include a positive kept one, got at most {float(largest)}")
    shares = kept / largest
    return shares.sum().square() / shares.square().sum()


def _masked_log_ratio(
    logprobs: Float[Tensor, "batch token"],
    rollout_logprobs: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
) -> Float[Tensor, "batch token"]:
    """log π/π_rollout of each token, 0 outside the mask."""
    log_ratio = at_least_float32(logprobs) - at_least_float32(rollout_logprobs)
    return torch.where(mask, log_ratio, 0.0)


def _next_kl(
    kl: Float[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch token"]:
    """KL_{t+1} at token t; 0 where no token follows."""
    kept = torch.where(mask, at_least_float32(kl), 0.0)
    return torch.cat([kept[:, 1:], torch.zeros_like(kept[:, :1])], -1)


def _mixing(
    placement: Placement, mixing: float | Float[Tensor, " batch"] | None
) -> Float[Tensor, "#batch 1"]:
    """The share of `exact` in the placement, 1 where the question does not arise."""
    gradient_of(placement)
    if (placement == "mixed") != (mixing is not None):
        raise ValueError(
            "mixing must be given for placement 'mixed' and for no other, got"
            f" {mixing!r} for {placement!r}"
        )
    share = 1.0 if mixing is None else mixing
    return torch.as_tensor(share, dtype=torch.float64).detach().reshape(-1, 1)
