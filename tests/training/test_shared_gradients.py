"""Gradients of several processes add to those of one, and to the enumerated gradient.

Rows are divided so that one process has most of a minibatch, one a few, and the others nothing.
"""

from collections.abc import Generator

import pytest
import torch
from oracles import gradient_models
from ranks import Ranks
from shared_gradients import BETA, PLACEMENTS


@pytest.fixture(scope="module")
def ranks() -> Generator[Ranks]:
    """Processes."""
    started = Ranks()
    yield started
    started.close()


@pytest.fixture
def double() -> Generator[None]:
    """New numbers are in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.usefixtures("double")
def test_the_sum_over_processes_is_the_gradient_of_the_objective(size: int, ranks: Ranks) -> None:
    models = gradient_models()
    world, table = models.world, models.policy.clone().requires_grad_()
    objective = world.objective(table, models.reference, world.random_scores(5), BETA)
    (true,) = torch.autograd.grad(-objective, table)
    (by_one,) = ranks.call("shared_gradients:tabular", size=1)
    everywhere = ranks.call("shared_gradients:tabular", size=size)
    for found in everywhere:
        assert found == everywhere[0]
    for placement in PLACEMENTS:
        together = torch.tensor(everywhere[0][placement])
        alone = torch.tensor(by_one[placement])
        assert float((together - alone).norm() / alone.norm()) < 1e-10
        assert float((together - true).norm() / true.norm()) < 1e-10


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.usefixtures("double")
def test_a_divided_model_has_the_gradient_of_a_whole_one(size: int, ranks: Ranks) -> None:
    (alone,) = (
        torch.tensor(found) for found in ranks.call("shared_gradients:language_model", size=1)
    )
    for found in ranks.call("shared_gradients:language_model", size=size):
        assert float((torch.tensor(found) - alone).norm() / alone.norm()) < 1e-10
