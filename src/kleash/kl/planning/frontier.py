"""Which β spends which KL for which score: the optimum's frontier, from reference samples alone.

The policy that maximises score − β·KL is known in closed form, π* ∝ π_ref·exp(r/β), so samples
of the reference, weighted *within each prompt*, are samples of the optimum; pooling them would
tilt the choice of prompts as well. Averages are over prompts, intervals from a bootstrap over
prompts. Where the samples do not suffice, a row is marked instead of extrapolated.

What is planned is the optimum: a run of finite length need not reach it, so a controller, not the
plan, holds a budget. Left out: drawing the samples, and the table that a user sees.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.kl.planning.tilting import TiltedScores, best_of_n_at, best_of_n_gain, spread, tilt

LEAST_SAMPLES = 5.0
"""Effective samples that nine prompts in ten must have."""
LARGEST_EXCESS = 0.05
"""Largest share of KL or gain that the jackknife may add beyond the trivial 1/N, noise included."""
_DRAWS = 1000
_GRID_STEP = 0.15
"""Of ln β, between points of the curves on which the bootstrap looks β up."""
_GAIN_STEP = 0.05
_BISECTIONS = 24
"""Of one step of the grid: β to 1e-8."""


@dataclass(frozen=True)
class Interval:
    """A number, and the bounds it lies between with the requested confidence."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PlanRow:
    """The optimum at one β.

    Attributes:
        beta: β in score per nat; an interval where it was sought for a budget.
        kl: KL(π*‖π_ref) in nats per response.
        score: E*[score].
        gain: E*[score] less the reference's mean score.
        objective: β·log Z = E*[score] − β·KL*.
        plant_gain: −d ln KL*/d ln β, for `BudgetBeta`.
        effective_samples: 1/Σw², of the prompt that nine in ten surpass.
        best_of_n: n for which best-of-n has the same KL, log n − (n−1)/n; None beyond N.
        best_of_n_gain: what that best-of-n gains over the reference's mean score.
        known: whether the samples suffice; if not, the numbers are shown and not claimed.
        reason: why they do not; empty if they do.
    """

    beta: Interval
    kl: Interval
    score: Interval
    gain: Interval
    objective: Interval
    plant_gain: float
    effective_samples: float
    best_of_n: float | None
    best_of_n_gain: float | None
    known: bool
    reason: str


@dataclass(frozen=True)
class NoRow:
    """No β spends this budget on these samples."""

    budget: float
    reason: str
    known: bool = False


@dataclass(frozen=True)
class _Bootstrap:
    """How often each draw took each prompt, as weights, and the tails to cut off."""

    weights: Float[Tensor, "draw prompt"]
    tail: float

    def interval(self, values: Float[Tensor, " prompt"], stretch: float = 0.0) -> Interval:
        """Percentile interval of the mean, and `stretch` on top, up if positive, else down.

        Draws of P prompts vary (P−1)/P as much as P fresh prompts would: put right.
        """
        mean = float(values.mean())
        widen = math.sqrt(len(values) / (len(values) - 1))
        low, high = self.quantiles(mean + widen * (self.weights @ values - mean))
        return Interval(mean, low + min(0.0, stretch), high + max(0.0, stretch))

    def quantiles(self, draws: Float[Tensor, " draw"]) -> tuple[float, float]:
        """The two tails of the draws."""
        return float(draws.quantile(self.tail)), float(draws.quantile(1 - self.tail))


