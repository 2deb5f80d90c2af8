"""What padding and rounding do to a model: the floor of an audit, and when it must be refused.

A model reads the same text alone and beside others. In between lie rounding, which makes the floor,
and padding, which must change nothing: with it a KL would depend on the size of the batches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kleash.auditing.float64_states import states_of
from kleash.auditing.generation import Written
from kleash.auditing.inputs import Item
from kleash.auditing.served_policy import ServedModel
from kleash.auditing.token_records import Record, side_by_side
from kleash.errors import ModelError
from kleash.models.policy import Policy
from kleash.scoring import token_scores
from kleash.types import Head

FLOOR_RESPONSES = 8
PADDING_TOLERANCE = 1e-5
"""Nats per token between a text read padded and alone."""
SAMPLING_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5}
"""Nats per token between what the sampler drew from and what is scored."""
HALF_TOLERANCE = 0.05
"""The same in half precision, whose logits are rounded to three digits."""
BEYOND_ROUNDING = 10.0
"""So many times what an unpadded batch changes is more than rounding."""
NORM_ROWS = 8192
"""Rows of a head whose norms are taken at once."""


@torch.no_grad()
def noise_floor(items: Sequence[Item], model: Policy, *, budget: int) -> float:
    """KL per token of a model to itself, read in a batch of several and alone.

    The two ways differ in nothing but rounding, so a KL of this size says nothing. A size is
    taken, not a sign: rounding takes a KL of 0 to either side.

    Args:
        items: some responses, of lengths as they come.
        model: the model.
        budget: tokens of a batch; where only one text fits, nothing is padded here either.

    Returns:
        mean |KL(π in a batch ‖ π alone)|, nats per token.
    """
    return _batch_against_alone(items if _is_padded(items, budget) else _cut(items), model)


def require_padding_invariance(items: Sequence[Item], model: Policy, *, budget: int) -> None:
    """Check that a model reads texts of several lengths the same padded and alone.

    Args:
        items: texts of the audit.
        model: the model.
        budget: tokens of a batch; where only one text fits, there is no padding to check.

    Raises:
        ModelError: padding changes what the model reads, beyond what a batch without padding does.
    """
    probes = _probes(items)
    if not _is_padded(probes, budget):
        return
    read = _together_and_alone(probes, model)
    if largest_kl(read.together, read.alone, model.head) <= PADDING_TOLERANCE:
        return  # Without a product with the vocabulary.
    padded = _kl_of(read, model)
    if padded <= PADDING_TOLERANCE:
        return
    unpadded = _batch_against_alone(_cut(probes), model)
    if math.isnan(unpadded):
        return  # A broken model: scoring names the number and the response.
    if not padded <= BEYOND_ROUNDING * unpadded:
        raise ModelError(
            f"expected {model.path!r} to read a text the same padded and alone, got "
            f"{padded:.3g} nats per token between the two ({unpadded:.3g} without padding): "
            f"{type(model.model).__name__} reads the padding, so its KL would depend on the batch; "
            "audit it one text at a time with --batch-tokens 1 (batch_tokens=1)"
        )


def require_sampler_agreement(
    written: Sequence[Written], records: Sequence[Record], model: Policy, *, forward: bool
) -> None:
    r"""Check that responses come from the distributions that are scored.

        mean over tokens of  e^(−d) − 1 + d,   d = log π_sampler(x) − log π_scored(x)

    Args:
        written: what the model wrote in one batch.
        records: the same responses, scored.
        model: the writer.
        forward: whether the writer is the policy of the pair.

    Raises:
        ModelError: they differ beyond rounding.
    """
    scored = [torch.from_numpy(r.logprobs if forward else r.ref_logprobs) for r in records]
    d = torch.cat([one.logprobs for one in written]).double() - torch.cat(scored).double()
    off = float((torch.expm1(-d) + d).mean())
    own = model.model
    computed_in = own.engine.dtype if isinstance(own, ServedModel) else model.head.weight.dtype
    if off <= SAMPLING_TOLERANCE.get(computed_in, HALF_TOLERANCE):
        return
    padded = len({len(one.item.prompt_ids) for one in written}) > 1
    cause = (
        "it reads the padding of a batch of prompts; audit it one prompt at a time with "
        "--batch-tokens 1 (batch_tokens=1)"
        if padded
        else "its cached states are not those of the whole text; give its responses as --responses"
    )
    raise ModelError(
        f"expected {model.path!r} to write from the distributions that it is scored on, got "
        f"{off:.3g} nats per token between sampler and scoring "
        f"({type(model.model).__name__}): {cause}"
    )


def _is_padded(items: Sequence[Item], budget: int) -> bool:
    """Whether texts of these lengths share a batch and need padding there."""
    lengths = {(len(item.prompt_ids), len(item.response_ids)) for item in items}
    totals = sorted(len(item.prompt_ids) + len(item.response_ids) for item in items)
    return len(lengths) > 1 and 2 * totals[0] <= budget


def _probes(items: Sequence[Item]) -> list[Item]:
    """A few texts from the shortest to the longest, each cut into something given and the rest."""
    ordered = sorted(items, key=lambda item: len(item.prompt_ids) + len(item.response_ids))
    last = len(ordered) - 1
    places = sorted({round(last * k / (FLOOR_RESPONSES - 1)) for k in range(FLOOR_RESPONSES)})
    probes: list[Item] = []
    for item in (ordered[place] for place in places):
        ids = (*item.prompt_ids, *item.response_ids)
        half = max(1, len(ids) // 2)
        probes.append(Item(item.cluster, ids[:half], ids[half:] or ids))
    return probes


def _cut(items: Sequence[Item]) -> list[Item]:
    """The items at one length, so that none of them is padded."""
    before = min(len(item.prompt_ids) for item in items)
    after = min(len(item.response_ids) for item in items)
    return [
        Item(item.cluster, item.prompt_ids[-before:], item.response_ids[:after]) for item in items
    ]


@torch.no_grad()
def largest_kl(one: Float[Tensor, "N D"], other: Float[Tensor, "N D"], head: Head) -> float:
    r"""A bound on the KL between what two readings of the same tokens predict.

        KL(p‖q) ≤ r²/8,    r = max_v δ_v − min_v δ_v ≤ 2 · scale · max_v‖w_v‖ · ‖h − h'‖

    with δ the difference of the logits, by Hoeffding's lemma; a soft cap only brings logits nearer.

    Args:
        one: final hidden states h of the model.
        other: states h' of the same tokens, read another way.
        head: the head, with the rows w.

    Returns:
        The bound for the token where it is largest, in nats; NaN where a number is.
    """
    weight = head.weight[: head.words]
    longest = max(float(rows.double().norm(dim=1).max()) for rows in weight.split(NORM_ROWS))
    apart = float((one.double() - other.double()).norm(dim=1).max())
    return (2 * head.scale * longest * apart) ** 2 / 8


@dataclass(frozen=True)
class _Readings:
    """Hidden states of the same tokens, and the tokens that came next."""

    together: Float[Tensor, "N D"]
    alone: Float[Tensor, "N D"]
    targets: Int[Tensor, " N"]


def _batch_against_alone(items: Sequence[Item], model: Policy) -> float:
    return _kl_of(_together_and_alone(items, model), model)


@torch.no_grad()
def _together_and_alone(items: Sequence[Item], model: Policy) -> _Readings:
    part, kept = side_by_side(items, model.device)
    together = states_of(model, part, kept)
    singles: list[Tensor] = []
    for item in items:
        one, inside = side_by_side([item], model.device)
        singles.append(states_of(model, one, inside))
    return _Readings(together, torch.cat(singles), part[2][kept])


@torch.no_grad()
def _kl_of(read: _Readings, model: Policy) -> float:
    scores = token_scores(
        read.together,
        model.head,
        read.targets,
        reference=(read.alone, model.head),
        want=("kl",),
    )
    assert scores.kl is not None
    return float(scores.kl.double().abs().mean())
