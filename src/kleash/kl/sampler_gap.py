r"""How far the sampler's law σ is from the trainer's π, both ways, from the sampled tokens alone.

Tokens come from σ, and of each the engine reports log σ and the trainer log π. With r = π/σ,

    KL(σ‖π)  of responses, k1:    −Σ_t log r_t             unbiased, as noisy as the samples
    KL(σ‖π)  of a state:          r − 1 − log r            unbiased, never negative
    KL(π‖σ)  of a state:          r log r − r + 1          unbiased, never negative

the latter two averaged over the states that σ came to. Both need σ to give every token that π may
write some probability: where a tail is cut off (top-p), r − 1 − log r sees the cut as smaller than
it is, and k1 does not. Full-vocabulary distributions have neither noise nor that limit:
`exact_gap`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kleash.kl.estimators import sampled_kl
from kleash.kl.statistics import Estimate, clustered_mean, clustered_ratio, response_kl


@dataclass(frozen=True)
class SamplerGap:
    """The KL between sampler and trainer, with standard errors clustered by prompt."""

    per_response: Estimate
    """KL(σ‖π) in nats per response, by k1; a batch may well be negative."""
    per_token: Estimate
    """KL(σ‖π) in nats per token, by k3."""
    reverse_per_token: Estimate
    """KL(π‖σ) in nats per token, in the states of σ."""


def sampler_gap(
    rollout_logprobs: Float[Tensor, "batch token"],
    sampler_logprobs: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    prompt_index: Int[Tensor, " batch"],
) -> SamplerGap:
    """Estimate both directions of the KL between sampler and trainer.

    Args:
        rollout_logprobs: log π of the sampled tokens as the trainer scored them, in nats.
        sampler_logprobs: log σ of the same tokens as the engine reports it.
        mask: True on the tokens of the response.
        prompt_index: which prompt each response answers.

    Returns:
        Three estimates; see `SamplerGap`.

    Raises:
        ValueError: if there is no response, or a log-probability of a kept token is NaN.

    Example:
        >>> then, now = torch.tensor([[[0.25, 0.5]], [[0.5, 0.5]]]).log()
        >>> gap = sampler_gap(now, then, torch.ones(1, 2) > 0, torch.tensor([0]))
        >>> round(gap.per_token.mean, 4), round(gap.reverse_per_token.mean, 4)
        (0.1534, 0.1931)
    """
    # In float64: of two laws that agree, both estimates are differences of nearly equal numbers.
    trainer, sampler = (
        torch.where(mask, x.detach().double(), 0.0) for x in (rollout_logprobs, sampler_logprobs)
    )
    log_ratio = trainer - sampler
    reverse = log_ratio * log_ratio.exp() - log_ratio.expm1()
    tokens = mask.sum(-1)
    return SamplerGap(
        per_response=clustered_mean(response_kl(-log_ratio, mask), prompt_index),
        per_token=clustered_ratio(
            response_kl(sampled_kl(sampler, trainer, "k3"), mask), tokens.double(), prompt_index
        ),
        reverse_per_token=clustered_ratio(
            response_kl(reverse, mask), tokens.double(), prompt_index
        ),
    )


def exact_gap(
    rollout_logprobs: Float[Tensor, "token vocab"], sampler_logprobs: Float[Tensor, "token vocab"]
) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
    r"""KL(σ‖π) and KL(π‖σ) of each state, from both distributions over the whole vocabulary.

    Args:
        rollout_logprobs: log π of every word in each state, in nats, normalised.
        sampler_logprobs: log σ of the same words; −∞ where σ never writes a word.

    Returns:
        Both directions in nats, float64; infinite where one law writes what the other never does.

    Example:
        >>> pi, sigma = torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]]).log()
        >>> exact_gap(pi, sigma)
        (tensor([0.6931], dtype=torch.float64), tensor([inf], dtype=torch.float64))
    """
    pi, sigma = rollout_logprobs.double(), sampler_logprobs.double()

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        # A word of probability 0 adds nothing, whatever the other law says of it.
        return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)

    return divergence(sigma, pi), divergence(pi, sigma)
