"""What weighting reference samples by exp(r/β) makes of them, prompt by prompt.

    w_i = e^(r_i/β)/Σ_j e^(r_j/β)      log Z = log(1/N Σ_i e^(r_i/β))
    E*[r] = Σ_i w_i r_i        KL* = E*[r]/β − log Z        objective = β·log Z

From N samples all three come out low, and the plain KL can never exceed log N: hence the
jackknife, whose correction also shows where it can no longer be trusted.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.kl.statistics import best_of_n_kl

QUANTITIES = ("kl", "gain", "objective")
"""KL*, E*[r] and β·log Z, the last two less the mean score of the reference."""


@dataclass(frozen=True)
class TiltedScores:
    """Per prompt the `QUANTITIES`, as they come out and corrected, and the samples that count."""

    plain: Float[Tensor, "prompt quantity"]
    corrected: Float[Tensor, "prompt quantity"]
    effective_samples: Float[Tensor, " prompt"]
    samples: int

    @property
    def excess(self) -> Float[Tensor, "prompt quantity"]:
        """Correction of each prompt, less the 1/N by which any variance of N samples falls short.

        The 1/N is exact where the tilt is small; the rest is the first term of a series, and
        about as large as what the jackknife leaves uncorrected.
        """
        return self.corrected * (1 - 1 / self.samples) - self.plain


def tilt(scores: Float[Tensor, "prompt sample"], beta: float) -> TiltedScores:
    r"""KL, gain and objective of π* ∝ π_ref·exp(r/β), plain and jackknifed.

        θ_J = N·θ − (N−1)·mean_i θ_(−i)          bias O(1/N) → O(1/N²)

    Leaving a sample out takes its term from two sums; without the largest, whose weight may be
    all there is, the sums are taken anew.

    Args:
        scores: rewards of N ≥ 3 reference responses to each prompt, in float64.
        beta: in score per nat.

    Returns:
        The quantities of each prompt.

    Raises:
        ValueError: if β is so small that scores divided by it are no numbers.

    Example:
        >>> tilted = tilt(torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64), beta=1.0)
        >>> tilted.plain[0]      # a coin with odds e : 1 against a fair one, and log((1 + e)/2) − ½
        tensor([0.1109, 0.2311, 0.1201], dtype=torch.float64)
    """
    n = scores.shape[1]
    # Relative to the prompt's mean: between large scores, differences would lose their digits.
    exponent = (scores - scores.mean(1, keepdim=True)) / beta
    if not torch.isfinite(exponent).all():
        raise ValueError(f"beta must be large enough to divide the scores by, got {beta}")
    shift, top = exponent.max(1, keepdim=True)
    weights = (exponent - shift).exp()
    total, moment = weights.sum(1, keepdim=True), (weights * exponent).sum(1, keepdim=True)
    plain = _quantities(moment / total, (total / n).log() + shift, beta)

    rest = exponent.scatter(1, top, -math.inf)
    rest_total = rest.logsumexp(1, keepdim=True)
    rest_mean = ((rest - rest_total).exp() * exponent).sum(1, keepdim=True)
    without = total - weights
    means = ((moment - weights * exponent) / without).scatter(1, top, rest_mean)
    log_z = (without.log() + shift).scatter(1, top, rest_total) - math.log(n - 1)
    # Relative to the mean of all: the means of those left over average to it.
    others = _quantities(means, log_z, beta).mean(1)
    return TiltedScores(
        plain=plain[:, 0],
        corrected=n * plain[:, 0] - (n - 1) * others,
        effective_samples=total[:, 0].square() / weights.square().sum(1),
        samples=n,
    )


def spread(scores: Float[Tensor, "prompt sample"]) -> float:
    """Standard deviation of the score within a prompt: root of the mean unbiased variance."""
    return math.sqrt(float(scores.var(1).mean()))


def best_of_n_at(kl: float, largest: int) -> float | None:
    """n whose best-of-n spends `kl` nats, between whole numbers in proportion to the KL.

    Args:
        kl: in nats per response.
        largest: n that can be shown.

    Returns:
        n, or None if it would exceed `largest`.

    Example:
        >>> best_of_n_at(best_of_n_kl(4), 10), best_of_n_at(3.0, 10)
        (4.0, None)
    """
    if kl > best_of_n_kl(largest):
        return None
    n = 1
    while n < largest - 1 and best_of_n_kl(n + 1) <= kl:
        n += 1
    below, above = best_of_n_kl(n), best_of_n_kl(n + 1)
    return n + max(0.0, kl - below) / (above - below)


def best_of_n_gain(scores: Float[Tensor, "prompt sample"], n: float) -> float:
    r"""Score that the best of n samples gains over one sample; unbiased.

        E max = Σ_i C(i−1, n−1)/C(N, n) · r_(i)          r_(1) ≤ … ≤ r_(N), averaged over prompts

    Between whole numbers, in proportion.

    Args:
        scores: rewards of N reference responses to each prompt.
        n: from 1 to N.

    Returns:
        Gain in score.

    Raises:
        ValueError: if `n` is not between 1 and N.

    Example:
        >>> best_of_n_gain(torch.tensor([[0.0, 3.0, 6.0]]), 2.0)      # maxima of pairs: 3, 6, 6
        2.0
    """
    samples = scores.shape[1]
    if not 1 <= n <= samples:
        raise ValueError(f"n must be between 1 and the {samples} samples of a prompt, got {n}")
    ordered = scores.double().sort(1).values.mean(0)
    whole = math.floor(n)
    best = _order_statistics(samples, whole) @ ordered
    if n > whole:
        best = best + (n - whole) * (_order_statistics(samples, whole + 1) @ ordered - best)
    return float(best - ordered.mean())


def _order_statistics(samples: int, n: int) -> Float[Tensor, " sample"]:
    """Probability that the i-th smallest sample is the largest of n drawn without replacement."""
    chances = [math.comb(i, n - 1) / math.comb(samples, n) for i in range(samples)]
    return torch.tensor(chances, dtype=torch.float64)


def _quantities(
    mean: Float[Tensor, "prompt sample"], log_z: Float[Tensor, "prompt sample"], beta: float
) -> Float[Tensor, "prompt sample quantity"]:
    """The `QUANTITIES` from E*[r]/β and log Z of centred scores."""
    return torch.stack([mean - log_z, beta * mean, beta * log_z], dim=-1)
