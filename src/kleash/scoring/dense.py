"""The obvious implementation: all logits at once, log-softmax, sums. The oracle of the tests.

It holds several [N, V] matrices, and autograd holds more. Left out: speed and thrift, which are
`streaming.py`'s.
"""

from collections.abc import Collection

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kleash.scoring.api import (
    OF_REFERENCE,
    OF_TOP_K,
    Quantity,
    TokenScores,
    check_request,
    working_dtype,
)
from kleash.types import Head


def token_scores(
    hidden: Float[Tensor, "N D"],
    head: Head,
    targets: Int[Tensor, " N"],
    *,
    reference: tuple[Float[Tensor, "N D2"], Head] | None = None,
    temperature: float = 1.0,
    want: Collection[Quantity] = ("logprobs",),
    top_k: int | None = None,
) -> TokenScores:
    r"""Score each row's target and next-token distribution; see `kleash.scoring.api`.

        z = softcap(scale · (W h + b)) / temperature,    log p = z − log Σ_v e^(z_v)

    Args:
        hidden: the policy's final hidden states; row n predicts `targets[n]`.
        head: the policy's head; rows beyond its `words` take no part.
        targets: ids of the words that were written.
        reference: the reference's hidden states (its own width) and head (the same words).
        temperature: divides both models' logits, after scale and soft-cap.
        want: which quantities to compute.
        top_k: how many words `top_k_mass` and `top_k_kl` keep apart.

    Returns:
        The quantities asked for, in nats, float32 (float64 for float64 hidden states).

    Raises:
        ValueError: as `check_request` says.

    Example:
        >>> head = Head(weight=torch.eye(2))
        >>> hidden = torch.tensor([[0.7, 0.3]]).log()
        >>> uniform = torch.tensor([[0.5, 0.5]]).log()
        >>> token_scores(
        ...     hidden, head, torch.tensor([0]), reference=(uniform, head), want=("kl",)
        ... ).kl
        tensor([0.0823])
    """
    check_request(
        hidden, head, targets, reference=reference, temperature=temperature, want=want, top_k=top_k
    )
    asked = set(want)
    dtype = working_dtype(hidden)
    out: dict[str, Tensor] = {}
    # Autocast would round the logits to half precision behind our back.
    with torch.autocast(hidden.device.type, enabled=False):
        logp = _log_softmax(hidden, head, temperature, dtype)
        out["logprobs"] = _at(logp, targets)
        out["entropy"] = _expectation(logp, -logp)
        if reference is not None and asked & OF_REFERENCE:
            logq = _log_softmax(*reference, temperature, dtype)
            out |= _against_reference(logp, logq)
            out["ref_logprobs"] = _at(logq, targets)
            out["same_top"] = (logp.argmax(-1) == logq.argmax(-1)).to(dtype)
        else:
            logq = logp
        if top_k is not None and asked & OF_TOP_K:
            out["top_k_mass"], out["top_k_kl"] = _top_k(logp.detach(), logq.detach(), top_k)
    return TokenScores(**{name: out[name] for name in asked})


def all_logits(
    hidden: Float[Tensor, "N D"], head: Head, temperature: float, dtype: torch.dtype
) -> Float[Tensor, "N V"]:
    """softcap(scale · (W h + b)) / temperature of every word, computed in `dtype`."""
    logits = hidden.to(dtype) @ head.weight[: head.words].to(dtype).T
    if head.bias is not None:
        logits = logits + head.bias[: head.words].to(dtype)
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits / temperature


def _log_softmax(
    hidden: Float[Tensor, "N D"], head: Head, temperature: float, dtype: torch.dtype
) -> Float[Tensor, "N V"]:
    return torch.log_softmax(all_logits(hidden, head, temperature, dtype), dim=-1)


def _at(logp: Float[Tensor, "N V"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    return logp.gather(-1, targets[:, None].long())[:, 0]


def _expectation(logp: Float[Tensor, "N V"], values: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """Σ_v p_v · values_v with 0 · anything = 0, in value and gradient.

    Selecting twice matters: autograd multiplies a zero by what was not selected.
    """
    zero = logp == -torch.inf
    p = torch.where(zero, 0.0, logp.exp())
    return (p * torch.where(zero, 0.0, values)).sum(-1)


def _against_reference(
    logp: Float[Tensor, "N V"], logq: Float[Tensor, "N V"]
) -> dict[str, Float[Tensor, " N"]]:
    """KL both ways, the variance of the log-ratio, and the reference's entropy."""
    no_p, no_q = logp == -torch.inf, logq == -torch.inf
    delta = torch.where(no_p | no_q, 0.0, logp - logq)
    infinite, reverse_infinite = (no_q & ~no_p).any(-1), (no_p & ~no_q).any(-1)
    kl = _expectation(logp, delta)
    variance = _expectation(logp, (delta - kl[:, None]).square())
    reverse_kl = _expectation(logq, -delta)
    return {
        "kl": torch.where(infinite, torch.inf, kl),
        "reverse_kl": torch.where(reverse_infinite, torch.inf, reverse_kl),
        "log_ratio_variance": torch.where(infinite, torch.inf, variance),
        "ref_entropy": _expectation(logq, -logq),
    }


def _top_k(
    logp: Float[Tensor, "N V"], logq: Float[Tensor, "N V"], k: int
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Mass of the k likeliest words, and the KL when all others share one bucket."""
    top, words = logp.topk(k, dim=-1)
    tail_p = logp.scatter(-1, words, -torch.inf).logsumexp(-1, keepdim=True)
    tail_q = logq.scatter(-1, words, -torch.inf).logsumexp(-1, keepdim=True)
    coarse_p = torch.cat([top, tail_p], dim=-1)
    coarse_q = torch.cat([logq.gather(-1, words), tail_q], dim=-1)
    return top.exp().sum(-1), _against_reference(coarse_p, coarse_q)["kl"]
