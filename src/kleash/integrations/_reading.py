"""What one batch of completions says: exact KL, entropy and scores with their standard errors.

All processes of a trainer read their own rows; means are over the rows of all of them, and so the
same numbers everywhere.
"""

import contextlib
import hashlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kleash.kl.statistics import Estimate, clustered_mean, clustered_ratio, response_kl
from kleash.models.policy import Policy, Reference
from kleash.rollout.scoring_pass import microbatches, score
from kleash.scoring import token_scores
from kleash.training.metrics import Number, variance_of, with_error
from kleash.types import Rollout, ScoredRollout

Gather = Callable[[Tensor], Tensor]
"""From this process's rows to the rows of all processes, in the order of the processes."""


@dataclass(frozen=True, eq=False)
class BatchReading:
    """One batch of completions as policy and reference see it."""

    step: int
    """The training step that the batch is made for; the policy is that before the step."""
    scored: ScoredRollout
    """This process's own rows."""
    kl: Estimate
    """Nats per response, over the rows of all processes."""
    measures: Mapping[str, Number]
    """By key of metrics.jsonl."""
    score_variance: float | None
    """Of the scores within prompts, in the units that β is a price in."""


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Generator[None]:
    """Evaluation mode inside; every module gets its own mode back."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def rollout_of(
    batch: Mapping[str, Any], stop_ids: tuple[int, ...]
) -> tuple[Rollout, Bool[Tensor, "batch token"]]:
    """A trainer's batch as a rollout, and which of its tokens the policy wrote itself.

    Args:
        batch: `prompt_ids`, `prompt_mask`, `completion_ids`, `completion_mask`, and `tool_mask`
            where tools wrote some of the tokens.
        stop_ids: ids that end a response.
    """
    prompt_mask, mask = batch["prompt_mask"].bool(), batch["completion_mask"].bool()
    own = mask if batch.get("tool_mask") is None else mask & batch["tool_mask"].bool()
    prompts, ids = batch["prompt_ids"], batch["completion_ids"]
    last = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
    ended = torch.isin(ids.gather(1, last).squeeze(1), torch.tensor(stop_ids, device=ids.device))
    rollout = Rollout(
        prompt_ids=prompts,
        prompt_mask=prompt_mask,
        response_ids=ids,
        response_mask=mask,
        ended=ended & mask.any(1),
        prompt_index=prompt_numbers(prompts, prompt_mask),
    )
    return rollout, own


def prompt_numbers(
    ids: Int[Tensor, "batch prompt"], mask: Bool[Tensor, "batch prompt"]
) -> Int[Tensor, " batch"]:
    """A number for each prompt that is the same wherever the same tokens are."""
    numbers = [
        int.from_bytes(
            hashlib.blake2b(row[kept].cpu().numpy().tobytes(), digest_size=8).digest(), "big"
        )
        >> 1
        for row, kept in zip(ids.long(), mask, strict=True)
    ]
    return torch.tensor(numbers, dtype=torch.int64, device=ids.device)


@torch.no_grad()
def read_completions(
    batch: Mapping[str, Any],
    policy: Policy,
    reference: Reference,
    *,
    temperature: float,
    microbatch: int,
) -> ScoredRollout:
    """Score a trainer's batch with both models in evaluation mode; nothing is drawn or changed.

    Raises:
        NonFiniteError: if a number is not finite, naming response and token.
        ScoringError: if a log-probability or KL is impossible.
    """
    rollout, own = rollout_of(batch, policy.stop_ids)
    nothing = torch.zeros(len(rollout.response_ids), device=rollout.response_ids.device)
    with evaluating(policy.model, reference.model):
        scored = score(
            rollout,
            policy=policy,
            reference=reference,
            scores=nothing,
            temperature=temperature,
            microbatch=microbatch,
        )
    if bool((own == rollout.response_mask).all()):
        return scored
    # What a tool wrote is context: read, and not measured.
    per_token = {
        name: torch.where(own, getattr(scored, name), 0.0)
        for name in ("rollout_logprobs", "ref_logprobs", "kl", "entropy")
    }
    return replace(scored, rollout=replace(rollout, response_mask=own), **per_token)


@torch.no_grad()
def reverse_kl(
    scored: ScoredRollout,
    policy: Policy,
    reference: Reference,
    *,
    temperature: float,
    microbatch: int,
) -> Float[Tensor, " batch"]:
    """Σ_t KL(π_ref‖π) of the states along each of the policy's responses, in nats."""
    rollout = scored.rollout
    mask, found = rollout.response_mask, torch.zeros_like(scored.kl)
    with evaluating(policy.model, reference.model):
        for rows in microbatches(rollout, microbatch):
            part = (
                rollout.prompt_ids[rows],
                rollout.prompt_mask[rows],
                rollout.response_ids[rows],
                mask[rows],
            )
            kept = mask[rows]
            got = token_scores(
                policy.hidden_states(*part)[:, :-1][kept],
                policy.head,
                part[2][kept],
                reference=(reference.hidden_states(*part)[:, :-1][kept], reference.head),
                temperature=temperature,
                want=("reverse_kl",),
            )
            assert got.reverse_kl is not None
            part_of = found.new_zeros(kept.shape).masked_scatter(kept, got.reverse_kl)
            found[rows] = part_of
    return response_kl(found, mask)


def summarise(
    step: int,
    scored: ScoredRollout,
    gather: Gather,
    *,
    scores: Float[Tensor, " all"] | None,
    priced: Float[Tensor, " all"] | None,
    reverse: Float[Tensor, " batch"] | None = None,
) -> BatchReading:
    """Means over the rows of all processes, with standard errors clustered by prompt.

    Args:
        step: the training step that the batch is made for.
        scored: this process's rows.
        gather: from them to those of all.
        scores: of all rows, in the same order; NaN where a response has none.
        priced: of all rows, what β is a price in; the scores, or advantages that divide them.
        reverse: of this process's rows, the KL the other way.
    """
    mask = scored.rollout.response_mask
    sampled = scored.rollout_logprobs - scored.ref_logprobs
    columns = {
        "kl": response_kl(scored.kl, mask),
        "k1": response_kl(sampled, mask),
        "entropy": response_kl(scored.entropy, mask),
        "length": mask.sum(-1),
        "ended": scored.rollout.ended,
    }
    if reverse is not None:
        columns["reverse"] = reverse
    every = {name: gather(column.double()).cpu() for name, column in columns.items()}
    clusters = gather(scored.rollout.prompt_index).cpu()
    kl = clustered_mean(every["kl"], clusters)
    per_token = clustered_ratio(every["kl"], every["length"], clusters)
    measures: dict[str, Number] = {
        **with_error("objective/kl_ref", kl),
        **with_error("objective/kl_ref_k1", clustered_mean(every["k1"], clusters)),
        "objective/kl_ref_per_token": per_token.mean,
        "objective/entropy": float(every["entropy"].mean()),
        "objective/entropy_per_token": float(every["entropy"].sum() / every["length"].sum()),
        "rollout/length": float(every["length"].mean()),
        "rollout/eos_fraction": float(every["ended"].mean()),
    }
    if reverse is not None:
        measures |= with_error(
            "objective/reverse_kl_ref", clustered_mean(every["reverse"], clusters)
        )
    if scores is not None and bool((known := scores.cpu().isfinite()).any()):
        mean = clustered_mean(scores.cpu()[known], clusters[known])
        measures |= with_error("objective/scores", mean)
    variance = None
    if priced is not None and bool((known := priced.cpu().isfinite()).any()):
        variance = variance_of(priced.cpu()[known], clusters[known])
    return BatchReading(step, scored, kl, measures, variance)
