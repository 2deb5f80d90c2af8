"""Plans against enumeration: what they claim is right, and where they cannot know they say so."""

import itertools
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from kleash.kl.planning.frontier import (
    NoRow,
    PlanRow,
    beta_ladder,
    plan_for_betas,
    plan_for_budgets,
)
from kleash.kl.planning.tilting import best_of_n_at, best_of_n_gain, spread, tilt

MODEL = oracles.fixed_point_model()


def double(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def drawn(prompts: int, samples: int, seed: int = 0) -> Tensor:
    """Scores of strings drawn from the oracle, as if every group were a prompt of its own."""
    p = MODEL.world.probabilities(MODEL.reference)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.multinomial(p, prompts * samples, replacement=True, generator=generator)
    return MODEL.scores[rows].view(prompts, samples)


def heavy_tailed(prompts: int, samples: int) -> Tensor:
    return -torch.rand(prompts, samples, generator=torch.Generator().manual_seed(0)).log()


@dataclass(frozen=True)
class Population:
    """Prompts that differ: each with a reference and a score per string of its own."""

    logits: Tensor
    scores: Tensor

    def draw(self, prompts: int, samples: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        who = torch.randint(len(self.logits), (prompts,), generator=generator)
        p = self.logits[who].softmax(-1)
        chosen = torch.multinomial(p, samples, replacement=True, generator=generator)
        return self.scores[who].gather(1, chosen)

    def exact(self, beta: float) -> tuple[float, float, float]:
        """Means over prompts of KL*, E*[score] and β·log Z."""
        reference = Categorical(logits=self.logits)
        best = Categorical(logits=reference.logits + self.scores / beta)
        kl, score = kl_divergence(best, reference), (best.probs * self.scores).sum(-1)
        return float(kl.mean()), float(score.mean()), float((score - beta * kl).mean())

    def beta(self, budget: float) -> float:
        low, high = 1e-3, 1e3
        for _ in range(60):
            middle = math.sqrt(low * high)
            enough = self.exact(middle)[0] > budget
            low, high = (middle, high) if enough else (low, middle)
        return math.sqrt(low * high)


@cache
def population() -> Population:
    generator = torch.Generator().manual_seed(3)
    logits, scores = (
        torch.randn(200, 100, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    levels = torch.randn(200, 1, generator=generator, dtype=torch.float64)
    return Population(logits, scores + 2 * levels)


# --- one prompt's samples


def test_samples_that_are_the_distribution_give_its_optimum():
    scores, beta = double([[0.3, -1.0, 2.0, 2.0, 0.0]]), 0.7
    best = Categorical(logits=scores[0] / beta)
    uniform = Categorical(logits=torch.zeros(5, dtype=torch.float64))
    kl = kl_divergence(best, uniform)
    gain = (best.probs * scores[0]).sum() - scores.mean()
    expected = torch.stack([kl, gain, gain - beta * kl])
    torch.testing.assert_close(tilt(scores, beta).plain[0], expected)
    share = 1 / best.probs.square().sum()
    torch.testing.assert_close(tilt(scores, beta).effective_samples[0], share)


def plain_by_hand(scores: np.ndarray, beta: float) -> np.ndarray:
    weights = np.exp(scores / beta)
    mean = (weights * scores).sum() / weights.sum()
    log_z = np.log(weights.mean())
    reference = scores.mean()
    return np.array([mean / beta - log_z, mean - reference, beta * log_z - reference])


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=8), st.floats(0.2, 5.0))
def test_the_jackknife_is_what_leaving_out_each_sample_gives(values: list[float], beta: float):
    scores, n = np.array(values), len(values)
    left_out = [plain_by_hand(np.delete(scores, i), beta) for i in range(n)]
    expected = n * plain_by_hand(scores, beta) - (n - 1) * np.mean(left_out, axis=0)
    got = tilt(double([values]), beta).corrected[0].numpy()
    np.testing.assert_allclose(got, expected, atol=1e-9)


def test_where_the_tilt_is_small_the_jackknife_is_the_unbiased_variance():
    scores = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kl = tilt(scores, 1e3).corrected[:, 0] * 2 * 1e6
    torch.testing.assert_close(kl, scores.var(1), rtol=1e-2, atol=0)


def test_a_sample_that_outweighs_all_others_leaves_finite_numbers():
    tilted = tilt(double([[0.0, 1.0, 1e6], [5.0, 5.0, 5.0]]), 1e-3)
    assert torch.isfinite(tilted.corrected).all()
    assert tilted.plain[0, 0] == pytest.approx(math.log(3))
    assert tilted.corrected[1].abs().max() == 0


def test_a_level_that_is_added_changes_nothing():
    scores = drawn(3, 16)
    torch.testing.assert_close(
        tilt(scores + 1e6, 0.5).corrected, tilt(scores, 0.5).corrected, rtol=1e-6, atol=1e-6
    )


def test_no_budget_has_no_row():
    assert plan_for_budgets(drawn(4, 16), []) == []


def test_a_beta_that_scores_cannot_be_divided_by_is_refused():
    with pytest.raises(ValueError, match="large enough to divide the scores by, got 1e-310"):
        tilt(double([[0.0, 1.0, 2.0]]), 1e-310)


def test_the_jackknife_takes_most_of_the_bias_away():
    """5,000 groups of 32: the bias is there, and less than a third of it is left."""
    scores, beta = drawn(5_000, 32), 0.7
    exact = MODEL.world.optimal_kl(MODEL.reference, MODEL.scores, beta)
    tilted = tilt(scores, beta)
    plain, corrected = float(tilted.plain[:, 0].mean()), float(tilted.corrected[:, 0].mean())
    assert plain < 0.9 * exact
    assert abs(corrected - exact) < (exact - plain) / 3


# --- best of n


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_choices_of_n(n: int):
    scores = double([[0.0, 3.0, -1.0, 3.0, 0.5], [9.0, 1.0, 1.0, 2.0, 0.0]])
    best = [max(c) for row in scores.tolist() for c in itertools.combinations(row, n)]
    expected = sum(best) / len(best) - float(scores.mean())
    assert best_of_n_gain(scores, float(n)) == pytest.approx(expected)


def test_between_whole_numbers_best_of_n_is_between():
    scores = drawn(4, 8)
    half = (best_of_n_gain(scores, 2.0) + best_of_n_gain(scores, 3.0)) / 2
    assert best_of_n_gain(scores, 2.5) == pytest.approx(half)


def test_best_of_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="between 1 and the 8 samples of a prompt, got 9"):
        best_of_n_gain(drawn(2, 8), 9.0)


@given(st.floats(0, 5))
def test_best_of_n_is_found_by_its_kl(kl: float):
    n = best_of_n_at(kl, 64)
    if n is None:
        assert kl > math.log(64) - 63 / 64
    else:
        low, high = (math.log(m) - (m - 1) / m for m in (math.floor(n), math.ceil(n)))
        assert low - 1e-12 <= kl <= high + 1e-12
    assert best_of_n_at(math.log(64) - 63 / 64, 64) == pytest.approx(64)


# --- plans


def test_what_a_plan_claims_is_within_three_percent_and_it_refuses_the_rest():
    scores = drawn(512, 128)
    mean = float((MODEL.world.probabilities(MODEL.reference) * MODEL.scores).sum())
    known = list[float]()
    for row in plan_for_betas(scores, beta_ladder(scores, 10)):
        assert row.known == (not row.reason)
        if not row.known:
            continue
        known.append(row.kl.value)
        beta = row.beta.value
        p = MODEL.world.optimal_probabilities(MODEL.reference, MODEL.scores, beta)
        score = float((p * MODEL.scores).sum())
        kl = MODEL.world.optimal_kl(MODEL.reference, MODEL.scores, beta)
        assert row.kl.value == pytest.approx(kl, rel=0.03)
        assert row.gain.value == pytest.approx(score - mean, rel=0.03)
        assert row.score.value == pytest.approx(score, abs=0.03 * (score - mean))
        variance = float((p * MODEL.scores.square()).sum()) - score**2
        assert row.plant_gain == pytest.approx(variance / (beta**2 * kl), rel=0.05)
        objective = score - beta * kl
        assert row.objective.value == pytest.approx(objective, abs=0.03 * (score - mean))
    assert 3 <= len(known) < 10 and max(known) > 0.7


def test_the_beta_for_a_budget_is_within_three_percent_or_refused():
    budgets = [0.05, 0.2, 0.5, 1.0, 3.0, 6.0]
    rows = plan_for_budgets(drawn(512, 128), budgets)
    assert [row.known for row in rows] == [True, True, True, True, False, False]
    for budget, row in zip(budgets[:4], rows, strict=False):
        exact = MODEL.world.beta_for_kl(MODEL.reference, MODEL.scores, budget)
        assert isinstance(row, PlanRow)
        assert row.kl.value == pytest.approx(budget, rel=1e-6)
        assert row.beta.value == pytest.approx(exact, rel=0.03)
        assert row.beta.low < row.beta.value < row.beta.high
    assert isinstance(rows[5], NoRow) and "fewer than 6" in rows[5].reason


def test_intervals_cover_the_truth_in_nine_trials_of_ten():
    """200 trials of 32 prompts out of a population of 200, 64 samples each, 95 % intervals."""
    world, beta, budget, trials = population(), 1.2, 0.3, 200
    exact, exact_beta = world.exact(beta), world.beta(budget)
    covered = dict.fromkeys(("kl", "score", "objective", "beta"), 0)
    for seed in range(trials):
        scores = world.draw(32, 64, seed)
        (row,) = plan_for_betas(scores, [beta], seed=seed)
        for name, truth in zip(("kl", "score", "objective"), exact, strict=True):
            interval = getattr(row, name)
            covered[name] += interval.low <= truth <= interval.high
        (found,) = plan_for_budgets(scores, [budget], seed=seed)
        assert isinstance(found, PlanRow)
        covered["beta"] += found.beta.low <= exact_beta <= found.beta.high
    assert all(count >= 0.9 * trials for count in covered.values()), covered


def test_pooling_the_prompts_would_be_wrong_and_is_not_done():
    """Prompts differ in level by more than responses do: pooled weights would buy easy prompts."""
    world = population()
    (row,) = plan_for_betas(world.draw(400, 64, 0), [1.0])
    pooled = tilt(world.draw(400, 64, 0).view(1, -1), 1.0).plain[0, 0]
    assert pooled > 3 * world.exact(1.0)[0]
    assert row.kl.low <= world.exact(1.0)[0] <= row.kl.high


@pytest.mark.parametrize(
    ("scores", "beta", "reason"),
    [
        (heavy_tailed(256, 32), 2.0, "32 samples a prompt are too few"),
        (drawn(64, 16), 0.2, "a tenth of the prompts rest on"),
        (drawn(64, 3) * 100, 0.1, "more than the log N = 1.10 nats"),
    ],
)
def test_where_samples_cannot_say_the_reason_is_given(scores: Tensor, beta: float, reason: str):
    (row,) = plan_for_betas(scores, [beta])
    assert not row.known and reason in row.reason


def test_scores_that_do_not_vary_gain_nothing():
    flat = torch.ones(3, 8)
    (row,) = plan_for_betas(flat, [1.0])
    assert (row.kl.value, row.gain.value, row.score.value, row.plant_gain) == (0, 0, 1, 0)
    (none,) = plan_for_budgets(flat, [1.0])
    assert isinstance(none, NoRow) and "do not vary" in none.reason and none.budget == 1.0
    with pytest.raises(ValueError, match="scores that vary within a prompt"):
        beta_ladder(flat)


def test_a_plan_scales_with_its_scores_and_repeats():
    scores = drawn(32, 32)
    (one,), (hundred,) = (plan_for_budgets(scores * c, [0.4]) for c in (1.0, 100.0))
    assert isinstance(one, PlanRow) and isinstance(hundred, PlanRow)
    assert hundred.beta.value == pytest.approx(100 * one.beta.value)
    assert hundred.beta.high == pytest.approx(100 * one.beta.high)
    assert plan_for_budgets(scores, [0.4]) == [one]


def test_a_higher_confidence_is_a_wider_interval():
    narrow, wide = (plan_for_betas(drawn(32, 32), [1.0], confidence=c)[0].kl for c in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_a_ladder_falls_from_next_to_nothing_to_log_n():
    scores = drawn(64, 32)
    ladder = beta_ladder(scores, 5)
    assert ladder == sorted(ladder, reverse=True) and len(ladder) == 5
    assert spread(scores) ** 2 / (2 * ladder[0] ** 2) == pytest.approx(0.02)
    assert spread(scores) ** 2 / (2 * ladder[-1] ** 2) == pytest.approx(math.log(32))
    with pytest.raises(ValueError, match="at least 2 rungs"):
        beta_ladder(scores, 1)


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        (torch.zeros(1, 8), "at least 2 prompts with 3 samples each, got 1 with 8"),
        (torch.zeros(4, 2), "at least 2 prompts with 3 samples each, got 4 with 2"),
        (double([[0, 1, 2], [0, math.nan, 1]]), r"not at \[prompt, sample\] \[1, 1\]"),
        (double([[0, math.inf, 2], [0, 1, 1]]), r"not at \[prompt, sample\] \[0, 1\]"),
    ],
)
def test_scores_that_no_plan_can_be_made_of_are_refused(scores: Tensor, sentence: str):
    for plan in (plan_for_betas, plan_for_budgets):
        with pytest.raises(ValueError, match=sentence):
            plan(scores, [1.0])


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_betas_and_budgets_must_be_positive(bad: float):
    with pytest.raises(ValueError, match="every beta must be positive"):
        plan_for_betas(drawn(4, 4), [1.0, bad])
    with pytest.raises(ValueError, match="every budget must be positive"):
        plan_for_budgets(drawn(4, 4), [1.0, bad])


@pytest.mark.parametrize("confidence", [0.0, 1.0, math.nan])
def test_a_confidence_lies_between_nothing_and_certainty(confidence: float):
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
        plan_for_betas(drawn(4, 4), [1.0], confidence=confidence)
