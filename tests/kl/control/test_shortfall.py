"""A budget that is not spent: β does not rise, and the run says why."""

import itertools
import math
from dataclasses import replace

import oracles
import pytest
import torch
from controlled_plants import Lagging, Lane, closed_loop
from hypothesis import given
from hypothesis import strategies as st

from kleash.kl.control.controllers import (
    BetaController,
    BetaState,
    BudgetBeta,
    Measurement,
)
from kleash.kl.control.shortfall import explain_shortfall

MODEL = oracles.fixed_point_model()

STALLED = [
    # KL, its standard error: sixteen responses a step, a target of 0.3 nats.
    *[(0.080, 0.016), (0.180, 0.020), (0.180, 0.030), (0.199, 0.031), (0.220, 0.030)],
    *[(0.210, 0.030), (0.200, 0.030), (0.250, 0.020), (0.220, 0.040), (0.250, 0.040)],
    *[(0.240, 0.040), (0.250, 0.050), (0.210, 0.040), (0.250, 0.060), (0.240, 0.050)],
]
"""Readings of a run of a tiny model, in which β went from 0.83 to 1.33 in as many steps."""


def betas(controller: BetaController, readings: list[Measurement]) -> list[float]:
    states = [controller.init()]
    for reading in readings:
        states.append(controller.update(states[-1], reading))
    return [state.beta for state in states]


@pytest.mark.parametrize("plant_gain", [None, 2.0])
def test_a_drift_that_has_ended_does_not_raise_beta(plant_gain: float | None) -> None:
    controller = BudgetBeta(0.3, 0.83, plant_gain=plant_gain)
    course = betas(controller, [Measurement(kl, error, 16) for kl, error in STALLED])
    assert all(after <= before for before, after in itertools.pairwise(course))


def test_scores_that_begin_to_vary_more_do_not_raise_beta_before_the_kl_is_there() -> None:
    """The closed form of the variance says twice the β; the KL is at half its target."""
    controller = BudgetBeta(1.0, 0.5)
    readings = [Measurement(0.5, 0.02, 128, variance) for variance in (0.5, 1.0, 2.0, 2.0, 2.0)]
    assert max(betas(controller, readings)) == 0.5
    # Then it arrives, and what the closed form knows counts.
    there = [*readings, *[Measurement(1.0, 0.02, 128, 2.0)] * 3]
    assert betas(controller, there)[-1] > 0.5


@pytest.mark.parametrize("peak", [0.33, 0.45])
def test_one_high_reading_does_not_raise_beta(peak: float) -> None:
    """Of a KL of 0.1 under 0.3, with the noise that 16 responses have: half of the reading."""
    low, high = Measurement(0.1, 0.05, 16), Measurement(peak, peak / 2, 16)
    course = betas(BudgetBeta(0.3, 0.5), [*[low] * 6, high, *[low] * 6])
    assert all(after <= before for before, after in itertools.pairwise(course))


@given(
    st.floats(0.05, 20.0),
    st.sampled_from([None, 0.8, 2.0]),
    st.lists(
        st.tuples(st.floats(0.001, 0.7), st.floats(0.0, 0.3), st.floats(0.01, 100.0)), max_size=30
    ),
)
def test_whatever_happens_under_the_target_beta_never_rises(
    target: float, plant_gain: float | None, history: list[tuple[float, float, float]]
) -> None:
    """Every reading is at 70 % of the target or less, however it is smoothed; noise up to 30 %."""
    controller = BudgetBeta(target, 1.0, plant_gain=plant_gain)
    readings = [
        Measurement(share * target, noise * share * target, 16, variance)
        for share, noise, variance in history
    ]
    course = betas(controller, readings)
    assert all(after <= before for before, after in itertools.pairwise(course))


@pytest.mark.parametrize("noise", [0.025, 0.16, 0.3])
def test_in_a_closed_loop_beta_rises_only_near_the_target_or_above(noise: float) -> None:
    """Against the true KL, which no controller sees: its mean of ten steps under 70 %."""
    targets = [0.1, 0.5, 1.0, 2.0] * 2
    plant = Lagging(MODEL, [Lane(1.0, seed) for seed in range(8)], rate=0.03, noise=noise)
    start = [math.sqrt(0.5 / target) for target in targets]
    controllers = [BudgetBeta(t, s) for t, s in zip(targets, start, strict=True)]
    history = closed_loop(plant, controllers, 100)
    smoothed = history.kl.unfold(0, 10, 1).mean(-1)
    rises = history.beta[10:] > history.beta[9:-1]
    far = smoothed[:-1] < 0.7 * torch.tensor(targets)
    assert far.sum() > 50
    assert not (rises & far).any()


# --- said, where it goes on

STUCK = BetaState(0.5, level=0.2, under=9)


def test_a_budget_under_spent_for_longer_than_its_settling_time_is_explained_now_and_then() -> None:
    controller, state, said = BudgetBeta(1.0, 0.5), BetaState(0.5), list[int]()
    for step in range(1, 41):
        state = controller.update(state, Measurement(0.25, 0.02, 64))
        if explain_shortfall(state, 1.0, 0.7) is not None:
            said.append(step)
    assert said == [9, 17, 25, 33]


def test_a_policy_that_lags_behind_its_optimum_is_said_to_learn_too_slowly() -> None:
    """Scores of sd 0.8 and β = 0.5: the optimum spends 0.64/0.5 = 1.28 nats."""
    sentence = explain_shortfall(replace(STUCK, speed=0.01), 1.0, 0.8)
    assert sentence is not None
    assert "about 1.3 nats" in sentence and "raise optimizer.lr" in sentence
    assert "55 more steps" in sentence  # (1 − √0.2)/0.01


def test_scores_that_hardly_differ_have_no_more_to_give() -> None:
    for sd in (0.0, None, 0.2):
        sentence = explain_shortfall(STUCK, 1.0, sd)
        assert sentence is not None and "more to give" in sentence and "lr" not in sentence


def test_beta_at_its_bound_is_named() -> None:
    sentence = explain_shortfall(replace(STUCK, bounded=True), 1.0, 0.8)
    assert sentence is not None and "β stands at its bound, 0.5" in sentence


@pytest.mark.parametrize(
    "state",
    [
        BetaState(0.5),
        replace(STUCK, under=8),
        replace(STUCK, under=10),
        replace(STUCK, speed=0.08),  # there within 8 readings
    ],
)
def test_nothing_is_said_before_or_where_the_kl_arrives(state: BetaState) -> None:
    assert explain_shortfall(state, 1.0, 0.8) is None
