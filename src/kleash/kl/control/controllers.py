"""How β moves while a policy trains: fixed, scheduled, adaptive after Ziegler, or held to a budget.

A controller is frozen settings; everything that changes is a `BetaState`, plain numbers that go
into the checkpoint, so that resuming cannot reset the leash:

    state = controller.init()
    state = controller.update(state, measurement)        once per rollout
    state.beta                                            β from now on

Units: KL and targets in nats per response, β in score per nat. Raising β shortens the leash.
Left out: targets per token, which the caller multiplies by the mean response length.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kleash.kl.control.budget import BudgetBeta, initial_beta
from kleash.kl.control.state import (
    BetaController,
    BetaState,
    Measurement,
    check_bounds,
    check_target,
    clip,
    count,
    raise_beta,
)

__all__ = [
    "AdaptiveBeta",
    "BetaController",
    "BetaState",
    "BudgetBeta",
    "FixedBeta",
    "Gain",
    "Measurement",
    "ScheduledBeta",
    "initial_beta",
    "raise_beta",
]

Gain = Literal["paper", "code"]


@dataclass(frozen=True)
class FixedBeta:
    """β never moves; readings are only counted.

    Raises:
        ValueError: if `beta` is negative or not finite.

    Example:
        >>> controller = FixedBeta(0.05)
        >>> controller.update(controller.init(), Measurement(9.0, 0.1, 64)).beta
        0.05
    """

    beta: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise ValueError(f"beta must be finite and not negative, got {self.beta}")

    def init(self) -> BetaState:
        """State before training."""
        return BetaState(self.beta)

    def update(self, state: BetaState, measurement: Measurement) -> BetaState:
        """Count the reading."""
        return count(state, measurement)


@dataclass(frozen=True)
class ScheduledBeta:
    """β along straight lines between points (responses seen, β), constant beyond the ends.

    Raises:
        ValueError: if there is no point, if responses do not increase, or a β is negative.

    Example:
        >>> warm_up = ScheduledBeta(((0, 0.2), (1000, 0.1)))
        >>> warm_up.update(warm_up.init(), Measurement(3.0, 0.1, responses=500)).beta
        0.15...
    """

    points: Sequence[tuple[int, float]]

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("points must hold at least one (responses, beta), got none")
        seen = [responses for responses, _ in self.points]
        if any(later <= earlier for earlier, later in itertools.pairwise(seen)):
            raise ValueError(f"responses of the points must increase, got {seen}")
        betas = [beta for _, beta in self.points]
        if not all(math.isfinite(beta) and beta >= 0 for beta in betas):
            raise ValueError(f"beta must be finite and not negative at every point, got {betas}")

    def init(self) -> BetaState:
        """State before training."""
        return BetaState(self._at(0))

    def update(self, state: BetaState, measurement: Measurement) -> BetaState:
        """β at the number of responses seen, whatever their KL."""
        state = count(state, measurement)
        return replace(state, beta=self._at(state.responses))

    def _at(self, responses: int) -> float:
        for (start, before), (end, after) in itertools.pairwise(self.points):
            if responses < end:
                along = max(0.0, (responses - start) / (end - start))
                return before + along * (after - before)
        return self.points[-1][1]


@dataclass(frozen=True)
class AdaptiveBeta:
    """The controller of Ziegler et al., with either of its two published gains.

        e = clip(KL/target − 1, −0.2, 0.2)
        β ← β·(1 + 0.1·e)                     gain "paper"
        β ← β·(1 + e·responses/horizon)       gain "code"

    At 512 responses and a horizon of 10,000 the code moves half as fast as the paper says, and
    its speed depends on the batch. Offered for comparison; `BudgetBeta` holds a target.

    Attributes:
        target_kl: nats per response.
        initial: β at the start, in score per nat; above zero, where multiplying would stay.
        gain: which of the two.
        horizon: responses; used by the gain "code" only.
        beta_min: β is never below.
        beta_max: β is never above.

    Raises:
        ValueError: if a setting cannot be.

    Example:
        >>> controller = AdaptiveBeta(target_kl=6.0, initial=0.15)
        >>> round(controller.update(controller.init(), Measurement(12.0, 0.2, 512)).beta, 6)
        0.153

    References:
        Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019, §2.2,
        https://arxiv.org/abs/1909.08593; the code: `AdaptiveKLController` in
        https://github.com/openai/lm-human-preferences/blob/master/lm_human_preferences/train_policy.py
    """

    target_kl: float
    initial: float
    gain: Gain = "paper"
    horizon: int = 10_000
    beta_min: float = 1e-8
    beta_max: float = 1e8

    def __post_init__(self) -> None:
        check_target(self.target_kl)
        check_bounds(self.initial, self.beta_min, self.beta_max)
        if self.gain not in ("paper", "code"):
            raise ValueError(f"gain must be 'paper' or 'code', got {self.gain!r}")
        if self.horizon <= 0:
            raise ValueError(f"horizon must be a positive number of responses, got {self.horizon}")

    def init(self) -> BetaState:
        """State before training."""
        return BetaState(self.initial)

    def update(self, state: BetaState, measurement: Measurement) -> BetaState:
        """One multiplicative step; none if the reading is NaN, infinite or negative.

        Raises:
            ValueError: if a batch is so large for the horizon that β would reach zero.
        """
        counted = count(state, measurement)
        if not measurement.usable:
            return counted
        gain = 0.1 if self.gain == "paper" else measurement.responses / self.horizon
        if gain >= 5:
            raise ValueError(
                f"responses must be fewer than 5 × horizon = {5 * self.horizon} or beta could "
                f"reach zero, got {measurement.responses}: raise the horizon"
            )
        off = measurement.response_kl / self.target_kl - 1
        error = clip(off, 0.2)
        beta = min(self.beta_max, max(self.beta_min, state.beta * (1 + gain * error)))
        bounded = beta in (self.beta_min, self.beta_max)
        return replace(counted, beta=beta, error=error, limited=off != error, bounded=bounded)
