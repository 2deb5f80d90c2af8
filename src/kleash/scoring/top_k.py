"""The k likeliest words and one bucket for all others, kept up to date tile by tile.

Throwing the tail away would give a number that is no KL and can be negative; with the tail in one
bucket it is the KL of coarsened distributions, and coarsening can only lower a KL (data
processing): a true lower bound.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.scoring.tiles import BANNED


class TopK:
    """State over the tiles of some rows: the top k logits so far, and the rest in one bucket.

    The policy, which comes first, decides which words are on top.
    """

    def __init__(self, hidden: Sequence[Float[Tensor, "R _"]], k: int) -> None:
        """Start with nothing seen; `hidden`, one for each model, gives rows, dtype and device."""
        self._k = k
        self._tops = [block.new_full((block.shape[0], k), -torch.inf) for block in hidden]
        self._tails = [
            block.new_full((block.shape[0],), -torch.inf, dtype=torch.float64) for block in hidden
        ]

    def add(self, logits: Sequence[Float[Tensor, "R C"]]) -> None:
        """See one more tile of each model; what falls out of the top goes into the bucket."""
        candidates = [torch.cat(pair, dim=1) for pair in zip(self._tops, logits, strict=True)]
        words = candidates[0].topk(self._k, dim=1).indices
        self._tops = [these.gather(1, words) for these in candidates]
        rests = [these.scatter(1, words, -torch.inf).double() for these in candidates]
        self._tails = [
            torch.logaddexp(tail, rest.logsumexp(1))
            for tail, rest in zip(self._tails, rests, strict=True)
        ]

    def scores(self, sums: dict[str, Float[Tensor, " R"]]) -> dict[str, Float[Tensor, " R"]]:
        """Top-k mass and, of two models, the coarse KL, given the fields of `Moments`."""
        logp = _coarse(self._tops[0], self._tails[0], sums["m"] + sums["log_s"])
        mass = logp[:, :-1].exp().sum(1)
        if len(self._tops) == 1:
            return {"top_k_mass": mass}
        logq = _coarse(self._tops[1], self._tails[1], sums["n"] + sums["log_r"])
        no_p, no_q = logp == -torch.inf, logq == -torch.inf
        terms = torch.where(no_p | no_q, 0.0, logp.exp() * (logp - logq)).sum(1)
        kl = torch.where((no_q & ~no_p).any(1), torch.inf, terms)
        return {"top_k_mass": mass, "top_k_kl": kl}


def _coarse(top: Tensor, tail: Tensor, log_sum: Tensor) -> Float[Tensor, "R buckets"]:
    """Log-probabilities of the top words and the bucket; a banned word's is −∞."""
    logits = torch.cat([top.double(), tail[:, None]], dim=1)
    return torch.where(logits < BANNED / 2, -torch.inf, logits - log_sum[:, None])
