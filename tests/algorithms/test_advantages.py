"""GAE against its defining double sum in numpy; group advantages against plain loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kleash.algorithms.advantages import gae, group_relative, leave_one_out

unit = st.floats(0, 1, allow_subnormal=False)
lengths_and_seed = st.tuples(
    st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 2**31 - 1)
)


def double_sum(rewards, values, gamma, lam, final):
    """A_t = Σ_l (γλ)^l δ_{t+l}, one row, straight from the definition."""
    following = np.append(values[1:], final)
    td = rewards + gamma * following - values
    n = len(rewards)
    return np.array(
        [sum((gamma * lam) ** step * td[t + step] for step in range(n - t)) for t in range(n)]
    )


def ragged_case(lengths, seed, width=9):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    rewards, values = torch.randn(2, len(lengths), width, generator=generator, dtype=torch.float64)
    final = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    return rewards, values, mask, final


@settings(max_examples=60, deadline=None)
@given(lengths_and_seed, unit, unit)
def test_gae_is_its_double_sum_and_padding_changes_nothing(case, gamma, lam):
    lengths, seed = case
    rewards, values, mask, final = ragged_case(lengths, seed)
    for poison in (0.0, math.nan, math.inf):
        for last in (None, final):
            advantages, returns = gae(
                torch.where(mask, rewards, poison),
                torch.where(mask, values, poison),
                mask,
                gamma=gamma,
                lam=lam,
                final_values=last,
            )
            for row, n in enumerate(lengths):
                kept_values = values[row, :n].numpy()
                end = 0.0 if last is None else float(last[row])
                expected = double_sum(rewards[row, :n].numpy(), kept_values, gamma, lam, end)
                np.testing.assert_allclose(advantages[row, :n].numpy(), expected, atol=1e-12)
                np.testing.assert_allclose(
                    returns[row, :n].numpy(), expected + kept_values, atol=1e-12
                )
            assert (advantages[~mask] == 0).all()
            assert (returns[~mask] == 0).all()


@settings(max_examples=30, deadline=None)
@given(lengths_and_seed)
def test_the_ends_of_lambda(case):
    lengths, seed = case
    rewards, values, mask, _ = ragged_case(lengths, seed)
    _, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    kept = torch.where(mask, rewards, 0)
    to_go = kept.flip(-1).cumsum(-1).flip(-1)
    assert torch.allclose(returns, torch.where(mask, to_go, 0))
    td, _ = gae(rewards, values, mask, gamma=1.0, lam=0.0)
    last = torch.tensor(lengths) - 1
    rows = torch.arange(len(lengths))
    assert torch.allclose(td[rows, last], (rewards - values)[rows, last])


def test_a_gap_in_the_mask_is_as_if_it_were_not_there():
    rewards, values, mask, final = ragged_case([4], 3, width=4)
    spread = torch.tensor([0, 2, 3, 6])
    wide_mask = torch.zeros(1, 8, dtype=torch.bool)
    wide_mask[:, spread] = True
    wide = torch.full((2, 1, 8), math.nan, dtype=torch.float64)
    wide[0, :, spread], wide[1, :, spread] = rewards, values
    dense, _ = gae(rewards, values, mask, gamma=0.9, lam=0.8, final_values=final)
    gappy, _ = gae(wide[0], wide[1], wide_mask, gamma=0.9, lam=0.8, final_values=final)
    assert torch.equal(gappy[:, spread], dense)


def test_gae_keeps_float32_for_halves_and_carries_no_gradient():
    values = torch.zeros(1, 2, dtype=torch.bfloat16, requires_grad=True)
    rewards = torch.zeros(1, 2, dtype=torch.bfloat16)
    advantages, returns = gae(rewards, values, torch.tensor([[True, True]]), gamma=1.0, lam=0.9)
    assert advantages.dtype == returns.dtype == torch.float32
    assert not advantages.requires_grad


@pytest.mark.parametrize("wrong", [{"gamma": 1.1}, {"gamma": math.nan}, {"lam": -0.1}])
def test_gamma_and_lambda_lie_in_the_unit_interval(wrong):
    numbers = {"gamma": 1.0, "lam": 0.95, **wrong}
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must lie in"):
        gae(torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([[True]]), **numbers)


groups = st.lists(st.tuples(st.integers(2, 5), st.integers(-9, 9)), min_size=1, max_size=4)


def shuffled_groups(sizes_and_offsets, seed):
    generator = torch.Generator().manual_seed(seed)
    index = torch.cat([torch.full((n,), 7 * i - 3) for i, (n, _) in enumerate(sizes_and_offsets)])
    scores = torch.randn(len(index), generator=generator, dtype=torch.float64)
    scores = scores + torch.cat([torch.full((n,), float(m)) for n, m in sizes_and_offsets])
    order = torch.randperm(len(index), generator=generator)
    return scores[order], index[order]


@settings(max_examples=40, deadline=None)
@given(groups, st.integers(0, 2**31 - 1))
def test_group_advantages_are_what_plain_loops_find(shape, seed):
    scores, index = shuffled_groups(shape, seed)
    relative = group_relative(scores, index, epsilon=0.25)
    left_out = leave_one_out(scores, index)
    for i in range(len(scores)):
        group = scores[index == index[i]].numpy()
        others = np.array(
            [float(s) for j, s in enumerate(scores) if j != i and index[j] == index[i]]
        )
        expected = (float(scores[i]) - group.mean()) / (group.std(ddof=1) + 0.25)
        assert float(relative[i]) == pytest.approx(expected, abs=1e-9)
        assert float(left_out[i]) == pytest.approx(float(scores[i]) - others.mean(), abs=1e-9)


@pytest.mark.parametrize("epsilon", [0.0, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_of_equal_scores_says_exactly_nothing(epsilon, dtype):
    scores = torch.tensor([0.1, 0.1, 0.1, 0.7, 0.2], dtype=dtype)
    index = torch.tensor([4, 4, 4, 9, 9])
    advantages = group_relative(scores, index, epsilon=epsilon)
    assert (advantages[:3] == 0).all()
    assert advantages[3:].isfinite().all()
    assert (advantages[3:] != 0).all()


def test_rounding_within_a_group_does_not_become_a_signal():
    scores = torch.tensor([1.0, 1.0 + 1e-7, 1.0 - 1e-7])
    assert float(group_relative(scores, torch.zeros(3, dtype=torch.long)).abs().max()) < 2e-3


@pytest.mark.parametrize("function", [group_relative, leave_one_out])
def test_a_prompt_with_a_single_response_is_named(function):
    with pytest.raises(ValueError, match=r"a single one for prompts \[5\]"):
        function(torch.zeros(3), torch.tensor([2, 5, 2]))


def test_epsilon_must_not_be_negative():
    with pytest.raises(ValueError, match=r"epsilon must not be negative, got -1"):
        group_relative(torch.zeros(2), torch.tensor([0, 0]), epsilon=-1.0)
