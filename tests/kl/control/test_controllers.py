"""Controllers: their published numbers, what they must survive, and loops closed on the oracle."""

import json
import math
from dataclasses import asdict, replace
from typing import Any

import oracles
import pytest
import torch
from controlled_plants import (
    ExactGradient,
    Lagging,
    Lane,
    Pace,
    Plant,
    SampledPPO,
    closed_loop,
    course,
    score_sd,
    variance_under,
)
from hypothesis import given
from hypothesis import strategies as st

from kleash.kl.control.controllers import (
    AdaptiveBeta,
    BetaController,
    BetaState,
    BudgetBeta,
    FixedBeta,
    Measurement,
    ScheduledBeta,
    initial_beta,
    raise_beta,
)

NAN, INF = math.nan, math.inf
MODEL = oracles.fixed_point_model()
EXACT_BETA = {
    target: MODEL.world.beta_for_kl(MODEL.reference, MODEL.scores, target)
    for target in (0.1, 0.5, 1.0, 2.0)
}


def read(controller: BetaController, *kls: float, state: BetaState | None = None, **more: Any):
    state = controller.init() if state is None else state
    for kl in kls:
        more = {"standard_error": 0.0, "responses": 128, **more}
        state = controller.update(state, Measurement(kl, **more))
    return state


# --- the published controllers


@pytest.mark.parametrize(
    ("kl", "code", "paper"),
    [
        (12.0, 0.151536, 0.153),
        (6.3, 0.150384, 0.15075),
        (6.0, 0.15, 0.15),
        (5.4, 0.149232, 0.1485),
        (3.0, 0.148464, 0.147),
        (0.0, 0.148464, 0.147),
    ],
)
def test_ziegler_moves_as_paper_and_as_code_say(kl: float, code: float, paper: float):
    for gain, expected in (("code", code), ("paper", paper)):
        controller = AdaptiveBeta(target_kl=6.0, initial=0.15, gain=gain)
        assert read(controller, kl, responses=512).beta == pytest.approx(expected, rel=1e-12)


def test_ziegler_stays_within_its_bounds():
    controller = AdaptiveBeta(target_kl=1.0, initial=1.0, beta_min=0.99, beta_max=1.01)
    assert read(controller, 9.0).beta == 1.01
    assert read(controller, 0.1).beta == 0.99


def test_ziegler_refuses_a_batch_that_could_bring_beta_to_zero():
    controller = AdaptiveBeta(target_kl=1.0, initial=1.0, gain="code", horizon=100)
    with pytest.raises(ValueError, match=r"fewer than 5 × horizon = 500 .* got 500"):
        read(controller, 1.0, responses=500)


def test_fixed_beta_is_fixed_and_may_be_zero():
    state = read(FixedBeta(0.0), 1.0, NAN, 3.0, responses=10)
    assert state == BetaState(0.0, updates=2, ignored=1, responses=30)


@pytest.mark.parametrize(
    ("responses", "beta"), [(0, 0.2), (50, 0.2), (100, 0.2), (200, 0.15), (300, 0.1), (999, 0.1)]
)
def test_a_schedule_follows_its_lines(responses: int, beta: float):
    controller = ScheduledBeta(((100, 0.2), (300, 0.1)))
    state = read(controller, NAN, responses=responses) if responses else controller.init()
    assert state.beta == pytest.approx(beta)


def test_a_schedule_does_not_depend_on_the_batch():
    controller = ScheduledBeta(((0, 1.0), (64, 3.0), (96, 0.0)))
    small, large = read(controller, *[1.0] * 10, responses=8), read(controller, 1.0, responses=80)
    assert small.beta == large.beta == pytest.approx(1.5)


# --- settings


@pytest.mark.parametrize("bad", [-0.1, NAN, INF])
def test_a_fixed_beta_must_be_a_number(bad: float):
    with pytest.raises(ValueError, match=f"not negative, got {bad}"):
        FixedBeta(bad)


