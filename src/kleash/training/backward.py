"""One pass over a minibatch: what the models say now, the loss, and its gradients."""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.algorithms import dispatch
from kleash.algorithms.common import select
from kleash.errors import RefusedError
from kleash.kl.placements import DIFFERENTIATES_KL, prefix_weights
from kleash.rollout.scoring_pass import fresh, microbatches
from kleash.scoring import token_scores
from kleash.training.components import Components
from kleash.training.metrics import first_ratio_error
from kleash.types import Experience, Fresh, Loss


def needs_exact_kl(components: Components) -> bool:
    """Whether the loss differentiates the exact KL."""
    return components.settings.placement in DIFFERENTIATES_KL


@dataclass(frozen=True)
class Passed:
    """What the backward passes of some rows say."""

    metrics: list[dict[str, float]]
    """Of each microbatch's loss; they combine to those of the minibatch."""
    ratio_error: float
    """How far a ratio was from 1."""
    weights: Float[Tensor, "batch token"]
    """Prefix weights, in float64: how much likelier the policy now is to come to a token."""


def backward(components: Components, rows: Experience, *, tokens: int, microbatch: int) -> Passed:
    """Add the gradients of some rows, a microbatch at a time; any split adds to the same.

    Args:
        components: whose gradients.
        rows: a minibatch, or some responses of it.
        tokens: kept tokens of the whole minibatch.
        microbatch: responses at once.

    Raises:
        RefusedError: a number is not finite; it names the response among these rows.
    """
    metrics: list[dict[str, float]] = []
    error, weights = 0.0, torch.zeros_like(rows.mask, dtype=torch.float64)
    for chosen in microbatches(rows.scored.rollout, microbatch):
        part = select(rows, chosen)
        try:
            loss, now = loss_of(components, part, tokens=tokens)
        except RefusedError as refused:
            refused.among(chosen.tolist())
            raise
        loss.total.backward()
        logprobs, then = now.logprobs.detach(), part.scored.rollout_logprobs
        error = max(error, first_ratio_error(logprobs, then, part.mask))
        weights[chosen] = prefix_weights(logprobs.double(), then.double(), part.mask)
        metrics.append(loss.metrics)
    return Passed(metrics, error, weights)


def loss_of(components: Components, part: Experience, *, tokens: int) -> tuple[Loss, Fresh]:
    """The loss of one microbatch, and what the models say of it now; gradients flow."""
    now = fresh(
        part,
        policy=components.policy,
        value=components.value,
        reference=components.reference,
        temperature=components.sampling.temperature,
        want=("logprobs", "kl") if needs_exact_kl(components) else ("logprobs",),
        scorer=partial(token_scores, tiles=components.tiles),
    )
    return dispatch.loss(part, now, components.settings, tokens=tokens), now
