"""How much better than expected: advantages from rewards, in three ways.

`gae` needs a critic and works per token; `group_relative` and `leave_one_out` need several
responses to each prompt and work per response. None carries a gradient.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def gae(
    rewards: Float[Tensor, "batch token"],
    values: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    gamma: float,
    lam: float,
    final_values: Float[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch token"], Float[Tensor, "batch token"]]:
    r"""Generalised advantage estimation over responses of different lengths.

        δ_t = r_t + γ V_{t+1} − V_t        A_t = Σ_l (γλ)^l δ_{t+l}        return_t = A_t + V_t

    where V_{t+1} after a response's last token is its `final_values`, 0 when it ended there.
    λ = 1 gives the plain return minus the baseline V, λ = 0 the one-step TD error.

    Args:
        rewards: reward of each token.
        values: value of the state before each token.
        mask: True on the tokens of the response. Where it has gaps, the kept tokens follow one
            another as if the gap were not there.
        gamma: discount per token, in [0, 1].
        lam: λ in [0, 1].
        final_values: value of the state after the last token, for responses that were cut off
            and are to be continued by the critic; 0 for those that ended. None: 0 for all.

    Returns:
        Advantages and returns, zero outside the mask, at least float32, without gradient.

    Raises:
        ValueError: if `gamma` or `lam` is outside [0, 1].

    Example:
        >>> advantages, returns = gae(
        ...     rewards=torch.tensor([[0.0, 1.0, 7.0]]),
        ...     values=torch.tensor([[0.5, 0.5, 7.0]]),
        ...     mask=torch.tensor([[True, True, False]]),
        ...     gamma=1.0,
        ...     lam=0.5,
        ... )
        >>> advantages, returns
        (tensor([[0.2500, 0.5000, 0.0000]]), tensor([[0.7500, 1.0000, 0.0000]]))

    References:
        Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage
        Estimation", 2016, eq. 11 and 16, https://arxiv.org/abs/1506.02438
    """
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {number}")
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    rewards, values = rewards.detach().to(dtype), values.detach().to(dtype)
    zero = torch.zeros_like(rewards[:, 0])
    after = zero if final_values is None else final_values.detach().to(dtype)
    advantage, columns = zero, list[Tensor]()
    for reward, value, kept in zip(
        reversed(rewards.unbind(-1)),
        reversed(values.unbind(-1)),
        reversed(mask.unbind(-1)),
        strict=True,
    ):
        td_error = reward + gamma * after - value
        # Right of the response both stay at their start, so padding can hold anything.
        advantage = torch.where(kept, td_error + gamma * lam * advantage, advantage)
        after = torch.where(kept, value, after)
        columns.append(advantage)
    advantages = torch.where(mask, torch.stack(columns[::-1], dim=-1), zero[:, None])
    return advantages, torch.where(mask, advantages + values, zero[:, None])


def group_relative(
    scores: Float[Tensor, " batch"],
    prompt_index: Int[Tensor, " batch"],
    *,
    epsilon: float = 1e-4,
) -> Float[Tensor, " batch"]:
    r"""Each score in standard deviations from the mean of its prompt's group.

        A_i = (s_i − mean) / (sd + ε)        sd² = Σ (s − mean)² / (n − 1)

    A group whose scores are all equal has no signal: exactly 0. ε keeps groups that differ by
    rounding alone from weighing as much as the others.

    Args:
        scores: one number per response.
        prompt_index: which prompt each response answers; equal numbers form a group.
        epsilon: added to the standard deviation, in units of the score.

    Returns:
        Advantages; each group sums to 0.

    Raises:
        ValueError: if a prompt has a single response, or `epsilon` is negative.

    Example:
        >>> group_relative(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([8, 8, 8]))
        tensor([-1.0000,  0.0000,  1.0000])

    References:
        Shao et al., "DeepSeekMath", 2024, section 4.1.2, https://arxiv.org/abs/2402.03300
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon must not be negative, got {epsilon}")
    centred, group, sizes = _centred(scores, prompt_index)
    squares = torch.zeros_like(sizes).index_add(0, group, centred.square())
    sd = (squares / (sizes - 1)).sqrt()[group]
    # 0/0 of an equal group at ε = 0 is the one case to name: its numerator is exactly 0.
    return torch.where(centred == 0, centred, centred / (sd + epsilon))


def leave_one_out(
    scores: Float[Tensor, " batch"],
    prompt_index: Int[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    r"""Each score less the mean of the other responses to the same prompt.

        A_i = s_i − 1/(n−1) Σ_{j≠i} s_j

    The baseline does not depend on response i, so the policy gradient stays unbiased; centring
    by the mean of all n would shrink it by 1 − 1/n.

    Args:
        scores: one number per response.
        prompt_index: which prompt each response answers; equal numbers form a group.

    Returns:
        Advantages; each group sums to 0.

    Raises:
        ValueError: if a prompt has a single response.

    Example:
        >>> leave_one_out(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([8, 8, 8]))
        tensor([-3.,  0.,  3.])

    References:
        Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from
        Human Feedback in LLMs", 2024, eq. 8, https://arxiv.org/abs/2402.14740
    """
    centred, group, sizes = _centred(scores, prompt_index)
    return centred * (sizes / (sizes - 1))[group]


def _centred(
    scores: Float[Tensor, " batch"], prompt_index: Int[Tensor, " batch"]
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"], Float[Tensor, " group"]]:
    """Scores less the mean of their group; the group of each; the size of each group."""
    prompts, group, counts = torch.unique(prompt_index, return_inverse=True, return_counts=True)
    if (counts < 2).any():
        raise ValueError(
            "every prompt needs at least 2 responses to be compared, got a single one for prompts "
            f"{prompts[counts < 2].tolist()}: raise responses_per_prompt"
        )
    scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    sizes = counts.to(scores.dtype)
    # From the group's lowest score on, equal scores centre to exactly 0.
    lowest = torch.full_like(sizes, float("inf")).scatter_reduce(0, group, scores, "amin")
    above = scores - lowest[group]
    means = torch.zeros_like(sizes).index_add(0, group, above) / sizes
    return above - means[group], group, sizes
