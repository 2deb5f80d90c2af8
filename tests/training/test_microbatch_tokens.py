"""A minibatch read by budgets of tokens has the numbers and the gradient of one read at once."""

from typing import cast

import pytest
import tiny_models
import torch
from shared_gradients import components_of
from transformers import AutoModelForCausalLM

from kleash.algorithms.rloo import RLOOSettings, prepare
from kleash.mesh import ALONE
from kleash.models.batching import TokenBudget
from kleash.models.policy import Policy, freeze_copy
from kleash.rollout.scoring_pass import score
from kleash.training.components import Components
from kleash.types import Experience, Rollout

ROWS = 12


def model(seed: int) -> Policy:
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(tiny_models.config("llama", 20)).double().eval()
    return Policy(made, tiny_models.tokenizer(), "", words=20, stop_ids=())


def ragged_rollout() -> Rollout:
    """Prompts of 1 to 9 tokens and responses of lognormal lengths up to 24."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 20, (ROWS, 33), generator=generator)
    prompts = torch.randint(1, 10, (ROWS, 1), generator=generator)
    drawn = (1.5 + torch.randn(ROWS, 1, generator=generator)).exp()
    responses = drawn.round().clamp(1, 24)
    return Rollout(
        prompt_ids=ids[:, :9],
        prompt_mask=torch.arange(9) >= 9 - prompts,
        response_ids=ids[:, 9:],
        response_mask=torch.arange(24) < responses,
        ended=torch.ones(ROWS, dtype=torch.bool),
        prompt_index=torch.arange(ROWS) // 2,
    )


@pytest.fixture
def read() -> tuple[Components, Experience]:
    policy, reference, rollout = model(0), freeze_copy(model(1)), ragged_rollout()
    scores = torch.randn(ROWS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    scored = score(rollout, policy=policy, reference=reference, scores=scores, microbatch=ROWS)
    settings = RLOOSettings(placement="exact")
    batch = prepare(scored, 0.3, settings)
    return components_of(policy, reference, None, settings, ALONE), batch


def test_any_budget_has_the_gradient_of_one_microbatch(read: tuple[Components, Experience]) -> None:
    components, batch = read

    def gradient(limit: int | TokenBudget) -> torch.Tensor:
        for parameter in components.parameters():
            parameter.grad = None
        components.backward_of_minibatch(batch, microbatch=limit)
        return torch.cat([cast(torch.Tensor, p.grad).flatten() for p in components.parameters()])

    whole = gradient(ROWS)
    # The largest has room for everything; of the smallest every row is longer than the budget.
    for tokens in (10_000, 70, 33, 12, 1):
        part = gradient(TokenBudget(tokens))
        assert float((part - whole).norm() / whole.norm()) < 1e-10, tokens


def test_any_budget_scores_the_same(read: tuple[Components, Experience]) -> None:
    components, batch = read
    for tokens in (70, 12, 1):
        part = components.score(
            batch.scored.rollout, batch.scored.scores, microbatch=TokenBudget(tokens)
        )
        for name in ("rollout_logprobs", "ref_logprobs", "kl", "entropy"):
            got, wanted = getattr(part, name), getattr(batch.scored, name)
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
