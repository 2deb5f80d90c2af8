import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from kleash import masked

SHAPES = st.tuples(st.integers(1, 5), st.integers(2, 7))


@st.composite
def ragged(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Numbers, and a mask that keeps at least two of them and one in each row."""
    shape = draw(SHAPES)
    x = draw(hnp.arrays(np.float64, shape, elements=st.floats(-100, 100)))
    mask = draw(hnp.arrays(bool, shape))
    mask[:, 0] = True
    mask[0, 1] = True
    return x, mask


def poisoned(x: np.ndarray, mask: np.ndarray) -> Tensor:
    """The numbers with NaN and infinities wherever they must not matter."""
    bad = np.resize([math.nan, math.inf, -math.inf], x.shape)
    return torch.tensor(np.where(mask, x, bad), requires_grad=True)


@given(ragged())
def test_sum_mean_and_variance_agree_with_numpy_on_the_kept(data: tuple) -> None:
    x, mask = data
    t, m = poisoned(x, mask), torch.tensor(mask)
    assert masked.masked_sum(t, m).item() == pytest.approx(x[mask].sum(), abs=1e-9)
    assert masked.masked_mean(t, m).item() == pytest.approx(x[mask].mean(), abs=1e-9)
    assert masked.masked_variance(t, m).item() == pytest.approx(x[mask].var(), abs=1e-9)
    rows = [x[i][mask[i]] for i in range(len(x))]
    sums, means = masked.masked_sum(t, m, dim=-1), masked.masked_mean(t, m, dim=-1)
    np.testing.assert_allclose(sums.detach(), [row.sum() for row in rows], atol=1e-9)
    np.testing.assert_allclose(means.detach(), [row.mean() for row in rows], atol=1e-9)


@given(ragged())
def test_whitening_agrees_with_numpy_on_the_kept(data: tuple) -> None:
    x, mask = data
    kept = x[mask]
    deviation = (kept - kept.mean()) / np.sqrt(kept.var() + masked.WHITENING_EPSILON)
    t, m = poisoned(x, mask), torch.tensor(mask)
    for function, expected in ((masked.whiten, 0), (masked.scale_only, kept.mean())):
        result = function(t, m).detach().numpy()
        np.testing.assert_allclose(result[mask], deviation + expected, atol=1e-6)
        assert (result[~mask] == 0).all()


def test_gradients_are_those_of_the_kept_and_zero_elsewhere() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    functions = (
        masked.masked_sum,
        masked.masked_mean,
        masked.masked_variance,
        masked.whiten,
        masked.scale_only,
    )
    for function in functions:
        # Finite differences see the kept elements only; NaN outside must leave a gradient of 0.
        def of_kept(kept: Tensor, function=function) -> Tensor:
            return function(torch.zeros_like(x).masked_scatter(mask, kept), mask)

        assert torch.autograd.gradcheck(of_kept, (x[mask].requires_grad_(),))
        poisoned_x = x.masked_fill(~mask, math.nan).requires_grad_()
        clean_x = x.clone().requires_grad_()
        weight = torch.arange(12.0).view(3, 4)
        for t in (poisoned_x, clean_x):
            (function(t, mask) * weight).sum().backward()
        assert (poisoned_x.grad[~mask] == 0).all()
        torch.testing.assert_close(poisoned_x.grad, clean_x.grad)


def test_published_vector_of_rewards_whitened_without_a_shift() -> None:
    rewards = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
    expected = [[0.0508, 0.4381, 0.8254], [1.2127, 1.6, 1.9873], [2.3746, 2.7619, 3.1492]]
    scaled = masked.scale_only(rewards, torch.ones(3, 3, dtype=torch.bool))
    np.testing.assert_allclose(scaled, expected, atol=6e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    ones, mask = torch.ones(1, 5000, dtype=dtype), torch.ones(1, 5000, dtype=torch.bool)
    total = masked.masked_sum(ones, mask)  # in half precision the sum would stop at 256 or 2048
    assert (total.dtype, total.item()) == (torch.float32, 5000.0)
    assert masked.whiten(ones, mask).dtype == torch.float32
    assert masked.masked_sum(ones.double(), mask).dtype == torch.float64


def test_equal_elements_whiten_to_zero() -> None:
    x, mask = torch.full((4,), 3.0), torch.ones(4, dtype=torch.bool)
    assert masked.whiten(x, mask).tolist() == [0.0] * 4
    assert masked.scale_only(x, mask).tolist() == [3.0] * 4


def test_sum_over_nothing_is_zero() -> None:
    x, none = torch.full((2, 2), math.nan), torch.zeros(2, 2, dtype=torch.bool)
    assert masked.masked_sum(x, none).item() == 0
    assert masked.masked_sum(x, none, dim=-1).tolist() == [0, 0]


@pytest.mark.parametrize("function", [masked.whiten, masked.scale_only])
@pytest.mark.parametrize("kept", [0, 1])
def test_whitening_fewer_than_two_is_refused(function, kept: int) -> None:
    mask = torch.arange(3) < kept
    with pytest.raises(ValueError, match=f"at least 2 kept elements .* got {kept}"):
        function(torch.zeros(3), mask)


def test_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="none at all"):
        masked.masked_mean(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="none along dim -1 in some row"):
        masked.masked_mean(torch.zeros(2, 2), torch.eye(2) * torch.tensor([1, 0]) > 0, dim=-1)
    with pytest.raises(ValueError, match="at least one kept"):
        masked.masked_variance(torch.zeros(2), torch.zeros(2, dtype=torch.bool))


def test_a_mask_of_numbers_or_of_another_shape_is_refused() -> None:
    with pytest.raises(TypeError):
        masked.masked_sum(torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(TypeError):
        masked.masked_sum(torch.zeros(2, 2), torch.ones(2, dtype=torch.bool))
