"""The few responses that are shown, scored again: which tokens each model prefers instead.

Here, and only here, whole next-token distributions are held: a few dozen rows at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.auditing.float64_states import states_of
from kleash.auditing.inputs import Item
from kleash.auditing.model_pair import ModelPair
from kleash.auditing.token_records import Record, side_by_side
from kleash.models.policy import Policy
from kleash.rollout.top_tokens import ROWS, TopTokens, distributions, top_tokens


@dataclass(frozen=True)
class ResponseDetails:
    """What both models wanted at each token of a response."""

    policy_top: list[TopTokens]
    reference_top: list[TopTokens]


@torch.no_grad()
def response_details(
    record: Record, pair: ModelPair, *, temperature: float, places: Sequence[int] | None = None
) -> tuple[ResponseDetails, Float[Tensor, " vocab"]]:
    """The likeliest words of both models at each token of a response.

    Args:
        record: the response.
        pair: the two models.
        temperature: divides both models' logits.
        places: the tokens that are looked at, in this order; None: all.

    Returns:
        The words, and Σ_t (π_t − π_ref,t): the probability each word gained over these tokens.
    """
    part, kept = side_by_side([item_of(record)], pair.policy.device)
    states = states_of(pair.policy, part, kept)
    ref_states = states_of(pair.reference, part, kept)
    if places is not None:
        states, ref_states = states[list(places)], ref_states[list(places)]
    moved = torch.zeros(pair.policy.words, dtype=torch.float64)
    tops: tuple[list[TopTokens], list[TopTokens]] = ([], [])
    for rows, ref_rows in zip(states.split(ROWS), ref_states.split(ROWS), strict=True):
        p = distributions(pair.policy.head, rows, temperature=temperature)
        q = distributions(pair.reference.head, ref_rows, temperature=temperature)
        moved += (p - q).sum(0).double().cpu()
        for found, these in zip(tops, (p, q), strict=True):
            found += top_tokens(these)
    return ResponseDetails(*tops), moved


@torch.no_grad()
def left_out_mass(
    records: Sequence[Record], model: Policy, *, shared: int, rows: int, temperature: float
) -> float:
    """Mean probability, per token, of the tokens that the comparison leaves out.

    Args:
        records: some responses.
        model: a model that has these tokens.
        shared: number of ids that are compared.
        rows: number of ids that the model has.
        temperature: divides its logits.

    Returns:
        Σ_v π_v over shared ≤ v < rows, mean over the tokens of the responses.
    """
    head = replace(model, words=rows).head
    total = tokens = 0.0
    for record in records:
        part, kept = side_by_side([item_of(record)], model.device)
        for states in states_of(model, part, kept).split(ROWS):
            mass = distributions(head, states, temperature=temperature)[:, shared:]
            total += float(mass.double().sum())
            tokens += len(states)
    return total / max(1.0, tokens)


def item_of(record: Record) -> Item:
    """The tokens of a response, to be read again."""
    return Item(record.cluster, tuple(record.prompt_ids.tolist()), tuple(record.ids.tolist()))
