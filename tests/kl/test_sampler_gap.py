"""Both directions of the sampler's KL, against enumeration of a tabular policy and sampler."""

import math

import oracles
import pytest
import torch

from kleash.kl.sampler_gap import exact_gap, sampler_gap

MODELS = oracles.gradient_models()
WORLD = MODELS.world
POLICY, SAMPLER = MODELS.policy, MODELS.sampler
NOW, THEN = WORLD.token_logprobs(POLICY), WORLD.token_logprobs(SAMPLER)


def test_each_estimate_is_unbiased_under_the_sampler() -> None:
    """The expectation over all strings of σ, against divergences of whole distributions."""
    probability = WORLD.probabilities(SAMPLER)
    responses, tokens, reverse, length = [
        torch.zeros(len(WORLD.strings), dtype=torch.float64) for _ in range(4)
    ]
    for number in range(len(WORLD.strings)):
        row, mask = slice(number, number + 1), WORLD.mask[number : number + 1]
        gap = sampler_gap(NOW[row], THEN[row], mask, torch.zeros(1, dtype=torch.long))
        length[number] = mask.sum()
        responses[number] = gap.per_response.mean
        tokens[number] = gap.per_token.mean * length[number]
        reverse[number] = gap.reverse_per_token.mean * length[number]
    visits = WORLD.visits(SAMPLER)
    assert float(probability @ responses) == pytest.approx(float(WORLD.kl(SAMPLER, POLICY)))
    forward_of_states = (visits * WORLD.state_kl(SAMPLER, POLICY)).sum()
    assert float(probability @ tokens) == pytest.approx(float(forward_of_states))
    assert float(forward_of_states) == pytest.approx(float(WORLD.kl(SAMPLER, POLICY)))
    reverse_of_states = (visits * WORLD.state_kl(POLICY, SAMPLER)).sum()
    assert float(probability @ reverse) == pytest.approx(float(reverse_of_states))
    assert abs(float(reverse_of_states / forward_of_states) - 1) > 0.01


def test_neither_estimate_per_token_is_negative_and_padding_changes_nothing() -> None:
    index = torch.arange(len(WORLD.strings))
    clean = sampler_gap(NOW, THEN, WORLD.mask, index)
    assert clean.per_token.mean > 0 and clean.reverse_per_token.mean > 0
    for poison in (math.nan, math.inf):
        now, then = (torch.where(WORLD.mask, x, poison) for x in (NOW, THEN))
        assert sampler_gap(now, then, WORLD.mask, index) == clean


def test_two_laws_that_agree_but_for_rounding_have_no_gap_to_speak_of() -> None:
    noise = torch.Generator().manual_seed(0)
    then = NOW + 1e-6 * torch.randn(NOW.shape, generator=noise, dtype=torch.float64)
    gap = sampler_gap(NOW, then, WORLD.mask, torch.arange(len(WORLD.strings)))
    assert gap.per_token.mean == pytest.approx(0.5e-12, rel=0.3)
    assert gap.reverse_per_token.mean == pytest.approx(0.5e-12, rel=0.3)


def test_whole_distributions_give_both_directions() -> None:
    forward, reverse = exact_gap(POLICY.log_softmax(-1), SAMPLER.log_softmax(-1))
    torch.testing.assert_close(forward, WORLD.state_kl(SAMPLER, POLICY))
    torch.testing.assert_close(reverse, WORLD.state_kl(POLICY, SAMPLER))


def test_a_cut_tail_is_infinitely_far_the_other_way() -> None:
    """Top-p with half of the mass kept: KL(σ‖π) = log 2, and π writes what σ never does."""
    pi = torch.tensor([[0.5, 0.25, 0.25]]).log()
    cut = torch.tensor([[1.0, 0.0, 0.0]]).log()
    forward, reverse = exact_gap(pi, cut)
    assert float(forward) == pytest.approx(math.log(2))
    assert float(reverse) == math.inf
