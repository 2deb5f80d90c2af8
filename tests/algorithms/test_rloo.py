"""RLOO: the expected gradient over all pairs of strings, its advantages, padding, refusals."""

import math

import pytest
import torch
from expected_gradients import expected_gradient
from oracles import gradient_models
from ragged_rollouts import ragged, with_padding

from kleash.algorithms.rloo import RLOOSettings, loss, prepare
from kleash.errors import NonFiniteError
from kleash.types import Fresh


@pytest.mark.parametrize("placement", ["reward_k1", "exact", "mixed"])
def test_the_expected_gradient_is_that_of_the_objective(placement):
    models = gradient_models()
    scores = models.world.random_scores(5)
    mixing = 0.3 if placement == "mixed" else None
    settings = RLOOSettings(placement=placement, mixing=mixing)
    found = expected_gradient(prepare, loss, settings, scores, 0.3)
    table = models.policy.clone().requires_grad_()
    objective = models.world.objective(table, models.reference, scores, 0.3)
    (true,) = torch.autograd.grad(-objective, table)
    assert float((found - true).norm() / true.norm()) < 1e-10


def test_k2_in_the_reward_has_another_gradient():
    models = gradient_models()
    scores = models.world.random_scores(5)
    settings = RLOOSettings(placement="reward_k2", allow_biased=True)
    found = expected_gradient(prepare, loss, settings, scores, 0.3)
    right = expected_gradient(prepare, loss, RLOOSettings(), scores, 0.3)
    assert float((found - right).norm() / right.norm()) > 0.05


def test_advantages_compare_whole_responses_with_their_siblings():
    scored, _ = ragged()
    batch = prepare(scored, 0.2, RLOOSettings())
    mask = scored.rollout.response_mask
    k1 = torch.where(mask, scored.rollout_logprobs - scored.ref_logprobs, 0.0).sum(-1)
    objective = (scored.scores - 0.2 * k1).tolist()
    for row in range(8):
        sibling = objective[row ^ 1]
        kept = batch.advantages[row][mask[row]]
        assert kept.tolist() == pytest.approx([objective[row] - sibling] * len(kept))
        assert batch.returns[row][mask[row]].tolist() == pytest.approx([objective[row]] * len(kept))


def test_what_padding_holds_changes_nothing():
    scored, fresh = ragged()
    mask = scored.rollout.response_mask
    results = []
    for poison in (0.0, math.nan, math.inf):
        batch = prepare(with_padding(scored, mask, poison), 0.2, RLOOSettings())
        result = loss(batch, with_padding(fresh, mask, poison), RLOOSettings(), tokens=30)
        results.append((batch.advantages, batch.returns, batch.rewards, result.total))
        assert set(result.metrics) > {"loss/policy", "policy/approx_kl"}
    for spoiled in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], spoiled, strict=True))


def test_dropped_responses_are_out_of_the_loss_but_still_a_baseline():
    scored, _ = ragged()
    batch = prepare(scored, 0.2, RLOOSettings(truncated="drop"))
    whole = prepare(scored, 0.2, RLOOSettings())
    ended = scored.rollout.ended
    assert torch.equal(batch.mask.any(-1), ended)
    assert torch.equal(batch.advantages[ended], whole.advantages[ended])
    assert not batch.advantages[~ended].any()


def test_an_infinite_kl_names_response_and_token():
    scored, fresh = ragged()
    settings = RLOOSettings(placement="exact")
    batch = prepare(scored, 0.2, settings)
    kl = fresh.kl.clone()
    kl[6, 1] = math.inf
    with pytest.raises(
        NonFiniteError, match=r"every exact KL must be finite.* token 1 of response 6"
    ):
        loss(batch, Fresh(fresh.logprobs, kl=kl), settings, tokens=1)


def test_there_is_no_critic_to_bootstrap_with():
    with pytest.raises(ValueError, match="got an algorithm without a critic"):
        RLOOSettings(truncated="bootstrap")


def test_settings_are_checked():
    with pytest.raises(ValueError, match="allow_biased"):
        RLOOSettings(placement="loss_k2")
    with pytest.raises(ValueError, match="goes with `truncated: penalise`"):
        RLOOSettings(missing_eos_penalty=1.0)
