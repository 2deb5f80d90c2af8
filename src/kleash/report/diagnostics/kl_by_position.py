"""KL by position in the response, from the few responses that a run kept.

Those kept of a step are the farthest ones and some drawn at random from the rest. Their plain mean
would be that of the worst. Each is therefore counted as often as there were responses that it
stands for: a farthest one for itself, a random one for its share of the rest,

    w = 1 (worst),   w = (n − worst kept) / random kept,   with n responses in the step,

so that Σ w = n, and the weighted sums have the expectation of those over the whole step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kleash.kl.position_bins import first_position, position_bins
from kleash.kl.statistics import Estimate, clustered_ratio
from kleash.storage.samples import Sample

LEAST = 3
"""Random responses that make a mean."""


@dataclass(frozen=True)
class KLByPosition:
    """Mean exact KL per token at each bin of positions, over the last kept steps."""

    starts: Sequence[int]
    """First position of each bin, counted from 0."""
    kl: Sequence[Estimate]
    """Nats per token; `n` responses reach the bin, and the clusters are steps."""
    responses: int
    steps: tuple[int, int]
    """The first and the last step that it rests on."""


def kl_by_position(samples: Sequence[Sample], responses_per_step: int) -> KLByPosition | None:
    """Estimate the KL at each position over the last third of the steps that kept responses.

    The policy's own responses to training prompts count. A step without a random one says nothing
    of its rest, and is left out; so are positions that fewer than `LEAST` random responses reach
    (all of them, where there are fewer), and those beyond what was kept of a long one.

    Args:
        samples: of one run.
        responses_per_step: how many responses a step wrote.

    Returns:
        The estimate, with a standard error clustered by step; None if no step will do.
    """
    steps: dict[int, list[Sample]] = {}
    for sample in samples:
        if sample.who == "policy" and sample.kind != "heldout" and sample.token_kl:
            steps.setdefault(sample.step, []).append(sample)
    weighted = {
        step: weights
        for step, kept in sorted(steps.items())
        if (weights := _weights(kept, responses_per_step)) is not None
    }
    last = list(weighted)[-max(1, len(weighted) // 3) :]
    if not last:
        return None
    rows = [(step, one, w) for step in last for one, w in weighted[step]]
    known = min((len(s.token_kl) for _, s, _ in rows if s.tokens_cut), default=None)
    sums, counts, clusters = _sums([(step, s.token_kl[:known], w) for step, s, w in rows])
    speak = [s.kind == "random" or len(weighted[step]) == responses_per_step for step, s, _ in rows]
    reaching = (counts[torch.tensor(speak)] > 0).sum(0)
    reached = (reaching >= min(LEAST, sum(speak))).nonzero().flatten().tolist()
    kl = [_mean(sums[:, place], counts[:, place], clusters) for place in reached]
    starts = [-int(-first_position(place) // 1) for place in reached]
    return KLByPosition(starts, kl, len(rows), (last[0], last[-1]))


def _mean(sums: torch.Tensor, counts: torch.Tensor, clusters: torch.Tensor) -> Estimate:
    """The mean of those that reach a bin; NaN where one of them is."""
    here = counts > 0
    if bool(sums[here].isnan().any()):
        return Estimate(math.nan, None, int(here.sum()), len(clusters[here].unique()))
    return clustered_ratio(sums[here], counts[here], clusters[here])


def _weights(kept: Sequence[Sample], responses: int) -> list[tuple[Sample, float]] | None:
    worst = sum(sample.kind == "worst" for sample in kept)
    rest, drawn = responses - worst, len(kept) - worst
    if rest < drawn or (rest > 0 and drawn == 0):
        return None
    return [(one, 1.0 if one.kind == "worst" else rest / drawn) for one in kept]


def _sums(
    rows: Sequence[tuple[int, Sequence[float], float]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[response, bin] weighted KL and weighted number of tokens, and [response] steps."""
    bins = [position_bins(len(kl)) for _, kl, _ in rows]
    width = max(int(places[-1]) for places in bins) + 1
    sums = torch.zeros(len(rows), width, dtype=torch.float64)
    counts = torch.zeros_like(sums)
    for row, (places, (_, kl, weight)) in enumerate(zip(bins, rows, strict=True)):
        values = torch.tensor(list(kl), dtype=torch.float64)
        sums[row].index_add_(0, places, weight * values)
        counts[row].index_add_(0, places, torch.full_like(values, weight))
    return sums, counts, torch.tensor([step for step, _, _ in rows])