def plan_for_betas(
    scores: Float[Tensor, "prompt sample"],
    betas: Sequence[float],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[PlanRow]:
    """What each β would spend and gain at the optimum.

    Args:
        scores: reward of N reference responses to each prompt.
        betas: in score per nat.
        confidence: of the intervals.
        seed: of the bootstrap.

    Returns:
        One row per β, in order.

    Raises:
        ValueError: if there are fewer than 2 prompts or 3 samples, a score is not finite, or a
            β or the confidence is impossible.

    Example:
        >>> scores = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
        >>> row = plan_for_betas(scores, [1.0])[0]      # normal scores: KL* = 1/(2β²)
        >>> row.known, row.kl.low < 0.5 < row.kl.high
        (True, True)
    """
    scores, bootstrap = _prepared(scores, confidence, seed)
    if any(not (math.isfinite(beta) and beta > 0) for beta in betas):
        raise ValueError(f"every beta must be positive and finite, got {list(betas)}")
    return [_row(scores, Interval(beta, beta, beta), bootstrap) for beta in betas]


def plan_for_budgets(
    scores: Float[Tensor, "prompt sample"],
    budgets: Sequence[float],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[PlanRow | NoRow]:
    """The β whose optimum spends each KL budget, and what it gains.

    β is found by bisection in log β, its interval by finding it again in every draw of the
    bootstrap.

    Args:
        scores: reward of N reference responses to each prompt.
        budgets: KL in nats per response.
        confidence: of the intervals.
        seed: of the bootstrap.

    Returns:
        One row per budget, in order; a `NoRow` for a budget that no β spends on these samples.

    Raises:
        ValueError: as `plan_for_betas` does, or if a budget is not positive.

    Example:
        >>> scores = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
        >>> half, ten = plan_for_budgets(scores, [0.5, 10.0])
        >>> half.known, half.beta.low < 1.0 < half.beta.high, ten.known
        (True, True, False)
    """
    scores, bootstrap = _prepared(scores, confidence, seed)
    if any(not (math.isfinite(budget) and budget > 0) for budget in budgets):
        raise ValueError(f"every budget must be positive nats per response, got {list(budgets)}")
    if not budgets:
        return []
    if (sd := spread(scores)) == 0:
        reason = "the scores do not vary within any prompt: nothing can be gained by any KL"
        return [NoRow(budget, reason) for budget in budgets]
    grid = _grid(sd, min(budgets), scores.shape[1])
    curves = torch.stack([tilt(scores, beta).corrected[:, 0] for beta in grid], dim=1)
    return [_budget_row(scores, budget, grid, curves, bootstrap) for budget in budgets]


def beta_ladder(scores: Float[Tensor, "prompt sample"], rungs: int = 12) -> list[float]:
    """βs worth planning for: from next to no KL down to all that N samples could show.

        Var(r)/(2β²) = 0.02 … log N, evenly spaced in log β

    Args:
        scores: reward of N reference responses to each prompt.
        rungs: how many.

    Returns:
        βs in decreasing order.

    Raises:
        ValueError: if scores do not vary within any prompt, there are too few, or `rungs` < 2.

    Example:
        >>> scores = torch.tensor([[-1.0, 0.0, 1.0], [2.0, 3.0, 4.0]])
        >>> [round(beta, 2) for beta in beta_ladder(scores, 3)]
        [5.0, 1.84, 0.67]
    """
    scores = _checked(scores)
    if rungs < 2 or (sd := spread(scores)) == 0:
        raise ValueError(
            f"a ladder needs at least 2 rungs and scores that vary within a prompt, got {rungs} "
            f"rungs and a spread of {spread(scores)}"
        )
    high, low = sd / math.sqrt(2 * 0.02), sd / math.sqrt(2 * math.log(scores.shape[1]))
    return [high * (low / high) ** (i / (rungs - 1)) for i in range(rungs)]


def _checked(scores: Float[Tensor, "prompt sample"]) -> Float[Tensor, "prompt sample"]:
    prompts, samples = scores.shape
    if prompts < 2 or samples < 3:
        raise ValueError(
            f"a plan needs at least 2 prompts with 3 samples each, got {prompts} with {samples}"
        )
    if not (finite := torch.isfinite(scores)).all():
        bad = (~finite).nonzero()[0].tolist()
        raise ValueError(f"scores must be finite, got one that is not at [prompt, sample] {bad}")
    return scores.detach().double()


def _prepared(
    scores: Float[Tensor, "prompt sample"], confidence: float, seed: int
) -> tuple[Float[Tensor, "prompt sample"], _Bootstrap]:
    scores = _checked(scores)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    prompts = len(scores)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(prompts, (_DRAWS, prompts), generator=generator)
    counts = torch.zeros(_DRAWS, prompts, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    return scores, _Bootstrap(counts / prompts, (1 - confidence) / 2)


def _row(scores: Float[Tensor, "prompt sample"], beta: Interval, bootstrap: _Bootstrap) -> PlanRow:
    tilted = tilt(scores, beta.value)
    stretch = tilted.excess.mean(0).tolist()
    means = scores.mean(1)
    kl, gain = (bootstrap.interval(tilted.corrected[:, i], stretch[i]) for i in (0, 1))
    score, objective = (
        bootstrap.interval(means + tilted.corrected[:, i], stretch[i]) for i in (1, 2)
    )
    n = best_of_n_at(kl.value, scores.shape[1])
    reason = _reason(tilted, kl.value, gain.value)
    return PlanRow(
        beta=beta,
        kl=kl,
        score=score,
        gain=gain,
        objective=objective,
        plant_gain=_plant_gain(scores, beta.value),
        effective_samples=_least_effective(tilted),
        best_of_n=n,
        best_of_n_gain=None if n is None else best_of_n_gain(scores, n),
        known=not reason,
        reason=reason,
    )


def _reason(tilted: TiltedScores, kl: float, gain: float) -> str:
    """Why the samples do not suffice; empty if they do."""
    if kl > math.log(tilted.samples):
        return (
            f"KL {kl:.2f} is more than the log N = {math.log(tilted.samples):.2f} nats that "
            f"{tilted.samples} samples a prompt can show"
        )
    least = _least_effective(tilted)
    if least < LEAST_SAMPLES:
        return (
            f"a tenth of the prompts rest on {least:.1f} effective samples or fewer of "
            f"{tilted.samples}; {LEAST_SAMPLES:g} are needed"
        )
    excess = tilted.excess.mean(0).abs() + tilted.excess.std(0) / math.sqrt(len(tilted.excess))
    worst = max(float(excess[0]) / max(kl, 1e-300), float(excess[1]) / max(gain, 1e-300))
    if worst > LARGEST_EXCESS:
        return (
            f"{tilted.samples} samples a prompt are too few: correcting for it moves the result "
            f"by {worst:.0%}, more than {LARGEST_EXCESS:.0%}"
        )
    return ""


def _least_effective(tilted: TiltedScores) -> float:
    return float(tilted.effective_samples.quantile(0.1))


def _mean_kl(scores: Float[Tensor, "prompt sample"], beta: float) -> float:
    return float(tilt(scores, beta).corrected[:, 0].mean())


def _plant_gain(scores: Float[Tensor, "prompt sample"], beta: float) -> float:
    """−d ln KL*/d ln β by a central difference; 0 where the KL is."""
    low, high = (_mean_kl(scores, beta * math.exp(s)) for s in (-_GAIN_STEP, _GAIN_STEP))
    if low <= 0 or high <= 0:
        return 0.0
    return math.log(low / high) / (2 * _GAIN_STEP)


def _grid(sd: float, smallest_kl: float, samples: int) -> list[float]:
    """βs in decreasing order, from about half of `smallest_kl` down to where all is saturated."""
    high = sd / min(math.sqrt(smallest_kl), 2 * math.sqrt(math.log(samples)))
    low = sd / (20 * math.sqrt(2 * math.log(samples)))
    steps = math.ceil(math.log(high / low) / _GRID_STEP)
    return [high * (low / high) ** (i / steps) for i in range(steps + 1)]


def _budget_row(
    scores: Float[Tensor, "prompt sample"],
    budget: float,
    grid: list[float],
    curves: Float[Tensor, "prompt grid"],
    bootstrap: _Bootstrap,
) -> PlanRow | NoRow:
    mean = curves.mean(0)
    reached = (mean >= budget).nonzero()
    if len(reached) == 0:
        return NoRow(
            budget,
            f"{scores.shape[1]} samples a prompt show at most {float(mean.max()):.2f} nats, fewer "
            f"than {budget:g}",
        )
    first = int(reached[0])
    low, high = grid[first], grid[max(0, first - 1)]
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _mean_kl(scores, middle) >= budget else (low, middle)
    beta = math.sqrt(low * high)
    bounds = _beta_bounds(budget, grid, curves, bootstrap, beta)
    tilted = tilt(scores, beta)
    # Where the KL may be higher than thought by `excess`, so may β, by 1/gain of it.
    shift = math.exp(
        float(tilted.excess[:, 0].mean()) / budget / max(_plant_gain(scores, beta), 0.5)
    )
    interval = Interval(beta, bounds[0] * min(1.0, shift), bounds[1] * max(1.0, shift))
    return _row(scores, interval, bootstrap)


def _beta_bounds(
    budget: float,
    grid: list[float],
    curves: Float[Tensor, "prompt grid"],
    bootstrap: _Bootstrap,
    beta: float,
) -> tuple[float, float]:
    """Bounds of β: in each draw, where its curve of KL over log β first reaches the budget."""
    drawn = bootstrap.weights @ curves
    reached = drawn >= budget
    reached[:, -1] = True  # a draw that never gets there ends at the smallest β tried
    after = reached.int().argmax(1).clamp(min=1)
    rows = torch.arange(len(drawn))
    below, above = drawn[rows, after - 1], drawn[rows, after]
    along = ((budget - below) / (above - below)).clamp(0, 1)
    logs = torch.tensor(grid, dtype=torch.float64).log()
    log_beta = logs[after - 1] + along * (logs[after] - logs[after - 1])
    widen = math.sqrt(curves.shape[0] / (curves.shape[0] - 1))
    low, high = bootstrap.quantiles(math.log(beta) + widen * (log_beta - math.log(beta)))
    return math.exp(low), math.exp(high)
