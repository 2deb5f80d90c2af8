r"""Intervals for a mean over prompts: at a sample size fixed beforehand, and valid at any time.

A sample that grows until its interval is narrow, or until it excludes a threshold, is tested
many times, and an ordinary interval is wrong too often at one look of many. The anytime-valid one
may be tested whenever one likes. Left out: intervals for a quantile.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

LEVEL = 0.95
"""Confidence of every interval."""

TUNED_FOR = 256
"""Number of prompts at which the anytime-valid interval is narrowest."""

Kind = Literal["fixed", "anytime"]
Decision = Literal["below", "above", "undecided"]


@dataclass(frozen=True)
class ConfidenceInterval:
    """A mean, and where it may lie."""

    mean: float
    low: float | None
    """None, as `high`, where nothing says how prompts differ: with a single one."""
    high: float | None
    standard_error: float | None
    n: int
    """Number of responses."""
    clusters: int
    """Number of prompts: what was sampled independently."""
    kind: Kind = "fixed"

    @property
    def half_width(self) -> float | None:
        """Distance from the mean to either end."""
        return None if self.high is None else self.high - self.mean


def interval(
    mean: float, standard_error: float | None, *, n: int, clusters: int, kind: Kind = "fixed"
) -> ConfidenceInterval:
    """Put an interval around a mean, from its standard error clustered by prompt.

    Args:
        mean: the mean.
        standard_error: s.e. of the mean; None where it cannot be known.
        n: number of responses.
        clusters: number of prompts G.
        kind: "fixed": mean ± t·s.e. with Student's t of G − 1 degrees of freedom, right at a G
            chosen beforehand. "anytime": right at every G at once, see `anytime_factor`.

    Example:
        >>> interval(0.5, 0.1, n=5, clusters=5).high
        0.777...
        >>> interval(0.5, None, n=5, clusters=1).high is None
        True
    """
    if standard_error is None or not math.isfinite(mean):
        return ConfidenceInterval(mean, None, None, None, n, clusters, kind)
    factor = student_quantile(clusters - 1) if kind == "fixed" else anytime_factor(clusters)
    half = factor * standard_error
    return ConfidenceInterval(mean, mean - half, mean + half, standard_error, n, clusters, kind)


def anytime_factor(clusters: int) -> float:
    r"""How many standard errors the anytime-valid interval reaches to either side.

        √( 2 (Gρ² + 1)/(Gρ²) · log( √(Gρ² + 1)/α ) ),   α = 1 − level

    Robbins' normal mixture with an estimated variance: an asymptotic confidence sequence. The
    probability that the mean is *ever* outside is at most α, in the limit of a late start.

    Args:
        clusters: number G of prompts so far.

    Example:
        >>> [round(anytime_factor(g), 2) for g in (32, 256, 4096)]
        [3.66, 3.04, 3.31]

    References:
        Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit theory and
        asymptotic confidence sequences", 2021, https://arxiv.org/abs/2103.06476, Theorem 2.2 and
        appendix B.2 for the choice of ρ.
    """
    alpha = 1 - LEVEL
    rho2 = (-2 * math.log(alpha) + math.log(-2 * math.log(alpha) + 1)) / TUNED_FOR
    spread = clusters * rho2 + 1
    return math.sqrt(2 * spread / (clusters * rho2) * math.log(math.sqrt(spread) / alpha))


def clusters_for(half_width: float, now: ConfidenceInterval) -> int | None:
    """How many prompts it would take to be this narrow, if they vary as those so far do.

    Args:
        half_width: the half width wanted.
        now: the interval so far; the one to come is of its kind.

    Returns:
        The smallest such number; None where the spread of prompts is not known.

    Example:
        >>> clusters_for(0.01, interval(0.5, 0.02, n=100, clusters=100, kind="anytime"))
        4398
    """
    if now.standard_error is None:
        return None
    spread = now.standard_error * math.sqrt(now.clusters)
    if spread == 0:
        return now.clusters

    def wide(count: int) -> bool:
        factor = anytime_factor(count) if now.kind == "anytime" else student_quantile(count - 1)
        return factor * spread / math.sqrt(count) > half_width

    high = 2
    while wide(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if wide(middle) else (low, middle)
    return high


def decide(found: ConfidenceInterval, threshold: float) -> Decision:
    """Say on which side of a threshold the mean lies, if the interval lies wholly on one.

    An infinite KL is above every threshold, however few prompts were seen.

    Example:
        >>> decide(interval(0.5, 0.1, n=50, clusters=50), 0.2)
        'above'
        >>> decide(interval(0.5, 0.1, n=50, clusters=50), 0.6)
        'undecided'
    """
    if found.mean == math.inf:
        return "above"
    if found.low is None or found.high is None:
        return "undecided"
    if found.low > threshold:
        return "above"
    return "below" if found.high < threshold else "undecided"


def tail_index(largest: Sequence[float]) -> float | None:
    r"""Hill's estimate of how heavy the upper tail is, from the k largest values x₁ ≥ … ≥ x_k.

        1/α = Σ_i log(x_i / x_k) / (k − 1)

    A tail P(X > x) ~ x^(−α) has no variance for α < 2 and no mean for α < 1; then no interval
    holds what it promises.

    Args:
        largest: the largest values, largest first.

    Returns:
        α; None with fewer than 10 positive, finite values, or where they are all alike.

    Example:
        >>> round(tail_index([10 / rank for rank in range(1, 41)]), 1)
        1.0

    References:
        Hill, "A simple general approach to inference about the tail of a distribution", 1975.
    """
    if len(largest) < 10 or not 0 < largest[-1] <= largest[0] < math.inf:
        return None
    total = sum(math.log(value / largest[-1]) for value in largest)
    return (len(largest) - 1) / total if total > 0 else None


@functools.cache
def student_quantile(freedom: int) -> float:
    """The number t with P(|T| ≤ t) = `LEVEL` for Student's T of so many degrees of freedom.

    Example:
        >>> round(student_quantile(4), 4)
        2.7764
    """
    if freedom > 1000:
        # Two terms of Cornish and Fisher's expansion leave an error below 3e-6 here.
        z = NormalDist().inv_cdf((1 + LEVEL) / 2)
        return z + (z**3 + z) / (4 * freedom)
    low, high = 0.0, 1e3
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < LEVEL else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| ≤ t), from the finite series for whole degrees of freedom.

    References:
        Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.3 and 26.7.4.
    """
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    if freedom == 1:
        return 2 * angle / math.pi
    term = cosine if odd else 1.0
    total = term
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
