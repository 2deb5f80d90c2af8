"""The clipped losses of PPO, and how losses of microbatches add up.

Every loss is a sum over tokens divided by `tokens`, the number of kept tokens of the whole
*minibatch*. The losses of its microbatches therefore add to the loss of the minibatch, and the
gradient does not depend on how it was split.

Nothing here reads a value back from the device. A ratio that is not finite must not pass, though
clipping can hide it from the loss and leave NaN in the gradient: `kleash.algorithms.common.
policy_terms` refuses it where it reads the metrics, the one synchronisation of a microbatch.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kleash.masked import masked_sum, masked_variance


def policy_ratio(
    logprobs: Float[Tensor, "batch token"],
    rollout_logprobs: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
) -> Float[Tensor, "batch token"]:
    """ρ_t = π(y_t) / π_rollout(y_t), 1 outside the mask; gradient through `logprobs` only."""
    return torch.where(mask, logprobs - rollout_logprobs.detach(), 0.0).exp()


def clipped_policy_loss(
    logprobs: Float[Tensor, "batch token"],
    rollout_logprobs: Float[Tensor, "batch token"],
    advantages: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    clip_range: float,
    tokens: int,
) -> Float[Tensor, ""]:
    r"""PPO's pessimistic surrogate, to go down.

        L = −1/tokens · Σ_t min(ρ_t A_t, clip(ρ_t, 1−ε, 1+ε) A_t)        ρ_t = π(y_t)/π_rollout(y_t)

    The gradient is that of −ρ_t A_t where the step has not yet gone further than ε in the
    direction that the advantage favours, and zero beyond.

    Args:
        logprobs: log π of the sampled tokens now, in nats; gradients flow.
        rollout_logprobs: the same when the rollout was scored.
        advantages: advantage of each token.
        mask: True on the tokens that take part.
        clip_range: ε, positive.
        tokens: kept tokens of the whole minibatch.

    Returns:
        The loss of these rows; over the microbatches of a minibatch it adds.

    Raises:
        ValueError: if `clip_range` or `tokens` is not positive.

    Example:
        >>> clipped_policy_loss(
        ...     torch.tensor([[0.0, 0.0]]),
        ...     torch.tensor([[0.0, -1.0]]),
        ...     torch.tensor([[2.0, 1.0]]),
        ...     torch.tensor([[True, True]]),
        ...     clip_range=0.2,
        ...     tokens=2,
        ... )
        tensor(-1.6000)

    References:
        Schulman et al., "Proximal Policy Optimization Algorithms", 2017, eq. 7,
        https://arxiv.org/abs/1707.06347
    """
    _require_positive(clip_range=clip_range, tokens=tokens)
    ratio = policy_ratio(logprobs, rollout_logprobs, mask)
    advantages = advantages.detach()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -masked_sum(torch.minimum(ratio * advantages, clipped * advantages), mask) / tokens


def clipped_value_loss(
    values: Float[Tensor, "batch token"],
    old_values: Float[Tensor, "batch token"],
    returns: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    clip_range: float | None,
    tokens: int,
) -> Float[Tensor, ""]:
    r"""Squared error of the critic, which may move no further than ε from where it was.

        L = 1/tokens · Σ_t ½ max((V_t − R_t)², (clip(V_t, V_old ± ε) − R_t)²)

    Args:
        values: values now; gradients flow.
        old_values: values when the rollout was scored.
        returns: what the values should have been.
        mask: True on the tokens that take part.
        clip_range: ε in units of the score, positive; None: the plain squared error.
        tokens: kept tokens of the whole minibatch.

    Returns:
        The loss of these rows; over the microbatches of a minibatch it adds.

    Raises:
        ValueError: if `clip_range` or `tokens` is not positive.

    Example:
        >>> clipped_value_loss(
        ...     torch.tensor([[1.0]]),
        ...     torch.tensor([[0.0]]),
        ...     torch.tensor([[1.0]]),
        ...     torch.tensor([[True]]),
        ...     clip_range=0.2,
        ...     tokens=1,
        ... )
        tensor(0.3200)

    References:
        OpenAI, lm-human-preferences, `PPOTrainer.loss`,
        https://github.com/openai/lm-human-preferences/blob/master/lm_human_preferences/train_policy.py
    """
    _require_positive(tokens=tokens)
    # Selected before they are squared: zero times NaN would be a gradient.
    values = torch.where(mask, values, 0.0)
    returns = torch.where(mask, returns.detach(), 0.0)
    errors = (values - returns).square()
    if clip_range is not None:
        _require_positive(clip_range=clip_range)
        old = torch.where(mask, old_values.detach(), 0.0)
        clipped = torch.clamp(values, old - clip_range, old + clip_range)
        errors = torch.maximum(errors, (clipped - returns).square())
    return 0.5 * masked_sum(errors, mask) / tokens


def explained_variance(
    values: Float[Tensor, "batch token"],
    returns: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
) -> float:
    """How much of the returns the critic foresaw: 1 − Var(return − V) / Var(return).

    1: all of it; 0: no more than a constant would; negative: less. NaN where the returns do not
    vary, because then there is nothing to foresee. Call it on a whole rollout: it does not add.

    Raises:
        ValueError: if fewer than two tokens are kept.

    Example:
        >>> mask = torch.tensor([[True, True, True]])
        >>> values = torch.tensor([[1.0, 2.0, 3.0]])
        >>> explained_variance(values, values + 1, mask)
        1.0
    """
    spread = float(masked_variance(returns, mask))
    if spread == 0:
        return float("nan")
    return 1 - float(masked_variance(returns - values, mask)) / spread


def combine(microbatches: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of a minibatch from those of its microbatches' losses.

    Keys that end in `_max` or `_min` are extremes and stay so; every other metric is a sum over
    tokens divided by the tokens of the minibatch, and adds.

    Raises:
        ValueError: if there is nothing to combine.

    Example:
        >>> combine([
        ...     {"loss/policy": 0.25, "policy/ratio_max": 1.5},
        ...     {"loss/policy": 0.50, "policy/ratio_max": 1.25},
        ... ])
        {'loss/policy': 0.75, 'policy/ratio_max': 1.5}
    """
    return _reduce(microbatches, sum)


def average(minibatches: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of a step from those of its minibatches: the extremes, and the mean of all others.

    Raises:
        ValueError: if there is nothing to average.

    Example:
        >>> average([{"loss/policy": 1.0}, {"loss/policy": 2.0}])
        {'loss/policy': 1.5}
    """
    return _reduce(minibatches, lambda numbers: sum(numbers) / len(numbers))


def _reduce(
    metrics: Sequence[dict[str, float]], ordinary: Callable[[list[float]], float]
) -> dict[str, float]:
    """Extremes by key suffix, everything else by `ordinary`."""
    if not metrics:
        raise ValueError("metrics of at least one loss are needed, got none")
    combined: dict[str, float] = {}
    for key in metrics[0]:
        numbers = [each[key] for each in metrics]
        if key.endswith("_max"):
            combined[key] = max(numbers)
        elif key.endswith("_min"):
            combined[key] = min(numbers)
        else:
            combined[key] = ordinary(numbers)
    return combined


def _require_positive(**numbers: float | int) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} must be positive, got {number}")