@pytest.mark.parametrize(
    ("points", "sentence"),
    [
        ((), "at least one"),
        (((10, 1.0), (10, 2.0)), "must increase"),
        (((0, 1.0), (10, -2.0)), "at every point"),
        (((0, NAN),), "at every point"),
    ],
)
def test_a_schedule_must_make_sense(points: tuple[tuple[int, float], ...], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        ScheduledBeta(points)


@pytest.mark.parametrize("make", [AdaptiveBeta, BudgetBeta])
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"target_kl": 0.0}, "target_kl must be positive"),
        ({"target_kl": -1.0}, "target_kl must be positive"),
        ({"target_kl": NAN}, "target_kl must be positive"),
        ({"initial": 0.0}, "initial must lie between"),
        ({"initial": NAN}, "initial must lie between"),
        ({"beta_min": 0.0}, "0 < beta_min"),
        ({"beta_min": 2.0, "beta_max": 1.0}, "0 < beta_min"),
        ({"beta_max": INF}, "0 < beta_min"),
    ],
)
def test_targets_and_bounds_must_make_sense(make: Any, settings: dict[str, float], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        make(**{"target_kl": 1.0, "initial": 1.0, **settings})


@pytest.mark.parametrize("settings", [{"horizon": 0}, {"horizon": -5}])
def test_a_horizon_must_be_positive(settings: dict[str, int]):
    with pytest.raises(ValueError, match="horizon must be a positive number of responses"):
        AdaptiveBeta(target_kl=1.0, initial=1.0, gain="code", **settings)


def test_a_gain_must_be_one_of_the_two():
    controller = AdaptiveBeta(target_kl=1.0, initial=1.0)
    object.__setattr__(controller, "gain", "article")  # past the type checker that tests run under
    with pytest.raises(ValueError, match="gain must be 'paper' or 'code', got 'article'"):
        controller.__post_init__()


@pytest.mark.parametrize("name", ["plant_gain", "settling", "rate_max", "error_max", "look_ahead"])
@pytest.mark.parametrize("bad", [-1.0, NAN, INF])
def test_settings_of_the_budget_must_be_positive(name: str, bad: float):
    with pytest.raises(ValueError, match=f"{name} must"):
        BudgetBeta(1.0, 1.0, **{name: bad})


@pytest.mark.parametrize("sd", [0.0, -1.0, NAN, INF])
def test_scores_that_do_not_vary_imply_no_beta(sd: float):
    with pytest.raises(ValueError, match="score_sd must be positive"):
        initial_beta(1.0, sd)


# --- the budget, reading by reading

readings = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(1e-3, 1e3),
    st.sampled_from([0.0, -1.0, NAN, INF, 1e-308, 1e308]),
)
variances = st.one_of(st.none(), st.floats(allow_nan=True), st.floats(1e-3, 1e3))


@given(st.lists(st.tuples(readings, readings, variances), max_size=12), st.floats(0.01, 100.0))
def test_whatever_is_read_beta_stays_a_number_in_its_bounds(
    history: list[tuple[float, float, float | None]], target: float
):
    budget = BudgetBeta(target, 1.0, beta_min=1e-3, beta_max=1e3)
    for controller in (budget, replace(budget, plant_gain=1.7)):
        state = controller.init()
        for kl, error, variance in history:
            before, reading = state, Measurement(kl, error, 7, variance)
            state = controller.update(state, reading)
            assert 1e-3 <= state.beta <= 1e3
            assert abs(math.log(state.beta / before.beta)) <= 0.5 + 1e-9
            assert all(math.isfinite(v) for v in asdict(state).values() if v is not None)
            assert BetaState(**json.loads(json.dumps(asdict(state), allow_nan=False))) == state
            assert state.updates + state.ignored == before.updates + before.ignored + 1


@pytest.mark.parametrize("bad", [NAN, INF, -INF, -1e-9, -3.0])
@pytest.mark.parametrize(
    "controller", [BudgetBeta(1.0, 1.0), AdaptiveBeta(target_kl=1.0, initial=1.0)]
)
def test_a_reading_that_is_none_moves_nothing_but_its_count(controller: BetaController, bad: float):
    state = read(controller, 0.5, 0.8, score_variance=1.0)
    after = read(controller, bad, state=state, score_variance=99.0)
    assert after == replace(state, error=0.0, ignored=1, responses=state.responses + 128)


def test_a_kl_of_exactly_zero_does_not_move_beta():
    state = read(BudgetBeta(1.0, 0.3), 0.0, 0.0, score_variance=1.0)
    assert (state.beta, state.updates) == (0.3, 2)
    assert state.feedforward == pytest.approx(math.sqrt(0.5))


def test_beta_goes_up_when_the_kl_is_above_and_down_when_below():
    assert read(BudgetBeta(1.0, 1.0), 2.0, 2.0).beta > 1
    assert read(BudgetBeta(1.0, 1.0), 0.5, 0.5).beta < 1
    assert read(BudgetBeta(1.0, 1.0), 1.0, 1.0).beta == 1


