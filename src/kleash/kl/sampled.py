"""The KL of two explicit distributions as a trainer sees it: from samples of the first.

Plain floats and no torch, as in `kleash.kl.discrete`; the tests hold every number against
`kleash.kl.estimators` and the closed forms of the estimators' means and variances.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kleash.kl.discrete import ExplicitKL

EstimatorName = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class SampledEstimate:
    """A mean over samples, in nats."""

    mean: float
    standard_error: float | None
    """None of a single sample; NaN where a sample is infinite."""


@dataclass(frozen=True)
class WorkedToken:
    """One outcome that was drawn, and what each estimator makes of it."""

    outcome: int
    log_p: float
    log_q: float
    values: Mapping[EstimatorName, float]


@dataclass(frozen=True)
class SampledKL:
    """KL(p‖q) estimated from outcomes drawn from p."""

    seed: int
    token: WorkedToken
    """The first outcome drawn."""
    rows: Mapping[int, Mapping[EstimatorName, SampledEstimate]]
    """By number of samples; a larger number contains the samples of a smaller one."""
    limits: Mapping[EstimatorName, float]
    """What each converges to: the sum over all outcomes."""


def sampled_explicit_kl(result: ExplicitKL, sizes: Sequence[int], *, seed: int) -> SampledKL:
    r"""Draw outcomes from p and estimate KL(p‖q) from them.

        δ = ln p(x) − ln q(x),  x ~ p        k1 = δ,   k2 = δ²/2,   k3 = e^(−δ) − 1 + δ

    k1 is unbiased; k3 is unbiased where every outcome of q is one of p, else it converges to
    KL(p‖q) less the probability q gives to what p never does; k2 is biased. Standard errors are
    sd/√n of the samples.

    Args:
        result: the two distributions.
        sizes: numbers of samples, each 1 or more.
        seed: of the drawing.

    Raises:
        ValueError: there is no size, or one is below 1.

    Example:
        >>> from kleash.kl.discrete import explicit_kl
        >>> found = sampled_explicit_kl(explicit_kl([0.25, 0.75], [0.05, 0.95]), [1000], seed=0)
        >>> round(found.rows[1000]["k1"].mean, 2)
        0.22
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"a number of samples is 1 or more, got {', '.join(map(str, sizes))}")
    drawn = random.Random(seed).choices(range(len(result.p)), weights=result.p, k=max(sizes))
    table = {outcome: _values(result, outcome) for outcome in set(drawn)}
    first = drawn[0]
    token = WorkedToken(first, _log(result.p[first]), _log(result.q[first]), table[first])
    rows: dict[int, Mapping[EstimatorName, SampledEstimate]] = {}
    for size in sizes:
        counts: dict[int, int] = {}
        for outcome in drawn[:size]:
            counts[outcome] = counts.get(outcome, 0) + 1
        rows[size] = {name: _estimate(counts, table, name) for name in table[first]}
    return SampledKL(seed, token, rows, _limits(result))


def _limits(result: ExplicitKL) -> dict[EstimatorName, float]:
    every = [outcome for outcome, p in enumerate(result.p) if p > 0]
    values = {outcome: _values(result, outcome) for outcome in every}
    return {
        name: math.fsum(result.p[outcome] * values[outcome][name] for outcome in every)
        for name in _ESTIMATORS
    }


_ESTIMATORS: Mapping[EstimatorName, Callable[[float], float]] = {
    "k1": lambda delta: delta,
    "k2": lambda delta: delta * delta / 2,
    # expm1 keeps what e^(−δ) − 1 would lose where δ is small.
    "k3": lambda delta: math.expm1(-delta) + delta,
}


def _values(result: ExplicitKL, outcome: int) -> dict[EstimatorName, float]:
    delta = _log(result.p[outcome]) - _log(result.q[outcome])
    return {name: estimator(delta) for name, estimator in _ESTIMATORS.items()}


def _estimate(
    counts: Mapping[int, int],
    table: Mapping[int, Mapping[EstimatorName, float]],
    name: EstimatorName,
) -> SampledEstimate:
    size = sum(counts.values())
    mean = math.fsum(count * table[outcome][name] for outcome, count in counts.items()) / size
    if size == 1:
        return SampledEstimate(mean, None)
    if math.isinf(mean):
        return SampledEstimate(mean, math.nan)
    squares = math.fsum(n * (table[outcome][name] - mean) ** 2 for outcome, n in counts.items())
    return SampledEstimate(mean, math.sqrt(squares / (size - 1) / size))


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -math.inf
