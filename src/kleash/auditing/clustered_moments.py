r"""Means with standard errors clustered by prompt, in memory that does not grow with the prompts.

`kl.statistics` says what the standard error of a ratio is and needs every response at once. The
same number follows from the first two moments of the prompts' sums v_g: with R = Σ a_g / Σ b_g,

    Σ_g (a_g − R b_g)² = Σ a_g² − 2R Σ a_g b_g + R² Σ b_g²
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.auditing.confidence_intervals import ConfidenceInterval, Kind, interval


class ClusteredMoments:
    """Running first and second moments of what is summed up within each prompt."""

    def __init__(self, names: Sequence[str]) -> None:
        """Start with no prompt; `names` are the quantities summed up, "responses" among them."""
        self._place = {name: place for place, name in enumerate(names)}
        self._first = torch.zeros(len(names), dtype=torch.float64)
        self._second = torch.zeros(len(names), len(names), dtype=torch.float64)
        self.clusters = 0

    def add(self, sums: Float[Tensor, "cluster name"]) -> None:
        """Add whole prompts: one row of sums for each."""
        self._first += sums.sum(0)
        self._second += sums.T @ sums
        self.clusters += len(sums)

    def copy(self) -> "ClusteredMoments":
        """The same so far, to be gone on with apart."""
        other = ClusteredMoments(tuple(self._place))
        other._first, other._second = self._first.clone(), self._second.clone()
        other.clusters = self.clusters
        return other

    def total(self, name: str) -> float:
        """Sum over all prompts."""
        return float(self._first[self._place[name]])

    def ratio(
        self, numerator: str, denominator: str, *, kind: Kind = "fixed"
    ) -> ConfidenceInterval:
        """Ratio of two sums, such as KL to tokens, with its interval.

        Raises:
            ValueError: if the denominator's sum is 0.
        """
        a, b = self._place[numerator], self._place[denominator]
        total = float(self._first[b])
        if not total > 0:
            raise ValueError(f"expected a positive sum of {denominator!r}, got {total}")
        mean = float(self._first[a]) / total
        n, clusters = round(self.total("responses")), self.clusters
        if clusters < 2 or not math.isfinite(mean):
            return interval(mean, None, n=n, clusters=clusters, kind=kind)
        second = self._second
        spread = float(second[a, a] - 2 * mean * second[a, b] + mean**2 * second[b, b])
        # Where all prompts are alike the three terms cancel, to a rounding error of either sign.
        variance = clusters / (clusters - 1) * max(spread, 0.0) / total**2
        return interval(mean, math.sqrt(variance), n=n, clusters=clusters, kind=kind)
