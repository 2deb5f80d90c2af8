"""From an experience to a better policy: passes, minibatches, gradients, optimiser steps.

A gradient that is not finite never reaches the weights; whose it was is found out by asking each
response alone, and then each of its tokens.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from kleash.algorithms import ppo
from kleash.algorithms.losses import average, combine, explained_variance
from kleash.assembly import Crew, learning_rate_factor
from kleash.config import Config
from kleash.errors import NonFiniteError, RefusedError, RunError
from kleash.measures import Number, first_ratio_error
from kleash.pretraining import pretraining_loss
from kleash.rollout import fresh, microbatches
from kleash.scoring import token_scores
from kleash.types import Experience, Fresh, Loss

_FIRST_RATIO_TOLERANCE = 1e-3
"""How far the first ratio of a step may be from 1 by rounding alone (float32, long responses)."""


def update(config: Config, crew: Crew, experience: Experience, *, done: int) -> dict[str, Number]:
    """Passes over the rollout in minibatches; each is one optimiser step.

    Args:
        config: the run.
        crew: its policy, critic and optimiser learn.
        experience: the rollout.
        done: steps finished before this one.

    Raises:
        RefusedError: a number is not finite; it names the response and token of the rollout.
        RunError: the policy does not repeat what it said when the rollout was scored.
    """
    factor = learning_rate_factor(config.optimizer, step=done, steps=config.steps)
    for group in crew.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    minibatches: list[dict[str, float]] = []
    ratio_error: float | None = None
    rows = ppo.kept_rows(experience)
    for _ in range(config.ppo.epochs):
        order = rows[torch.randperm(len(rows)).to(rows.device)]
        for chosen in order.chunk(config.ppo.minibatches):
            try:
                minibatch = ppo.select(experience, chosen)
                losses = _backward(config, crew, minibatch)
                if ratio_error is None:
                    ratio_error = max(error for _, error in losses)
                    _require_first_ratio(ratio_error)
                numbers = combine([loss for loss, _ in losses])
                numbers["optim/grad_norm"] = _optimise(config, crew, minibatch)
            except RefusedError as error:
                error.among(chosen.tolist())
                raise
            minibatches.append(numbers)
    foreseen = experience.scored.values
    return {
        **average(minibatches),
        "policy/ratio_first_error": ratio_error,
        "optim/lr": config.optimizer.lr * factor,
        "value/explained_variance": None
        if foreseen is None
        else explained_variance(foreseen, experience.returns, experience.mask),
    }


def needs_exact_kl(crew: Crew) -> bool:
    """Whether the loss differentiates the exact KL."""
    return crew.settings.placement in ("exact", "mixed", "loss_exact")


def _backward(config: Config, crew: Crew, minibatch: Experience) -> list[tuple[Loss, float]]:
    """Gradients of one minibatch, a microbatch at a time; they add to the same whatever the split.

    Returns:
        Each microbatch's loss, and how far its ratio was from 1.
    """
    crew.optimizer.zero_grad(set_to_none=True)
    tokens = int(minibatch.mask.sum())
    losses: list[tuple[Loss, float]] = []
    for rows in microbatches(minibatch.scored.rollout, config.ppo.microbatch_size):
        part = ppo.select(minibatch, rows)
        try:
            loss, now = _loss(crew, part, tokens=tokens)
        except RefusedError as error:
            error.among(rows.tolist())
            raise
        loss.total.backward()
        error = first_ratio_error(now.logprobs.detach(), part.scored.rollout_logprobs, part.mask)
        losses.append((loss, error))
    mix = crew.pretraining
    if mix is not None:
        likelihood = pretraining_loss(
            crew.policy, mix.draw(), pad_id=crew.policy.pad_id, device=crew.policy.device
        )
        (mix.coefficient * likelihood).backward()
        losses[0][0].metrics["loss/pretraining"] = float(likelihood.detach())
        for loss, _ in losses[1:]:
            loss.metrics["loss/pretraining"] = 0.0
    return losses


def _loss(crew: Crew, part: Experience, *, tokens: int) -> tuple[Loss, Fresh]:
    now = fresh(
        part,
        policy=crew.policy,
        value=crew.value,
        reference=crew.reference,
        temperature=crew.sampling.temperature,
        want=("logprobs", "kl") if needs_exact_kl(crew) else ("logprobs",),
        scorer=partial(token_scores, tiles=crew.tiles),
    )
    return ppo.loss(part, now, crew.settings, tokens=tokens), now


def _optimise(config: Config, crew: Crew, minibatch: Experience) -> float:
    """One optimiser step; refused if a gradient is not finite, so that the weights stay good."""
    parameters = _parameters(crew)
    norm = float(nn.utils.clip_grad_norm_(parameters, config.optimizer.max_grad_norm))
    if not norm < float("inf"):
        response, token = _culprit(crew, minibatch)
        raise NonFiniteError(
            f"the gradient's norm is {norm}, by {{place}}: the update was refused; lower "
            "optimizer.lr or look at the scores of this step",
            response=response,
            token=token,
        )
    crew.optimizer.step()
    return norm


def _culprit(crew: Crew, minibatch: Experience) -> tuple[int | None, int | None]:
    """The first response whose gradient alone is not finite, and the first such token of it."""
    tokens = int(minibatch.mask.sum())
    for row in range(len(minibatch.mask)):
        alone = ppo.select(minibatch, torch.tensor([row], device=minibatch.mask.device))
        if _is_finite(crew, alone, tokens=tokens):
            continue
        for token in alone.mask[0].nonzero().flatten().tolist():
            only = torch.zeros_like(alone.mask)
            only[0, token] = True
            if not _is_finite(crew, replace(alone, mask=only), tokens=tokens):
                return row, token
        return row, None
    return None, None


def _is_finite(crew: Crew, part: Experience, *, tokens: int) -> bool:
    crew.optimizer.zero_grad(set_to_none=True)
    try:
        _loss(crew, part, tokens=tokens)[0].total.backward()
    except NonFiniteError:
        return False
    # The norm, for it can overflow where no single number does.
    norm = nn.utils.get_total_norm([p.grad for p in _parameters(crew) if p.grad is not None])
    return bool(norm.isfinite())


def _parameters(crew: Crew) -> list[nn.Parameter]:
    return [*crew.policy.parameters(), *crew.value.parameters()]


def _require_first_ratio(error: float) -> None:
    if error > _FIRST_RATIO_TOLERANCE:
        raise RunError(
            f"before the first update the policy must give its own tokens the probability it gave "
            f"them when they were scored, got a ratio off by {error:.3g}: the model is not "
            "deterministic (dropout, a low-precision kernel); use policy.dtype: float32 or "
            "policy.attention: eager"
        )
