"""The numbers of a step, against sums done by hand in numpy."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from random_rollouts import scored

from kleash.algorithms.ppo import PPOSettings, prepare
from kleash.errors import ScoringError
from kleash.training.metrics import (
    Clock,
    account,
    first_ratio_error,
    next_mixing,
    objective_measures,
    rollout_measures,
    sampler_measures,
    score_variance,
)


def test_the_objective_by_hand() -> None:
    data = scored(per_prompt=2)
    mask = data.rollout.response_mask.numpy()
    kl = np.where(mask, data.kl.numpy(), 0).astype(float)
    sums, scores = kl.sum(1), data.scores.numpy().astype(float)
    found = objective_measures(data, beta=0.5)
    assert found["objective/kl_ref"] == pytest.approx(sums.mean())
    assert found["objective/kl_ref_per_token"] == pytest.approx(kl.sum() / mask.sum(), rel=1e-6)
    assert found["objective/rlhf_reward"] == pytest.approx(scores.mean() - 0.5 * sums.mean())
    # Equal clusters: the standard error of the prompts' means.
    means = sums.reshape(3, 2).mean(1)
    assert found["objective/kl_ref_se"] == pytest.approx(means.std(ddof=1) / math.sqrt(3))
    k1 = np.where(mask, (data.rollout_logprobs - data.ref_logprobs).numpy(), 0).sum(1)
    assert found["objective/kl_ref_k1"] == pytest.approx(k1.mean(), rel=1e-6)


def test_the_rollout_by_hand() -> None:
    data = scored()
    lengths = data.rollout.response_mask.sum(1).numpy()
    found = rollout_measures(data, ["a b a b", "c"])
    assert found["rollout/length"] == pytest.approx(lengths.mean())
    assert found["rollout/eos_fraction"] == 0.5
    assert found["rollout/distinct_2"] == pytest.approx(2 / 3)


def test_the_gap_of_the_sampler_by_hand() -> None:
    """Every log-probability of the sampler is 0.01 too high: r = e^(−0.01)."""
    data = scored()
    lengths = data.rollout.response_mask.sum(1).numpy()
    found = sampler_measures(data, PPOSettings(), floor=None)
    assert found["rollout/kl_sampler"] == pytest.approx(0.01 * lengths.mean(), rel=1e-4)
    per_token = math.exp(-0.01) - 1 + 0.01
    assert found["rollout/kl_sampler_per_token"] == pytest.approx(per_token, rel=1e-3)
    silent = replace(data, rollout=replace(data.rollout, sampler_logprobs=None))
    assert sampler_measures(silent, PPOSettings(), floor=None) == {}


@pytest.mark.parametrize("placement", ["reward_k1", "exact", "measure", "reward_k3"])
@pytest.mark.parametrize("truncated", ["score", "drop"])
def test_the_accounting_identity_holds_and_a_changed_reward_breaks_it(
    placement: str, truncated: str
) -> None:
    settings = PPOSettings(
        placement=placement,  # type: ignore[arg-type]
        truncated=truncated,  # type: ignore[arg-type]
        allow_biased=True,
    )
    experience = prepare(scored(), 0.3, settings)
    assert account(settings, experience, 0.3) < 1e-6
    experience.rewards[0, 0] += 1.0
    with pytest.raises(ScoringError, match="do not add up"):
        account(settings, experience, 0.3)


def test_the_variance_of_scores_within_prompts_and_without() -> None:
    one_each, pairs = scored(), scored(per_prompt=2)
    assert score_variance(one_each) == pytest.approx(float(one_each.scores.var()), rel=1e-6)
    within = pairs.scores.numpy().reshape(3, 2).var(axis=1, ddof=1).mean()
    assert score_variance(pairs) == pytest.approx(within, rel=1e-6)
    assert score_variance(scored(batch=1)) is None


def test_the_mixing_of_the_next_step_exists_for_mixed_alone() -> None:
    plain = PPOSettings()
    assert next_mixing(plain, prepare(scored(), 0.3, plain), 0.3) is None
    found: list[float | None] = []
    for c in (0.0, 0.7):
        settings = PPOSettings(placement="mixed", mixing=c)
        data = scored()
        assert data.values is not None
        # A critic that follows the charges knows the KL of the present state, left out of them.
        data = replace(data, values=data.values + c * 0.3 * data.kl)
        found.append(next_mixing(settings, prepare(data, 0.3, settings), 0.3))
    # Whatever was mixed into this step's advantages, the estimate for the next is the same.
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_the_mixing_is_bounded() -> None:
    """Where reward noise dwarfs that of the KL, the best c of one gradient is huge."""
    settings = PPOSettings(placement="mixed", mixing=0.0, lam=1.0)
    found: list[float | None] = []
    for sign in (1, -1):
        data = scored()
        excess = data.rollout_logprobs - data.ref_logprobs - data.kl
        noise = torch.where(data.rollout.response_mask, excess, 0.0).sum(1)
        data = replace(data, scores=sign * 100 * noise)
        found.append(next_mixing(settings, prepare(data, 0.3, settings), 0.3))
    assert found == [-1.0, 1.0]


def test_the_first_ratio() -> None:
    now, then = torch.tensor([[0.1, torch.nan]]), torch.tensor([[0.0, 0.0]])
    mask = torch.tensor([[True, False]])
    assert first_ratio_error(now, then, mask) == pytest.approx(math.expm1(0.1), rel=1e-6)


def test_a_clock_adds_up() -> None:
    clock = Clock()
    with clock.measure("time/x"):
        time.sleep(0.01)
    seconds = clock.seconds["time/x"]
    assert seconds is not None
    assert 0.01 <= seconds <= clock.total
