"""Expected gradients of group-relative losses, over all pairs of responses."""

from dataclasses import replace

import torch
from oracles import gradient_models, scored_rollout

from kleash.algorithms.common import select
from kleash.types import Fresh


def all_pairs(scores, *, sampler=None):
    """Every ordered pair of strings as two responses to one prompt, and its probability.

    With a `sampler`, a table of logits, it wrote them, and says so; else the policy did.
    """
    models = gradient_models()
    world = models.world
    n = len(world.strings)
    pairs = torch.cartesian_prod(torch.arange(n), torch.arange(n))
    rows = pairs.flatten()
    scored = scored_rollout(
        world,
        world.rollout,
        policy=models.policy,
        reference=models.reference,
        scores=scores,
    )
    scored = select(scored, rows)
    prompts = torch.arange(len(pairs)).repeat_interleave(2)
    written = None if sampler is None else world.token_logprobs(sampler)[rows]
    rollout = replace(scored.rollout, prompt_index=prompts, sampler_logprobs=written)
    scored = replace(scored, rollout=rollout)
    p = world.probabilities(models.policy if sampler is None else sampler)
    return models, scored, rows, (p[pairs[:, 0]] * p[pairs[:, 1]]).repeat_interleave(2)


def expected_gradient(prepare, loss, settings, scores, beta, *, sampler=None):
    """Gradient of the mean response over all pairs; the loss is linear in what it is given."""
    models, scored, rows, probability = all_pairs(scores, sampler=sampler)
    batch = prepare(scored, beta, settings)
    w = probability[:, None] / 2
    pathwise = None if batch.pathwise is None else batch.pathwise * w
    batch = replace(batch, advantages=batch.advantages * w, pathwise=pathwise)
    table = models.policy.clone().requires_grad_()
    world = models.world
    fresh = Fresh(
        logprobs=world.token_logprobs(table)[rows],
        kl=world.at_tokens(world.state_kl(table, models.reference))[rows],
    )
    (found,) = torch.autograd.grad(loss(batch, fresh, settings, tokens=1).total, table)
    return found
