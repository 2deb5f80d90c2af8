"""The walk over all tiles that turns upstream weights into gradients of hidden states and heads."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kleash.scoring.forward import Summed
from kleash.scoring.logit_gradients import (
    Rows,
    Upstream,
    policy_terms,
    reference_terms,
    tile_gradients,
)
from kleash.scoring.tiles import (
    LN2,
    Bare,
    Buffer,
    Side,
    Sides,
    Tiles,
    body_for,
    compiled,
    is_whole,
    slices,
    softcap_slope,
    spans,
)


@dataclass(frozen=True)
class NeededGradients:
    """Which of a model's tensors want a gradient."""

    hidden: bool
    weight: bool
    bias: bool

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


class SideGradients:
    """Gradients of one model's hidden states, weight and bias, added up tile by tile.

    Sums are held in the working dtype, and rounded to the tensor's own at the end.
    """

    def __init__(
        self, side: Side, wanted: NeededGradients, weight_rows: int, added_to: Tensor | None = None
    ) -> None:
        """Allocate what is wanted; `weight_rows` counts the rows of padding too.

        `added_to` is a gradient of the weight that there is already, and is added to.
        """
        self._side, self._adds = side, added_to is not None
        words, like = side.weight.shape[0], side.hidden
        self.hidden = self.weight = self.bias = None
        if wanted.hidden:
            self.hidden = torch.zeros_like(like, dtype=side.dtype)
        if wanted.weight and added_to is not None:
            self.weight = added_to
        elif wanted.weight:
            # Rows of words are all written to below; rows of padding have no gradient.
            self.weight = side.weight.new_empty(weight_rows, like.shape[1])
            self.weight[words:] = 0
        if wanted.bias:
            self.bias = like.new_zeros(weight_rows, dtype=side.dtype)

    def open(self, cols: slice) -> None:
        """Begin a column of tiles."""
        self._cols = cols
        self._words = self._side.columns(cols)
        if self.weight is not None:
            self._sum = self.weight[cols]
            if self._sum.dtype != self._side.dtype:
                self._sum = self._sum.to(self._side.dtype)

    def add(self, tile: Float[Tensor, "R C"], rows: slice) -> None:
        """One product for the hidden states of these rows, one for the weights of the column."""
        side = self._side
        # The gradient itself will be bfloat16; so may its factors be where sums are float32.
        factor = tile.to(side.hidden.dtype) if side.half else tile
        if self.hidden is not None:
            _add_product(self.hidden[rows], factor, self._words, side)
        if self.weight is not None:
            if rows.start == 0 and not self._adds:
                side.product(factor.T, side.rows(rows), self._sum)
            else:
                _add_product(self._sum, factor.T, side.rows(rows), side)
        if self.bias is not None:
            self.bias[self._cols] += tile.sum(0)

    def close(self) -> None:
        """End a column of tiles."""
        if self.weight is not None and self._sum.dtype != self.weight.dtype:
            self.weight[self._cols] = self._sum.to(self.weight.dtype)


def walk_back(
    sides: Sides,
    targets: Int[Tensor, " N"],
    *,
    upstream: Upstream,
    summed: Summed,
    wanted: list[NeededGradients],
    weight_rows: list[int],
    tiles: Tiles,
    added_to: Float[Tensor, "V D"] | None = None,
) -> list[SideGradients]:
    """Make (or find) each tile of logits again and multiply its gradient out.

    Args:
        sides: the policy, or the policy and its reference.
        targets: one word per row.
        upstream: ∂loss/∂quantity for every row.
        summed: what the walk forward found.
        wanted: for each model, which tensors want a gradient; none of a model on which no weighted
            quantity depends.
        weight_rows: for each model, rows of its head, padding included.
        tiles: shape of the tiles, the same as forward.
        added_to: a gradient of the policy's weight that there is already, and is added to.
    """
    gradients = [
        SideGradients(side, want, rows, into)
        for side, want, rows, into in zip(
            sides, wanted, weight_rows, (added_to, None)[: len(sides)], strict=True
        )
    ]
    if not any(wanted):
        return gradients
    needed = [bool(want) or (any(wanted) and upstream.by_log_ratio) for want in wanted]
    remake = _Remake(sides, needed, tiles, summed)
    hits = _hits(sides, summed, upstream)
    outs = [Buffer(side, tiles) for side in sides]
    rows_of = gradient_rows(sides, summed, upstream, wanted)
    words = sides[0].weight.shape[0]
    body = _body(tiles, sides[0])
    for cols in spans(words, tiles.columns):
        for gradient in gradients:
            gradient.open(cols)
        for span in spans(targets.shape[0], tiles.rows):
            shape = (span.stop - span.start, cols.stop - cols.start)
            made = [
                out.tile(*shape) if want else None for out, want in zip(outs, wanted, strict=True)
            ]
            body(remake.tile(span, cols), rows_of.cut(span), made)
            for tile, gradient, hit in zip(made, gradients, hits, strict=True):
                if tile is not None:
                    if hit is not None:
                        add_at_targets(tile, targets[span], cols, hit[span])
                    gradient.add(tile, span)
        for gradient in gradients:
            gradient.close()
    return gradients


