"""Where β starts: the enumerated optimum where the plan knows, and said otherwise where not."""

import math
from functools import cache

import oracles
import pytest
import torch
from torch import Tensor

from kleash.kl.planning.initial_beta import starting_beta

MODEL = oracles.fixed_point_model()


@cache
def drawn(prompts: int, samples: int, seed: int = 0) -> Tensor:
    """Scores of strings drawn from the oracle, as if every group were a prompt of its own."""
    p = MODEL.world.probabilities(MODEL.reference)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.multinomial(p, prompts * samples, replacement=True, generator=generator)
    return MODEL.scores[rows].view(prompts, samples)


@pytest.mark.parametrize("target", [0.1, 0.5, 1.0])
def test_where_the_plan_knows_it_is_the_optimum(target: float) -> None:
    start = starting_beta(drawn(64, 128), target)
    exact = MODEL.world.beta_for_kl(MODEL.reference, MODEL.scores, target)
    assert (start.source, start.reason) == ("plan", "")
    assert start.beta == pytest.approx(exact, rel=0.05)
    # −d ln KL*/d ln β by enumeration.
    low, high = (
        MODEL.world.optimal_kl(MODEL.reference, MODEL.scores, exact * s) for s in (0.99, 1 / 0.99)
    )
    assert start.plant_gain == pytest.approx(math.log(low / high) / -2 / math.log(0.99), rel=0.1)


def test_beyond_its_edge_normal_scores_go_on_as_they_do() -> None:
    """KL* = Var/(2β²) at any KL: with N(0, 3²) the edge carried on must be near 3/√(2·target)."""
    scores = 3 * torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).double()
    start = starting_beta(scores, 8.0)
    assert start.source == "edge" and "128 samples" in start.reason
    assert start.beta == pytest.approx(3 / math.sqrt(16), rel=0.2)


def test_beyond_its_edge_saturating_scores_need_less_than_their_spread_says() -> None:
    """The oracle at 2 nats from 24 samples: nearer to the truth than sd/√(2·target)."""
    scores = drawn(64, 24)
    exact = MODEL.world.beta_for_kl(MODEL.reference, MODEL.scores, 2.0)
    start = starting_beta(scores, 2.0)
    spread = float(scores.var(1).mean().sqrt()) / 2
    assert start.source == "edge"
    assert abs(math.log(start.beta / exact)) < abs(math.log(spread / exact))


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([[0.0, 1.0, 3.0]], "2 prompts or more"),
        ([[0.0, 1.0], [2.0, 4.0]], "2 prompts or more"),
        ([[0.0, 1.0, 3.0], [2.0, 4.0, 9.0]], "3 samples"),
    ],
)
def test_where_nothing_is_known_the_spread_is_taken(scores: list[list[float]], reason: str) -> None:
    rows = torch.tensor(scores, dtype=torch.float64)
    start = starting_beta(rows, 2.0)
    assert start.source == "spread" and start.plant_gain is None
    assert reason in start.reason
    assert start.beta == pytest.approx(float(rows.var(1).mean().sqrt()) / 2)


@pytest.mark.parametrize("rows", [torch.ones(4, 8), torch.randn(4, 1)])
def test_scores_that_do_not_vary_within_a_prompt_start_nothing(rows: Tensor) -> None:
    with pytest.raises(ValueError, match="scores that vary within a prompt"):
        starting_beta(rows, 1.0)


def test_a_target_must_be_a_number() -> None:
    with pytest.raises(ValueError, match="target_kl must be positive"):
        starting_beta(drawn(4, 8), -1.0)
