"""`kleash.Leash`: the controller it wraps, its memory, and what it refuses."""

import json
import math

import pytest
import torch

import kleash
from kleash.kl.control.budget import BudgetBeta
from kleash.kl.control.state import Measurement

PROMPTS = torch.tensor([0, 0, 1, 1, 2, 2])
SCORES = torch.tensor([0.0, 2.0, 5.0, 6.0, 1.0, 1.0])
WITHIN = (2.0 + 0.5 + 0.0) / 3
"""Mean of the variances of (0, 2), (5, 6) and (1, 1)."""


def kl(mean: float) -> torch.Tensor:
    """Of each token; the means of the prompts are mean − 0.1, mean and mean + 0.1."""
    of_response = mean + torch.tensor([-0.1, -0.1, 0.0, 0.0, 0.1, 0.1])
    return torch.stack([of_response / 4, 3 * of_response / 4], dim=1).double()


def test_it_moves_as_the_controller_that_it_wraps() -> None:
    leash = kleash.Leash(2.0)
    first = math.sqrt(WITHIN) / math.sqrt(2 * 2.0)
    controller = BudgetBeta(target_kl=2.0, initial=first)
    state = controller.init()
    for mean in (0.5, 1.5, 3.0, 4.0):
        # The standard error of the three prompts' means.
        reading = Measurement(mean, 0.1 / math.sqrt(3), 6, WITHIN)
        state = controller.update(state, reading)
        assert leash.step(kl(mean), SCORES, PROMPTS) == pytest.approx(state.beta, rel=1e-6)
    assert leash.beta == leash.step(kl(0.0) * 0, SCORES, PROMPTS)


def test_a_saved_leash_goes_on_where_it_was() -> None:
    one = kleash.Leash(1.0)
    assert kleash.Leash.from_json(one.to_json()).state is None
    series = [0.3, 0.8, 1.7, 1.2, 0.9]
    betas = [one.step(kl(mean), SCORES, PROMPTS) for mean in series]
    two = kleash.Leash(1.0)
    again = []
    for mean in series:
        again.append(two.step(kl(mean), SCORES, PROMPTS))
        two = kleash.Leash.from_json(json.loads(json.dumps(two.to_json())))
    assert again == betas


def test_a_beta_that_is_given_is_where_it_starts() -> None:
    leash = kleash.Leash(1.0, initial_beta=0.3)
    assert leash.beta == 0.3
    assert leash.step(torch.zeros(6), SCORES, PROMPTS) == 0.3


def test_each_response_is_its_own_prompt_unless_said() -> None:
    leash = kleash.Leash(2.0)
    beta = leash.step(torch.zeros(6), SCORES)
    assert beta == pytest.approx(float(SCORES.double().std()) / 2)


def test_what_it_cannot_use_is_refused() -> None:
    leash = kleash.Leash(1.0)
    with pytest.raises(ValueError, match="β is known after the first step"):
        _ = leash.beta
    with pytest.raises(ValueError, match="scores that do not vary imply no β"):
        leash.step(torch.zeros(6), torch.ones(6), PROMPTS)
    with pytest.raises(ValueError, match=r"shapes \[6\], \[5\] and \[6\]"):
        leash.step(torch.zeros(6), SCORES[:5], PROMPTS)
    spent = torch.zeros(6)
    spent[4] = float("inf")
    with pytest.raises(ValueError, match="finite KL of every response, got inf for response 4"):
        leash.step(spent, SCORES, PROMPTS)
    with pytest.raises(ValueError, match="finite score of every response, got nan for response 0"):
        leash.step(torch.zeros(6), SCORES * float("nan"), PROMPTS)
    assert leash.state is None
    with pytest.raises(ValueError, match="target_kl must be positive"):
        kleash.Leash(-1.0)
    with pytest.raises(ValueError, match=r"what Leash\.to_json wrote"):
        kleash.Leash.from_json({"target_kl": 1.0})
