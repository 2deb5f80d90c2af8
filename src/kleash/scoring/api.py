"""The quantities that scoring computes, and their container: shared by dense, streaming and triton.

With z and u the logits of policy and reference, both divided by the temperature, and

    p = softmax(z),   q = softmax(u),   δ_v = log p_v − log q_v,

a scorer gives, for each row (a position whose next token is known), any of

    logprobs              log p_target                                ≤ 0
    ref_logprobs          log q_target                                ≤ 0
    kl                    KL(π‖π_ref) = Σ p_v δ_v                     ≥ 0, positive = drifted
    reverse_kl            KL(π_ref‖π) = −Σ q_v δ_v                    ≥ 0
    entropy               −Σ p_v log p_v                              ≥ 0
    ref_entropy           −Σ q_v log q_v                              ≥ 0
    log_ratio_variance    Σ p_v (δ_v − kl)²                           ≥ 0, in nats²
    top_k_mass            Σ p_v over the k likeliest words of p       in (0, 1]
    top_k_kl              KL(π‖π_ref) after every other word has been
                          put into one bucket                         0 ≤ top_k_kl ≤ kl
    same_top              1[argmax p = argmax q], the lowest id       0 or 1, no unit
                          among equals

all but the last in nats. Logits of −∞ are words of probability 0: they add nothing where 0·log 0
arises, and a KL is ∞ exactly where one side has a word that the other has not. An infinite KL (and
the variance beside it) is constant in every logit, so its gradient is zero. The last three are for
reading; no gradient flows through them.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kleash.types import Head

Quantity = Literal[
    "logprobs",
    "ref_logprobs",
    "kl",
    "reverse_kl",
    "entropy",
    "ref_entropy",
    "log_ratio_variance",
    "top_k_mass",
    "top_k_kl",
    "same_top",
]

QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)

OF_REFERENCE: frozenset[Quantity] = frozenset(
    {
        "ref_logprobs",
        "kl",
        "reverse_kl",
        "ref_entropy",
        "log_ratio_variance",
        "top_k_kl",
        "same_top",
    }
)
"""Quantities that need a reference."""

OF_TOP_K: frozenset[Quantity] = frozenset({"top_k_mass", "top_k_kl"})
"""Quantities that need `top_k`."""

WITHOUT_GRADIENT: frozenset[Quantity] = frozenset({*OF_TOP_K, "same_top"})
"""Quantities that are for reading alone."""


@dataclass(frozen=True)
class TokenScores:
    """What was asked for, per row, in nats (`same_top`: 0 or 1); None where it was not asked for.

    float32, or float64 where the policy's hidden states are float64.
    """

    logprobs: Float[Tensor, " N"] | None = None
    ref_logprobs: Float[Tensor, " N"] | None = None
    kl: Float[Tensor, " N"] | None = None
    reverse_kl: Float[Tensor, " N"] | None = None
    entropy: Float[Tensor, " N"] | None = None
    ref_entropy: Float[Tensor, " N"] | None = None
    log_ratio_variance: Float[Tensor, " N"] | None = None
    top_k_mass: Float[Tensor, " N"] | None = None
    top_k_kl: Float[Tensor, " N"] | None = None
    same_top: Float[Tensor, " N"] | None = None


def working_dtype(hidden: Float[Tensor, "N D"]) -> torch.dtype:
    """Dtype of logits, sums and results: float64 for float64 input, else float32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def check_request(
    hidden: Float[Tensor, "N D"],
    head: Head,
    targets: Int[Tensor, " N"],
    *,
    reference: tuple[Float[Tensor, "N D2"], Head] | None,
    temperature: float,
    want: Collection[Quantity],
    top_k: int | None,
) -> None:
    """Refuse what cannot be scored, before any product is paid for.

    Raises:
        ValueError: if the temperature is not a positive number; `want` is empty, unknown, needs a
            reference or a `top_k` that is not there; shapes or vocabularies do not fit; or a
            target is not a word. Targets are checked even where a mask will drop them later.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive number, got {temperature!r}")
    _check_want(want, has_reference=reference is not None, top_k=top_k, words=head.words)
    _check_model("policy", hidden, head)
    rows = hidden.shape[0]
    if targets.shape != (rows,):
        raise ValueError(f"expected one target per row, {rows} in all, got {list(targets.shape)}")
    if reference is not None:
        ref_hidden, ref_head = reference
        _check_model("reference", ref_hidden, ref_head)
        if ref_hidden.shape[0] != rows:
            raise ValueError(f"expected {rows} rows of the reference, got {ref_hidden.shape[0]}")
        if ref_head.words != head.words:
            raise ValueError(
                f"policy and reference must have the same words, got {head.words} and "
                f"{ref_head.words}: they need one tokenizer; set Head.vocab_size if one is padded"
            )
    if rows:
        low, high = (int(value) for value in torch.aminmax(targets))
        if low < 0 or high >= head.words:
            worst = low if low < 0 else high
            raise ValueError(f"targets must lie in 0…{head.words - 1}, got {worst}")


def _check_want(
    want: Collection[str], *, has_reference: bool, top_k: int | None, words: int
) -> None:
    if isinstance(want, str) or not want or not set(want) <= set(QUANTITIES):
        raise ValueError(f"want must name some of {', '.join(QUANTITIES)}, got {want!r}")
    if not has_reference and (missing := [name for name in want if name in OF_REFERENCE]):
        raise ValueError(f"{', '.join(missing)} need reference=(hidden, head), got none")
    asked = [name for name in want if name in OF_TOP_K]
    if asked and (top_k is None or not 1 <= top_k <= words):
        raise ValueError(f"{', '.join(asked)} need top_k in 1…{words}, got {top_k!r}")


def _check_model(who: str, hidden: Float[Tensor, "N D"], head: Head) -> None:
    rows, width = head.weight.shape
    if hidden.shape[1] != width:
        raise ValueError(
            f"{who}: head is for width {width}, got hidden states of {hidden.shape[1]}"
        )
    if not 0 < head.words <= rows:
        raise ValueError(f"{who}: vocab_size must lie in 1…{rows}, got {head.vocab_size}")
    if head.bias is not None and head.bias.shape != (rows,):
        raise ValueError(f"{who}: expected a bias of {rows} rows, got {list(head.bias.shape)}")
    if not 0 < head.scale < float("inf"):
        raise ValueError(f"{who}: scale must be a positive number, got {head.scale!r}")
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"{who}: softcap must be positive or None, got {head.softcap!r}")
