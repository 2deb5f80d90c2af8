"""From upstream weights per row to the gradient of the logits, tile by tile.

With p, q, a, b, d, s, r as in `sums.py`, d̄ = E_p[d], d̃ = E_q[d], K the KL and H an entropy, the
derivatives with respect to the policy's logits z and the reference's u are

    quantity              ∂/∂z_v                                      ∂/∂u_v
    log p_t               1[v=t] − p_v                                –
    log q_t               –                                           1[v=t] − q_v
    kl                    p_v (d_v − d̄)  = p_v (log p_v/q_v − K)      q_v − p_v
    reverse_kl            p_v − q_v                                   −q_v (d_v − d̃)
    entropy               −p_v (a_v − E_p[a])                         –
    ref_entropy           –                                           −q_v (b_v − E_q[b])
    log_ratio_variance    p_v ((d_v − d̄)² − Var + 2 (d_v − d̄))        −2 p_v (d_v − d̄)

so each tile's gradient is a short polynomial in d and a, with one coefficient per row and power.
The table is in nats; a, b and d are in units of raw logits, and the coefficients make up for it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.scoring.tile_reductions import Moments, in_units_of
from kleash.scoring.tiles import LN2, Bare, raw_logits, softcap_slope

Column = Float[Tensor, "R 1"]


class PolicyTerms(NamedTuple):
    """∂/∂z = 2^(g·a) · (constant + by_d · (d−d̄) + by_d2 · (d−d̄)² + by_a · a) − by_q · 2^(h·b)."""

    constant: Column
    by_d: Column | None = None
    by_d2: Column | None = None
    by_a: Column | None = None
    by_q: Column | None = None


class ReferenceTerms(NamedTuple):
    """∂/∂u = 2^(h·b) · (constant + by_d · (d−d̃) + by_b · b) + 2^(g·a) · (by_p + by_pd · (d−d̄))."""

    constant: Column
    by_d: Column | None = None
    by_b: Column | None = None
    by_p: Column | None = None
    by_pd: Column | None = None


class Rows(NamedTuple):
    """Everything a tile's gradient needs to know about its rows, in the working dtype.

    m and n are greatest raw logits.
    `policy` or `reference` is None where that side asks for no gradient.
    """

    m: Column
    n: Column | None
    mean_d: Column | None
    ref_mean_d: Column | None
    policy: PolicyTerms | None
    reference: ReferenceTerms | None

    def cut(self, rows: slice) -> "Rows":
        """The same for some of the rows."""
        policy, reference = self.policy, self.reference
        return Rows(
            self.m[rows],
            None if self.n is None else self.n[rows],
            None if self.mean_d is None else self.mean_d[rows],
            None if self.ref_mean_d is None else self.ref_mean_d[rows],
            None if policy is None else PolicyTerms(*_cut(policy, rows)),
            None if reference is None else ReferenceTerms(*_cut(reference, rows)),
        )


@dataclass(frozen=True)
class Upstream:
    """∂loss/∂quantity per row, in float64; None where the loss does not use the quantity.

    Rows whose value is infinite must come with weight 0.
    """

    logprobs: Float[Tensor, " N"] | None = None
    ref_logprobs: Float[Tensor, " N"] | None = None
    kl: Float[Tensor, " N"] | None = None
    reverse_kl: Float[Tensor, " N"] | None = None
    entropy: Float[Tensor, " N"] | None = None
    ref_entropy: Float[Tensor, " N"] | None = None
    log_ratio_variance: Float[Tensor, " N"] | None = None

    @property
    def to_policy(self) -> bool:
        """Whether the policy's logits get any gradient."""
        used = (self.logprobs, self.kl, self.reverse_kl, self.entropy, self.log_ratio_variance)
        return any(weight is not None for weight in used)

    @property
    def to_reference(self) -> bool:
        """Whether the reference's logits get any gradient."""
        used = (self.ref_logprobs, self.kl, self.reverse_kl, self.ref_entropy)
        return any(weight is not None for weight in (*used, self.log_ratio_variance))

    @property
    def about_policy(self) -> bool:
        """Whether a gradient depends on how far a log-ratio lies from its mean under the policy."""
        return self.kl is not None or self.log_ratio_variance is not None

    @property
    def by_log_ratio(self) -> bool:
        """Whether one side's gradient needs the other side's logits."""
        used = (self.kl, self.reverse_kl, self.log_ratio_variance)
        return any(weight is not None for weight in used)


def policy_terms(
    up: Upstream, moments: Moments, gains: Sequence[float], dtype: torch.dtype
) -> PolicyTerms:
    """Coefficients of ∂loss/∂(raw logits) of the policy."""
    nats = LN2 * gains[0]
    per_p = nats * (-moments.log_s).exp2()
    constant = torch.zeros_like(moments.log_s)
    by_d = by_d2 = by_a = by_q = None
    if up.logprobs is not None:
        constant = constant - up.logprobs
    if up.entropy is not None:
        constant = constant + up.entropy * LN2 * _known(moments.mean_a)
        by_a = -nats * up.entropy
    if up.kl is not None:
        by_d = nats * up.kl
    if up.log_ratio_variance is not None:
        constant = constant - up.log_ratio_variance * LN2**2 * _known(moments.variance)
        by_d = _plus(by_d, 2 * nats * up.log_ratio_variance)
        by_d2 = nats**2 * up.log_ratio_variance
    if up.reverse_kl is not None:
        constant = constant + up.reverse_kl
        by_q = up.reverse_kl * nats * (-_known(moments.log_r)).exp2()
    return PolicyTerms(
        constant=(constant * per_p).to(dtype)[:, None],
        by_d=_column(by_d, per_p, dtype),
        by_d2=_column(by_d2, per_p, dtype),
        by_a=_column(by_a, per_p, dtype),
        by_q=_column(by_q, None, dtype),
    )


