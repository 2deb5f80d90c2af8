"""Divergences between whole next-token distributions, from their log-probabilities.

Every function maps log-probabilities over the vocabulary (last axis, in nats, each row summing to
1 in probability) to one number per row, and is right in value and gradient where words have
probability 0, that is log-probability −∞: banned tokens, padded vocabulary rows, top-k sampling.

A KL is +∞ where the first distribution allows a word that the second forbids. That is a finding
and is returned; its gradient does not exist and comes out as NaN or infinite.

Half-precision input is accumulated, and the result returned, in float32.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.masked import at_least_float32


def exact_kl(
    logprobs: Float[Tensor, "*rows vocab"], ref_logprobs: Float[Tensor, "*rows vocab"]
) -> Float[Tensor, "*rows"]:
    r"""KL(π‖π_ref) of next-token distributions: how far the policy has drifted.

        KL(π‖π_ref) = Σ_v π_v (log π_v − log π_ref,v)  ≥ 0,   0 only where they are equal

    Its gradient through `logprobs = log_softmax(z)` is ∂KL/∂z_v = π_v (log(π_v/π_ref,v) − KL).

    Args:
        logprobs: log π over the vocabulary, in nats.
        ref_logprobs: log π_ref over the vocabulary, in nats.

    Returns:
        One KL per row, in nats; +∞ where π allows a word that π_ref forbids.

    Example:
        >>> exact_kl(torch.tensor([0.7, 0.3]).log(), torch.tensor([0.5, 0.5]).log())
        tensor(0.0823)
    """
    p, q = at_least_float32(logprobs), at_least_float32(ref_logprobs)
    return _mul_exp(p - q, p).sum(-1)


def reverse_kl(
    logprobs: Float[Tensor, "*rows vocab"], ref_logprobs: Float[Tensor, "*rows vocab"]
) -> Float[Tensor, "*rows"]:
    r"""KL(π_ref‖π): what the reference knows and the policy has forgotten.

        KL(π_ref‖π) = Σ_v π_ref,v (log π_ref,v − log π_v)  ≥ 0

    The same arguments in the same order as `exact_kl`. Its gradient through
    `logprobs = log_softmax(z)` is ∂/∂z_v = π_v − π_ref,v.

    Args:
        logprobs: log π over the vocabulary, in nats.
        ref_logprobs: log π_ref over the vocabulary, in nats.

    Returns:
        One KL per row, in nats; +∞ where π forbids a word that π_ref allows.

    Example:
        >>> reverse_kl(torch.tensor([0.7, 0.3]).log(), torch.tensor([0.5, 0.5]).log())
        tensor(0.0872)
    """
    return exact_kl(ref_logprobs, logprobs)


def entropy(logprobs: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows"]:
    r"""Entropy −Σ_v π_v log π_v, between 0 (one word is certain) and log V (all alike).

    Args:
        logprobs: log π over the vocabulary, in nats.

    Returns:
        One entropy per row, in nats.

    Example:
        >>> entropy(torch.tensor([0.25, 0.25, 0.5, 0.0]).log())
        tensor(1.0397)
    """
    p = at_least_float32(logprobs)
    return -_mul_exp(p, p).sum(-1)


def js_divergence(
    a: Float[Tensor, "*rows vocab"], b: Float[Tensor, "*rows vocab"]
) -> Float[Tensor, "*rows"]:
    r"""Jensen–Shannon divergence: symmetric, and finite whatever the two distributions forbid.

        JS(a, b) = ½ KL(a‖m) + ½ KL(b‖m),    m = (a + b)/2,    0 ≤ JS ≤ log 2

    Args:
        a: log-probabilities over the vocabulary, in nats.
        b: log-probabilities over the vocabulary, in nats.

    Returns:
        One divergence per row, in nats; log 2 where the two share no word.

    Example:
        >>> js_divergence(torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log())
        tensor(0.6931)

    References:
        Lin, "Divergence measures based on the Shannon entropy", 1991.
    """
    a, b = at_least_float32(a), at_least_float32(b)
    # logaddexp(−∞, −∞) has a NaN gradient; a word that both forbid takes no part in any sum.
    neither = torch.isneginf(a) & torch.isneginf(b)
    mixture = torch.logaddexp(a.masked_fill(neither, 0.0), b.masked_fill(neither, 0.0))
    mixture = mixture - math.log(2)
    return (_mul_exp(a - mixture, a).sum(-1) + _mul_exp(b - mixture, b).sum(-1)) / 2


def top_k_kl(
    logprobs: Float[Tensor, "*rows vocab"], ref_logprobs: Float[Tensor, "*rows vocab"], k: int
) -> Float[Tensor, "*rows"]:
    r"""KL(π‖π_ref) seen through the policy's k likeliest words and one bucket for the rest.

        Σ_{v in top k} π_v log(π_v/π_ref,v) + π_rest log(π_rest/π_ref,rest)  ≤  KL(π‖π_ref)

    A true KL, of the two distributions over k + 1 events, so it is never negative and, by the
    data-processing inequality, never above the exact KL. Leaving the bucket out gives a sum that
    can be negative and is no KL at all. The gradient takes the choice of words as fixed.

    Args:
        logprobs: log π over the vocabulary, in nats.
        ref_logprobs: log π_ref over the vocabulary, in nats.
        k: words kept apart, from 1 to V; V gives `exact_kl`.

    Returns:
        One lower bound per row, in nats.

    Raises:
        ValueError: if `k` is not between 1 and the vocabulary size.

    Example:
        >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.2, 0.2, 0.6]).log()
        >>> top_k_kl(p, q, 1), top_k_kl(p, q, 3), exact_kl(p, q)
        (tensor(0.3819), tensor(0.6016), tensor(0.6016))
    """
    vocabulary = logprobs.shape[-1]
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k must be between 1 and the vocabulary size {vocabulary}, got {k}")
    p, q = at_least_float32(logprobs), at_least_float32(ref_logprobs)
    order = p.argsort(dim=-1, descending=True)
    return exact_kl(*(_with_bucket(x.gather(-1, order), k) for x in (p, q)))


def _with_bucket(logprobs: Float[Tensor, "*rows vocab"], k: int) -> Float[Tensor, "*rows events"]:
    """The first k log-probabilities, and that of all others together (none if k = V)."""
    head, tail = logprobs[..., :k], logprobs[..., k:]
    if tail.shape[-1] == 0:
        return head
    # logsumexp of −∞ alone has a NaN gradient; a row without a tail has a bucket of −∞.
    empty = torch.isneginf(tail).all(-1, keepdim=True)
    bucket = tail.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True)
    return torch.cat([head, bucket.masked_fill(empty, -math.inf)], -1)


def _mul_exp(x: Float[Tensor, "*shape"], logp: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """x · e^logp with 0 · anything = 0: the one place that decides what 0 · log 0 is.

    Where e^logp is 0 the product and both its gradients are 0, even if x is NaN or infinite.
    A NaN in `logp` stays NaN.
    """
    p = logp.exp()
    return p * torch.where(p == 0, 0.0, x)
