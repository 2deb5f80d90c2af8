"""Intervals of the audit: they cover what they promise, at a fixed size and at any time."""

import math

import numpy as np
import pytest
import torch
from oracles import TabularModel, World
from scipy import stats

from kleash.auditing.clustered_moments import ClusteredMoments
from kleash.auditing.confidence_intervals import (
    anytime_factor,
    clusters_for,
    decide,
    interval,
    student_quantile,
    tail_index,
)
from kleash.auditing.inputs import Item
from kleash.auditing.token_records import score_items
from kleash.kl.statistics import clustered_ratio

TRIALS = 400
KINDS = 40
"""Prompts of the population, each with its own two tables of logits."""
NAMES = ("kl", "tokens", "responses")


class TwoModels:
    def __init__(self, policy: TabularModel, reference: TabularModel) -> None:
        self.policy, self.reference = policy, reference


@pytest.fixture(scope="module")
def population() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probability, exact KL and length of every string under every prompt, as the audit finds them;
    what it finds is checked against enumeration."""
    world = World(vocabulary=4, max_length=3)
    items = [Item(n, (1,), string) for n, string in enumerate(world.strings)]
    rows = []
    for kind in range(KINDS):
        # Policies of very different distance, as prompts of very different difficulty.
        logits = world.random_logits(kind)
        other = logits + (0.1 + kind / KINDS) * world.random_logits(1000 + kind)
        both = TwoModels(TabularModel(world, logits), TabularModel(world, other))
        records = score_items(
            items, both, first_number=0, temperature=1.0, budget=64, agreement=False
        )
        kl = np.array([record.kl.sum(dtype=np.float64) for record in records])
        expected = world.at_tokens(world.state_kl(logits, other)).sum(-1)
        np.testing.assert_allclose(kl, expected.numpy(), atol=1e-6)
        p = world.probabilities(logits)
        assert float(p @ torch.from_numpy(kl)) == pytest.approx(
            float(world.kl(logits, other)), abs=1e-6
        )
        rows.append((p.numpy() / float(p.sum()), kl))
    lengths = world.mask.sum(-1).double().numpy()
    return np.stack([p for p, _ in rows]), np.stack([kl for _, kl in rows]), lengths


def truths(population: tuple[np.ndarray, np.ndarray, np.ndarray]) -> dict[str, float]:
    p, kl, lengths = population
    return {
        "responses": float((p * kl).sum() / KINDS),
        "tokens": float((p * kl).sum() / (p * lengths).sum()),
    }


def draw(
    population: tuple[np.ndarray, np.ndarray, np.ndarray],
    rng: np.random.Generator,
    prompts: int,
    each: int,
) -> torch.Tensor:
    """Sums of some prompts, several responses to each."""
    p, kl, lengths = population
    kinds = rng.integers(KINDS, size=prompts)
    cumulative = p.cumsum(-1)[kinds]
    drawn = (
        (rng.random((prompts, each, 1)) > cumulative[:, None, :]).sum(-1).clip(max=p.shape[1] - 1)
    )
    sums = np.stack(
        [kl[kinds[:, None], drawn].sum(1), lengths[drawn].sum(1), np.full(prompts, each)], 1
    )
    return torch.from_numpy(sums.astype(np.float64))


@pytest.mark.parametrize("per", ["tokens", "responses"])
def test_the_interval_covers_what_it_promises(population, per: str) -> None:
    truth, rng = truths(population)[per], np.random.default_rng(7)
    covered = 0
    for _ in range(TRIALS):
        moments = ClusteredMoments(NAMES)
        moments.add(draw(population, rng, 100, 2))
        found = moments.ratio("kl", per)
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / TRIALS <= 0.98


def test_the_width_shrinks_as_one_over_the_root_of_n(population) -> None:
    rng = np.random.default_rng(3)
    widths = []
    for prompts in (100, 400, 1600):
        halves = []
        for _ in range(40):
            moments = ClusteredMoments(NAMES)
            moments.add(draw(population, rng, prompts, 1))
            halves.append(moments.ratio("kl", "tokens").half_width)
        widths.append(np.mean(halves))
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.05)
    assert widths[1] / widths[2] == pytest.approx(2, rel=0.05)


def sample_until(population, rng: np.random.Generator, done) -> tuple[ClusteredMoments, object]:
    """Windows of 32 prompts until `done` says so, as the audit samples."""
    moments = ClusteredMoments(NAMES)
    for _ in range(400):
        moments.add(draw(population, rng, 32, 1))
        found = moments.ratio("kl", "tokens", kind="anytime")
        if done(found):
            return moments, found
    return moments, found


def test_sampling_until_it_is_narrow_keeps_the_promise(population) -> None:
    truth, rng = truths(population)["tokens"], np.random.default_rng(11)
    precision = 0.15 * truth
    covered, sizes = 0, []
    for _ in range(TRIALS):
        moments, found = sample_until(population, rng, lambda one: one.half_width <= precision)
        assert found.half_width <= precision
        sizes.append(moments.clusters)
        covered += found.low <= truth <= found.high
    assert covered / TRIALS >= 0.92
    # The sizes do vary with the samples: otherwise nothing was put to the test.
    assert len(set(sizes)) > 3


def test_looking_until_the_truth_is_excluded_seldom_succeeds(population) -> None:
    """What breaks an ordinary interval: stop at the first look that leaves the truth out."""
    truth, rng = truths(population)["tokens"], np.random.default_rng(5)
    wrong = {"fixed": 0, "anytime": 0}
    for _ in range(TRIALS // 4):
        moments, out = ClusteredMoments(NAMES), {"fixed": False, "anytime": False}
        for _ in range(30):
            moments.add(draw(population, rng, 32, 1))
            for kind in out:
                found = moments.ratio("kl", "tokens", kind=kind)
                out[kind] |= not found.low <= truth <= found.high
        for kind in wrong:
            wrong[kind] += out[kind]
    assert wrong["anytime"] / (TRIALS // 4) <= 0.08
    assert wrong["fixed"] > 2 * wrong["anytime"] and wrong["fixed"] > 0.1 * TRIALS / 4


def test_the_gate_errs_no_more_often_than_promised(population) -> None:
    """200 trials on either side of the threshold and near it: at most 5 % wrong, beyond chance."""
    truth, rng = truths(population)["tokens"], np.random.default_rng(23)
    trials, wrong, decided = 200, {0.5: 0, 0.97: 0, 1.03: 0, 2.0: 0}, {}
    for factor in wrong:
        threshold, right = factor * truth, "above" if factor < 1 else "below"
        for _ in range(trials):
            moments = ClusteredMoments(NAMES)
            moments.add(draw(population, rng, 128, 1))
            said = decide(moments.ratio("kl", "tokens"), threshold)
            wrong[factor] += said not in (right, "undecided")
            decided[factor] = decided.get(factor, 0) + (said == right)
    limit = stats.binom.ppf(0.999, trials, 0.05)
    assert max(wrong.values()) <= limit
    assert decided[0.5] >= 0.95 * trials and decided[2.0] == trials


# ---- against other computations ------------------------------------------------------------------


def test_moments_give_the_clustered_standard_error() -> None:
    generator = torch.Generator().manual_seed(0)
    kl = torch.rand(60, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, 9, (60,), generator=generator).double()
    prompt = torch.randint(0, 12, (60,), generator=generator)
    rows = torch.zeros(12, 3, dtype=torch.float64)
    rows.index_add_(0, prompt, torch.stack([kl, tokens, torch.ones(60, dtype=torch.float64)], 1))
    moments = ClusteredMoments(NAMES)
    for part in rows.split(5):
        moments.add(part)
    expected = clustered_ratio(kl, tokens, prompt)
    found = moments.ratio("kl", "tokens")
    assert (found.n, found.clusters) == (60, 12)
    assert found.mean == pytest.approx(expected.mean, rel=1e-12)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-9)
    half = stats.t.ppf(0.975, 11) * expected.standard_error
    assert found.high == pytest.approx(expected.mean + half, rel=1e-9)


def test_what_cannot_be_known_is_none() -> None:
    moments = ClusteredMoments(NAMES)
    with pytest.raises(ValueError, match="positive sum of 'tokens'"):
        moments.ratio("kl", "tokens")
    moments.add(torch.tensor([[1.0, 2.0, 1.0]], dtype=torch.float64))
    single = moments.ratio("kl", "tokens")
    assert (single.mean, single.low, single.half_width) == (0.5, None, None)
    assert decide(single, 0.1) == "undecided" and clusters_for(0.1, single) is None
    moments.add(torch.tensor([[math.inf, 2.0, 1.0]], dtype=torch.float64))
    infinite = moments.ratio("kl", "tokens")
    assert infinite.mean == math.inf and infinite.low is None
    assert decide(infinite, 1e9) == "above"


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 30, 77, 1000, 1001, 10**6])
def test_the_quantile_is_students(freedom: int) -> None:
    assert student_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=3e-6)


@pytest.mark.parametrize("kind", ["fixed", "anytime"])
def test_the_cost_is_the_smallest_number_that_will_do(kind) -> None:
    now = interval(1.0, 0.05, n=40, clusters=40, kind=kind)
    count = clusters_for(0.02, now)

    def half(clusters: int) -> float:
        error = 0.05 * math.sqrt(40 / clusters)
        return interval(1.0, error, n=clusters, clusters=clusters, kind=kind).half_width

    assert half(count) <= 0.02 < half(count - 1)
    assert clusters_for(0.02, interval(1.0, 0.0, n=40, clusters=40)) == 40


def test_the_anytime_interval_costs_about_half_as_much_again() -> None:
    assert all(1.5 < anytime_factor(g) / 1.96 < 1.9 for g in (64, 256, 1024))


@pytest.mark.parametrize("index", [0.8, 1.5, 3.0])
def test_the_tail_index_is_that_of_a_pareto(index: float) -> None:
    rng = np.random.default_rng(1)
    largest = np.sort(rng.pareto(index, 20_000) + 1)[::-1][:400]
    assert tail_index(largest.tolist()) == pytest.approx(index, rel=0.15)
    assert tail_index([1.0] * 20) is None and tail_index([2.0, 1.0]) is None
    assert tail_index([math.inf, *[1.0] * 20]) is None
