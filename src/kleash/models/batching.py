"""Which rows a model reads together: microbatches of similar length, and shares of processes.

Numbers of rows are plain integers, lengths are tokens, and no order of rows changes a result: the
losses divide by the tokens of the whole minibatch, so that microbatches add.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenBudget:
    """Tokens of a microbatch, its padding among them: rows × the longest row ≤ `tokens`."""

    tokens: int

    def __post_init__(self) -> None:
        """Refuse a budget of nothing.

        Raises:
            ValueError: fewer than one token.
        """
        if self.tokens < 1:
            raise ValueError(f"expected a micro-batch of at least 1 token, got {self.tokens}")


Limit = int | TokenBudget
"""How large a microbatch may be: so many rows, or a budget of tokens."""


def microbatches(lengths: Sequence[int], limit: Limit) -> list[list[int]]:
    """Numbers of rows in groups of similar length, longest first: if memory fails, it does at once.

    Each group takes as many of the next shorter rows as the limit allows, with a budget of tokens
    none that is shorter than two thirds of its longest: one more pass costs less than that padding.
    A row that is longer than a whole budget is a group of its own, neither split nor left out.

    Args:
        lengths: tokens of each row.
        limit: the largest group, in rows or in tokens with padding.

    Returns:
        Every row number once.

    Raises:
        ValueError: a limit of no rows.

    Example:
        >>> microbatches([2, 9, 4, 3], TokenBudget(8))
        [[1], [2, 3], [0]]
        >>> microbatches([9, 9, 5], TokenBudget(27))
        [[0, 1], [2]]
        >>> microbatches([2, 9, 4, 3], 2)
        [[1, 2], [3, 0]]
    """
    if isinstance(limit, int) and limit < 1:
        raise ValueError(f"expected a micro-batch of at least 1 response, got {limit}")
    groups: list[list[int]] = []
    for row in _longest_first(lengths):
        last = groups[-1] if groups else []
        if last and _joins(lengths[row], limit, len(last), lengths[last[0]]):
            last.append(row)
        else:
            groups.append([row])
    return groups


def _joins(length: int, limit: Limit, rows: int, longest: int) -> bool:
    """Whether a row goes into a group that has so many rows."""
    similar = isinstance(limit, int) or 3 * length >= 2 * longest
    return similar and rows < most_rows(limit, longest)


def most_rows(limit: Limit, longest: int) -> int:
    """How many rows a microbatch has at most whose longest one has so many tokens.

    Example:
        >>> most_rows(TokenBudget(1024), 300), most_rows(TokenBudget(1024), 2000), most_rows(8, 300)
        (3, 1, 8)
    """
    return limit if isinstance(limit, int) else max(1, limit.tokens // max(1, longest))


def balanced_shares(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of the rows of each process, with about as many tokens in each.

    The longest row that is left goes to the process with the fewest tokens, the first of those: no
    process has more than 4/3 − 1/(3 size) times the tokens of the best division (R. Graham, "Bounds
    on multiprocessing timing anomalies", 1969), and none is without a row that could have one.

    Args:
        lengths: tokens of each row.
        size: how many processes.

    Returns:
        Every row number once; longest first in each share.

    Example:
        >>> balanced_shares([9, 2, 8, 3, 5], 2)
        [[0, 3, 1], [2, 4]]
    """
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [0] * size
    for row in _longest_first(lengths):
        rank = min(range(size), key=lambda rank: (loads[rank], len(shares[rank]), rank))
        shares[rank].append(row)
        loads[rank] += lengths[row]
    return shares


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])