def test_a_kl_on_its_way_is_met_before_it_arrives():
    """Still below its target, but rising fast: β goes up."""
    assert read(BudgetBeta(1.0, 1.0), 0.3, 0.6, 0.9).beta > 1


def test_noise_that_looks_like_drift_is_none():
    quiet = read(BudgetBeta(1.0, 1.0), 1.0, 1.02)
    noisy = read(BudgetBeta(1.0, 1.0), 1.0, 1.02, standard_error=0.05)
    assert quiet.error == pytest.approx(math.log(1.02) + 5 * 0.5 * math.log(1.02), rel=0.02)
    assert noisy.error == pytest.approx(math.log(1.02) + (0.05 / 1.02) ** 2 / 2)


@pytest.mark.parametrize("unknown", [NAN, -1.0])
def test_an_unknown_noise_counts_as_none(unknown: float):
    known = read(BudgetBeta(1.0, 1.0), 1.0, 1.3)
    assert read(BudgetBeta(1.0, 1.0), 1.0, 1.3, standard_error=unknown) == known


def test_noise_does_not_bias_the_integral():
    """KL readings with mean at the target and 20 % of noise leave β where it is, on average."""
    controller = BudgetBeta(1.0, 1.0, look_ahead=0.0, settling=5.0)
    off = 0.2 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    kls = torch.cat([1 + off, 1 - off]).tolist()  # in pairs, so that the mean is the target's
    assert read(controller, *kls, standard_error=0.2).trim == pytest.approx(0, abs=1)
    # Without the correction −0.02 · 1000/(2 · 5) = −2; terms of fourth order leave +0.3.


@pytest.mark.parametrize("many", [2, 5])
def test_a_noisy_reading_counts_as_the_responses_it_is_of(many: int):
    """As many readings as the variance of one is larger move β as far as a single clear one."""
    controller, noise = BudgetBeta(1.0, 1.0), 0.06 * math.sqrt(many)
    known = BetaState(1.0, kl=1.02)
    clear = read(controller, 1.02, state=known)
    noisy = read(controller, *[1.02] * many, state=known, standard_error=1.02 * noise)
    assert clear.trim == pytest.approx(math.log(1.02) / (2 * 8))
    assert noisy.trim == pytest.approx((math.log(1.02) + noise**2 / 2) / (2 * 8))


def test_an_error_that_noise_cannot_explain_is_worked_off_at_once():
    """Twice the target for 40 readings: a fifth of the error, and all that is beyond the noise."""
    controller, noise = BudgetBeta(1.0, 1.0), 0.24
    state = read(controller, *[2.0] * 40, state=BetaState(1.0, kl=2.0), standard_error=2 * noise)
    error = math.log(2) + noise**2 / 2
    assert state.offset == pytest.approx(error, rel=1e-3)
    assert state.error == pytest.approx(0.2 * error + 0.8 * (error - noise), rel=1e-3)


@pytest.mark.parametrize("error", [0.0, 0.01, 0.06])
def test_a_clear_reading_has_its_whole_weight(error: float):
    state = read(BudgetBeta(1.0, 1.0, look_ahead=0.0), 2.0, standard_error=2 * error)
    assert state.trim == pytest.approx((math.log(2) + error**2 / 2) / (2 * 8))


def test_the_batch_size_does_not_matter():
    kls = (0.1, 0.5, 0.9, 1.4, 1.2)
    small = read(BudgetBeta(1.0, 1.0), *kls, responses=8, score_variance=1.0)
    large = read(BudgetBeta(1.0, 1.0), *kls, responses=512, score_variance=1.0)
    assert replace(small, responses=0) == replace(large, responses=0)


@given(st.floats(1e-3, 1e3))
def test_scaling_the_scores_scales_beta(scale: float):
    kls = (0.1, 0.5, 0.9, 1.4, 1.2)
    one = read(BudgetBeta(1.0, 0.7), *kls, score_variance=1.0)
    scaled = read(BudgetBeta(1.0, 0.7 * scale), *kls, score_variance=scale**2)
    assert scaled.beta == pytest.approx(one.beta * scale)


def test_nothing_winds_up_at_a_bound():
    controller = BudgetBeta(1.0, 1.0, beta_max=2.0)
    state = read(controller, *[9.0] * 50)
    assert state.beta == 2.0
    assert read(controller, 0.5, 0.5, state=state).beta < 2.0


