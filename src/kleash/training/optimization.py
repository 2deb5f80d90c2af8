"""From an experience to a better policy: passes, minibatches, gradients, optimiser steps.

A gradient that is not finite never reaches the weights; whose it was is found out by asking each
response alone, and then each of its tokens.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from kleash.algorithms.common import kept_rows, select
from kleash.algorithms.losses import average, combine, explained_variance
from kleash.config.schema import Config
from kleash.errors import NonFiniteError, RefusedError, RunError
from kleash.kl.placements import effective_sample_size
from kleash.training import distributed
from kleash.training.backward import loss_of
from kleash.training.components import Components, learning, learning_rate_factor
from kleash.training.metrics import Number
from kleash.training.pretraining_mix import pretraining_loss
from kleash.types import Experience

_FIRST_RATIO_TOLERANCE = 1e-3
"""How far the first ratio of a step may be from 1 by rounding alone (float32, long responses)."""


def update(
    config: Config, components: Components, experience: Experience, *, done: int
) -> dict[str, Number]:
    """Passes over the rollout in minibatches; each is one optimiser step.

    Args:
        config: the run.
        components: its policy, critic and optimiser learn.
        experience: the rollout.
        done: steps finished before this one.

    Raises:
        RefusedError: a number is not finite; it names the response and token of the rollout.
        RunError: the policy does not repeat what it said when the rollout was scored.
    """
    factor = learning_rate_factor(config.optimizer, step=done, steps=config.steps)
    for group in components.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    made: list[dict[str, float]] = []
    first_error, effective = None, 1.0
    for chosen in _minibatches(config, experience):
        try:
            minibatch = select(experience, chosen)
            components.optimizer.zero_grad(set_to_none=True)
            passed = distributed.backward(
                components, minibatch, microbatch=config.algorithm.microbatch_size
            )
            if first_error is None:
                first_error = passed.ratio_error
                _require_first_ratio(first_error)
            kept = effective_sample_size(passed.weights, minibatch.mask)
            effective = min(effective, float(kept) / int(minibatch.mask.sum()))
            if made and effective < cast(float, config.algorithm.min_effective_samples):
                break
            numbers = combine(passed.metrics) | _pretrain(components)
            numbers["optim/grad_norm"] = _optimise(config, components, minibatch)
        except RefusedError as error:
            error.among(chosen.tolist())
            raise
        made.append(numbers)
    foreseen = experience.scored.values
    return {
        **average(made),
        "policy/ratio_first_error": first_error,
        "policy/effective_samples": effective,
        "policy/updates": len(made),
        "optim/lr": config.optimizer.lr * factor,
        "value/explained_variance": None
        if foreseen is None
        else explained_variance(foreseen, experience.returns, experience.mask),
    }


def _minibatches(config: Config, experience: Experience) -> Iterator[Tensor]:
    """Rows of each optimiser step: every kept response once in an epoch, in a new order."""
    rows = kept_rows(experience)
    for _ in range(config.algorithm.epochs):
        order = rows[torch.randperm(len(rows)).to(rows.device)]
        yield from order.chunk(config.algorithm.minibatches)


def _pretrain(components: Components) -> dict[str, float]:
    """Gradients of the pretraining mix, where there is one, and its likelihood."""
    mix = components.pretraining
    if mix is None:
        return {}
    likelihood = pretraining_loss(
        components.policy,
        mix.draw(),
        pad_id=components.policy.pad_id,
        device=components.policy.device,
    )
    (mix.coefficient * likelihood).backward()
    return {"loss/pretraining": float(likelihood.detach())}


def _optimise(config: Config, components: Components, minibatch: Experience) -> float:
    """One optimiser step; refused if a gradient is not finite, so that the weights stay good."""
    parameters = learning(components)
    norm = float(nn.utils.clip_grad_norm_(parameters, config.optimizer.max_grad_norm))
    if not norm < float("inf"):
        response, token = _culprit(components, minibatch)
        raise NonFiniteError(
            f"the gradient's norm is {norm}, by {{place}}: the update was refused; lower "
            "optimizer.lr or look at the scores of this step",
            response=response,
            token=token,
        )
    components.optimizer.step()
    return norm


def _culprit(components: Components, minibatch: Experience) -> tuple[int | None, int | None]:
    """The first response whose gradient alone is not finite, and the first such token of it."""
    tokens = int(minibatch.mask.sum())
    for row in range(len(minibatch.mask)):
        alone = select(minibatch, torch.tensor([row], device=minibatch.mask.device))
        if _is_finite(components, alone, tokens=tokens):
            continue
        for token in alone.mask[0].nonzero().flatten().tolist():
            only = torch.zeros_like(alone.mask)
            only[0, token] = True
            if not _is_finite(components, replace(alone, mask=only), tokens=tokens):
                return row, token
        return row, None
    return None, None


def _is_finite(components: Components, part: Experience, *, tokens: int) -> bool:
    components.optimizer.zero_grad(set_to_none=True)
    try:
        loss_of(components, part, tokens=tokens)[0].total.backward()
    except NonFiniteError:
        return False
    # The norm, for it can overflow where no single number does.
    norm = nn.utils.get_total_norm([p.grad for p in learning(components) if p.grad is not None])
    return bool(norm.isfinite())


def _require_first_ratio(error: float) -> None:
    if error > _FIRST_RATIO_TOLERANCE:
        raise RunError(
            f"before the first update the policy must give its own tokens the probability it gave "
            f"them when they were scored, got a ratio off by {error:.3g}: the model is not "
            "deterministic (dropout, a low-precision kernel); use policy.dtype: float32 or "
            "policy.attention: eager"
        )
