r"""The coefficient of the placement `mixed`: how much k1 noise the gradient should carry.

The gradient of the whole objective with charges and pathwise term mixed by c is, per response,

    ĝ(c) = ĝ(0) + c·h,     ĝ(0) = Σ_t A_t u_t,     h = Σ_t (D_t u_t − β v_t),

    u_t = ∇log π(a_t),   v_t = ∇KL_t,   D_t = β Σ_{s≥t} (k1_s − KL_s),

A_t being the advantages of `reward_k1`. The mean of h is 0: whatever c, the gradient is unbiased,
if c does not depend on the response it multiplies. The variance is least at

    c = − E⟨ĝ(0), h⟩ / E‖h‖².

No value of c is best everywhere. c = 1 (`exact`) removes the noise of k1, c = 0 keeps it, and c < 0
amplifies it: as the policy approaches the optimum, the k1 noise becomes the mirror image of the
reward noise and cancels it, completely at the optimum with c = 0. Part of the way there it is
only a part of its size, and c ≈ −(what is left of the way)/(what is done) is best.

The inner products are taken in the space of logits, where distinct states do not interact:
exact for a table of logits, a stand-in for a network. Only the variance depends on it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kleash.kl.estimators import sampled_kl
from kleash.masked import at_least_float32, masked_sum

RIDGE = 1e-6
"""Added to E‖h‖², as a share of E‖ĝ(0)‖²: where h is below a thousandth of the gradient, as at the
first step (policy = reference, h = rounding errors), c goes to 0 instead of amplifying them."""


@dataclass(frozen=True)
class GradientGeometry:
    """Inner products, per token, of the two gradients with respect to the logits."""

    score: Float[Tensor, "*shape"]
    """‖u‖² of u = ∇log π(a)."""
    cross: Float[Tensor, "*shape"]
    """⟨u, v⟩ with v = ∇KL."""
    pathwise: Float[Tensor, "*shape"]
    """‖v‖²."""


def gradient_geometry(
    logprobs: Float[Tensor, "*shape vocab"],
    ref_logprobs: Float[Tensor, "*shape vocab"],
    tokens: Int[Tensor, "*shape"],
) -> GradientGeometry:
    r"""Inner products of ∇log π(a) and ∇KL(π‖π_ref) with respect to the logits.

    With ℓ = log π − log π_ref, a the token,

        u = e_a − π                ‖u‖² = 1 − 2π_a + Σ π²
        v = π∘(ℓ − KL)             ‖v‖² = Σ π²(ℓ − KL)²
                                  ⟨u, v⟩ = π_a(ℓ_a − KL) − Σ π²(ℓ − KL)

    so that three sums over the vocabulary, Σ π², Σ π²ℓ and Σ π²ℓ², are all it takes.

    Args:
        logprobs: log π over the vocabulary, in nats; words of probability 0 take no part.
        ref_logprobs: the same under the reference.
        tokens: the sampled tokens.

    Returns:
        Three numbers per token. No gradient flows through them.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.5, 0.5]).log()
        >>> gradient_geometry(p, q, torch.tensor(0)).score
        tensor(0.5000)
    """
    p, q = at_least_float32(logprobs).detach(), at_least_float32(ref_logprobs).detach()
    probabilities = p.exp()
    log_ratio = torch.where(probabilities == 0, 0.0, p - q)
    kl = (probabilities * log_ratio).sum(-1, keepdim=True)
    pathwise = probabilities * (log_ratio - kl)
    chosen = tokens.unsqueeze(-1)
    return GradientGeometry(
        score=1 - 2 * probabilities.gather(-1, chosen)[..., 0] + probabilities.square().sum(-1),
        cross=pathwise.gather(-1, chosen)[..., 0] - (probabilities * pathwise).sum(-1),
        pathwise=pathwise.square().sum(-1),
    )


def kl_excess(
    logprobs: Float[Tensor, "batch token"],
    ref_logprobs: Float[Tensor, "batch token"],
    kl: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    decay: float = 1.0,
) -> Float[Tensor, "batch token"]:
    r"""How much more than expected the k1 of this token and of those after it came to.

        excess_t = Σ_{s≥t} decay^(s−t) · (k1_s − KL_s),      of mean 0 in every state

    The advantages of `mixed` are those of `reward_k1` plus c·β·excess_t, where the values follow
    the charges. With generalised advantage estimation (γ = 1) the decay is λ.

    Args:
        logprobs: log π of the sampled tokens, in nats.
        ref_logprobs: the same under the reference.
        kl: exact KL(π‖π_ref) in the state before each token, in nats.
        mask: True on the tokens of the response.
        decay: λ, in [0, 1].

    Returns:
        Excess in nats, 0 outside the mask. No gradient flows through it.

    Raises:
        ValueError: if `decay` is not in [0, 1].

    Example:
        >>> kl_excess(
        ...     torch.tensor([[-1.0, -2.0]]),
        ...     torch.tensor([[-1.5, -1.0]]),
        ...     torch.tensor([[0.25, 0.5]]),
        ...     torch.tensor([[True, True]]),
        ... )
        tensor([[-1.2500, -1.5000]])
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be in [0, 1], got {decay}")
    own = sampled_kl(logprobs, ref_logprobs, "k1") - at_least_float32(kl)
    own = torch.where(mask, own, 0.0).detach()
    running, columns = torch.zeros_like(own[:, 0]), [own[:, :0]]
    for t in reversed(range(own.shape[1])):
        running = own[:, t] + decay * running
        columns.append(running[:, None])
    return torch.where(mask, torch.cat(columns[::-1], -1), 0.0)


