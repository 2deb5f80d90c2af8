r"""Estimators of KL(π‖π_ref) from the log-probabilities of the tokens that were sampled.

Throughout, π is the policy, π_ref the frozen reference, and

    δ = log π(x) − log π_ref(x)      for a token x drawn from π.

Nothing here knows about models: log-probabilities in, numbers out, nothing clamped.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.masked import at_least_float32

Estimator = Literal["k1", "k2", "k3"]


def sampled_kl(
    logprobs: Float[Tensor, "*shape"],
    ref_logprobs: Float[Tensor, "*shape"],
    estimator: Estimator = "k1",
) -> Float[Tensor, "*shape"]:
    r"""Estimate KL(π‖π_ref) at each token of sequences sampled from π.

        k1 = δ                unbiased, may be negative
        k2 = δ² / 2           biased, never negative
        k3 = e^(−δ) − 1 + δ   unbiased, never negative; of infinite variance where π is
                              much sharper than π_ref

    Differentiated at one token with the sample held fixed the three part company. In
    expectation over x ~ π, k1 has no gradient at all, k2 has that of KL(π‖π_ref), and k3 has
    that of KL(π_ref‖π). None of the three is the gradient of the KL of whole responses, which
    `kl.placements` is about: k1 inside the reward is.

    Args:
        logprobs: log π of the sampled tokens, in nats.
        ref_logprobs: log π_ref of the same tokens, in nats.
        estimator: which of the three to return.

    Returns:
        One estimate per token, in nats. Positions outside the response are not masked.

    Raises:
        ValueError: if `estimator` is not one of the three.

    Example:
        A token of probability ¼ under the policy and 1⁄20 under the reference:

        >>> logprobs, ref_logprobs = torch.tensor(0.25).log(), torch.tensor(0.05).log()
        >>> sampled_kl(logprobs, ref_logprobs)
        tensor(1.6094)
        >>> sampled_kl(logprobs, ref_logprobs, "k3")
        tensor(0.8094)

    References:
        Schulman, "Approximating KL Divergence", 2020, http://joschu.net/blog/kl-approx.html
    """
    delta = at_least_float32(logprobs) - at_least_float32(ref_logprobs)
    match estimator:
        case "k1":
            return delta
        case "k2":
            return delta.square() / 2
        case "k3":
            return torch.expm1(-delta) + delta
        case _:
            raise ValueError(f"estimator must be 'k1', 'k2' or 'k3', got {estimator!r}")
