"""The walks over tiles behind `divergences`: one student, several frozen models.

A walk makes the student's tile and that of each frozen model once, and hands the pairs to the same
arithmetic as `forward` and `backward` use for a policy and its reference. Jensen–Shannon has its
own: with d = log p − log q of a word,

    log p/m = log 2 − log(1 + e^−d)         log q/m = log 2 − log(1 + e^d)

which is finite whatever p and q are, and 0 · finite is 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kleash.scoring.backward import NeededGradients, SideGradients, add_at_targets, gradient_rows
from kleash.scoring.forward import Aim, Summed, scores_of
from kleash.scoring.logit_gradients import Rows, Upstream, tile_gradients
from kleash.scoring.tile_reductions import GROUP, Moments, Needs, Tally, sum_names, tile_sums
from kleash.scoring.tiles import (
    LN2,
    Bare,
    Buffer,
    Side,
    Tiles,
    lacks,
    raw_logits,
    slices,
    softcap_slope,
    spans,
)


@dataclass(frozen=True)
class Comparison:
    """The student and one frozen model, and how they are compared."""

    sides: tuple[Side, Side]
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon"]

    @property
    def needs(self) -> Needs:
        """Sums of the first walk beyond the normalisers."""
        return Needs(kl=self.divergence == "reverse_kl", reverse_kl=self.divergence == "forward_kl")

    def cut(self, rows: slice) -> "Comparison":
        """The same for some of the rows."""
        student, frozen = (replace(one, hidden=one.hidden[rows]) for one in self.sides)
        return Comparison((student, frozen), self.divergence)


@dataclass(frozen=True)
class Found:
    """What the walks forward found out, in float64 and nats."""

    logprobs: Float[Tensor, " N"]
    divergences: list[Float[Tensor, " N"]]
    summed: list[Summed]
    """Of each comparison, for the walk back."""
    to_mixture: list[Float[Tensor, " N"] | None]
    """KL(p‖m) of each comparison by Jensen–Shannon; None of the others."""


def sum_up_all(
    comparisons: Sequence[Comparison],
    targets: Int[Tensor, " N"],
    tiles: Tiles,
    made: "TileSource | None" = None,
) -> Found:
    """One walk for log-probabilities and KLs, and another where there is a Jensen–Shannon.

    Args:
        comparisons: the student and each frozen model.
        targets: one word per row.
        tiles: shape of the tiles.
        made: where tiles come from; None: they are made, each in the memory of the last.
    """
    summed = _first_walk(comparisons, targets, tiles, made)
    scores = [
        scores_of(one, pair.sides, targets) for one, pair in zip(summed, comparisons, strict=True)
    ]
    mixtures = _second_walk(comparisons, summed, tiles, made)
    divergences: list[Tensor] = []
    for pair, score, mixture in zip(comparisons, scores, mixtures, strict=True):
        match pair.divergence:
            case "reverse_kl":
                divergences.append(score["kl"])
            case "forward_kl":
                divergences.append(score["reverse_kl"])
            case "jensen_shannon":
                assert mixture is not None
                divergences.append(mixture.mean(0))
    return Found(
        logprobs=scores[0]["logprobs"],
        divergences=divergences,
        summed=summed,
        to_mixture=[None if mixture is None else mixture[0] for mixture in mixtures],
    )


@runtime_checkable
class TileSource(Protocol):
    """Where the walks get their tiles from."""

    def make(self, rows: slice, cols: slice) -> list[Bare]:
        """The tile of each model; never to be written to."""
        ...


class _Tiles:
    """Makes the tile of each model once, in memory that serves every tile."""

    def __init__(self, models: Sequence[Side], tiles: Tiles) -> None:
        self._models = models
        self._buffers = [Buffer(model, tiles) for model in models]

    def make(self, rows: slice, cols: slice) -> list[Bare]:
        """The tile of each model, where the last one was."""
        shape = (rows.stop - rows.start, cols.stop - cols.start)
        return [
            model.bare(
                model.product(model.rows(rows), model.columns(cols).T, buffer.tile(*shape)), cols
            )
            for model, buffer in zip(self._models, self._buffers, strict=True)
        ]


def models_of(comparisons: Sequence[Comparison]) -> list[Side]:
    """The student, then the frozen models."""
    return [comparisons[0].sides[0], *(pair.sides[1] for pair in comparisons)]


def _first_walk(
    comparisons: Sequence[Comparison],
    targets: Int[Tensor, " N"],
    tiles: Tiles,
    made: TileSource | None,
) -> list[Summed]:
    """Normalisers, the targets' logits, and the sums of the KLs."""
    models = models_of(comparisons)
    student, rows, words = models[0], targets.shape[0], models[0].weight.shape[0]
    made = _Tiles(models, tiles) if made is None else made
    tallies = [
        Tally(
            names := sum_names(pair.needs, two_models=True),
            [model.gain for model in pair.sides],
            student.new_empty(len(names), GROUP, min(tiles.rows, max(rows, 1))),
        )
        for pair in comparisons
    ]
    blocks: list[list[dict[str, Tensor]]] = [[] for _ in comparisons]
    for span in spans(rows, tiles.rows):
        aims = [Aim(pair.sides, targets[span]) for pair in comparisons]
        for tally in tallies:
            tally.start(span.stop - span.start)
        for cols in spans(words, tiles.columns):
            bare = made.make(span, cols)
            for number, pair in enumerate(comparisons):
                two, out = [bare[0], bare[number + 1]], tallies[number].slot()
                for piece in slices(*bare[0].product.shape):
                    out[:, piece] = tile_sums([one.cut(piece) for one in two], pair.needs)
                aims[number].look(two, cols)
        for block, tally, aim in zip(blocks, tallies, aims, strict=True):
            block.append(tally.moments() | aim.logits())
    return [_summed(block) for block in blocks]


