"""Rewards per token against the conservation law; score statistics against numpy."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kleash.algorithms.rewards import ScoreStatistics, kl_shaped_rewards, missing_eos_penalty

ragged = st.tuples(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 2**31 - 1))


def mask_of(lengths: list[int], width: int = 7) -> torch.Tensor:
    return torch.arange(width)[None] < torch.tensor(lengths)[:, None]


@settings(max_examples=60, deadline=None)
@given(ragged, st.floats(0, 10))
def test_rows_sum_to_the_objective_whatever_the_padding_holds(shape, beta):
    lengths, seed = shape
    generator = torch.Generator().manual_seed(seed)
    mask = mask_of(lengths)
    clean = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    scores = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    for poison in (math.nan, math.inf, -1e300):
        charge = torch.where(mask, clean, poison)
        rewards = kl_shaped_rewards(scores, charge, beta, mask)
        expected = [
            float(scores[i]) - beta * math.fsum(clean[i, :n].tolist())
            for i, n in enumerate(lengths)
        ]
        assert rewards.sum(-1).tolist() == pytest.approx(expected, abs=1e-10)
        assert (rewards[~mask] == 0).all()


def test_score_lands_on_the_last_token_alone():
    mask = mask_of([1, 3, 7])
    rewards = kl_shaped_rewards(torch.tensor([5.0, 6.0, 7.0]), torch.zeros(3, 7), 0.1, mask)
    expected = torch.zeros(3, 7)
    expected[0, 0], expected[1, 2], expected[2, 6] = 5.0, 6.0, 7.0
    assert torch.equal(rewards, expected)


def test_score_lands_on_the_last_kept_token_of_a_mask_with_gaps():
    mask = torch.tensor([[False, True, False, True, False]])
    rewards = kl_shaped_rewards(torch.tensor([2.0]), torch.ones(1, 5), 0.5, mask)
    assert rewards.tolist() == [[0.0, -0.5, 0.0, 1.5, 0.0]]


def test_nothing_is_charged_at_beta_zero_not_even_nan():
    mask = mask_of([2, 7])
    rewards = kl_shaped_rewards(torch.tensor([1.0, 2.0]), torch.full((2, 7), math.nan), 0.0, mask)
    assert rewards.sum(-1).tolist() == [1.0, 2.0]


def test_an_infinite_charge_inside_the_response_is_not_hidden():
    charge = torch.tensor([[math.inf, 0.0]])
    rewards = kl_shaped_rewards(torch.tensor([1.0]), charge, 0.1, torch.tensor([[True, True]]))
    assert rewards[0, 0] == -math.inf


def test_half_precision_scores_are_spread_in_float32():
    charge = torch.full((1, 2), 0.001, dtype=torch.bfloat16)
    scores = torch.tensor([3.0], dtype=torch.bfloat16)
    rewards = kl_shaped_rewards(scores, charge, 0.1, torch.tensor([[True, True]]))
    assert rewards.dtype == torch.float32
    assert float(rewards[0, 1]) == pytest.approx(3.0 - 0.1 * float(charge[0, 0]), abs=1e-6)


def test_rewards_carry_no_gradient():
    scores = torch.zeros(1, requires_grad=True)
    charge = torch.zeros(1, 2, requires_grad=True)
    rewards = kl_shaped_rewards(scores, charge, 1.0, torch.tensor([[True, True]]))
    assert not rewards.requires_grad


@pytest.mark.parametrize("beta", [-0.1, math.nan, math.inf])
def test_beta_must_be_a_finite_number_from_zero_on(beta):
    with pytest.raises(ValueError, match=r"beta must be finite and not negative, got"):
        kl_shaped_rewards(torch.zeros(1), torch.zeros(1, 1), beta, torch.tensor([[True]]))


def test_empty_responses_are_named():
    mask = mask_of([2, 0, 1, 0])
    with pytest.raises(ValueError, match=r"got empty responses \[1, 3\]"):
        kl_shaped_rewards(torch.zeros(4), torch.zeros(4, 7), 0.1, mask)


def test_wrong_shapes_and_float_masks_are_refused():
    with pytest.raises(TypeError):
        kl_shaped_rewards(torch.zeros(3), torch.zeros(2, 2), 0.1, torch.ones(2, 2).bool())
    with pytest.raises(TypeError):
        kl_shaped_rewards(torch.zeros(2), torch.zeros(2, 2), 0.1, torch.ones(2, 2))


def test_missing_end_is_subtracted_so_that_order_stays():
    scores = torch.tensor([1.0, 2.0, 3.0])
    after = missing_eos_penalty(scores, torch.tensor([True, False, False]), 5.0)
    assert after.tolist() == [1.0, -3.0, -2.0]


@pytest.mark.parametrize("penalty", [0.0, -1.0, math.nan, math.inf])
def test_the_penalty_must_be_positive(penalty):
    with pytest.raises(ValueError, match=r"missing-EOS penalty must be positive and finite, got"):
        missing_eos_penalty(torch.zeros(1), torch.tensor([True]), penalty)


batches = st.lists(
    st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), max_size=8), min_size=1, max_size=5
)


@settings(max_examples=60, deadline=None)
@given(batches)
def test_statistics_do_not_depend_on_the_batches(parts):
    running = ScoreStatistics()
    for part in parts:
        running = running.update(torch.tensor(part, dtype=torch.float64))
    merged = ScoreStatistics()
    for part in reversed(parts):
        alone = ScoreStatistics().update(torch.tensor(part, dtype=torch.float64))
        merged = alone.merge(merged)
    everything = np.array([x for part in parts for x in part])
    for statistics in (running, merged):
        assert statistics.count == everything.size
        if everything.size:
            assert statistics.mean == pytest.approx(everything.mean(), abs=1e-9)
            variance = statistics.m2 / everything.size
            assert variance == pytest.approx(everything.var(), rel=1e-9, abs=1e-8)


def test_a_large_offset_loses_nothing():
    scores = 1e6 + torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    statistics = ScoreStatistics().update(scores[:1]).update(scores[1:])
    assert statistics.sd == pytest.approx(float(np.std([0.25, 0.5, 0.75, 1.0], ddof=1)), rel=1e-9)


def test_normalised_scores_have_mean_zero_and_sd_one_and_scaled_ones_keep_their_zero():
    scores = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 7 + 65
    statistics = ScoreStatistics().update(scores)
    normalised, scaled = statistics.normalise(scores), statistics.scale(scores)
    assert float(normalised.mean()) == pytest.approx(0, abs=1e-5)
    assert float(normalised.std()) == pytest.approx(1, abs=1e-5)
    assert float(scaled.std()) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(scaled * statistics.sd, scores)
    assert normalised.dtype == scores.dtype


def test_statistics_survive_a_round_trip_through_plain_data():
    statistics = ScoreStatistics().update(torch.tensor([1.0, 2.0, 4.0]))
    assert ScoreStatistics(**dataclasses.asdict(statistics)) == statistics


@pytest.mark.parametrize("seen", [[], [3.0]])
def test_sd_of_fewer_than_two_scores_is_an_error(seen):
    statistics = ScoreStatistics().update(torch.tensor(seen))
    with pytest.raises(ValueError, match=f"needs at least 2 scores, got {len(seen)}"):
        statistics.normalise(torch.zeros(1))


def test_sd_of_equal_scores_is_an_error():
    statistics = ScoreStatistics().update(torch.tensor([0.1, 0.1, 0.1]))
    with pytest.raises(ValueError, match=r"must be positive, got 0: all 3 scores equal 0\.1"):
        statistics.scale(torch.zeros(1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_statistics_refuse_scores_that_are_not_finite(bad):
    with pytest.raises(ValueError, match=r"for responses \[1\]"):
        ScoreStatistics().update(torch.tensor([1.0, bad]))