def test_nothing_winds_up_behind_the_rate_limit():
    """β is 1000 times too large: on its way down it integrates nothing on top."""
    controller = BudgetBeta(1.0, 1000.0)
    state = read(controller, *[0.01] * 10, score_variance=2.0)
    assert state.beta == pytest.approx(1000 * math.exp(-5), rel=1e-6)
    assert state.trim == 0


def test_a_plan_is_taken_at_its_word():
    controller = BudgetBeta(1.0, 0.3, plant_gain=3.0)
    first = controller.init().beta
    assert first == 0.3
    state = read(controller, 1.0, 1.0, score_variance=7.0)
    assert (state.feedforward, state.gain) == (0.3, 3.0)
    assert state.beta == pytest.approx(first)
    pushed = read(controller, 2.0, 2.0, score_variance=7.0)
    assert math.log(pushed.beta / first) == pytest.approx(2 * math.log(2) / (3 * 8))


def test_a_flat_plan_does_not_hurry_the_loop():
    """Divided by its own slope, two readings would move β by 2·ln 2/(0.1 · 8) = 1.7."""
    controller = BudgetBeta(1.0, 0.3, plant_gain=0.1)
    moved = math.log(read(controller, 2.0, 2.0).beta / controller.init().beta)
    assert 0.05 < moved < 0.2


def test_the_gain_is_measured_at_the_place():
    """Var/(β²·KL) at the optimum for 0.5 nats is the slope of ln KL* over ln β."""
    beta = EXACT_BETA[0.5]
    p = MODEL.world.optimal_probabilities(MODEL.reference, MODEL.scores, beta)
    variance = float(variance_under(p, MODEL.scores))
    shift = 1.001
    kls = [
        MODEL.world.optimal_kl(MODEL.reference, MODEL.scores, beta * s) for s in (shift, 1 / shift)
    ]
    expected = math.log(kls[1] / kls[0]) / (2 * math.log(shift))
    state = read(BudgetBeta(0.5, beta), 0.5, score_variance=variance)
    assert state.gain == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("target", [0.1, 0.5, 1.0, 2.0])
def test_along_the_path_of_optima_the_feedforward_is_exact(target: float):
    """Nothing but dKL = −Var·dβ/β³, summed over 60 optima on the way, and a bit beyond."""
    controller, state = BudgetBeta(target, 1.0), BetaState(1.0)
    for i in range(1, 67):
        beta = EXACT_BETA[target] * 60 / i
        p = MODEL.world.optimal_probabilities(MODEL.reference, MODEL.scores, beta)
        kl = MODEL.world.optimal_kl(MODEL.reference, MODEL.scores, beta)
        variance = float(variance_under(p, MODEL.scores))
        state = read(controller, kl, state=state, score_variance=variance)
    assert state.feedforward == pytest.approx(EXACT_BETA[target], rel=0.02)


def test_a_path_retraced_after_scores_saturated_keeps_a_positive_tilt():
    controller = BudgetBeta(1.0, 1.0)
    state = read(controller, 0.5, 2.0, score_variance=1.0)
    state = read(controller, *[2.0] * 20, state=state, score_variance=1e-4)
    state = read(controller, 0.2, 1e-6, state=state, score_variance=1e-4)
    assert state.tilt > 0 and state.feedforward is not None and state.feedforward > 0


def test_a_variance_that_comes_late_is_used():
    controller = BudgetBeta(1.0, 5.0)
    state = read(controller, 0.2, 0.3)
    assert state.feedforward == 5.0 and state.gain == 2.0
    state = read(controller, 0.4, state=state, score_variance=2.0)
    assert state.feedforward == pytest.approx(1.0)


# --- loops closed on the oracle


def assert_held(plant: Plant, start: dict[float, float], targets: list[float], n: int):
    controllers = [
        BudgetBeta(t, start[t] * lane.scale) for t, lane in zip(targets, plant.lanes, strict=True)
    ]
    history = closed_loop(plant, controllers, n)
    for i, (target, lane) in enumerate(zip(targets, plant.lanes, strict=True)):
        exact = EXACT_BETA[target] * lane.scale
        run = course(history.kl[:, i], history.beta[:, i], target=target, exact_beta=exact)
        assert abs(run.end) <= 0.05, (target, lane, run)
        assert abs(run.after_third) <= 0.05, (target, lane, run)
        assert run.overshoot <= 0.25, (target, lane, run)
        assert abs(run.beta) <= 0.05, (target, lane, run)


SPREAD_START = {target: initial_beta(target, score_sd(MODEL)) for target in EXACT_BETA}