def _summed(blocks: list[dict[str, Tensor]]) -> Summed:
    found = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    return Summed(
        z=found.pop("z"),
        u=found.pop("u"),
        top_k_mass=None,
        top_k_kl=None,
        moments=Moments(**found),
        kept={},
    )


def _second_walk(
    comparisons: Sequence[Comparison],
    summed: Sequence[Summed],
    tiles: Tiles,
    made: TileSource | None,
) -> list[Float[Tensor, "2 N"] | None]:
    """KL(p‖m) and KL(q‖m) of the comparisons by Jensen–Shannon."""
    asked = [i for i, pair in enumerate(comparisons) if pair.divergence == "jensen_shannon"]
    out: list[Tensor | None] = [None] * len(comparisons)
    if not asked:
        return out
    pairs = [comparisons[i] for i in asked]
    models = models_of(pairs)
    rows, words = models[0].hidden.shape[0], models[0].weight.shape[0]
    made = _Tiles(models, tiles) if made is None else made
    tops = [_tops(summed[i], comparisons[i]) for i in asked]
    totals = [
        torch.zeros(2, rows, dtype=torch.float64, device=models[0].hidden.device) for _ in pairs
    ]
    for span in spans(rows, tiles.rows):
        for cols in spans(words, tiles.columns):
            bare = made.make(span, cols)
            for number, total in enumerate(totals):
                for piece in slices(*bare[0].product.shape):
                    where = slice(span.start + piece.start, span.start + piece.stop)
                    total[:, where] += _mixture_sums(
                        [bare[0].cut(piece), bare[number + 1].cut(piece)], tops[number].cut(where)
                    )
    for i, total in zip(asked, totals, strict=True):
        out[i] = total
    return out


@dataclass(frozen=True)
class _Tops:
    """What turns raw logits into log-probabilities: log p = LN2 · (gain · (raw − m) − log_s)."""

    m: Float[Tensor, "N 1"]
    log_s: Float[Tensor, "N 1"]
    n: Float[Tensor, "N 1"]
    log_r: Float[Tensor, "N 1"]

    def cut(self, rows: slice) -> "_Tops":
        return _Tops(self.m[rows], self.log_s[rows], self.n[rows], self.log_r[rows])


