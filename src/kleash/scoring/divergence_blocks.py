"""The gradient of a sum of divergences in the walk forward: every tile is made once.

A loss in general says only backward what each row weighs, and by then the tiles are gone. The sum
over all rows weighs them alike: of a block of rows all tiles are kept, summed up, turned into their
gradient and multiplied out, before the next block takes their place.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from kleash.scoring.backward import NeededGradients, SideGradients
from kleash.scoring.divergence_walks import (
    Comparison,
    Found,
    gradient_parts,
    gradient_tile,
    is_infinite,
    models_of,
    sum_up_all,
)
from kleash.scoring.tile_reductions import Moments
from kleash.scoring.tiles import Bare, Buffer, Side, Tiles, spans

BLOCK_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
"""Logits of all models that `walk_once` holds: some hundred rows of a large vocabulary on a CPU,
enough rows for its products to be efficient."""


def walk_once(
    comparison: Comparison,
    targets: Int[Tensor, " N"],
    *,
    needed: Sequence[bool],
    weight_rows: int,
    tiles: Tiles,
) -> tuple[Found, SideGradients | None]:
    """Sum up, and the gradient of the sum of the divergence over all rows, each tile made once.

    Args:
        comparison: the student and a frozen model.
        targets: one word per row.
        needed: whether the student's hidden states, weight and bias want a gradient.
        weight_rows: rows of the student's head, padding included.
        tiles: shape of the tiles; their rows are at most those of a block.

    Returns:
        What the walks forward find; and ∂ΣD/∂ of the student's tensors, None where there is none.
    """
    student, rows = comparison.sides[0], targets.shape[0]
    tiles = replace(tiles, rows=min(tiles.rows, block_rows(comparison)))
    made = _KeptTiles(models_of([comparison]), tiles, rows)
    wanted = NeededGradients(*needed)
    gradients = None
    if wanted and not is_infinite(comparison):
        gradients = SideGradients(student, wanted, weight_rows)
    blocks: list[Found] = []
    for span in spans(rows, tiles.rows):
        block = [comparison.cut(span)]
        made.begin(models_of(block))
        found = sum_up_all(block, targets[span], tiles, made)
        blocks.append(found)
        if gradients is not None:
            ones = torch.ones_like(found.logprobs)
            parts, out = (
                gradient_parts(block, found, [None, ones]),
                Buffer(block[0].sides[0], tiles),
            )
            for cols in spans(student.weight.shape[0], tiles.columns):
                gradients.open(cols)
                tile = gradient_tile(made.make(slice(0, len(ones)), cols), parts, out, 0)
                gradients.add(tile, span)
                gradients.close()
    return _joined(blocks), gradients


def block_rows(comparison: Comparison) -> int:
    """How many rows `walk_once` takes at once."""
    student = comparison.sides[0]
    row = 2 * student.weight.shape[0] * student.dtype.itemsize
    return max(1, BLOCK_BYTES["cuda" if student.on_gpu else "cpu"] // row)


def _joined(blocks: Sequence[Found]) -> Found:
    """What was found of consecutive rows, by one comparison."""
    summed = [one.summed[0] for one in blocks]

    def joined(columns: Sequence[Tensor | None]) -> Tensor | None:
        known = [column for column in columns if column is not None]
        return torch.cat(known) if known else None

    moments: Any = {
        name: joined([getattr(one.moments, name) for one in summed]) for name in Moments._fields
    }
    return Found(
        logprobs=torch.cat([one.logprobs for one in blocks]),
        divergences=[torch.cat([one.divergences[0] for one in blocks])],
        summed=[
            replace(
                summed[0],
                z=torch.cat([one.z for one in summed]),
                u=joined([one.u for one in summed]),
                moments=Moments(**moments),
            )
        ],
        to_mixture=[joined([one.to_mixture[0] for one in blocks])],
    )


class _KeptTiles:
    """Makes each tile of a block of rows once, and keeps it until the next block."""

    def __init__(self, models: Sequence[Side], tiles: Tiles, rows: int) -> None:
        self._rows = min(tiles.rows, rows)
        self._memory = [model.new_empty(self._rows * model.weight.shape[0]) for model in models]

    def begin(self, models: Sequence[Side]) -> None:
        """A new block."""
        self._models, self._made = models, dict[int, list[Bare]]()

    def make(self, rows: slice, cols: slice) -> list[Bare]:
        """The tile of each model."""
        if cols.start not in self._made:
            shape = (rows.stop - rows.start, cols.stop - cols.start)
            where = slice(shape[0] * cols.start, shape[0] * cols.stop)
            self._made[cols.start] = [
                model.bare(
                    model.product(
                        model.rows(rows), model.columns(cols).T, memory[where].view(*shape)
                    ),
                    cols,
                )
                for model, memory in zip(self._models, self._memory, strict=True)
            ]
        return self._made[cols.start]
