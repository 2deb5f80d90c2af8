"""The likeliest word of each row, tile by tile, never holding the logits.

Softmax, a positive scale and a soft cap keep the order of logits, so bare products and the bias
are enough to find it.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kleash.masked import at_least_float32
from kleash.types import Head

ROWS, COLUMNS = 256, 4096
"""Shape of a tile: a few megabytes."""


def top_words(hidden: Float[Tensor, "N D"], head: Head) -> Int[Tensor, " N"]:
    """argmax_v of the next-token distribution of each row; the lowest id among equals.

    Args:
        hidden: final hidden states.
        head: the model's head; rows beyond its words take no part.

    Example:
        >>> top_words(torch.tensor([[0.1, 0.9], [0.8, 0.3]]), Head(torch.eye(2)))
        tensor([1, 0])
    """
    found: list[Tensor] = []
    for rows in hidden.split(ROWS):
        rows = at_least_float32(rows)
        best = rows.new_full((len(rows),), -torch.inf)
        word = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
        for start in range(0, head.words, COLUMNS):
            columns = slice(start, min(start + COLUMNS, head.words))
            logits = rows @ head.weight[columns].to(rows.dtype).T
            if head.bias is not None:
                logits = logits + head.bias[columns]
            value, index = logits.max(dim=1)
            better = value > best
            best = torch.where(better, value, best)
            word = torch.where(better, index + start, word)
        found.append(word)
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.long, device=hidden.device)
