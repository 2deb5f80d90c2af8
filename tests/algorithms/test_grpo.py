"""GRPO: its advantages from plain numpy, the KL's own gradient by enumeration, its refusals."""

import math

import numpy as np
import pytest
import torch
from expected_gradients import expected_gradient
from oracles import gradient_models
from ragged_rollouts import ragged, with_padding

from kleash.algorithms.grpo import GRPOSettings, loss, prepare


def test_advantages_are_normalised_scores_less_the_leash():
    scored, _ = ragged()
    beta, mask = 0.2, scored.rollout.response_mask
    batch = prepare(scored, beta, GRPOSettings())
    k1 = torch.where(mask, scored.rollout_logprobs - scored.ref_logprobs, 0.0).sum(-1).numpy()
    scores = scored.scores.numpy()
    for row in range(8):
        group = scores[[row, row ^ 1]]
        relative = (scores[row] - group.mean()) / (group.std(ddof=1) + 1e-4)
        kept = batch.advantages[row][mask[row]].numpy()
        np.testing.assert_allclose(kept, relative - beta * (k1[row] - k1[row ^ 1]), atol=1e-12)
        np.testing.assert_allclose(
            batch.returns[row][mask[row]].numpy(), relative - beta * k1[row], atol=1e-12
        )
        assert float(batch.rewards[row].sum()) == pytest.approx(relative - beta * k1[row])


@pytest.mark.parametrize("placement", ["reward_k1", "exact", "mixed"])
def test_with_equal_scores_the_expected_gradient_is_that_of_the_kl(placement):
    """A group whose scores are equal still pays the full price per nat."""
    models = gradient_models()
    mixing = 0.3 if placement == "mixed" else None
    settings = GRPOSettings(placement=placement, mixing=mixing)
    scores = torch.full((len(models.world.strings),), 0.1, dtype=torch.float64)
    found = expected_gradient(prepare, loss, settings, scores, 0.3)
    table = models.policy.clone().requires_grad_()
    (true,) = torch.autograd.grad(0.3 * models.world.kl(table, models.reference), table)
    assert float((found - true).norm() / true.norm()) < 1e-10


def test_as_published_it_follows_another_gradient_and_has_to_be_asked_for():
    with pytest.raises(ValueError, match="allow_biased"):
        GRPOSettings(placement="loss_k3")
    models = gradient_models()
    scores = models.world.random_scores(5)
    published = GRPOSettings(placement="loss_k3", allow_biased=True)
    found = expected_gradient(prepare, loss, published, scores, 0.3)
    right = expected_gradient(prepare, loss, GRPOSettings(), scores, 0.3)
    assert float((found - right).norm() / right.norm()) > 0.05


def test_beta_zero_leaves_the_normalised_score():
    scored, _ = ragged()
    batch = prepare(scored, 0.0, GRPOSettings(placement="loss_k3", allow_biased=True))
    assert batch.pathwise is None
    sums = batch.advantages[:, 0].reshape(4, 2).sum(-1)
    assert sums.tolist() == pytest.approx([0.0] * 4, abs=1e-12)


@pytest.mark.parametrize("placement", ["reward_k1", "loss_k3", "exact"])
def test_what_padding_holds_changes_nothing(placement):
    scored, fresh = ragged()
    settings = GRPOSettings(placement=placement, allow_biased=True)
    mask = scored.rollout.response_mask
    results = []
    for poison in (0.0, math.nan, math.inf):
        batch = prepare(with_padding(scored, mask, poison), 0.2, settings)
        result = loss(batch, with_padding(fresh, mask, poison), settings, tokens=30)
        results.append((batch.advantages, batch.returns, batch.rewards, result.total))
    for spoiled in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], spoiled, strict=True))


def test_there_is_no_critic_to_bootstrap_with():
    with pytest.raises(ValueError, match="got an algorithm without a critic"):
        GRPOSettings(truncated="bootstrap")


def test_a_penalty_lowers_the_score_before_it_is_normalised():
    scored, _ = ragged()
    penalised = GRPOSettings(truncated="penalise", missing_eos_penalty=100.0)
    batch = prepare(scored, 0.0, penalised)
    # Rows 0 and 4 were cut off and their siblings were not.
    assert batch.advantages[[0, 4], 0].tolist() == pytest.approx([-math.sqrt(0.5)] * 2, abs=1e-3)
