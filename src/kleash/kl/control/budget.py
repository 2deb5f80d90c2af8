"""Hold the KL of a policy in training to a budget.

Two things are known before the first reading: how the optimum's KL depends on β, and that a
policy lags behind its optimum. The closed form therefore chooses β (feed-forward), and feedback
corrects, slowly and with an eye on where the KL is heading, what the closed form gets wrong:
a policy class that cannot follow, KL wasted by noisy updates, scores that saturate.
"""

import math
from dataclasses import dataclass, replace

from kleash.kl.control.state import BetaState, Measurement, check_bounds, check_target, clip, count

SMALL_TILT_GAIN = 2.0
"""−d ln KL*/d ln β where the tilt is small: KL* ≈ Var(r)/(2β²)."""
_GAIN_RANGE = (0.5, 4.0)
"""Range of measured gains that is used; beyond, they reflect noise of a variance, no plant."""
_SPEED_WEIGHT = 0.5
"""Weight of the newest change in the running speed, of a clear reading."""
_VARIANCE_WEIGHT = 0.3
"""Weight of the newest variance in its running (geometric) mean, of a clear reading."""
_NOISE_WEIGHT = 0.1
"""Weight of the newest standard error in its running mean square."""
_CLEAR = 0.06
"""Standard error of ln KL up to which a reading is clear; 2 to 4 % with 100 to 500 responses."""
_LEAST_TRUST = 0.2
"""Of a noisier reading: memories become at most five times longer."""
_LEVEL_WEIGHT = 0.5
"""Weight of the newest KL in its running mean, of a clear reading."""
_SIGNIFICANT = 2.0
"""Standard errors of a smoothed KL by which it must be off for that to be no noise."""
_OFFSET_WEIGHT = 0.2
"""Weight of the newest error in the running one, whose noise is then a third of a reading's."""
_LEAST_WEIGHT, _WEIGHT_SLOPE = 0.2, 1.5
"""Weight of the feedback: while next to nothing of the budget is spent, and per share of it spent.

It is 1 from two thirds of the budget on: a weight that still rose at the target would take noise
above it for more than noise below it.
"""
_LEAST_PLANNED_GAIN = 1.5
"""A planned slope counts as no flatter than this."""
_NEAREST = 1e-3
"""Smallest believed ratio of the coming √KL to today's: no policy runs through its reference."""


