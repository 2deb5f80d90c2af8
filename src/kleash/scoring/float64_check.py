"""Streaming scores, a few of them compared with the obvious implementation in float64.

For the preflight, and now and then while training: a head the tiles misread (an unknown soft-cap, a
wrong scale, a broken kernel) would otherwise show as a KL that looks like learning.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kleash.errors import ScoringError
from kleash.scoring import dense, streaming
from kleash.scoring.api import Quantity, TokenScores
from kleash.types import Head

ROWS = 64
"""Tokens compared in a call, spread evenly over those given."""
WORDS = 8192
"""Rows of a head that are held in float64 at once."""
TOLERANCE = 1e-6
"""Nats of error allowed for each unit of the row's largest logit or of the log-probability.

float32 rounds a logit in proportion to its size: log π of a sure word may be 1e-5 where the logits
are of 70, and carries their rounding: with logits up to 78, up to 3e-7 of the largest were found.
"""


def token_scores(
    hidden: Float[Tensor, "N D"],
    head: Head,
    targets: Int[Tensor, " N"],
    *,
    reference: tuple[Float[Tensor, "N D2"], Head] | None = None,
    temperature: float = 1.0,
    want: Sequence[Quantity] = ("logprobs",),
) -> TokenScores:
    """`streaming.token_scores`, checked.

    Raises:
        ScoringError: if log π or log π_ref of a token is off by more than `TOLERANCE` times the
            largest of 1, its size, and the row's largest finite logit; names the token.
        ValueError: as `scoring.api.check_request` says.
    """
    scores = streaming.token_scores(
        hidden, head, targets, reference=reference, temperature=temperature, want=want
    )
    rows = torch.arange(0, len(targets), max(1, len(targets) // ROWS), device=targets.device)
    sides = {"logprobs": (hidden, head)}
    if reference is not None:
        sides["ref_logprobs"] = reference
    for name, (states, side) in sides.items():
        if name in want:
            found = getattr(scores, name).detach()[rows]
            with torch.no_grad():
                logits = _logits(states[rows].double(), side, temperature)
            _compare(name, found, logits, targets[rows], rows)
    return scores


def _logits(
    hidden: Float[Tensor, "rows D"], head: Head, temperature: float
) -> Float[Tensor, "rows V"]:
    """In float64, of which the whole head is never held: it may be several gigabytes."""
    biases = None if head.bias is None else head.bias[: head.words].split(WORDS)
    parts: list[Tensor] = []
    for place, weight in enumerate(head.weight[: head.words].split(WORDS)):
        bias = None if biases is None else biases[place]
        part = replace(head, weight=weight, bias=bias, vocab_size=-1)
        parts.append(dense.all_logits(hidden, part, temperature, torch.float64))
    return torch.cat(parts, dim=-1)


def _compare(
    name: str,
    found: Float[Tensor, " rows"],
    logits: Float[Tensor, "rows V"],
    targets: Int[Tensor, " rows"],
    rows: Int[Tensor, " rows"],
) -> None:
    truth = logits.log_softmax(-1).gather(-1, targets[:, None].long())[:, 0]
    # Of a banned word, whose logit and log π are infinite, no finite number is near enough.
    sizes = torch.cat([logits, truth[:, None]], dim=-1).abs()
    largest = torch.where(sizes.isfinite(), sizes, 0.0).amax(-1)
    allowed = TOLERANCE * largest.clamp(min=1)
    # Equal infinities (a banned word) are no error.
    error = torch.where(found == truth, 0.0, (found.double() - truth).abs())
    if bool((error > allowed).any()) or bool(error.isnan().any()):
        worst = int((error / allowed).nan_to_num(torch.inf).argmax())
        raise ScoringError(
            "expected streaming and dense scoring to agree within "
            f"{float(allowed[worst]):.2g} ({TOLERANCE:g} of the largest logit), got {name} "
            f"{float(found[worst]):.9g} and {float(truth[worst]):.9g} at token {int(rows[worst])}: "
            "please report this model's architecture; its numbers cannot be trusted"
        )