def _tops(summed: Summed, pair: Comparison) -> _Tops:
    of, dtype = summed.moments, pair.sides[0].dtype
    assert of.n is not None and of.log_r is not None
    gains = [side.gain for side in pair.sides]
    columns = (of.m / gains[0], of.log_s, of.n / gains[1], of.log_r)
    return _Tops(*(column.to(dtype)[:, None] for column in columns))


def _log_probabilities(bare: Sequence[Bare], tops: _Tops) -> tuple[Tensor, Tensor]:
    """log p and log q of a tile, in bits."""
    log_p = (raw_logits(bare[0]) - tops.m).mul_(bare[0].gain).sub_(tops.log_s)
    log_q = (raw_logits(bare[1]) - tops.n).mul_(bare[1].gain).sub_(tops.log_r)
    return log_p, log_q


def _mixture_sums(bare: Sequence[Bare], tops: _Tops) -> Float[Tensor, "2 R"]:
    log_p, log_q = _log_probabilities(bare, tops)
    d = (log_p - log_q).mul_(LN2)
    p, q = log_p.exp2_(), log_q.exp2_()
    # log(1 + e^±d) = log(1 + e^−|d|) + max(±d, 0): one exponential for both, and no cancellation.
    rest = LN2 - torch.nn.functional.softplus(-d.abs())
    to_q = (q * (rest - d.clamp(min=0.0))).sum(1)
    to_p = (p * (rest + d.clamp(max=0.0))).sum(1)
    return torch.stack([to_p, to_q]).double()


def walk_back_all(
    comparisons: Sequence[Comparison],
    targets: Int[Tensor, " N"],
    *,
    found: Found,
    upstream: Sequence[Float[Tensor, " N"] | None],
    needed: Sequence[bool],
    weight_rows: int,
    tiles: Tiles,
) -> SideGradients:
    """Make each tile again and multiply the student's gradient out.

    Args:
        comparisons: as forward.
        targets: one word per row.
        found: what the walks forward found.
        upstream: ∂loss/∂log p of the target, then ∂loss/∂divergence of each comparison.
        needed: whether the student's hidden states, weight and bias want a gradient.
        weight_rows: rows of the student's head, padding included.
        tiles: shape of the tiles.
    """
    models = models_of(comparisons)
    student = models[0]
    parts = gradient_parts(comparisons, found, upstream)
    if not any(needed) or not parts:
        return SideGradients(student, NeededGradients(False, False, False), weight_rows)
    gradients = SideGradients(student, NeededGradients(*needed), weight_rows)
    # Only models that a weighted divergence asks for are read again.
    used = [student, *(models[part.number + 1] for part in parts if part.number is not None)]
    made, out = _Tiles(used, tiles), Buffer(student, tiles)
    hit = _hit(found.summed[0], upstream[0], student)
    for cols in spans(student.weight.shape[0], tiles.columns):
        gradients.open(cols)
        for span in spans(targets.shape[0], tiles.rows):
            bare = made.make(span, cols)
            tile = gradient_tile(bare, parts, out, span.start)
            if hit is not None:
                add_at_targets(tile, targets[span], cols, hit[span])
            gradients.add(tile, span)
        gradients.close()
    return gradients


@dataclass(frozen=True)
class _Part:
    """One term of the gradient of the student's logits."""

    number: int | None
    """Which comparison; None: the log-probability of the target alone."""
    rows: Rows | None = None
    """Coefficients of a KL or of the log-probability."""
    tops: _Tops | None = None
    """Of Jensen–Shannon, with the two columns below."""
    scale: Float[Tensor, "N 1"] | None = None
    to_mixture: Float[Tensor, "N 1"] | None = None

    def cut(self, rows: slice) -> "_Part":
        return _Part(
            self.number,
            None if self.rows is None else self.rows.cut(rows),
            None if self.tops is None else self.tops.cut(rows),
            None if self.scale is None else self.scale[rows],
            None if self.to_mixture is None else self.to_mixture[rows],
        )


