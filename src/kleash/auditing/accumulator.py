"""The running account of an audit: records go in, one after the other, and are forgotten.

Kept are sums (per prompt, until its window is closed), a histogram, and a bounded number of whole
records: the worst responses, those with the worst tokens, and some at random.
"""

import hashlib
import heapq
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from kleash.auditing.clustered_moments import ClusteredMoments
from kleash.auditing.confidence_intervals import ConfidenceInterval, Kind
from kleash.auditing.token_classes import TOKEN_CLASSES
from kleash.auditing.token_records import By, Record
from kleash.kl.estimators import sampled_kl
from kleash.kl.position_bins import POSITIONS, position_bins

QUANTITIES = (
    "kl",
    "reverse_kl",
    "k1",
    "k3",
    "nll",
    "ref_nll",
    "entropy",
    "ref_entropy",
    "same_top",
    "tokens",
    "responses",
)
"""What is summed up within each prompt."""

PER_DECADE = 232
LOWEST, HIGHEST = -12, 4
BINS = PER_DECADE * (HIGHEST - LOWEST)
"""Bins of the histogram of per-token KL, each 1 % wide, from 1e-12 to 1e4 nats."""

MAX_GROUPS = 100
LARGEST = 200
"""Responses of largest KL whose KL is remembered, for the index of the tail."""


