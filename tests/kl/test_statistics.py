import math

import numpy as np
import oracles
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from kleash.kl import statistics
from kleash.kl.statistics import Estimate


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def test_response_kl_is_the_sum_over_kept_tokens() -> None:
    kl = torch.tensor([[0.1, 0.2, math.nan], [1.0, math.inf, math.inf]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    sums = statistics.response_kl(kl, mask)
    np.testing.assert_allclose(sums.detach(), [0.3, 1.0], rtol=1e-6)
    sums.sum().backward()
    assert torch.equal(kl.grad, mask.float())


def test_response_kl_averages_to_the_kl_of_responses() -> None:
    """Chain rule: the visited states' KLs add up, on average, to the KL of whole strings."""
    models = oracles.gradient_models()
    world = models.world
    state_kl = world.state_kl(models.policy, models.reference)
    sums = statistics.response_kl(world.at_tokens(state_kl), world.mask)
    mean = (world.probabilities(models.policy) * sums).sum().item()
    total = world.kl(models.policy, models.reference).item()
    by_visits = (world.visits(models.policy) * state_kl).sum().item()
    assert mean == pytest.approx(total, abs=1e-12)
    assert by_visits == pytest.approx(total, abs=1e-12)


@given(seed=st.integers(0, 10_000), n=st.integers(2, 30))
def test_one_response_a_prompt_is_scipys_sem(seed: int, n: int) -> None:
    x = normal(seed, n)
    estimate = statistics.clustered_mean(torch.tensor(x), torch.arange(n) * 7 - 3)
    assert estimate.mean == pytest.approx(x.mean(), abs=1e-12)
    assert estimate.standard_error == pytest.approx(scipy.stats.sem(x), rel=1e-9)
    assert (estimate.n, estimate.clusters) == (n, n)


@given(seed=st.integers(0, 10_000), prompts=st.integers(2, 12), size=st.integers(1, 6))
def test_equal_clusters_are_the_standard_error_of_prompt_means(seed, prompts, size) -> None:
    x = normal(seed, prompts, size) + normal(seed + 1, prompts, 1)
    order = np.random.default_rng(seed).permutation(prompts * size)
    index = np.repeat(np.arange(prompts) * 5, size)[order]
    estimate = statistics.clustered_mean(torch.tensor(x.ravel()[order]), torch.tensor(index))
    assert estimate.mean == pytest.approx(x.mean(), abs=1e-12)
    assert estimate.standard_error == pytest.approx(scipy.stats.sem(x.mean(-1)), rel=1e-9)
    assert (estimate.n, estimate.clusters) == (prompts * size, prompts)


def test_unequal_clusters_are_the_sandwich_of_a_regression_on_a_constant() -> None:
    x, groups = normal(0, 9), np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
    design = np.ones((9, 1))
    bread = np.linalg.inv(design.T @ design)
    residual = x - x.mean()
    meat = np.zeros((1, 1))
    for g in range(3):
        score = design[groups == g].T @ residual[groups == g]
        meat += np.outer(score, score)
    sandwich = 3 / 2 * bread @ meat @ bread
    estimate = statistics.clustered_mean(torch.tensor(x), torch.tensor(groups))
    assert estimate.standard_error == pytest.approx(math.sqrt(sandwich[0, 0]), rel=1e-12)


def coverage(groups: np.ndarray, seed: int) -> float:
    """Share of 1,000 experiments whose mean ± 1.96 s.e. holds the truth, 0.

    Sixty prompts of five responses, prompts differing as much as responses to one do.
    """
    rng, hits = np.random.default_rng(seed), 0
    for _ in range(1000):
        x = (rng.normal(size=(60, 1)) + rng.normal(size=(60, 5))).ravel()
        estimate = statistics.clustered_mean(torch.tensor(x), torch.tensor(groups))
        assert estimate.standard_error is not None
        hits += abs(estimate.mean) < 1.96 * estimate.standard_error
    return hits / 1000


def test_coverage_needs_the_clusters() -> None:
    assert 0.92 < coverage(np.repeat(np.arange(60), 5), seed=1) < 0.97
    assert coverage(np.arange(300), seed=1) < 0.80  # responses taken as independent


def test_ratio_is_exact_where_it_is_a_mean() -> None:
    x, index = torch.tensor(normal(0, 12)), torch.arange(12) // 3
    ones = torch.ones_like(x)
    assert statistics.clustered_ratio(x, ones, index) == statistics.clustered_mean(x, index)
    doubled = statistics.clustered_ratio(x, 2 * ones, index)
    mean = statistics.clustered_mean(x, index)
    assert doubled.mean == pytest.approx(mean.mean / 2)
    assert doubled.standard_error == pytest.approx(mean.standard_error / 2)


def test_ratio_spreads_as_simulated() -> None:
    rng = np.random.default_rng(2)
    means, errors = [], []
    for _ in range(600):
        tokens = rng.integers(1, 40, size=(50, 1)) + rng.integers(0, 9, size=(50, 3))
        kl = 0.03 * tokens + rng.normal(size=(50, 1)) * 0.2
        estimate = statistics.clustered_ratio(
            torch.tensor(kl.ravel()), torch.tensor(tokens.ravel()).double(), torch.arange(150) // 3
        )
        means.append(estimate.mean)
        errors.append(estimate.standard_error)
    assert np.mean(means) == pytest.approx(0.03, abs=3 * np.std(means) / math.sqrt(600))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.1)


def test_ratio_that_never_varies_has_no_error() -> None:
    tokens = torch.tensor([10.0, 20.0, 5.0])
    estimate = statistics.clustered_ratio(tokens / 4, tokens, torch.tensor([0, 1, 1]))
    assert estimate == Estimate(mean=0.25, standard_error=0.0, n=3, clusters=2)


def test_a_single_prompt_has_no_known_error() -> None:
    estimate = statistics.clustered_mean(torch.tensor([1.0, 2.0]), torch.tensor([4, 4]))
    assert estimate == Estimate(mean=1.5, standard_error=None, n=2, clusters=1)


def test_an_infinite_kl_is_reported_without_an_error() -> None:
    estimate = statistics.clustered_mean(torch.tensor([1.0, math.inf]), torch.tensor([0, 1]))
    assert estimate == Estimate(mean=math.inf, standard_error=None, n=2, clusters=2)


def test_float32_is_accumulated_in_float64() -> None:
    x = torch.full((200_000,), 0.1)
    estimate = statistics.clustered_mean(x, torch.arange(200_000) // 2)
    assert estimate.mean == pytest.approx(float(np.float32(0.1)), rel=1e-12)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([], "at least one response, got none"),
        ([1.0, math.nan], r"got \[nan\] for responses \[1\]"),
        ([math.inf, -math.inf, 1.0], r"got \[inf, -inf\] for responses \[0, 1\]"),
    ],
)
def test_values_without_a_mean_are_refused(values: list[float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        statistics.clustered_mean(torch.tensor(values), torch.arange(len(values)))


@pytest.mark.parametrize("denominators", [[0.0, 0.0], [1.0, -2.0], [1.0, math.nan], [1, math.inf]])
def test_denominators_that_cannot_divide_are_refused(denominators: list[float]) -> None:
    with pytest.raises(ValueError, match="positive, finite sum"):
        statistics.clustered_ratio(torch.ones(2), torch.tensor(denominators), torch.arange(2))


def test_best_of_n_kl_published() -> None:
    assert statistics.best_of_n_kl(1000) == pytest.approx(5.909, abs=5e-4)
    assert statistics.best_of_n_kl(60_000) == pytest.approx(10.002, abs=5e-4)


def test_best_of_n_kl_is_that_of_the_best_of_n_without_ties() -> None:
    """Many equally likely outcomes of distinct scores: nearly a continuum, where it is exact."""
    outcomes = 100_000
    for n in (1, 2, 4, 16):
        up = np.arange(outcomes + 1) / outcomes
        best = np.diff(up**n)
        kl = (best * np.log(best * outcomes)).sum()
        assert statistics.best_of_n_kl(n) == pytest.approx(kl, abs=1e-3)


def test_best_of_n_kl_bounds_the_oracle() -> None:
    model = oracles.fixed_point_model()
    p = model.world.probabilities(model.reference)
    for n, expected in ((2, 0.18993), (4, 0.61203), (16, 1.65470), (64, 3.04511), (256, 4.07855)):
        best = model.world.best_of_n(model.reference, model.scores, n)
        kl = torch.xlogy(best, best / p).sum().item()
        assert kl == pytest.approx(expected, abs=1e-5)
        assert kl < statistics.best_of_n_kl(n)


@pytest.mark.parametrize("n", [0, -3])
def test_best_of_none_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {n}"):
        statistics.best_of_n_kl(n)
