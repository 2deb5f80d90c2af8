"""Bins of positions in a response: one for each of the first, wider ones farther on.

A mean by position needs many responses that reach it. The first 64 positions stand alone; from
there each doubling has 8 bins, so that a bin is about a tenth of its position wide.
"""

import torch
from jaxtyping import Int
from torch import Tensor

SINGLE, PER_OCTAVE, OCTAVES = 64, 8, 14
POSITIONS = SINGLE + PER_OCTAVE * OCTAVES
"""Number of bins; the last one is open."""


def position_bins(count: int) -> Int[Tensor, " token"]:
    """Bin of each of the first `count` positions, which are counted from 0.

    Example:
        >>> position_bins(80)[[0, 1, 63, 64, 69, 70]].tolist()
        [0, 1, 63, 64, 64, 65]
    """
    at = torch.arange(count)
    octaves = torch.log2(at.clamp(min=SINGLE).double() / SINGLE)
    beyond = (PER_OCTAVE * octaves).floor().long()
    return torch.where(at < SINGLE, at, (SINGLE + beyond).clamp(max=POSITIONS - 1))


def first_position(place: int) -> float:
    """Where a bin begins.

    Example:
        >>> first_position(3), first_position(72)
        (3.0, 128.0)
    """
    return float(place) if place < SINGLE else SINGLE * 2 ** ((place - SINGLE) / PER_OCTAVE)
