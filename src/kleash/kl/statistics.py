"""From tokens to responses to a mean with an honest standard error.

Responses to one prompt resemble each other: they share its difficulty. Standard errors therefore
treat the prompt, not the response and never the token, as the unit that was sampled.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kleash.masked import masked_sum


@dataclass(frozen=True)
class Estimate:
    """A mean and how far to trust it."""

    mean: float
    standard_error: float | None
    """Standard error of the mean, clustered by prompt; None where it cannot be known: with a
    single prompt nothing says how prompts differ, and an infinite value has no spread."""
    n: int
    """Number of responses."""
    clusters: int
    """Number of distinct prompts."""


def response_kl(
    kl: Float[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
) -> Float[Tensor, " batch"]:
    """Σ_t kl_t of each response: the KL in nats per response.

    Args:
        kl: per-token KL, in nats.
        mask: True on the tokens of the response.

    Returns:
        One sum per response, in nats.

    Example:
        >>> response_kl(torch.tensor([[0.2, 0.4, 9.0]]), torch.tensor([[True, True, False]]))
        tensor([0.6000])
    """
    return masked_sum(kl, mask, dim=-1)


def clustered_mean(
    values: Float[Tensor, " batch"], prompt_index: Int[Tensor, " batch"]
) -> Estimate:
    r"""Mean over responses, with a standard error clustered by prompt.

        mean = Σ_i x_i / n,     s.e.² = G/(G−1) · Σ_g (Σ_{i in g} (x_i − mean))² / n²

    over G prompts g. With as many responses to each prompt it is the standard error of the
    prompts' means; with one response to each, the ordinary one.

    Args:
        values: one number per response.
        prompt_index: which prompt each response answers; equal numbers are one cluster.

    Returns:
        The estimate, accumulated in float64. Its standard error is None with a single prompt.

    Raises:
        ValueError: if there are no responses, or the values are NaN or infinite in both
            directions.

    Example:
        >>> clustered_mean(torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([0, 0, 1, 1]))
        Estimate(mean=4.0, standard_error=2.0, n=4, clusters=2)

    References:
        Liang and Zeger, "Longitudinal data analysis using generalized linear models", 1986.
        Miller, "Adding Error Bars to Evals", 2024, https://arxiv.org/abs/2411.00640, §2.2.
    """
    return clustered_ratio(values, torch.ones_like(values), prompt_index)


def clustered_ratio(
    numerators: Float[Tensor, " batch"],
    denominators: Float[Tensor, " batch"],
    prompt_index: Int[Tensor, " batch"],
) -> Estimate:
    r"""Ratio of two sums over responses, such as nats per token, with a clustered standard error.

        R = Σ_i a_i / Σ_i b_i,   s.e.² = G/(G−1) · Σ_g (Σ_{i in g} (a_i − R b_i))² / (Σ_i b_i)²

    to first order in the fluctuations of the two sums (the delta method).

    Args:
        numerators: a_i, such as the KL of each response.
        denominators: b_i, such as its number of tokens.
        prompt_index: which prompt each response answers; equal numbers are one cluster.

    Returns:
        The estimate, accumulated in float64. Its standard error is None with a single prompt.

    Raises:
        ValueError: if there are no responses, the numerators are NaN or infinite in both
            directions, or the denominators' sum is not positive and finite.

    Example:
        >>> kl, tokens = torch.tensor([1.0, 3.0]), torch.tensor([10.0, 10.0])
        >>> clustered_ratio(kl, tokens, torch.tensor([0, 1]))
        Estimate(mean=0.2, standard_error=0.1, n=2, clusters=2)
    """
    n = numerators.shape[0]
    if n == 0:
        raise ValueError("a mean needs at least one response, got none")
    a, b = numerators.detach().double(), denominators.detach().double()
    total = float(b.sum())
    if not 0 < total < math.inf:
        raise ValueError(f"denominators must have a positive, finite sum, got {total}")
    mean = float(a.sum()) / total
    if math.isnan(mean):
        rows = (~torch.isfinite(a)).nonzero().flatten().tolist()
        raise ValueError(f"values must have a mean, got {a[rows].tolist()} for responses {rows}")
    _, cluster = prompt_index.unique(return_inverse=True)
    clusters = int(cluster.max()) + 1
    if clusters == 1 or not math.isfinite(mean):
        return Estimate(mean, None, n, clusters)
    sums = a.new_zeros(clusters).index_add(0, cluster, a - mean * b)
    variance = clusters / (clusters - 1) * float(sums.square().sum()) / total**2
    return Estimate(mean, math.sqrt(variance), n, clusters)


def variance_of(
    scores: Float[Tensor, " batch"], prompt_index: Int[Tensor, " batch"]
) -> float | None:
    r"""Variance of scores, within prompts where there are several responses to some.

        Var = Σ_g Σ_{i in g} (s_i − mean_g)² / (n − G)

    over G prompts g; with one response to each, the variance of all of them.

    Args:
        scores: one number per response.
        prompt_index: which prompt each response answers; equal numbers are one group.

    Returns:
        The unbiased variance, in score²; None for a single response.

    Example:
        >>> variance_of(torch.tensor([1.0, 3.0, 8.0, 8.0]), torch.tensor([0, 0, 1, 1]))
        1.0
    """
    prompts, index = prompt_index.unique(return_inverse=True)
    scores, count = scores.double(), len(scores)
    within = count > len(prompts)
    groups = index if within else torch.zeros_like(index)
    sums = scores.new_zeros(len(prompts)).index_add(0, groups, scores)
    sizes = scores.new_zeros(len(prompts)).index_add(0, groups, torch.ones_like(scores))
    freedom = count - (len(prompts) if within else 1)
    if freedom < 1:
        return None
    means = sums / sizes.clamp(min=1)
    return float((scores - means[groups]).square().sum()) / freedom


def best_of_n_kl(n: int) -> float:
    r"""KL spent by taking the best of n samples: log n − (n − 1)/n nats.

    Exact where no two responses score alike; otherwise an upper bound. The natural yardstick for
    a KL: 1,000 samples buy 5.9 nats.

    Args:
        n: number of samples.

    Returns:
        The KL, in nats per response.

    Raises:
        ValueError: if `n` is not at least 1.

    Example:
        >>> round(best_of_n_kl(1000), 3), best_of_n_kl(1)
        (5.909, 0.0)

    References:
        Gao, Schulman and Hilton, "Scaling Laws for Reward Model Overoptimization", 2022,
        https://arxiv.org/abs/2210.10760, §2. Beirami et al., "Theoretical guarantees on the
        best-of-n alignment policy", 2024, https://arxiv.org/abs/2401.01879: an upper bound.
    """
    if n < 1:
        raise ValueError(f"best-of-n needs n of at least 1, got {n}")
    return math.log(n) - (n - 1) / n
