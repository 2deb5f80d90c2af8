"""The k likeliest words and one bucket for all others, or the likeliest alone, tile by tile.

Throwing the tail away would give a number that is no KL and can be negative; with the tail in one
bucket it is the KL of coarsened distributions, and coarsening can only lower a KL (data
processing): a true lower bound.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.scoring.tiles import BANNED, LN2, Bare, Sides, raw_logits


class TopK:
    """State over the tiles of some rows: the top k logits so far, and the rest in one bucket.

    The policy, which comes first, decides which words are on top.
    """

    def __init__(self, sides: Sides, rows: int, k: int) -> None:
        """Start with nothing seen of so many rows."""
        self._k = k
        self._nats = [LN2 * side.gain for side in sides]
        self._tops = [torch.full_like(side.new_empty(rows, k), -torch.inf) for side in sides]
        self._tails = [top.new_full((rows,), -torch.inf, dtype=torch.float64) for top in self._tops]

    def add(self, logits: Sequence[Float[Tensor, "R C"]]) -> None:
        """See one more tile of raw logits; what falls out of the top goes into the bucket."""
        candidates = [torch.cat(pair, dim=1) for pair in zip(self._tops, logits, strict=True)]
        words = candidates[0].topk(self._k, dim=1).indices
        self._tops = [these.gather(1, words) for these in candidates]
        rests = [these.scatter(1, words, -torch.inf).double() for these in candidates]
        self._tails = [
            torch.logaddexp(tail, (nats * rest).logsumexp(1))
            for tail, rest, nats in zip(self._tails, rests, self._nats, strict=True)
        ]

    def scores(self, sums: dict[str, Float[Tensor, " R"]]) -> dict[str, Float[Tensor, " R"]]:
        """Top-k mass and, of two models, the coarse KL, given the fields of `Moments`."""
        logp = self._coarse(0, LN2 * (sums["m"] + sums["log_s"]))
        mass = logp[:, :-1].exp().sum(1)
        if len(self._tops) == 1:
            return {"top_k_mass": mass}
        logq = self._coarse(1, LN2 * (sums["n"] + sums["log_r"]))
        no_p, no_q = logp == -torch.inf, logq == -torch.inf
        terms = torch.where(no_p | no_q, 0.0, logp.exp() * (logp - logq)).sum(1)
        kl = torch.where((no_q & ~no_p).any(1), torch.inf, terms)
        return {"top_k_mass": mass, "top_k_kl": kl}

    def _coarse(self, model: int, log_sum: Float[Tensor, " R"]) -> Float[Tensor, "R buckets"]:
        """Log-probabilities of the top words and the bucket; a banned word's is −∞."""
        top = self._nats[model] * self._tops[model].double()
        logits = torch.cat([top, self._tails[model][:, None]], dim=1)
        return torch.where(logits < BANNED / 2, -torch.inf, logits - log_sum[:, None])


class Likeliest:
    """Each model's likeliest word over the tiles of some rows; the lowest id among equals.

    A tile's maxima are known from its sums, so only rows that a tile improves are searched for the
    word: of T tiles in no particular order log T, not T.
    """

    def __init__(self, sides: Sides, rows: int) -> None:
        """Start with nothing seen of so many rows."""
        self._best = [torch.full_like(side.new_empty(rows), -torch.inf) for side in sides]
        device = sides[0].hidden.device
        self._words = [torch.zeros(rows, dtype=torch.long, device=device) for _ in sides]

    def look(
        self, bare: Sequence[Bare], maxima: Sequence[Float[Tensor, " R"]], cols: slice
    ) -> None:
        """See one more tile of the words `cols`, with each row's greatest raw logit in it."""
        for one, top, best, words in zip(bare, maxima, self._best, self._words, strict=True):
            better = (top > best).nonzero()[:, 0]
            if len(better):
                raw = raw_logits(one._replace(product=one.product[better]))
                words[better] = raw.argmax(1) + cols.start
                best[better] = top[better]

    def same(self) -> Float[Tensor, " R"]:
        """1 where both models' likeliest word is the same, else 0."""
        first, second = self._words
        return (first == second).double()
