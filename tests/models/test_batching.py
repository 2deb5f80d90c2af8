"""Microbatches and shares of processes, by enumeration and by Graham's bound."""

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kleash.models.batching import TokenBudget, balanced_shares, microbatches, most_rows

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(max_examples=60)
@given(lengths=LENGTHS, budget=st.integers(1, 90))
def test_a_budget_of_tokens_takes_each_row_once_and_is_kept(
    lengths: list[int], budget: int
) -> None:
    groups = microbatches(lengths, TokenBudget(budget))
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[row] for row in group)
        # A row beyond the budget is alone; every other group fits, padding and all.
        assert len(group) == 1 or len(group) * longest <= budget
    # Longest first, and no group could have had the first row of the next one too, unless it is
    # shorter than two thirds of the longest: no more than a third of a group is padding.
    order = [lengths[row] for group in groups for row in group]
    assert order == sorted(lengths, reverse=True)
    for group, following in pairwise(groups):
        longest, first = lengths[group[0]], lengths[following[0]]
        assert (len(group) + 1) * longest > budget or first / longest < 2 / 3
        assert 3 * sum(lengths[row] for row in group) >= 2 * len(group) * longest


def test_a_row_longer_than_the_budget_is_alone_and_whole() -> None:
    assert microbatches([3, 50, 3, 1], TokenBudget(6)) == [[1], [0, 2], [3]]


@pytest.mark.parametrize("limit", [2, TokenBudget(8)])
def test_nothing_is_no_microbatch(limit: int | TokenBudget) -> None:
    assert microbatches([], limit) == []


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 response, got 0"):
        microbatches([1], 0)
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        TokenBudget(0)


def test_most_rows_is_what_a_microbatch_of_equal_rows_has() -> None:
    for longest, limit in product((1, 7, 30), (3, TokenBudget(21), TokenBudget(60))):
        groups = microbatches([longest] * 100, limit)
        assert len(groups[0]) == most_rows(limit, longest)


@settings(max_examples=60)
@given(lengths=LENGTHS.filter(lambda some: len(some) <= 7), size=st.integers(1, 3))
def test_shares_are_balanced_by_tokens(lengths: list[int], size: int) -> None:
    shares = balanced_shares(lengths, size)
    assert sorted(row for share in shares for row in share) == list(range(len(lengths)))
    assert sum(1 for share in shares if share) == min(size, len(lengths))
    # The best division, by trying all of them.
    best = min(
        max(
            sum(n for n, rank in zip(lengths, ranks, strict=True) if rank == r) for r in range(size)
        )
        for ranks in product(range(size), repeat=len(lengths))
    )
    longest = max(sum(lengths[row] for row in share) for share in shares)
    assert longest <= (4 / 3 - 1 / (3 * size)) * best + 1e-9


def test_one_long_response_is_not_beside_another_one() -> None:
    # Dealt out in turn by length, the first process would have 16 of 22 tokens.
    shares = balanced_shares([10, 3, 3, 3, 3], 2)
    assert shares == [[0], [1, 2, 3, 4]]