@pytest.mark.parametrize(("rate", "delay"), [(0.1, 0), (0.2, 2), (0.5, 0), (0.5, 2)])
def test_the_budget_is_held_on_a_lagging_plant(rate: float, delay: int):
    """Readings as noisy as those of 128 responses: 2.5 % of the KL."""
    targets = [0.1, 0.5, 1.0, 2.0]
    lanes = [Lane(1.0, seed) for seed in range(4)]
    plant = Lagging(MODEL, lanes, rate=rate, noise=0.025, delay=delay)
    assert_held(plant, SPREAD_START, targets, 120)


def test_little_of_the_noise_of_a_small_batch_gets_into_the_policy():
    """Readings of 32 responses, off by 16 %: an integral over 8 of them would pass on 16/√(2·8)."""
    targets = torch.tensor([0.1, 0.5, 1.0, 2.0] * 2, dtype=torch.float64)
    plant = Lagging(MODEL, [Lane(1.0, seed) for seed in range(8)], rate=0.1, noise=0.16)
    controllers = [BudgetBeta(t, SPREAD_START[t]) for t in targets.tolist()]
    history = closed_loop(plant, controllers, 300)
    off = (history.kl[100:] / targets).log()
    assert float(off.square().mean().sqrt()) < 0.16 / math.sqrt(2 * 8)
    assert off.mean(0).abs().max() < 0.05
    exact = torch.tensor([EXACT_BETA[t] for t in targets.tolist()])
    assert (history.beta[-100:].mean(0) / exact - 1).abs().max() < 0.05


@pytest.mark.parametrize("wrong", [0.7, 1.4])
def test_noise_does_not_hide_a_plan_that_is_wrong(wrong: float):
    """β off by two fifths, the KL by twice that: fixed within a third of the iterations."""
    targets = torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.float64)
    plant = Lagging(MODEL, [Lane(1.0, seed) for seed in range(4)], rate=0.1, noise=0.16)
    controllers = [BudgetBeta(t, wrong * EXACT_BETA[t], plant_gain=2.0) for t in targets.tolist()]
    history = closed_loop(plant, controllers, 200)
    assert (history.kl[67:].mean(0) / targets - 1).abs().max() < 0.05


@pytest.mark.parametrize("wrong", [0.2, 5.0])
def test_a_wrong_start_is_put_right_by_the_scores(wrong: float):
    targets = [0.1, 0.5, 1.0, 2.0]
    lanes = [Lane(1.0, seed) for seed in range(4)]
    plant = Lagging(MODEL, lanes, rate=0.1, noise=0.025)
    start = {target: beta * wrong for target, beta in SPREAD_START.items()}
    controllers = [BudgetBeta(target, start[target]) for target in targets]
    history = closed_loop(plant, controllers, 120)
    for i, target in enumerate(targets):
        run = course(
            history.kl[:, i], history.beta[:, i], target=target, exact_beta=EXACT_BETA[target]
        )
        assert abs(run.end) <= 0.05 and abs(run.beta) <= 0.05, (target, run)


def test_the_budget_is_held_by_exact_gradients_at_any_scale_of_scores():
    cases = [(0.1, 0.01), (0.5, 100.0), (1.0, 1.0), (2.0, 0.01), (2.0, 100.0)]
    plant = ExactGradient(MODEL, [Lane(s, 0) for _, s in cases])
    assert_held(plant, SPREAD_START, [t for t, _ in cases], 60)


def test_the_budget_is_held_in_sampled_ppo():
    lanes = [Lane(1.0, 0), Lane(100.0, 1)]
    plant = SampledPPO(MODEL, lanes, Pace(60, responses=512, epochs=2, lr=0.02))
    assert_held(plant, SPREAD_START, [0.5, 1.0], 60)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_beta_is_raised_by_a_number(factor: float) -> None:
    with pytest.raises(ValueError, match="factor must be positive and finite"):
        raise_beta(BetaState(0.1), factor)


def test_a_raised_beta_is_not_taken_back() -> None:
    """A controller that is on target leaves a raised β where it is."""
    controller = BudgetBeta(target_kl=2.0, initial=0.5)
    state = controller.init()
    for _ in range(10):
        state = controller.update(state, Measurement(2.0, 0.01, 64))
    raised = raise_beta(state, 3.0)
    assert raised.beta == pytest.approx(3 * state.beta)
    assert controller.update(raised, Measurement(2.0, 0.01, 64)).beta == pytest.approx(
        3 * state.beta, rel=0.01
    )
