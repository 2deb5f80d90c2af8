"""The walk over all tiles that sums them up, and the scores read off the sums."""

import importlib
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kleash.scoring.api import Quantity
from kleash.scoring.tile_reductions import GROUP, Moments, Needs, Tally, sum_names, tile_sums
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
    lacks,
    raw_logits,
    slices,
    spans,
)
from kleash.scoring.top_k import Likeliest, TopK

Kept = dict[tuple[int, int], list[Tensor]]
"""Bare products of tiles by the tile's first row and first column: one for each model, or the
policy's alone."""

_BLOCK = 1 << 24
"""Numbers of a block of kept tiles. The C library gives blocks of 32 MiB and more back at once, and
may keep smaller ones for itself."""


@dataclass(frozen=True)
class Summed:
    """What one walk over all tiles found out, in float64; logits in bits."""

    moments: Moments
    z: Float[Tensor, " N"]
    """The policy's logit of the target."""
    u: Float[Tensor, " N"] | None
    """The reference's."""
    top_k_mass: Float[Tensor, " N"] | None
    top_k_kl: Float[Tensor, " N"] | None
    kept: Kept
    same_top: Float[Tensor, " N"] | None = None


def sum_up(
    sides: Sides,
    targets: Int[Tensor, " N"],
    *,
    want: tuple[Quantity, ...],
    top_k: int | None,
    tiles: Tiles,
    keep_bytes: int = 0,
) -> Summed:
    """Make each tile of logits once, and sum it up for everything that is wanted.

    Args:
        sides: the policy, or the policy and its reference.
        targets: one word per row.
        want: which quantities the sums must suffice for.
        top_k: how many words to keep apart; None for none.
        tiles: shape of the tiles.
        keep_bytes: how many bytes of bare products to keep.
    """
    needs = _needs_of(want)
    names = sum_names(needs, two_models=len(sides) == 2)
    rows, words = targets.shape[0], sides[0].weight.shape[0]
    way = body_for(tiles, sides[0])
    gains = [side.gain for side in sides]
    products = _Products(sides, tiles, keep_bytes)
    most = min(tiles.rows, max(rows, 1))
    tally = Tally(names, gains, sides[0].new_empty(len(names), GROUP, most))
    blocks: list[dict[str, Tensor]] = []
    for span in spans(rows, tiles.rows):
        hidden = [side.rows(span) for side in sides]
        tally.start(span.stop - span.start)
        aim = Aim(sides, targets[span])
        top = None if top_k is None else TopK(sides, span.stop - span.start, top_k)
        likeliest = Likeliest(sides, span.stop - span.start) if "same_top" in want else None
        for cols in spans(words, tiles.columns):
            bare = products.tile(hidden, span, cols)
            out = tally.slot()
            if way == "triton":
                # Deferred: an optional dependency.
                importlib.import_module("kleash.scoring.triton").tile_sums(bare, needs, out)
            elif way == "compiled" and is_whole(bare[0].product, tiles):
                out.copy_(compiled(tile_sums)(bare, needs))
            else:  # plain torch, a few rows at a time: every intermediate stays in the cache
                for piece in slices(*bare[0].product.shape):
                    out[:, piece] = tile_sums([one.cut(piece) for one in bare], needs)
            aim.look(bare, cols)
            if top is not None:
                top.add([raw_logits(one) for one in bare])
            if likeliest is not None:
                likeliest.look(bare, [out[names.index(name)] for name in ("m", "n")], cols)
        sums = tally.moments()
        blocks.append(sums | aim.logits() | ({} if top is None else top.scores(sums)))
        if likeliest is not None:
            blocks[-1]["same_top"] = likeliest.same()
    found = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    return Summed(
        z=found.pop("z"),
        u=found.pop("u", None),
        top_k_mass=found.pop("top_k_mass", None),
        top_k_kl=found.pop("top_k_kl", None),
        same_top=found.pop("same_top", None),
        moments=Moments(**found),
        kept=products.kept,
    )


