"""Sampled training of tables, several side by side, with an algorithm's own `prepare` and `loss`.

The world is so small that a rollout is a draw of row numbers: everything that the engine would
find by running models is cut out of tables over all strings. A *lane* is one run with its own β,
seed, policy, critic and rollouts; lanes share nothing but the call of `loss`, where their rows lie
one after another, and Adam, which treats every parameter for itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from oracles import ScoredModel, scored_rollout
from torch import Tensor

from kleash.algorithms.common import select
from kleash.types import Experience, Fresh, Loss, ScoredRollout


@dataclass(frozen=True)
class Lane:
    beta: float
    seed: int


@dataclass(frozen=True)
class Pace:
    """How long and how fast."""

    iterations: int
    rollouts: int = 512
    group: int = 1
    epochs: int = 4
    minibatches: int = 4
    lr: float = 0.05
    value_lr: float = 0.05


def climb(
    model: ScoredModel,
    lanes: Sequence[Lane],
    prepare: Callable[[ScoredRollout, float], Experience],
    loss: Callable[[Experience, Fresh, int], Loss],
    pace: Pace,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Float[Tensor, "lane prefix vocab"]:
    """Logits of every lane's policy after training from the reference.

    Adam, its rates decayed linearly to zero; the critic is a table too and starts at zero. Each
    iteration prepares the lanes in their order; `watch` is then shown its number and the logits.
    """
    world, n = model.world, len(lanes)
    ids, states = world.rollout.response_ids, world.string_states
    generators = [torch.Generator().manual_seed(lane.seed) for lane in lanes]
    logits = model.reference.repeat(n, 1, 1).requires_grad_()
    values = torch.zeros(n, len(world.prefixes), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam(
        [{"params": [logits], "lr": pace.lr}, {"params": [values], "lr": pace.value_lr}]
    )
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / pace.iterations)
    everything = scored_rollout(
        world, world.rollout, policy=logits[0], reference=model.reference, scores=model.scores
    )
    prompts = torch.arange(pace.rollouts) // pace.group
    for iteration in range(pace.iterations):
        # Every lane writes and learns from strings of its own.
        drawn, experiences = list[Tensor](), list[Experience]()
        with torch.no_grad():
            tables = logits.log_softmax(-1)[:, states, ids] * world.mask
            for lane, table in enumerate(tables):
                drawn.append(_draw(table, pace.rollouts, generators[lane]))
                every = replace(
                    everything,
                    rollout_logprobs=table,
                    kl=world.at_tokens(world.state_kl(logits[lane], model.reference)),
                    values=world.at_tokens(values[lane]),
                )
                scored = select(every, drawn[lane])
                scored = replace(scored, rollout=replace(scored.rollout, prompt_index=prompts))
                experiences.append(prepare(scored, lanes[lane].beta))
        experience, strings = concatenate(experiences), torch.cat(drawn)
        for _ in range(pace.epochs):
            orders = torch.stack(
                [torch.randperm(pace.rollouts, generator=generator) for generator in generators]
            )
            for rows in orders.chunk(pace.minibatches, dim=1):
                flat = (rows + pace.rollouts * torch.arange(n)[:, None]).flatten()
                whose = torch.arange(n).repeat_interleave(rows.shape[1])[:, None]
                part = select(experience, flat)
                at, chosen = states[strings[flat]], ids[strings[flat]]
                kl = world.state_kl(logits, model.reference)
                fresh = Fresh(
                    logprobs=logits.log_softmax(-1)[whose, at, chosen],
                    values=values[whose, at],
                    kl=kl[whose, at],
                )
                optimizer.zero_grad()
                loss(part, fresh, int(part.mask.sum())).total.backward()
                optimizer.step()
        decay.step()
        if watch is not None:
            watch(iteration + 1, logits.detach())
    return logits.detach()


def _draw(
    logprobs: Float[Tensor, "string token"], count: int, generator: torch.Generator
) -> Int[Tensor, " count"]:
    """Numbers of strings, drawn with the probability that their tokens have together."""
    return torch.multinomial(logprobs.sum(-1).exp(), count, replacement=True, generator=generator)


def concatenate(parts: Sequence[Any]) -> Any:
    """Rows of several experiences as one."""
    joined: dict[str, Any] = {}
    for field in fields(parts[0]):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], Tensor):
            joined[field.name] = torch.cat(values)
        elif values[0] is not None:
            joined[field.name] = concatenate(values)
    return replace(parts[0], **joined)