def reference_terms(
    up: Upstream, moments: Moments, gains: Sequence[float], dtype: torch.dtype
) -> ReferenceTerms:
    """Coefficients of ∂loss/∂(raw logits) of the reference."""
    nats, ref_nats = LN2 * gains[0], LN2 * gains[1]
    per_p = ref_nats * (-moments.log_s).exp2()
    per_q = ref_nats * (-_known(moments.log_r)).exp2()
    constant = torch.zeros_like(moments.log_s)
    by_d = by_b = by_p = by_pd = None
    if up.ref_logprobs is not None:
        constant = constant - up.ref_logprobs
    if up.ref_entropy is not None:
        constant = constant + up.ref_entropy * LN2 * _known(moments.mean_b)
        by_b = -ref_nats * up.ref_entropy
    if up.kl is not None:
        constant = constant + up.kl
        by_p = -up.kl
    if up.reverse_kl is not None:
        by_d = -nats * up.reverse_kl
    if up.log_ratio_variance is not None:
        by_pd = -2 * nats * up.log_ratio_variance
    return ReferenceTerms(
        constant=(constant * per_q).to(dtype)[:, None],
        by_d=_column(by_d, per_q, dtype),
        by_b=_column(by_b, per_q, dtype),
        by_p=_column(by_p, per_p, dtype),
        by_pd=_column(by_pd, per_p, dtype),
    )


def tile_gradients(bare: list[Bare | None], rows: Rows, outs: list[Tensor | None]) -> None:
    """Write a tile's gradient with respect to the bare products, less that at the targets.

    Args:
        bare: the policy's tile, or the policy's and the reference's; None where no term needs it.
        rows: coefficients of the tile's rows.
        outs: where to write each model's gradient; None for one that wants none.
    """
    policy, reference = (*bare, None)[:2]
    z, a, p = _exponentials(policy, rows.m)
    u, b, q = _exponentials(reference, rows.n)
    apart = None
    if policy is not None and reference is not None:
        apart = _known(a) - in_units_of((policy, reference), _known(b))
    d = None if apart is None or rows.mean_d is None else apart - rows.mean_d
    if rows.policy is not None:
        gradient = _policy_gradient(rows.policy, _known(p), q, a, d)
        _known(outs[0]).copy_(_through_softcap(gradient, z, policy))
    if rows.reference is not None:
        ref_d = None if apart is None or rows.ref_mean_d is None else apart - rows.ref_mean_d
        gradient = _reference_gradient(rows.reference, p, _known(q), b, d, ref_d)
        _known(outs[1]).copy_(_through_softcap(gradient, u, reference))


def _through_softcap(gradient: Tensor, raw: Tensor | None, bare: Bare | None) -> Tensor:
    if bare is None or bare.inner is None:
        return gradient
    return gradient * softcap_slope(_known(raw), bare.inner)


def _exponentials(
    bare: Bare | None, top: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Raw logits, how far they lie below the maximum, and 2 to that in bits."""
    if bare is None:
        return None, None, None
    raw = raw_logits(bare)
    below = raw - _known(top)
    return raw, below, (below * bare.gain).exp2_()


def _policy_gradient(
    terms: PolicyTerms, p: Tensor, q: Tensor | None, a: Tensor | None, d: Tensor | None
) -> Tensor:
    factor = terms.constant
    if terms.by_d is not None:
        slope = terms.by_d if terms.by_d2 is None else _known(d) * terms.by_d2 + terms.by_d
        factor = (_known(d) * slope).add_(factor)
    if terms.by_a is not None:
        factor = (_known(a) * terms.by_a).add_(factor)
    gradient = p * factor
    return gradient if terms.by_q is None else gradient.sub_(_known(q) * terms.by_q)


def _reference_gradient(
    terms: ReferenceTerms,
    p: Tensor | None,
    q: Tensor,
    b: Tensor | None,
    d: Tensor | None,
    ref_d: Tensor | None,
) -> Tensor:
    factor = terms.constant
    if terms.by_d is not None:
        factor = (_known(ref_d) * terms.by_d).add_(factor)
    if terms.by_b is not None:
        factor = (_known(b) * terms.by_b).add_(factor)
    gradient = q * factor
    if terms.by_pd is not None:
        gradient.add_((_known(p) * terms.by_pd).mul_(_known(d)))
    return gradient if terms.by_p is None else gradient.add_(_known(p) * terms.by_p)


def _cut(terms: Iterable[Column | None], rows: slice) -> list[Any]:
    return [None if term is None else term[rows] for term in terms]


def _known(value: Tensor | None) -> Tensor:
    assert value is not None, "the request's needs say that this was computed"
    return value


def _plus(left: Tensor | None, right: Tensor) -> Tensor:
    return right if left is None else left + right


def _column(value: Tensor | None, times: Tensor | None, dtype: torch.dtype) -> Column | None:
    if value is None:
        return None
    return (value if times is None else value * times).to(dtype)[:, None]