def scores_of(
    summed: Summed, sides: Sides, targets: Int[Tensor, " N"]
) -> dict[Quantity, Float[Tensor, " N"]]:
    """Every score that the sums suffice for, in float64 and nats."""
    of = summed.moments
    scores: dict[Quantity, Tensor | None] = {
        "logprobs": _unless_banned(LN2 * (summed.z - of.m - of.log_s), sides[0], targets),
        "entropy": None if of.mean_a is None else LN2 * (of.log_s - of.mean_a),
        "top_k_mass": summed.top_k_mass,
        "top_k_kl": summed.top_k_kl,
        "same_top": summed.same_top,
    }
    if len(sides) == 2 and summed.u is not None and of.n is not None and of.log_r is not None:
        ref_score = LN2 * (summed.u - of.n - of.log_r)
        scores["ref_logprobs"] = _unless_banned(ref_score, sides[1], targets)
        scores["ref_entropy"] = None if of.mean_b is None else LN2 * (of.log_r - of.mean_b)
        apart = of.log_r - of.log_s
        kl = None if of.mean_d is None else LN2 * (of.mean_d + apart)
        reverse_kl = None if of.ref_mean_d is None else LN2 * (-of.ref_mean_d - apart)
        policy, reference = sides
        scores["kl"] = _infinite_if(lacks(reference, policy), kl)
        scores["reverse_kl"] = _infinite_if(lacks(policy, reference), reverse_kl)
        variance = None if of.variance is None else LN2**2 * of.variance
        scores["log_ratio_variance"] = _infinite_if(lacks(reference, policy), variance)
    return {name: score for name, score in scores.items() if score is not None}


def _infinite_if(infinite: bool, score: Tensor | None) -> Tensor | None:
    return score if score is None or not infinite else torch.full_like(score, torch.inf)


def _unless_banned(score: Tensor, side: Side, targets: Tensor) -> Tensor:
    if side.banned is None:
        return score
    return torch.where(side.banned[targets.long()], -torch.inf, score)


def _needs_of(want: tuple[Quantity, ...]) -> Needs:
    """Sums that the quantities are made from."""
    return Needs(
        entropy="entropy" in want,
        ref_entropy="ref_entropy" in want,
        kl="kl" in want,
        variance="log_ratio_variance" in want,
        reverse_kl="reverse_kl" in want,
    )


class _Products:
    """Makes tiles of bare products: in buffers or, within the budget, in memory to keep."""

    def __init__(self, sides: Sides, tiles: Tiles, keep_bytes: int) -> None:
        self._sides = sides
        self._buffers = [Buffer(side, tiles) for side in sides]
        self._left = keep_bytes
        self._held = len(sides) if tiles.keep_reference else 1
        self._block = sides[0].new_empty(0)
        self.kept: Kept = {}

    def tile(self, hidden: list[Tensor], rows: slice, cols: slice) -> list[Bare]:
        shape = (hidden[0].shape[0], cols.stop - cols.start)
        size = self._held * shape[0] * shape[1] * self._sides[0].dtype.itemsize
        outs = [buffer.tile(*shape) for buffer in self._buffers]
        if size <= self._left:
            self._left -= size
            outs[: self._held] = held = [self._hold(*shape) for _ in range(self._held)]
            self.kept[rows.start, cols.start] = held
        return [
            side.bare(side.product(block, side.columns(cols).T, out), cols)
            for side, block, out in zip(self._sides, hidden, outs, strict=True)
        ]

    def _hold(self, rows: int, columns: int) -> Float[Tensor, "R C"]:
        """Memory for one tile, of a block large enough to go back to the system when it is free."""
        size = rows * columns
        if len(self._block) < size:
            side = self._sides[0]
            within_budget = self._left // side.dtype.itemsize
            self._block = side.new_empty(max(size, min(_BLOCK, within_budget)))
        tile, self._block = self._block[:size], self._block[size:]
        return tile.view(rows, columns)


class Aim:
    """Picks the logit of each row's target when its tile comes by."""

    def __init__(self, sides: Sides, targets: Int[Tensor, " R"]) -> None:
        self._sides = sides
        self._targets = targets.long()
        self._found = [torch.zeros_like(side.new_empty(*targets.shape)) for side in sides]

    def look(self, bare: list[Bare], cols: slice) -> None:
        """Pick the targets' products out of a tile."""
        at = self._targets - cols.start
        here = (at >= 0) & (at < cols.stop - cols.start)
        index = torch.where(here, at, 0)[:, None]
        self._found = [
            torch.where(here, one.product.gather(1, index)[:, 0], found)
            for one, found in zip(bare, self._found, strict=True)
        ]

    def logits(self) -> dict[str, Tensor]:
        """The targets' logits by name of the model's logits, in float64."""
        named: dict[str, Tensor] = {}
        for name, side, found in zip("zu", self._sides, self._found, strict=False):
            bias = None if side.bias is None else side.bias[self._targets]
            raw = raw_logits(Bare(found, bias, side.inner, side.gain))
            named[name] = raw.double() * side.gain
        return named
