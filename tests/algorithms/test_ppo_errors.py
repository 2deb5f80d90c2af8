"""What PPO refuses: missing inputs, settings that contradict each other, numbers not finite."""

import math
from dataclasses import replace

import pytest
import torch
from ragged_rollouts import ragged

from kleash.algorithms.ppo import PPOSettings, loss, prepare
from kleash.errors import NonFiniteError


def test_ppo_without_a_critic_is_refused():
    scored, fresh = ragged()
    with pytest.raises(ValueError, match="PPO needs the values of a critic, got values=None"):
        prepare(replace(scored, values=None), 0.1, PPOSettings())
    batch = prepare(scored, 0.1, PPOSettings())
    with pytest.raises(ValueError, match=r"pass Fresh\.values"):
        loss(batch, replace(fresh, values=None), PPOSettings(), tokens=1)


def test_bootstrapping_without_final_values_is_refused():
    scored, _ = ragged()
    with pytest.raises(ValueError, match="got final_values=None"):
        prepare(replace(scored, final_values=None), 0.1, PPOSettings(truncated="bootstrap"))


def test_dropping_every_response_is_refused():
    scored, _ = ragged()
    cut = replace(scored, rollout=replace(scored.rollout, ended=torch.zeros(8, dtype=torch.bool)))
    with pytest.raises(ValueError, match="at least one response must have ended"):
        prepare(cut, 0.1, PPOSettings(truncated="drop"))


def test_a_biased_placement_has_to_be_asked_for():
    with pytest.raises(ValueError, match="allow_biased"):
        PPOSettings(placement="loss_k3")


def test_mixing_goes_with_mixed():
    for wrong in ({"placement": "mixed"}, {"mixing": 0.5}):
        with pytest.raises(ValueError, match="mixing must be given for placement 'mixed'"):
            PPOSettings(**wrong)


@pytest.mark.parametrize("wrong", [{"truncated": "penalise"}, {"missing_eos_penalty": 1.0}])
def test_the_penalty_goes_with_penalise(wrong):
    with pytest.raises(ValueError, match="goes with `truncated: penalise` and with nothing else"):
        PPOSettings(**wrong)


def test_a_pathwise_term_needs_the_kl_of_now():
    scored, fresh = ragged()
    settings = PPOSettings(placement="exact")
    batch = prepare(scored, 0.1, settings)
    with pytest.raises(ValueError, match=r"got Fresh\.kl=None"):
        loss(batch, replace(fresh, kl=None), settings, tokens=1)


def test_pathwise_weights_of_another_placement_are_refused():
    scored, fresh = ragged()
    batch = prepare(scored, 0.1, PPOSettings(placement="exact"))
    with pytest.raises(ValueError, match="use the settings it was prepared with"):
        loss(batch, fresh, PPOSettings(), tokens=1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_advantage_that_is_not_finite_names_response_and_token(bad):
    scored, _ = ragged()
    values = scored.values.clone()
    values[3, 4] = bad
    with pytest.raises(NonFiniteError, match=r"advantage must be finite, got .* of response 3"):
        prepare(replace(scored, values=values), 0.1, PPOSettings())


@pytest.mark.parametrize(
    ("field", "bad", "name"),
    [
        ("logprobs", 1000.0, "policy ratio"),
        ("logprobs", math.nan, "policy ratio"),
        ("logprobs", -math.inf, "log-probability"),
        ("values", math.nan, "value"),
        ("values", math.inf, "value"),
        ("kl", math.inf, "exact KL"),
    ],
)
def test_what_is_not_finite_now_names_response_and_token(field, bad, name):
    scored, fresh = ragged()
    settings = PPOSettings(placement="exact")
    batch = prepare(scored, 0.1, settings)
    numbers = getattr(fresh, field).clone()
    numbers[5, 2] = bad
    with pytest.raises(
        NonFiniteError, match=f"every {name} must be finite.* token 2 of response 5"
    ):
        loss(batch, replace(fresh, **{field: numbers}), settings, tokens=1)


def test_a_loss_that_overflows_from_finite_numbers_is_an_error():
    scored, fresh = ragged(torch.float32)
    batch = prepare(scored, 0.1, PPOSettings())
    with pytest.raises(NonFiniteError, match="from finite ratios, values and KL"):
        loss(batch, replace(fresh, values=fresh.values + 1e30), PPOSettings(), tokens=1)