@dataclass(frozen=True)
class BudgetBeta:
    r"""Feed-forward from the closed form, integral control of ln β with look-ahead on top.

    **Feed-forward.** The optimum obeys dKL*/dβ = −Var*(r)/β³, that is

        d(1/(2β²)) = dKL*/Var*(r)

    Summed along the KL and the variance of the scores measured so far, then straight on to the
    target, it says which β spends the budget: sd(r)/√(2·target) at first, and less as scores
    saturate. With a plan (`plant_gain`), or where no variance is measured, `initial` is taken at
    its word instead.

    **Feedback.** The loop is divided by its own gain, so that it is the same loop at every
    target and reward scale:

        e = clip(ln(KL_ahead/target), ±error_max)       √KL_ahead = √KL + look_ahead · speed
        trim ← trim + w · e/(g · settling)              g = Var(r)/(β²·KL), w = 0.2…1
        ln β = ln β_feedforward + trim                  changing by at most ±rate_max

    Drift grows steadily in √KL rather than in KL, hence the look-ahead there; it is the
    proportional part of a loop that integrates, and keeps β from falling while the KL is already
    on its way. Speed that noise could have produced counts as none (dead band). The
    integral sees every reading, because it averages noise away, less the downward bias
    (s.e./KL)²/2 of a noisy number's logarithm. The weight w grows with the share of the budget
    in use: far below it the closed form is the better guide. Nothing is integrated that the rate
    limit or a bound would withhold.

    **Noise.** A reading is clear up to a standard error of 6 % of the KL. A noisier one has

        trust = max(0.2, (0.06/noise)²)
        e ← trust · e + (1 − trust) · (what of the running mean of e is beyond its noise)

    and speed and variance move by so much less, while the look-ahead reaches so much further.
    noise² falls with the number of responses, so that memories then hold as many responses, not
    iterations. An error that goes on beyond three standard errors of its mean is no noise, and is
    not waited for. A clear reading is untouched by all this.

    **Under the target β never rises.** While the running mean of the KL is under the target by more
    than two of its standard errors (of at least 6 % each), neither a drift that is expected nor a
    closed form that has changed its mind raises β: what is expected is not there yet, and the
    memory that noise asks for believes in the first steps' drift long after it has ended. A rise of
    the closed form is made up for, at the rate limit, as soon as the KL is there.

    The batch size enters through the standard error only. A reading that is NaN, infinite or
    negative changes nothing but its count; one of exactly 0 only says that training has not
    begun, and does not move β either.

    Attributes:
        target_kl: the budget, in nats per response.
        initial: β at the start, in score per nat: from a plan, or `initial_beta`.
        plant_gain: g at the target according to a plan, whose β is then `initial`; None: both from
            the variance of the scores.
        settling: iterations in which an error is worked off; larger is calmer.
        look_ahead: iterations that the policy is expected to go on drifting by itself.
        rate_max: largest change of ln β in one update.
        error_max: largest error acted upon, in units of ln KL.
        beta_min: β is never below.
        beta_max: β is never above.

    Raises:
        ValueError: if a setting cannot be.

    Example:
        >>> controller = BudgetBeta(target_kl=2.0, initial=0.5)
        >>> state = controller.init()
        >>> for kl in (0.5, 1.5, 3.0, 4.0):
        ...     state = controller.update(state, Measurement(kl, 0.05, 128))
        >>> state.beta > 0.5
        True

    References:
        Stooke et al., "Responsive Safety in Reinforcement Learning by PID Lagrangian Methods",
        2020, https://arxiv.org/abs/2007.03964
    """

    target_kl: float
    initial: float
    plant_gain: float | None = None
    settling: float = 8.0
    look_ahead: float = 5.0
    rate_max: float = 0.5
    error_max: float = 1.0
    beta_min: float = 1e-8
    beta_max: float = 1e8

    def __post_init__(self) -> None:
        check_target(self.target_kl)
        check_bounds(self.initial, self.beta_min, self.beta_max)
        for name in ("plant_gain", "settling", "rate_max", "error_max"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not (math.isfinite(self.look_ahead) and self.look_ahead >= 0):
            raise ValueError(f"look_ahead must be finite and not negative, got {self.look_ahead}")

    def init(self) -> BetaState:
        """State before training."""
        return BetaState(self.initial)

    def update(self, state: BetaState, measurement: Measurement) -> BetaState:
        """One step of ln β."""
        counted = count(state, measurement)
        if not measurement.usable:
            return counted
        seen = self._observe(counted, measurement)
        if measurement.response_kl == 0:
            return seen
        error, quiet = self._error(seen, measurement)
        offset = seen.offset + _OFFSET_WEIGHT * (error - seen.offset)
        # The share that is not trusted goes by what of the running error noise cannot explain: what
        # is beyond three of its own standard errors, one of a reading's.
        trust = _trust(seen.noise)
        error = trust * error + (1 - trust) * _beyond(offset, seen.noise or 0.0)
        gain = self._gain(seen, measurement.response_kl)
        updated = replace(seen, error=error, quiet=quiet, offset=offset, gain=gain)
        return self._move(updated, measurement.response_kl)

    def _observe(self, state: BetaState, measurement: Measurement) -> BetaState:
        """Speed, variance, the tilt of the path so far and the β it leads to."""
        kl, noise, variance = measurement.response_kl, state.noise, state.variance
        level, under = state.level, state.under
        if kl > 0:
            noise = _mean_square(noise, measurement.noise)
            level = _level(level, kl, noise)
            under = under + 1 if self._under(level, noise) else 0
        trust = _trust(noise)
        if measurement.variance is not None:
            variance = _smoothed(variance, measurement.variance, trust * _VARIANCE_WEIGHT)
        tilt, feedforward = state.tilt, self.initial
        if self.plant_gain is None and variance is not None:
            # A first variance that comes late finds the path so far a straight one.
            known = state.kl if state.kl is not None and state.variance is not None else 0.0
            tilt = _tilt_at(kl, tilt=tilt, kl=known, variance=variance)
            ahead = _tilt_at(self.target_kl, tilt=tilt, kl=kl, variance=variance)
            feedforward = 1 / math.sqrt(2 * ahead)
        speed = 0.0
        if state.kl is not None:
            change = math.sqrt(kl) - math.sqrt(state.kl)
            speed = state.speed + trust * _SPEED_WEIGHT * (change - state.speed)
        return replace(
            state,
            kl=kl,
            noise=noise,
            level=level,
            under=under,
            speed=speed,
            variance=variance,
            tilt=tilt,
            feedforward=feedforward,
        )

    def _under(self, level: float, noise: float) -> bool:
        """Whether a smoothed KL is under the target by more than noise explains."""
        weight = _LEVEL_WEIGHT * _trust(noise)
        error = max(_CLEAR, noise * math.sqrt(weight / (2 - weight)))
        return math.log(level) - math.log(self.target_kl) < -_SIGNIFICANT * error

    def _error(self, state: BetaState, measurement: Measurement) -> tuple[float, bool]:
        """ln(KL_ahead/target): today's error, and the drift to come beyond the noise, if any is."""
        kl, noise = measurement.response_kl, measurement.noise
        now = math.log(kl / self.target_kl) + noise**2 / 2
        ahead = self.look_ahead / _trust(state.noise) * state.speed / math.sqrt(kl)
        # ln KL has the standard error `noise`: smoothed and extrapolated, it looks like drift. More
        # of it than a clear reading has goes first: the logarithm's curvature would turn it into
        # a drift of one sign.
        lead = _SPEED_WEIGHT * self.look_ahead
        clear = _beyond(ahead, lead * max(0.0, noise - _CLEAR) / 2)
        drift = _beyond(2 * math.log(max(_NEAREST, 1 + clear)), lead * min(noise, _CLEAR))
        return clip(now + drift, self.error_max), drift == 0 != ahead

    def _gain(self, state: BetaState, kl: float) -> float:
        """g of the plan, or Var(r)/(β²·KL) as far as it is believed, or that of a small tilt.

        A plan knows the slope of the optimum. Where that is flat, a policy on its way there still
        responds to β more steeply: a loop divided by so little would swing.
        """
        if self.plant_gain is not None:
            return max(_LEAST_PLANNED_GAIN, self.plant_gain)
        if state.variance is None:
            return SMALL_TILT_GAIN
        low, high = _GAIN_RANGE
        now = min(high, max(low, state.variance / (state.beta**2 * kl)))
        # Smoothed, since a reading that is low by chance would make for a high gain: 1/g of its
        # own error, whose mean is not 0.
        return _smoothed(state.gain, now, _trust(state.noise))

    def _move(self, state: BetaState, kl: float) -> BetaState:
        """β towards feed-forward and trim, within the rate limit and the bounds."""
        assert state.feedforward is not None and state.gain is not None
        weight = max(_LEAST_WEIGHT, min(1.0, _WEIGHT_SLOPE * kl / self.target_kl))
        push = weight * state.error / (state.gain * self.settling)
        base, old = math.log(state.feedforward), math.log(state.beta)
        if abs(gap := base + state.trim - old) > self.rate_max and gap * push > 0:
            push = 0.0  # the rate limit withholds it: integrating on would overshoot
        if state.under and push > 0:
            push = 0.0  # a drift that is expected, but not there
        wanted = base + state.trim + push - old
        if state.under:
            wanted = min(0.0, wanted)
        log_beta = old + clip(wanted, self.rate_max)
        beta = min(self.beta_max, max(self.beta_min, math.exp(log_beta)))
        trim = state.trim + push
        bounded = beta in (self.beta_min, self.beta_max)
        if bounded:
            trim = math.log(beta) - base
        limited = abs(wanted) > self.rate_max
        return replace(state, beta=beta, trim=trim, limited=limited, bounded=bounded)


def initial_beta(target_kl: float, score_sd: float) -> float:
    """β to start from, given how much the scores of one prompt's responses vary.

        KL* ≈ Var(r)/(2β²)   so   β = sd(r)/√(2·target)

    Exact for normally distributed scores, and the limit of a small tilt for any others.
    `kleash.kl.planning.frontier` does better where there are enough reference samples.

    Args:
        target_kl: nats per response.
        score_sd: standard deviation of the score within a prompt.

    Returns:
        β in score per nat.

    Raises:
        ValueError: if either is not positive and finite.

    Example:
        >>> initial_beta(target_kl=2.0, score_sd=1.0)
        0.5
    """
    check_target(target_kl)
    if not (math.isfinite(score_sd) and score_sd > 0):
        raise ValueError(
            f"score_sd must be positive and finite, got {score_sd}: scores that do not vary imply "
            "no β"
        )
    return score_sd / math.sqrt(2 * target_kl)


def _beyond(value: float, band: float) -> float:
    """What of `value` lies outside ±`band`."""
    return math.copysign(max(0.0, abs(value) - band), value)


def _trust(noise: float | None) -> float:
    """Share of its usual weight that a reading gets: 1 if it is clear, else (clear/noise)².

    The square of a standard error falls with the number of responses, so that a memory made
    longer by 1/trust holds the same number of them, however many come at once.
    """
    if noise is None or noise <= _CLEAR:
        return 1.0
    return max(_LEAST_TRUST, (_CLEAR / noise) ** 2)


def _mean_square(noise: float | None, newest: float) -> float:
    """Running root mean square: one reading's standard error is high where its KL is low."""
    if noise is None:
        return newest
    return math.sqrt((1 - _NOISE_WEIGHT) * noise**2 + _NOISE_WEIGHT * newest**2)


def _level(level: float | None, kl: float, noise: float) -> float:
    """Running mean of the KL, never farther from the newest reading than noise could bring it."""
    if level is None:
        return kl
    mean = level + _LEVEL_WEIGHT * _trust(noise) * (kl - level)
    reach = _SIGNIFICANT * noise * kl
    return min(kl + reach, max(kl - reach, mean))


def _smoothed(variance: float | None, newest: float, weight: float) -> float:
    """Running geometric mean: a variance is noisy in proportion to itself."""
    if variance is None:
        return newest
    return math.exp((1 - weight) * math.log(variance) + weight * math.log(newest))


def _tilt_at(kl_there: float, *, tilt: float, kl: float, variance: float) -> float:
    """1/(2β²) of the optimum that spends `kl_there`, from the tilt of the one that spends `kl`.

    A straight line of slope 1/Var. Backwards, a variance that has fallen on the way makes that
    line too steep; the tilt then shrinks at most twice as far as in proportion to the KL.
    """
    straight = tilt + (kl_there - kl) / variance
    if kl_there >= kl:
        return straight
    return max(straight, tilt * kl_there / kl / 2)
