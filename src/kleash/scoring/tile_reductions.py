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


class Tally:
    """Sums of some rows over all the tiles seen so far, in float64 and bits.

    Tiles are put together `GROUP` at a time, so that what is held does not grow with the
    vocabulary; the memory is taken once and serves every block of rows in turn.
    """

    def __init__(self, names: Sequence[str], gains: Sequence[float], memory: Float[Tensor, "..."]):
        """Buffer for the sums of `GROUP` tiles.

        Args:
            names: what `sum_names` says.
            gains: for each model, bits per unit of raw logit.
            memory: [sums, GROUP, rows] in the dtype of the tiles.
        """
        own, other = gains[0], gains[-1]
        unit = {"m": own, "s": 1.0, "mean_a": own, "mean_d": own, "variance": own**2}
        unit |= {"n": other, "r": 1.0, "mean_b": other, "ref_mean_d": own}
        self._units = {name: unit[name] for name in names}
        self._memory = memory
        self.start(memory.shape[2])

    def start(self, rows: int) -> None:
        """Forget everything and begin with so many new rows."""
        self._parts = self._memory[:, :, :rows]
        self._filled = 0
        self._so_far: dict[str, Tensor] = {}

    def slot(self) -> Float[Tensor, "sums R"]:
        """Where the next tile's sums are to be written."""
        if self._filled == self._parts.shape[1]:
            self._put_together()
        self._filled += 1
        return self._parts[:, self._filled - 1]

    def moments(self) -> dict[str, Float[Tensor, " R"]]:
        """Fields of `Moments` over all the tiles that were written."""
        self._put_together()
        logs = {"s": "log_s", "r": "log_r"}
        return {
            logs.get(name, name): values.log2() if name in logs else values
            for name, values in self._so_far.items()
        }

    def _put_together(self) -> None:
        parts = dict(zip(self._units, self._parts[:, : self._filled], strict=True))
        pieces = [
            merge({name: self._with_so_far(name, values, span) for name, values in parts.items()})
            for span in spans(self._parts.shape[2], PIECE)
        ]
        self._so_far = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        self._filled = 0

    def _with_so_far(
        self, name: str, values: Float[Tensor, "tiles R"], span: slice
    ) -> Float[Tensor, "parts P"]:
        new = values[:, span].double() * self._units[name]
        return torch.cat([self._so_far[name][None, span], new]) if self._so_far else new


GROUP = 16
"""Tiles put together at once."""
PIECE = 128
"""Rows put together at once: bounds the memory that float64 takes."""


def merge(part: dict[str, Float[Tensor, "tiles R"]]) -> dict[str, Float[Tensor, " R"]]:
    """Sums of several tiles as those of the one large tile they make up; all in bits."""
    m, up, weight, s = _normaliser(part["m"], part["s"])
    whole: dict[str, Tensor] = {"m": m, "s": s}
    if "mean_a" in part:
        whole["mean_a"] = (weight * (part["mean_a"] + up)).sum(0)
    if "n" in part:
        n, ref_up, ref_weight, r = _normaliser(part["n"], part["r"])
        whole |= {"n": n, "r": r}
        if "mean_b" in part:
            whole["mean_b"] = (ref_weight * (part["mean_b"] + ref_up)).sum(0)
        shift = up - ref_up
        if "mean_d" in part:
            mean_d = part["mean_d"] + shift
            whole["mean_d"] = mean = (weight * mean_d).sum(0)
            if "variance" in part:
                spread = part["variance"] + (mean_d - mean).square()
                whole["variance"] = (weight * spread).sum(0)
        if "ref_mean_d" in part:
            whole["ref_mean_d"] = (ref_weight * (part["ref_mean_d"] + shift)).sum(0)
    # In the order of `sum_names`, in which tiles are written and read.
    return {name: whole[name] for name in part}


def _normaliser(
    maxima: Float[Tensor, "tiles R"], sums: Float[Tensor, "tiles R"]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows' maxima, how far each tile lies below, each tile's share, and the sum."""
    top = maxima.amax(0)
    below = maxima - top
    mass = sums * below.exp2()
    total = mass.sum(0)
    return top, below, mass / total, total
