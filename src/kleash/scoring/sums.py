"""What a tile of logits adds to the scores, and how tiles are put together.

Within a tile everything is relative to the tile's own maxima, so no exponential overflows and
differences of large logits are taken before anything is rounded. With z and u raw logits, m and n
their maxima, and gains g and h in bits per unit of raw logit,

    a = z − m,  b = u − n,  d = a − b · h/g,  s = Σ 2^(g·a),  r = Σ 2^(h·b)

a tile is summed up by m, s, n, r and means of a, b, d under its own two softmaxes. Tiles are put
together in float64 and bits, as one adds up means and variances of groups (Chan, Golub & LeVeque,
1979): the rounding of a score is that of its logits and of one tile's sums.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.scoring.tiles import Bare, raw_logits, spans


class Needs(NamedTuple):
    """Which sums a request needs beyond the normalisers."""

    entropy: bool = False
    ref_entropy: bool = False
    kl: bool = False
    variance: bool = False
    reverse_kl: bool = False


class Moments(NamedTuple):
    """A row's sums over all words, in float64 and bits, relative to its maxima m and n.

    With E_p and E_q the means under p and q. Logarithms are to base 2. None where
    not needed.
    """

    m: Float[Tensor, " N"]
    log_s: Float[Tensor, " N"]
    n: Float[Tensor, " N"] | None = None
    log_r: Float[Tensor, " N"] | None = None
    mean_a: Float[Tensor, " N"] | None = None
    """E_p[a]; the entropy is log s − E_p[a]."""
    mean_b: Float[Tensor, " N"] | None = None
    """E_q[b]."""
    mean_d: Float[Tensor, " N"] | None = None
    """E_p[d]; the KL is E_p[d] − log s + log r."""
    variance: Float[Tensor, " N"] | None = None
    """E_p[(d − E_p[d])²], which no shift of the logits changes."""
    ref_mean_d: Float[Tensor, " N"] | None = None
    """E_q[d]."""


def sum_names(needs: Needs, *, two_models: bool) -> list[str]:
    """Names of the rows of `tile_sums`, in order."""
    wanted = {
        "m": True,
        "s": True,
        "mean_a": needs.entropy,
        "n": two_models,
        "r": two_models,
        "mean_b": needs.ref_entropy,
        "mean_d": needs.kl or needs.variance,
        "variance": needs.variance,
        "ref_mean_d": needs.reverse_kl,
    }
    return [name for name, is_wanted in wanted.items() if is_wanted]


def tile_sums(bare: list[Bare], needs: Needs) -> Float[Tensor, "sums R"]:
    """Sum up one tile of the policy, or of policy and reference: `sum_names` names the rows.

    Works in place on its own intermediates: the fewer there are, the more of them stay in cache.
    Nothing else has a side effect, so that it can be compiled as it stands.
    """
    m, a, p = _below_maximum(bare[0])
    s = p.sum(1)
    out = [m, s]
    if needs.entropy:
        out.append((p * a).sum(1) / s)
    if len(bare) == 1:
        return torch.stack(out)
    n, b, q = _below_maximum(bare[1])
    r = q.sum(1)
    out += [n, r]
    if needs.ref_entropy:
        out.append((q * b).sum(1) / r)
    d = a.sub_(in_units_of(bare, b))
    ref_mean_d = [q.mul_(d).sum(1) / r] if needs.reverse_kl else []
    if needs.kl or needs.variance:
        mean_d = (p * d).sum(1) / s
        out.append(mean_d)
        if needs.variance:
            # About the tile's own mean: Σp·d² − (Σp·d)² would cancel where the means are far off 0.
            d = d.sub_(mean_d[:, None])
            out.append(p.mul_(d).mul_(d).sum(1) / s)
    return torch.stack(out + ref_mean_d)


def in_units_of(bare: Sequence[Bare], b: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
    """The reference's b in units of the policy's raw logits; as a rule they have the same."""
    ratio = bare[1].gain / bare[0].gain
    return b if ratio == 1 else b * ratio


def _below_maximum(bare: Bare) -> tuple[Float[Tensor, " R"], Tensor, Tensor]:
    """Greatest raw logit of each row, how far the others lie below it, and 2 to that in bits."""
    raw = raw_logits(bare)
    top = raw.amax(1)
    below = raw - top[:, None]
    return top, below, (below * bare.gain).exp2_()


def put_together(
    parts: dict[str, Float[Tensor, "tiles R"]], gains: Sequence[float]
) -> dict[str, Float[Tensor, " R"]]:
    """Fields of `Moments` for whole rows from those of their tiles.

    Args:
        parts: for each of `sum_names`, one number per tile and row.
        gains: for each model, bits per unit of raw logit.
    """
    own, other = gains[0], gains[-1]
    unit = {"m": own, "s": 1.0, "mean_a": own, "mean_d": own, "variance": own**2}
    unit |= {"n": other, "r": 1.0, "mean_b": other, "ref_mean_d": own}
    columns = [
        _whole_rows({name: values[:, span].double() * unit[name] for name, values in parts.items()})
        for span in spans(parts["m"].shape[1], PIECE)
    ]
    return {name: torch.cat([piece[name] for piece in columns]) for name in columns[0]}


PIECE = 128
"""Rows put together at once: bounds the memory that float64 takes."""


def _whole_rows(part: dict[str, Float[Tensor, "tiles R"]]) -> dict[str, Float[Tensor, " R"]]:
    m, up, weight, log_s = _normaliser(part["m"], part["s"])
    moments: dict[str, Tensor] = {"m": m, "log_s": log_s}
    if "mean_a" in part:
        moments["mean_a"] = (weight * (part["mean_a"] + up)).sum(0)
    if "n" in part:
        n, ref_up, ref_weight, log_r = _normaliser(part["n"], part["r"])
        moments |= {"n": n, "log_r": log_r}
        if "mean_b" in part:
            moments["mean_b"] = (ref_weight * (part["mean_b"] + ref_up)).sum(0)
        shift = up - ref_up
        if "mean_d" in part:
            mean_d = part["mean_d"] + shift
            moments["mean_d"] = mean = (weight * mean_d).sum(0)
            if "variance" in part:
                spread = part["variance"] + (mean_d - mean).square()
                moments["variance"] = (weight * spread).sum(0)
        if "ref_mean_d" in part:
            moments["ref_mean_d"] = (ref_weight * (part["ref_mean_d"] + shift)).sum(0)
    return moments


def _normaliser(
    maxima: Float[Tensor, "tiles R"], sums: Float[Tensor, "tiles R"]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A row's maximum, how far each tile lies below it, each tile's share, and log of the sum."""
    top = maxima.amax(0)
    below = maxima - top
    mass = sums * below.exp2()
    total = mass.sum(0)
    return top, below, mass / total, total.log2()
