"""Streaming scores, a few of them compared with the obvious implementation in float64.

For the preflight, and now and then while training: a head the tiles misread (an unknown soft-cap, a
wrong scale, a broken kernel) would otherwise show as a KL that looks like learning.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kleash.errors import ScoringError
from kleash.scoring import dense, streaming
from kleash.scoring.api import Quantity, TokenScores
from kleash.types import Head

ROWS = 64
"""Tokens compared in a call, spread evenly over those given."""
TOLERANCE = 1e-6
"""Nats of error per unit of log-probability (at least 1): a few roundings of float32."""


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
            larger of 1 and its size; names the token.
        ValueError: as `scoring.api.check_request` says.
    """
    scores = streaming.token_scores(
        hidden, head, targets, reference=reference, temperature=temperature, want=want
    )
    rows = torch.arange(0, len(targets), max(1, len(targets) // ROWS), device=targets.device)
    checked: list[Quantity] = [name for name in ("logprobs", "ref_logprobs") if name in want]
    with torch.no_grad():
        truth = dense.token_scores(
            hidden[rows].double(),
            _double(head),
            targets[rows],
            reference=None
            if reference is None
            else (reference[0][rows].double(), _double(reference[1])),
            temperature=temperature,
            want=checked,
        )
    for name in checked:
        _compare(name, getattr(scores, name).detach()[rows], getattr(truth, name), rows)
    return scores


def _compare(name: str, found: Tensor, truth: Tensor, rows: Tensor) -> None:
    # Equal infinities (a banned word) are no error.
    error = torch.where(found == truth, 0.0, (found.double() - truth).abs())
    excess = error - TOLERANCE * truth.abs().clamp(min=1)
    if bool((excess > 0).any()) or bool(error.isnan().any()):
        worst = int(error.nan_to_num(torch.inf).argmax())
        raise ScoringError(
            f"expected streaming and dense scoring to agree within {TOLERANCE:g}, got {name} "
            f"{float(found[worst]):.9g} and {float(truth[worst]):.9g} at token {int(rows[worst])}: "
            "please report this model's architecture; its numbers cannot be trusted"
        )


def _double(head: Head) -> Head:
    weight = head.weight.detach().double()
    bias = None if head.bias is None else head.bias.detach().double()
    return Head(weight, bias, head.scale, head.softcap, head.vocab_size)
