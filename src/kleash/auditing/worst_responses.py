"""A second look at the few responses that are shown: what each model wanted instead.

Here, and only here, whole next-token distributions are held: a few dozen rows at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.auditing.float64_states import states_of
from kleash.auditing.inputs import Item
from kleash.auditing.model_pair import ModelPair
from kleash.auditing.token_records import Record, side_by_side
from kleash.models.policy import LanguageModel
from kleash.rollout.top_tokens import ROWS, Wanted, distributions, likeliest
from kleash.scoring import token_scores

FLOOR_RESPONSES = 8


@dataclass(frozen=True)
class ResponseDetails:
    """What both models wanted at each token of a response."""

    policy_top: list[Wanted]
    reference_top: list[Wanted]


@torch.no_grad()
def response_details(
    record: Record, pair: ModelPair, *, temperature: float
) -> tuple[ResponseDetails, Float[Tensor, " vocab"]]:
    """The likeliest words of both models at each token of a response.

    Args:
        record: the response.
        pair: the two models.
        temperature: divides both models' logits.

    Returns:
        The words, and Σ_t (π_t − π_ref,t): the probability each word gained over the response.
    """
    part, kept = side_by_side([_item(record)], pair.policy.device)
    states = states_of(pair.policy, part, kept)
    ref_states = states_of(pair.reference, part, kept)
    moved = torch.zeros(pair.policy.words, dtype=torch.float64)
    tops: tuple[list[Wanted], list[Wanted]] = ([], [])
    for rows, ref_rows in zip(states.split(ROWS), ref_states.split(ROWS), strict=True):
        p = distributions(pair.policy.head, rows, temperature=temperature)
        q = distributions(pair.reference.head, ref_rows, temperature=temperature)
        moved += (p - q).sum(0).double().cpu()
        for found, these in zip(tops, (p, q), strict=True):
            found += likeliest(these)
    return ResponseDetails(*tops), moved


@torch.no_grad()
def noise_floor(records: Sequence[Record], model: LanguageModel, device: torch.device) -> float:
    """KL per token of a model to itself, read in a batch of several and alone.

    The two ways differ in nothing but rounding, so a KL of this size says nothing. A size is
    taken, not a sign: rounding takes a KL of 0 to either side.

    Args:
        records: some responses.
        model: the model.
        device: where it is.
    """
    items = [_item(record) for record in records[:FLOOR_RESPONSES]]
    part, kept = side_by_side(items, device)
    together = states_of(model, part, kept)
    singles: list[Tensor] = []
    for item in items:
        one, inside = side_by_side([item], device)
        singles.append(states_of(model, one, inside))
    alone = torch.cat(singles)
    scores = token_scores(
        together, model.head, part[2][kept], reference=(alone, model.head), want=("kl",)
    )
    assert scores.kl is not None
    return float(scores.kl.double().abs().mean())


def _item(record: Record) -> Item:
    return Item(record.cluster, tuple(record.prompt_ids.tolist()), tuple(record.ids.tolist()))