def mixing_coefficient(
    advantages: Float[Tensor, "batch token"],
    excess: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    beta: float,
    geometry: GradientGeometry | None = None,
) -> float:
    r"""The c that makes the gradient of the whole objective least noisy, from these responses.

        c = − Σ_t ⟨A u, D u − β v⟩_t / (Σ_t ‖D u − β v‖²_t + ridge),    D_t = β·excess_t

    Without `geometry` the returns alone decide, as if ‖u‖ were constant and v = 0:
    c = − Σ A D / (Σ D² + ridge), which needs no sum over the vocabulary and is close.

    Use it on other responses than these, or the gradient is biased: `cross_fitted_mixing`.
    c is often negative and is not limited here.

    Args:
        advantages: of the placement `reward_k1`, in units of the score, before any whitening.
        excess: from `kl_excess`, in nats.
        mask: True on the tokens of the response.
        beta: strength of the penalty, in score per nat.
        geometry: from `gradient_geometry`; None for the estimate from returns alone.

    Returns:
        The coefficient; 0 where advantages are all 0, or β is.

    Raises:
        ValueError: if nothing is kept, or `beta` is negative.

    Example:
        Half-way to the optimum the k1 noise is half of the reward noise and should be doubled:

        >>> advantages, kept = torch.tensor([[1.0, -1.0]]), torch.tensor([[True, True]])
        >>> round(mixing_coefficient(advantages, advantages / 0.1, kept, beta=0.1), 4)
        -1.0

    References:
        Control variates: Owen, "Monte Carlo theory, methods and examples", 2013, §8.9.
    """
    if beta < 0:
        raise ValueError(f"beta must not be negative, got {beta}")
    if not bool(mask.any()):
        raise ValueError("a mixing coefficient needs at least one kept token, got none")
    a, d = at_least_float32(advantages).detach(), beta * at_least_float32(excess).detach()
    if geometry is None:
        product, square, scale = a * d, d.square(), a.square()
    else:
        product = a * (d * geometry.score - beta * geometry.cross)
        square = d.square() * geometry.score - 2 * beta * d * geometry.cross
        square = square + beta**2 * geometry.pathwise
        scale = a.square() * geometry.score
    top = float(masked_sum(product.double(), mask))
    bottom = float(masked_sum(square.double(), mask) + RIDGE * masked_sum(scale.double(), mask))
    return 0.0 if bottom == 0 else -top / bottom


def cross_fitted_mixing(
    advantages: Float[Tensor, "batch token"],
    excess: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    half: Bool[Tensor, " batch"],
    *,
    beta: float,
    geometry: GradientGeometry | None = None,
) -> Float[Tensor, " batch"]:
    """One c per response, estimated from the other half of the batch, so that none is biased.

    Args:
        advantages: as for `mixing_coefficient`.
        excess: as for `mixing_coefficient`.
        mask: True on the tokens of the response.
        half: which half each response belongs to. Responses that share anything random, such
            as a baseline taken from their group, must be in the same half.
        beta: strength of the penalty, in score per nat.
        geometry: as for `mixing_coefficient`.

    Returns:
        The coefficient of the other half, for each response.

    Raises:
        ValueError: if a half has no kept token, or `beta` is negative.
    """
    first, second = (
        mixing_coefficient(advantages, excess, mask & rows[:, None], beta=beta, geometry=geometry)
        for rows in (half, ~half)
    )
    return torch.where(half, second, first).to(at_least_float32(excess))