class AuditAccumulator:
    """Everything an audit says of the responses seen so far."""

    def __init__(
        self, by: By, classes: UInt8[np.ndarray, " vocab"], *, keep: int, seed: int
    ) -> None:
        """Start with nothing seen.

        Args:
            by: who writes; says which direction of the KL its own samples estimate.
            classes: class of each token id, see `tokens.token_classes`.
            keep: how many records to keep of each kind.
            seed: of the choice of random records.
        """
        self.by: By = by
        self._classes = classes
        self._keep = keep
        self._seed = seed
        names = [*QUANTITIES]
        names += [f"{what} {name}" for name in TOKEN_CLASSES for what in ("kl", "count")]
        names += [f"{what} at {at}" for at in range(POSITIONS) for what in ("kl", "count")]
        self.moments = ClusteredMoments(names)
        self.groups: dict[str, ClusteredMoments] = {}
        self.groups_left_out = 0
        self.histogram = np.zeros(BINS + 2, dtype=np.int64)
        self.largest_token = -math.inf
        self._open: dict[int, tuple[str | None, Float[np.ndarray, " name"]]] = {}
        self._worst: list[tuple[float, int, Record]] = []
        self._tokens: list[tuple[float, int, int, Record]] = []
        self._random: list[tuple[int, int, Record]] = []
        self._largest: list[float] = []

    def add(self, records: Iterable[Record]) -> None:
        """See some more responses."""
        for record in records:
            sums = self._sums(record)
            group, before = self._open.get(record.cluster, (record.group, np.zeros_like(sums)))
            self._open[record.cluster] = (group, before + sums)
            self._look(record)

    def close_window(self) -> None:
        """Every prompt seen so far is complete: add their sums to the moments."""
        if not self._open:
            return
        rows = self._open_rows()
        self.moments.add(rows)
        labels = [group for group, _ in self._open.values()]
        for group in sorted({label for label in labels if label is not None}):
            if group not in self.groups and len(self.groups) == MAX_GROUPS:
                self.groups_left_out += 1
                continue
            inside = [place for place, label in enumerate(labels) if label == group]
            found = self.groups.setdefault(group, ClusteredMoments(QUANTITIES))
            found.add(rows[inside, : len(QUANTITIES)])
        self._open.clear()

    def mean(self, name: str, per: str, *, kind: Kind = "fixed") -> ConfidenceInterval:
        """Mean of a quantity per "token" or per "response", over closed windows."""
        return self.moments.ratio(name, f"{per}s", kind=kind)

    def glimpse(self, name: str, per: str, *, kind: Kind = "fixed") -> ConfidenceInterval:
        """The same with the open window: to report, not to stop by, for long texts come first."""
        moments = self.moments.copy()
        if self._open:
            moments.add(self._open_rows())
        return moments.ratio(name, f"{per}s", kind=kind)

    @property
    def headline(self) -> str:
        """The KL that these samples are drawn for: of who wrote, to the other."""
        return "reverse_kl" if self.by == "reference" else "kl"

    def percentile(self, share: float) -> float:
        """The KL per token below which so large a share of tokens lies, to 1 %."""
        total = int(self.histogram.sum())
        place = int(np.searchsorted(self.histogram.cumsum(), share * total))
        if place == 0:
            return 0.0
        if place == BINS + 1:
            return self.largest_token
        return min(10 ** (LOWEST + (place - 0.5) / PER_DECADE), self.largest_token)

    def worst(self) -> list[Record]:
        """Responses of largest KL, largest first."""
        return [record for _, _, record in sorted(self._worst, key=lambda e: (-e[0], -e[1]))]

    def at_random(self) -> list[Record]:
        """A sample of the responses, each as likely as any other, in their order."""
        return sorted((record for _, _, record in self._random), key=lambda r: r.number)

    def drawn(self, count: int) -> list[Record]:
        """So many responses, each as likely as any other: of the lengths that there are."""
        return [r for _, _, r in sorted(self._random, key=lambda e: (-e[0], -e[1]))[:count]]

    def worst_tokens(self) -> list[tuple[Record, int]]:
        """Tokens of largest KL, largest first, each as a record and a place in it."""
        found = sorted(self._tokens, key=lambda e: (-e[0], -e[1], -e[2]))
        return [(record, -place) for _, _, place, record in found]

    def largest(self) -> list[float]:
        """The largest KLs of whole responses, at most a tenth of all, largest first."""
        count = max(10, round(self.moments.total("responses")) // 10)
        return sorted(self._largest, reverse=True)[:count]

    def _open_rows(self) -> Float[Tensor, "cluster name"]:
        return torch.from_numpy(np.stack([sums for _, sums in self._open.values()]))

    def _sums(self, record: Record) -> Float[np.ndarray, " name"]:
        kl, reverse = record.kl.astype(np.float64), record.reverse_kl.astype(np.float64)
        mine, other = record.logprobs, record.ref_logprobs
        if self.by == "reference":
            mine, other = other, mine
        pair = torch.from_numpy(mine.astype(np.float64)), torch.from_numpy(other.astype(np.float64))
        k1, k3 = (float(sampled_kl(*pair, which).sum()) for which in ("k1", "k3"))
        count = len(record.ids)
        base = [kl.sum(), reverse.sum(), k1, k3]
        base += [-record.logprobs.sum(dtype=np.float64), -record.ref_logprobs.sum(dtype=np.float64)]
        base += [record.entropy.sum(dtype=np.float64), record.ref_entropy.sum(dtype=np.float64)]
        base += [float(record.same_top.sum()), float(count), 1.0]
        shown = reverse if self.by == "reference" else kl
        classes = self._classes[record.ids]
        places = position_bins(count).numpy()
        return np.concatenate(
            [base, _by(classes, shown, len(TOKEN_CLASSES)), _by(places, shown, POSITIONS)]
        )

    def _look(self, record: Record) -> None:
        shown = record.reverse_kl if self.by == "reference" else record.kl
        np.add.at(self.histogram, histogram_bins(shown), 1)
        self.largest_token = max(self.largest_token, float(shown.max()))
        total = float(shown.sum(dtype=np.float64))
        _push(self._worst, (total, -record.number, record), self._keep)
        _push(self._random, (-self._lot(record.number), -record.number, record), self._keep)
        _push(self._largest, total, LARGEST)
        for place in np.argsort(-shown, kind="stable")[:3].tolist():
            entry = (float(shown[place]), -record.number, -place, record)
            _push(self._tokens, entry, self._keep)

    def _lot(self, number: int) -> int:
        """A draw of the number and the seed alone: both writers' responses to a prompt are kept."""
        text = f"{self._seed}/{number}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def histogram_bins(kl: Float[np.ndarray, " token"]) -> Int[np.ndarray, " token"]:
    """Bin of each KL: 0 for what is below 1e-12, the last for what is above 1e4."""
    above = np.maximum(kl.astype(np.float64), 10.0**LOWEST)
    scaled = PER_DECADE * (np.log10(above) - LOWEST)
    inside = np.clip(scaled, 0, BINS).astype(np.int64) + 1
    return np.where(kl < 10.0**LOWEST, 0, inside)


def _by(
    places: Int[np.ndarray, " token"] | UInt8[np.ndarray, " token"],
    values: Float[np.ndarray, " token"],
    size: int,
) -> Float[np.ndarray, " name"]:
    """Sum of values and their number, for each place in turn."""
    both = np.stack([np.bincount(places, values, size), np.bincount(places, minlength=size)], 1)
    return both.astype(np.float64).ravel()


def _push(heap: list[Any], entry: Any, size: int) -> None:
    """Keep the `size` largest entries."""
    if len(heap) < size:
        heapq.heappush(heap, entry)
    elif size and entry > heap[0]:
        heapq.heapreplace(heap, entry)