def gradient_parts(
    comparisons: Sequence[Comparison], found: Found, upstream: Sequence[Tensor | None]
) -> list[_Part]:
    """Terms of the gradient, of log p and of each divergence that has an upstream weight."""
    student = comparisons[0].sides[0]
    wanted = [NeededGradients(True, True, True), NeededGradients(False, False, False)]
    parts: list[_Part] = []
    if upstream[0] is not None:
        rows = gradient_rows(
            (student,), found.summed[0], Upstream(logprobs=upstream[0]), wanted[:1]
        )
        parts.append(_Part(None, rows=rows))
    for number, (pair, weight) in enumerate(zip(comparisons, upstream[1:], strict=True)):
        if weight is None or is_infinite(pair):
            continue
        summed, mixture = found.summed[number], found.to_mixture[number]
        if mixture is not None:
            dtype = student.dtype
            # ½ of the mean, and from nats per logit to raw units.
            scale = (0.5 * LN2 * student.gain * weight).to(dtype)[:, None]
            tops, column = _tops(summed, pair), mixture.to(dtype)[:, None]
            parts.append(_Part(number, tops=tops, scale=scale, to_mixture=column))
            continue
        reverse = pair.divergence == "reverse_kl"
        up = Upstream(kl=weight) if reverse else Upstream(reverse_kl=weight)
        parts.append(_Part(number, rows=gradient_rows(pair.sides, summed, up, wanted)))
    return parts


def is_infinite(pair: Comparison) -> bool:
    """An infinite KL is infinite for all logits nearby: no gradient."""
    student, frozen = pair.sides
    match pair.divergence:
        case "reverse_kl":
            return lacks(frozen, student)
        case "forward_kl":
            return lacks(student, frozen)
        case "jensen_shannon":
            return False


def gradient_tile(
    bare: Sequence[Bare], parts: Sequence[_Part], out: Buffer, first: int
) -> Float[Tensor, "R C"]:
    """The gradient of a tile of the student's logits, whose rows begin at `first`."""
    tile = out.tile(*bare[0].product.shape)
    for piece in slices(*tile.shape):
        rows = slice(first + piece.start, first + piece.stop)
        cut = [one.cut(piece) for one in bare]
        _write(tile[piece], cut, [part.cut(rows) for part in parts])
    return tile


def _write(out: Float[Tensor, "R C"], bare: Sequence[Bare], parts: Sequence[_Part]) -> None:
    """The sum of all terms of a piece of a tile, into `out`."""
    frozen = iter(bare[1:])
    for number, part in enumerate(parts):
        into = out if number == 0 else torch.empty_like(out)
        own: list[Bare | None] = [bare[0]]
        if part.number is not None:
            own.append(next(frozen))
        if part.rows is not None:
            tile_gradients(own, part.rows, [into, None][: len(own)])
        else:
            _mixture_gradient(into, [one for one in own if one is not None], part)
        if number:
            out.add_(into)


def _mixture_gradient(out: Float[Tensor, "R C"], bare: Sequence[Bare], part: _Part) -> None:
    assert part.tops is not None and part.scale is not None and part.to_mixture is not None
    log_p, log_q = _log_probabilities(bare, part.tops)
    d = (log_p - log_q).mul_(LN2)
    slope = LN2 - part.to_mixture - torch.nn.functional.softplus(-d)
    gradient = log_p.exp2_().mul_(slope).mul_(part.scale)
    if bare[0].inner is not None:
        gradient = gradient * softcap_slope(raw_logits(bare[0]), bare[0].inner)
    out.copy_(gradient)


def _hit(
    summed: Summed, weight: Float[Tensor, " N"] | None, student: Side
) -> Float[Tensor, " N"] | None:
    """What the gradient gets at the target itself: that of the target's logit."""
    if weight is None:
        return None
    slope = softcap_slope(summed.z / student.gain, student.inner)
    return (weight * LN2 * student.gain * slope).to(student.dtype)
