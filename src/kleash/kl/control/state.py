"""A controller's input (`Measurement`), its memory (`BetaState`), and checks of its settings."""

import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

_SMALLEST, _LARGEST = 1e-60, 1e60
"""A variance or KL beyond these is a fault of the measurement, and its square no number."""


@dataclass(frozen=True)
class Measurement:
    """What one rollout measured.

    Attributes:
        response_kl: mean over responses of Σ_t KL_t, in nats; exact where it can be.
        standard_error: of that mean, in nats, clustered by prompt; NaN if unknown.
        responses: how many responses it was measured on.
        score_variance: variance of the score of the responses to one prompt, averaged over
            prompts, in score²; None if unknown. With one response per prompt the variance of
            the whole batch is an upper bound, and makes for a shorter leash to begin with.
    """

    response_kl: float
    standard_error: float
    responses: int
    score_variance: float | None = None

    @property
    def usable(self) -> bool:
        """Whether the KL is a finite number and not negative."""
        return 0 <= self.response_kl < _LARGEST

    @property
    def noise(self) -> float:
        """Standard error of ln KL, at most 1; 0 if unknown, which trusts the reading."""
        if not self.standard_error >= 0:
            return 0.0
        return min(1.0, self.standard_error / max(self.response_kl, _SMALLEST))

    @property
    def variance(self) -> float | None:
        """The variance of the scores if it was measured and is in range."""
        if self.score_variance is None or not _SMALLEST < self.score_variance < _LARGEST:
            return None
        return self.score_variance


@dataclass(frozen=True)
class BetaState:
    """Everything a controller remembers; `BetaState(**json)` restores `dataclasses.asdict`.

    Attributes:
        beta: β in force, in score per nat.
        updates: readings that were taken in.
        ignored: readings that were not: NaN, infinite or negative.
        responses: responses seen, whatever their reading was worth.
        error: what the last reading was off its target, as acted upon; 0 if it was not.
        gain: −d ln KL*/d ln β as believed at the last reading; None where none is used.
        kl: the last usable reading, in nats; None before the first.
        noise: standard error of ln KL, smoothed; None before the first KL that is not 0.
        level: the KL, smoothed over as many readings as noise asks for; None before the first that
            is not 0.
        under: readings in a row, up to the last, at which `level` was significantly under the
            target.
        speed: smoothed change of √KL per reading.
        variance: smoothed variance of the scores; None until measured.
        tilt: 1/(2β²) of the optimum that spends `kl`, along the path travelled.
        feedforward: β that the closed form holds right for the target; None until known.
        offset: running mean of the errors.
        trim: what feedback has added to ln β on top of it.
        quiet: whether the dead band took all of the last reading's drift for noise.
        limited: whether the last step of β was cut to the largest allowed.
        bounded: whether β stands at one of its hard bounds.
    """

    beta: float
    updates: int = 0
    ignored: int = 0
    responses: int = 0
    error: float = 0.0
    gain: float | None = None
    kl: float | None = None
    noise: float | None = None
    level: float | None = None
    under: int = 0
    speed: float = 0.0
    variance: float | None = None
    tilt: float = 0.0
    feedforward: float | None = None
    offset: float = 0.0
    trim: float = 0.0
    quiet: bool = False
    limited: bool = False
    bounded: bool = False


@runtime_checkable
class BetaController(Protocol):
    """The shape of a controller: `init` once, `update` after every rollout."""

    def init(self) -> BetaState:
        """State before training."""
        ...

    def update(self, state: BetaState, measurement: Measurement) -> BetaState:
        """State after one more reading."""
        ...


def count(state: BetaState, measurement: Measurement) -> BetaState:
    """The reading and its responses counted, nothing else moved."""
    return replace(
        state,
        updates=state.updates + measurement.usable,
        ignored=state.ignored + (not measurement.usable),
        responses=state.responses + measurement.responses,
        error=0.0,
        quiet=False,
        limited=False,
    )


def raise_beta(state: BetaState, factor: float) -> BetaState:
    """β multiplied, in such a way that the controller goes on from there.

    Args:
        state: of any controller.
        factor: above 1 shortens the leash.

    Raises:
        ValueError: if `factor` is not positive and finite.

    Example:
        >>> raise_beta(BetaState(0.1), 2.0).beta
        0.2
    """
    if not 0 < factor < _LARGEST:
        raise ValueError(f"factor must be positive and finite, got {factor}")
    # `BudgetBeta` steers towards feed-forward and trim, and would take back what trim lacks.
    return replace(state, beta=state.beta * factor, trim=state.trim + math.log(factor))


def clip(value: float, bound: float) -> float:
    """`value` within ±`bound`."""
    return min(bound, max(-bound, value))


def check_target(target_kl: float) -> None:
    """Refuse a target that is not a positive number of nats.

    Raises:
        ValueError: if it is not.
    """
    if not _SMALLEST < target_kl < _LARGEST:
        raise ValueError(f"target_kl must be positive nats per response, got {target_kl}")


def check_bounds(initial: float, beta_min: float, beta_max: float) -> None:
    """Refuse bounds that β could not lie between, and an initial β outside them.

    Raises:
        ValueError: if 0 < beta_min ≤ initial ≤ beta_max does not hold.
    """
    if not _SMALLEST < beta_min <= beta_max < _LARGEST:
        raise ValueError(f"0 < beta_min ≤ beta_max is needed, got {beta_min} and {beta_max}")
    if not beta_min <= initial <= beta_max:
        raise ValueError(
            f"initial must lie between beta_min {beta_min} and beta_max {beta_max}, got {initial}"
        )