def _add_product(
    into: Float[Tensor, "I J"],
    left: Float[Tensor, "I K"],
    right: Float[Tensor, "K J"],
    side: Side,
) -> None:
    if side.half:
        into.add_(side.product(left, right, torch.empty_like(into)))
    else:
        into.addmm_(left, right)


class _Remake:
    """Bare products of a tile: kept ones where they were kept, else made again."""

    def __init__(self, sides: Sides, needed: list[bool], tiles: Tiles, summed: Summed) -> None:
        self._sides, self._needed, self._kept = sides, needed, summed.kept
        self._buffers = [Buffer(side, tiles) for side in sides]

    def tile(self, rows: slice, cols: slice) -> list[Bare | None]:
        # Taken out: what was turned into a gradient need not be held any longer.
        kept = self._kept.pop((rows.start, cols.start), [])
        made: list[Bare | None] = []
        for index, side in enumerate(self._sides):
            if not self._needed[index]:
                made.append(None)
            elif index < len(kept):
                made.append(side.bare(kept[index], cols))
            else:
                out = self._buffers[index].tile(rows.stop - rows.start, cols.stop - cols.start)
                made.append(
                    side.bare(side.product(side.rows(rows), side.columns(cols).T, out), cols)
                )
        return made


def gradient_rows(
    sides: Sides, summed: Summed, upstream: Upstream, wanted: list[NeededGradients]
) -> Rows:
    """Coefficients of every row's gradient, in the working dtype."""
    of, dtype = summed.moments, sides[0].dtype
    gains = [side.gain for side in sides]

    def column(bits: Tensor | None, gain: float) -> Tensor | None:
        return None if bits is None else (bits / gain).to(dtype)[:, None]

    policy = policy_terms(upstream, of, gains, dtype) if wanted[0] else None
    reference = None
    if len(sides) == 2 and wanted[1]:
        reference = reference_terms(upstream, of, gains, dtype)
    return Rows(
        m=(of.m / gains[0]).to(dtype)[:, None],
        n=column(of.n, gains[-1]),
        mean_d=column(of.mean_d, gains[0]) if upstream.about_policy else None,
        ref_mean_d=column(of.ref_mean_d, gains[0]) if upstream.reverse_kl is not None else None,
        policy=policy,
        reference=reference,
    )


def _hits(sides: Sides, summed: Summed, upstream: Upstream) -> list[Float[Tensor, " N"] | None]:
    """What each model's gradient gets at the target itself: that of the target's logit."""
    hits: list[Tensor | None] = []
    weights = (upstream.logprobs, upstream.ref_logprobs)
    for side, logit, weight in zip(sides, (summed.z, summed.u), weights, strict=False):
        if weight is None or logit is None:
            hits.append(None)
        else:
            slope = softcap_slope(logit / side.gain, side.inner)
            hits.append((weight * LN2 * side.gain * slope).to(side.dtype))
    return hits


def add_at_targets(
    tile: Float[Tensor, "R C"], targets: Int[Tensor, " R"], cols: slice, hit: Float[Tensor, " R"]
) -> None:
    """Add `hit` to the logits' gradient at the targets that lie in this tile."""
    at = targets.long() - cols.start
    here = (at >= 0) & (at < tile.shape[1])
    tile.scatter_add_(1, torch.where(here, at, 0)[:, None], torch.where(here, hit, 0.0)[:, None])


def _body(
    tiles: Tiles, side: Side
) -> Callable[[list[Bare | None], Rows, list[Tensor | None]], None]:
    body = body_for(tiles, side)
    if body == "triton":
        # Deferred: an optional dependency.
        return importlib.import_module("kleash.scoring.triton").tile_gradients
    return _plain_gradients if body == "plain" else functools.partial(_compiled_gradients, tiles)


def _plain_gradients(bare: list[Bare | None], rows: Rows, outs: list[Tensor | None]) -> None:
    """Plain torch, a few rows at a time so that every intermediate stays in the cache."""
    shape = next(out.shape for out in outs if out is not None)
    for span in slices(*shape):
        tile_gradients(
            [None if one is None else one.cut(span) for one in bare],
            rows.cut(span),
            [None if out is None else out[span] for out in outs],
        )


def _compiled_gradients(
    tiles: Tiles, bare: list[Bare | None], rows: Rows, outs: list[Tensor | None]
) -> None:
    whole = all(out is None or is_whole(out, tiles) for out in outs)
    (compiled(tile_gradients) if whole else _plain_gradients)(bare, rows, outs)
