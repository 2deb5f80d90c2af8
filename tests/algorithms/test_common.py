"""What the algorithms share: cutting minibatches, the price of the leash, adding up a loss."""

import dataclasses
import math

import pytest
import torch
from ragged_rollouts import ragged

from kleash.algorithms.common import finish, kept_rows, leash, require_finite, select
from kleash.algorithms.ppo import PPOSettings, prepare
from kleash.errors import NonFiniteError


def tensors(data, path=""):
    """Every tensor of a dataclass, however deep, by name."""
    found = {}
    for name, value in vars(data).items():
        if isinstance(value, torch.Tensor):
            found[path + name] = value
        elif dataclasses.is_dataclass(value):
            found |= tensors(value, f"{path}{name}.")
    return found


def test_select_takes_the_same_rows_of_everything():
    scored, _ = ragged()
    batch = prepare(scored, 0.2, PPOSettings(placement="exact"))
    rows = torch.tensor([5, 0, 5])
    before, after = tensors(batch), tensors(select(batch, rows))
    assert before.keys() == after.keys()
    assert {"pathwise", "scored.values", "scored.rollout.prompt_ids"} < before.keys()
    for name, number in before.items():
        assert torch.equal(after[name], number[rows]), name
    assert select(batch, rows).scored.ref_hidden is None


def test_minibatches_are_made_of_responses_that_take_part():
    scored, _ = ragged()
    assert kept_rows(prepare(scored, 0.2, PPOSettings())).tolist() == list(range(8))
    dropped = prepare(scored, 0.2, PPOSettings(truncated="drop"))
    assert kept_rows(dropped).tolist() == [1, 2, 3, 5, 6]


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_rewards_and_loss_weights_share_beta_as_the_mixture_says(beta):
    scored, _ = ragged()
    mask = scored.rollout.response_mask
    rewards, weight = leash(scored, scored.scores, beta, "mixed", mixing=0.25)
    k1 = torch.where(mask, scored.rollout_logprobs - scored.ref_logprobs, 0.0).sum(-1)
    later = torch.where(mask, scored.kl, 0.0)[:, 1:].sum(-1)
    assert torch.allclose(rewards.sum(-1), scored.scores - beta * (0.75 * k1 + 0.25 * later))
    if beta == 0:
        assert weight is None
    else:
        assert torch.allclose(weight, 0.25 * beta * mask.double())


def test_finish_weighs_the_parts_and_reports_them_unweighted():
    scored, fresh = ragged()
    batch = prepare(scored, 0.2, PPOSettings())
    parts = {"loss/policy": torch.tensor(2.0), "loss/value": torch.tensor(3.0)}
    loss = finish(parts, batch, fresh, weights={"loss/value": 0.5}, clip_range=0.2, tokens=1)
    assert loss.total.item() == 3.5
    assert (loss.metrics["loss/policy"], loss.metrics["loss/value"]) == (2.0, 3.0)


def test_only_kept_tokens_have_to_be_finite():
    numbers = torch.tensor([[1.0, math.nan], [math.inf, math.nan]])
    require_finite("advantage", numbers, torch.tensor([[True, False], [False, False]]))
    with pytest.raises(NonFiniteError, match=r"got inf at token 0 of response 1 \(and 1 more\)"):
        require_finite("advantage", numbers, torch.tensor([[True, False], [True, True]]))
