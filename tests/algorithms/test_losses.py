"""Clipped losses against numpy on every token, splits of a minibatch, and how metrics combine."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kleash.algorithms.losses import (
    average,
    clipped_policy_loss,
    clipped_value_loss,
    combine,
    explained_variance,
    policy_ratio,
)

seeds = st.integers(0, 2**31 - 1)


def case(seed, rows=6, width=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    mask = torch.arange(width)[None] < lengths[:, None]
    a, b, c = torch.randn(3, rows, width, generator=generator, dtype=dtype)
    return a, b, c, mask


def gradient(function, x):
    leaf = x.clone().requires_grad_()
    value = function(leaf)
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(0.01, 0.9))
def test_policy_loss_and_gradient_are_those_of_the_definition(seed, clip):
    now, old, advantages, mask = case(seed)
    value, grad = gradient(
        lambda x: clipped_policy_loss(x, old, advantages, mask, clip_range=clip, tokens=7), now
    )
    expected, slopes = 0.0, np.zeros(mask.shape)
    for i, t in np.argwhere(mask.numpy()):
        ratio, a = math.exp(float(now[i, t] - old[i, t])), float(advantages[i, t])
        inside = min(max(ratio, 1 - clip), 1 + clip)
        expected -= min(ratio * a, inside * a) / 7
        stopped = (a > 0 and ratio > 1 + clip) or (a < 0 and ratio < 1 - clip)
        slopes[i, t] = 0.0 if stopped else -ratio * a / 7
    assert float(value) == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(grad.numpy(), slopes, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(seeds, st.one_of(st.none(), st.floats(0.01, 2.0)))
def test_value_loss_is_that_of_the_definition(seed, clip):
    now, old, returns, mask = case(seed)
    value, grad = gradient(
        lambda x: clipped_value_loss(x, old, returns, mask, clip_range=clip, tokens=7), now
    )
    expected, slopes = 0.0, np.zeros(mask.shape)
    for i, t in np.argwhere(mask.numpy()):
        v, o, r = float(now[i, t]), float(old[i, t]), float(returns[i, t])
        near = v if clip is None else min(max(v, o - clip), o + clip)
        expected += 0.5 * max((v - r) ** 2, (near - r) ** 2) / 7
        slopes[i, t] = (v - r) / 7 if near == v or (v - r) ** 2 > (near - r) ** 2 else 0.0
    assert float(value) == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(grad.numpy(), slopes, atol=1e-12)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_nothing_outside_the_mask_reaches_value_or_gradient(poison):
    now, old, numbers, mask = case(1)

    def spoil(x):
        return torch.where(mask, x, poison)

    for function in (
        lambda x, o, n: clipped_policy_loss(x, o, n, mask, clip_range=0.2, tokens=5),
        lambda x, o, n: clipped_value_loss(x, o, n, mask, clip_range=0.2, tokens=5),
    ):
        clean = gradient(lambda x, f=function: f(x, old, numbers), now)
        spoiled = gradient(lambda x, f=function: f(x, spoil(old), spoil(numbers)), spoil(now))
        assert torch.equal(clean[0], spoiled[0])
        assert torch.equal(clean[1], spoiled[1])
        assert (spoiled[1][~mask] == 0).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("parts", [1, 2, 6])
def test_the_gradient_does_not_depend_on_the_split(dtype, tolerance, parts):
    now, old, numbers, mask = case(2, dtype=dtype)
    tokens = int(mask.sum())

    def losses(x, rows):
        return clipped_policy_loss(
            x[rows], old[rows], numbers[rows], mask[rows], clip_range=0.2, tokens=tokens
        ) + clipped_value_loss(
            x[rows], old[rows], numbers[rows], mask[rows], clip_range=0.2, tokens=tokens
        )

    whole = gradient(lambda x: losses(x, torch.arange(6)), now)
    split = gradient(lambda x: sum(losses(x, rows) for rows in torch.arange(6).chunk(parts)), now)
    for a, b in zip(whole, split, strict=True):
        assert float((a - b).abs().max()) <= tolerance


def test_ratio_is_exactly_one_where_nothing_changed_and_outside_the_mask():
    now, old, _, mask = case(3, dtype=torch.float32)
    assert (policy_ratio(now, now.clone(), mask) == 1).all()
    assert (policy_ratio(now, old, mask)[~mask] == 1).all()


def test_an_overflowing_ratio_is_not_clamped():
    now, old = torch.tensor([[1000.0]]), torch.tensor([[0.0]])
    mask = torch.tensor([[True]])
    assert float(policy_ratio(now, old, mask)) == math.inf
    against = clipped_policy_loss(now, old, torch.tensor([[-1.0]]), mask, clip_range=0.2, tokens=1)
    assert float(against) == math.inf


def test_half_precision_is_summed_in_float32():
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)
    mask = torch.ones(1, 4096, dtype=torch.bool)
    loss = clipped_value_loss(ones, ones, 0 * ones, mask, clip_range=None, tokens=4096)
    assert loss.dtype == torch.float32
    assert float(loss) == 0.5


@pytest.mark.parametrize("wrong", [{"clip_range": 0.0}, {"clip_range": math.nan}, {"tokens": 0}])
def test_ranges_and_token_counts_are_positive(wrong):
    x, mask = torch.zeros(1, 1), torch.tensor([[True]])
    arguments = {"clip_range": 0.2, "tokens": 1, **wrong}
    for function in (clipped_policy_loss, clipped_value_loss):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be positive, got"):
            function(x, x, x, mask, **arguments)


def test_explained_variance_is_numpys():
    values, returns, _, mask = case(4)
    v, r = values[mask].numpy(), returns[mask].numpy()
    expected = 1 - np.var(r - v) / np.var(r)
    spoiled = torch.where(mask, values, math.nan)
    assert explained_variance(spoiled, returns, mask) == pytest.approx(expected, abs=1e-12)


def test_explained_variance_of_equal_returns_is_undefined():
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert math.isnan(explained_variance(torch.zeros(1, 3), torch.ones(1, 3), mask))


def test_metrics_add_average_and_keep_their_extremes():
    parts = [
        {"loss/policy": 1.0, "policy/ratio_max": 2.0, "policy/ratio_min": 0.5},
        {"loss/policy": 3.0, "policy/ratio_max": 1.0, "policy/ratio_min": 0.75},
    ]
    extremes = {"policy/ratio_max": 2.0, "policy/ratio_min": 0.5}
    assert combine(parts) == {"loss/policy": 4.0, **extremes}
    assert average(parts) == {"loss/policy": 2.0, **extremes}


def test_nothing_cannot_be_combined():
    with pytest.raises(ValueError, match="got none"):
        combine([])
