"""KL by position: the few that were kept speak for all, with the weight that they stand for."""

import math
import random

import numpy as np
import pytest

from kleash.report.diagnostics.kl_by_position import kl_by_position
from kleash.storage.samples import Sample
from kleash.training.evaluation import rows_to_keep


def kept(step: int, kind: str, kl: list[float], **more) -> Sample:
    return Sample(
        step, kind, "policy", "p", "r", 0.0, sum(kl), ["t"] * len(kl), token_kl=kl, **more
    )


def test_a_random_one_counts_for_all_it_stands_for() -> None:
    """By hand: one worst of 10 responses for itself, one of the other nine for nine."""
    found = kl_by_position([kept(1, "worst", [1.0, 5.0]), kept(1, "random", [0.1, 0.2, 0.3])], 10)
    assert found is not None
    assert found.starts == [0, 1, 2] and (found.responses, found.steps) == (2, (1, 1))
    means = [one.mean for one in found.kl]
    assert means == pytest.approx([(1 + 9 * 0.1) / 10, (5 + 9 * 0.2) / 10, 0.3])
    assert [one.n for one in found.kl] == [2, 2, 1] and found.kl[0].standard_error is None


def test_the_weighted_mean_is_that_of_the_whole_step() -> None:
    """Many steps of known responses, of which the run keeps what `rows_to_keep` says."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, size=(450, 12))
    kl = rng.exponential(size=(450, 12, 8)) * (1 + lengths[..., None])
    samples: list[Sample] = []
    for step in range(450):
        rows = [kl[step, row, : lengths[step, row]].tolist() for row in range(12)]
        for row, kind in rows_to_keep([sum(r) for r in rows], worst=1, at_random=1, seed=step):
            samples.append(kept(step, kind, rows[row]))
    found = kl_by_position(samples, 12)
    assert found is not None and found.steps == (300, 449)
    for at, one in zip(found.starts, found.kl, strict=True):
        reach = lengths > at
        whole = float((kl[..., at] * reach).sum() / reach.sum())
        assert one.standard_error is not None
        assert abs(one.mean - whole) < 4 * one.standard_error, at
        plain = np.mean([s.token_kl[at] for s in samples if len(s.token_kl) > at])
        assert one.mean < plain


def test_which_responses_count() -> None:
    rest = [kept(step, "random", [0.1, 0.2]) for step in range(1, 10)]
    others = [
        kept(9, "heldout", [50.0]),
        Sample(9, "random", "reference", "p", "r", 0.0, 9.0, ["t"], token_kl=[50.0]),
        Sample(9, "random", "policy", "p", "r", 0.0, 9.0),
        kept(10, "worst", [50.0, 50.0]),
    ]
    found = kl_by_position([*rest, *others], 4)
    assert found is not None and (found.responses, found.steps) == (3, (7, 9))
    assert [one.mean for one in found.kl] == pytest.approx([0.1, 0.2])
    assert kl_by_position(others, 4) is None and kl_by_position([], 4) is None
    # More than there were: the count of responses is not that of this run.
    assert kl_by_position(rest[:1] * 3, 2) is None


def test_where_all_are_kept_each_counts_once() -> None:
    found = kl_by_position([kept(1, "worst", [1.0, 3.0]), kept(1, "worst", [2.0, 5.0])], 2)
    assert found is not None and [one.mean for one in found.kl] == pytest.approx([1.5, 4.0])


def test_positions_that_only_the_worst_reach_are_left_out() -> None:
    found = kl_by_position([kept(1, "worst", [1.0] * 5), kept(1, "random", [0.1])], 9)
    assert found is not None and found.starts == [0]


def test_positions_beyond_what_was_kept_are_left_out() -> None:
    cut = kept(1, "random", [0.1, 0.1], tokens_cut=70)
    found = kl_by_position([cut, kept(1, "random", [0.3] * 90)], 2)
    assert found is not None and found.starts == [0, 1]


def test_far_positions_share_bins_and_numbers_that_are_none_stay() -> None:
    rng = random.Random(0)
    long = [rng.random() for _ in range(200)]
    found = kl_by_position([kept(1, "random", long)], 1)
    assert found is not None and found.starts[:65] == list(range(65)) and len(found.starts) < 90
    last = found.starts[-1]
    assert found.kl[-1].mean == pytest.approx(sum(long[last:]) / len(long[last:]))
    broken = kl_by_position([kept(1, "random", [math.nan, math.inf, 0.5])], 1)
    assert broken is not None and math.isnan(broken.kl[0].mean)
    assert [one.mean for one in broken.kl[1:]] == [math.inf, 0.5]
