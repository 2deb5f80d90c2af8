"""Sums, means and whitening over the kept elements of a tensor.

Masks select: every element outside the mask is replaced before it is used, so neither its value
nor its gradient can matter, even where it is NaN or infinite. (What *produced* a NaN outside the
mask may still have a NaN gradient of its own: zero times a NaN derivative. Select there as well.)

Half-precision input is summed, and the result returned, in float32; float32 and float64 stay.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

WHITENING_EPSILON = 1e-8
"""Added to the variance before its root, as in OpenAI's lm-human-preferences."""


def at_least_float32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The same numbers in a dtype fit to accumulate in: float32, or float64 where they are."""
    return x if x.dtype == torch.float64 else x.float()


def masked_sum(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None
) -> Float[Tensor, "..."]:
    """Sum of the elements where `mask` is True, over all axes or over one.

    Args:
        x: any numbers; what lies outside the mask is ignored, NaN included.
        mask: True = keep.
        dim: the axis to sum over; None for all.

    Returns:
        The sum, 0 where nothing is kept.

    Example:
        >>> x, mask = torch.tensor([[1.0, 2.0], [3.0, float("nan")]]), torch.ones(2, 2) > 0
        >>> mask[1, 1] = False
        >>> masked_sum(x, mask), masked_sum(x, mask, dim=-1)
        (tensor(6.), tensor([3., 3.]))
    """
    kept = torch.where(mask, at_least_float32(x), 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None
) -> Float[Tensor, "..."]:
    """Mean of the elements where `mask` is True, over all axes or over one.

    Args:
        x: any numbers; what lies outside the mask is ignored, NaN included.
        mask: True = keep.
        dim: the axis to average over; None for all.

    Returns:
        Sum of the kept elements divided by their number.

    Raises:
        ValueError: if a mean would be taken over nothing.

    Example:
        >>> masked_mean(torch.tensor([1.0, 2.0, 30.0]), torch.tensor([True, True, False]))
        tensor(1.5000)
    """
    count = mask.sum() if dim is None else mask.sum(dim)
    if not bool((count > 0).all()):
        raise ValueError(
            f"a mean needs at least one kept element, got a mask of shape {tuple(mask.shape)} with"
            f" none {'at all' if dim is None else f'along dim {dim} in some row'};"
            " drop empty rows first"
        )
    return masked_sum(x, mask, dim) / count


def masked_variance(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Population variance of the kept elements: mean of (x − mean)², divided by n, not n − 1.

    Args:
        x: any numbers; what lies outside the mask is ignored, NaN included.
        mask: True = keep.

    Returns:
        The variance; 0 for a single element.

    Raises:
        ValueError: if nothing is kept.

    Example:
        >>> masked_variance(torch.tensor([1.0, 3.0, 50.0]), torch.tensor([True, True, False]))
        tensor(1.)
    """
    return masked_mean(_centred(x, mask).square(), mask)


def whiten(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Shift and scale to mean 0 and variance 1 over the kept elements: (x − mean)/√(var + ε).

    The variance is the population's; ε is `WHITENING_EPSILON`, so equal elements become 0.

    Args:
        x: any numbers; what lies outside the mask is ignored, NaN included.
        mask: True = keep.

    Returns:
        The whitened elements, 0 outside the mask.

    Raises:
        ValueError: if fewer than 2 elements are kept: one element has no spread.

    Example:
        >>> whiten(torch.tensor([1.0, 3.0, 50.0]), torch.tensor([True, True, False]))
        tensor([-1.,  1.,  0.])

    References:
        OpenAI, lm-human-preferences, `lm_human_preferences/utils/core.py`, `whiten`.
    """
    _check_several(mask)
    return _centred(x, mask) * torch.rsqrt(masked_variance(x, mask) + WHITENING_EPSILON)


def scale_only(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Scale to variance 1 over the kept elements and leave their mean: whiten(x) + mean(x).

    So that a reward keeps its sign and level. (This is the published "whitening" of rewards,
    which divides the deviations only and adds the old mean back.)

    Args:
        x: any numbers; what lies outside the mask is ignored, NaN included.
        mask: True = keep.

    Returns:
        The scaled elements, 0 outside the mask.

    Raises:
        ValueError: if fewer than 2 elements are kept: one element has no spread.

    Example:
        >>> scale_only(torch.tensor([1.0, 5.0, 50.0]), torch.tensor([True, True, False]))
        tensor([2., 4., 0.])

    References:
        Huang et al., "The N Implementation Details of RLHF with PPO", 2023, whose test vector
        [[1.2, 1.3, 1.4], …] → [[0.0508, 0.4381, 0.8254], …] this function reproduces.
    """
    return torch.where(mask, whiten(x, mask) + masked_mean(x, mask), 0.0)


def _centred(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """x − mean of the kept, 0 outside: selected before any non-linear step, see the top."""
    return torch.where(mask, at_least_float32(x) - masked_mean(x, mask), 0.0)


def _check_several(mask: Bool[Tensor, "*shape"]) -> None:
    kept = int(mask.sum())
    if kept < 2:
        raise ValueError(
            f"whitening needs at least 2 kept elements to have a spread, got {kept};"
            " use a larger batch or turn whitening off"
        )
