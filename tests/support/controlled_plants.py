"""Policies in training, as a controller sees them: a KL that follows β, late and with noise.

Three plants over the enumerable oracle, several *lanes* side by side, each with its own reward
scale and seed: `Lagging` moves along the closed form, `ExactGradient` climbs the exact objective,
`SampledPPO` is the engine's own algorithm on sampled strings. A plant is measured, then advanced
under one β per lane; `closed_loop` joins plants and controllers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Float
from oracles import ScoredModel, scored_rollout
from tabular_ascent import concatenate
from torch import Tensor

from kleash.algorithms import ppo
from kleash.algorithms.common import select
from kleash.kl.control.controllers import BetaController, BetaState, BudgetBeta, Measurement
from kleash.types import Experience, Fresh


@dataclass(frozen=True)
class Lane:
    """One run: its score is `scale` times the model's."""

    scale: float
    seed: int


@dataclass(frozen=True)
class Reading:
    kl: float
    """The true KL, which no controller sees."""
    measurement: Measurement


class Plant(Protocol):
    lanes: Sequence[Lane]

    def measure(self) -> list[Reading]: ...
    def advance(self, betas: Sequence[float]) -> None: ...


@dataclass(frozen=True)
class History:
    kl: Float[Tensor, "iteration lane"]
    beta: Float[Tensor, "iteration lane"]


def closed_loop(plant: Plant, controllers: Sequence[BetaController], iterations: int) -> History:
    """Measure, update β, train under it, as the loop does."""
    states = [controller.init() for controller in controllers]
    kls, betas = list[list[float]](), list[list[float]]()
    for _ in range(iterations):
        readings = plant.measure()
        kls.append([reading.kl for reading in readings])
        betas.append([state.beta for state in states])
        plant.advance(betas[-1])
        states = [
            controller.update(state, reading.measurement)
            for controller, state, reading in zip(controllers, states, readings, strict=True)
        ]
    return History(torch.tensor(kls, dtype=torch.float64), torch.tensor(betas).double())


class Lagging:
    """The closed form with a lag: 1/β of the policy goes `rate` of the way to that asked for.

    With `delay` iterations in which nothing is felt, and readings off by `noise` times the KL.
    """

    def __init__(
        self,
        model: ScoredModel,
        lanes: Sequence[Lane],
        *,
        rate: float,
        noise: float = 0.0,
        delay: int = 0,
    ) -> None:
        self.model, self.lanes, self.rate, self.noise = model, lanes, rate, noise
        self.tilts = [0.0] * len(lanes)
        self.asked = [[0.0] * len(lanes)] * delay
        self.generators = [torch.Generator().manual_seed(lane.seed) for lane in lanes]

    def measure(self) -> list[Reading]:
        world, readings = self.model.world, list[Reading]()
        for tilt, lane, generator in zip(self.tilts, self.lanes, self.generators, strict=True):
            scores = self.model.scores * lane.scale
            log_p = world.string_logprobs(self.model.reference)
            log_best = (log_p + tilt * scores).log_softmax(-1)
            best = log_best.exp()
            kl = float((best * (log_best - log_p)).sum()) if tilt > 0 else 0.0
            off = self.noise * kl * float(torch.randn((), generator=generator))
            variance = float(variance_under(best, scores))
            readings.append(Reading(kl, Measurement(kl + off, self.noise * kl, 128, variance)))
        return readings

    def advance(self, betas: Sequence[float]) -> None:
        self.asked.append([1 / beta for beta in betas])
        goals = self.asked.pop(0)
        self.tilts = [
            tilt + self.rate * (goal - tilt) for tilt, goal in zip(self.tilts, goals, strict=True)
        ]


class ExactGradient:
    """Adam on the exact objective divided by β, `steps` times an iteration."""

    def __init__(
        self, model: ScoredModel, lanes: Sequence[Lane], *, lr: float = 0.02, steps: int = 8
    ) -> None:
        self.model, self.lanes, self.steps = model, lanes, steps
        self.logits = model.reference.repeat(len(lanes), 1, 1).requires_grad_()
        self.optimizer = torch.optim.Adam([self.logits], lr=lr)

    def measure(self) -> list[Reading]:
        world, readings = self.model.world, list[Reading]()
        for logits, lane in zip(self.logits.detach(), self.lanes, strict=True):
            kl = float(world.kl(logits, self.model.reference))
            p = world.probabilities(logits)
            variance = float(variance_under(p, self.model.scores * lane.scale))
            readings.append(Reading(kl, Measurement(kl, 0.0, 128, variance)))
        return readings

    def advance(self, betas: Sequence[float]) -> None:
        world, reference = self.model.world, self.model.reference
        log_ref = world.string_logprobs(reference)
        scales = torch.tensor([lane.scale for lane in self.lanes], dtype=torch.float64)
        tilts = scales / torch.tensor(betas, dtype=torch.float64)
        states, ids = world.string_states, world.rollout.response_ids
        for _ in range(self.steps):
            tokens = self.logits.log_softmax(-1)[:, states, ids]
            log_p = torch.where(world.mask, tokens, 0.0).sum(-1)
            gained = tilts[:, None] * self.model.scores - (log_p - log_ref)
            self.optimizer.zero_grad()
            (-(log_p.exp() * gained).sum()).backward()
            self.optimizer.step()


@dataclass(frozen=True)
class Pace:
    iterations: int
    responses: int
    lr: float = 0.02
    epochs: int = 4
    minibatches: int = 4


class SampledPPO:
    """The engine's PPO on strings drawn from tables; rates fall linearly to a tenth.

    The critic is a table in units of the lane's scale, so that every scale learns alike. The KL
    measured is that of the strings drawn: exact at each of their states.
    """

    settings = ppo.PPOSettings(value_clip_range=None)

    def __init__(self, model: ScoredModel, lanes: Sequence[Lane], pace: Pace) -> None:
        self.model, self.lanes, self.pace = model, lanes, pace
        count, world = len(lanes), model.world
        self.logits = model.reference.repeat(count, 1, 1).requires_grad_()
        self.values = torch.zeros(count, len(world.prefixes), dtype=torch.float64)
        self.values.requires_grad_()
        self.optimizer = torch.optim.Adam(
            [{"params": [self.logits], "lr": pace.lr}, {"params": [self.values], "lr": 0.05}]
        )
        self.decay = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda i: 1 - 0.9 * i / pace.iterations
        )
        self.generators = [torch.Generator().manual_seed(lane.seed) for lane in lanes]
        self.scales = torch.tensor([lane.scale for lane in lanes], dtype=torch.float64)
        self.drawn = list[Tensor]()

    @cached_property
    def everything(self) -> ppo.ScoredRollout:
        world = self.model.world
        return scored_rollout(
            world,
            world.rollout,
            policy=self.model.reference,
            reference=self.model.reference,
            scores=self.model.scores,
        )

    @torch.no_grad()
    def measure(self) -> list[Reading]:
        world, count, readings = self.model.world, self.pace.responses, list[Reading]()
        self.drawn = []
        for lane, (logits, generator) in enumerate(zip(self.logits, self.generators, strict=True)):
            p = world.probabilities(logits)
            rows = torch.multinomial(p, count, replacement=True, generator=generator)
            spent = world.at_tokens(world.state_kl(logits, self.model.reference)).sum(-1)
            measurement = Measurement(
                response_kl=float(spent[rows].mean()),
                standard_error=float(spent[rows].std()) / count**0.5,
                responses=count,
                score_variance=float((self.scales[lane] * self.model.scores[rows]).var()),
            )
            self.drawn.append(rows)
            readings.append(Reading(float((p * spent).sum()), measurement))
        return readings

    def advance(self, betas: Sequence[float]) -> None:
        world, count, n = self.model.world, self.pace.responses, len(self.lanes)
        states, ids = world.string_states, world.rollout.response_ids
        experience: Experience = concatenate(
            [self._experience(lane, beta) for lane, beta in enumerate(betas)]
        )
        strings = torch.cat(self.drawn)
        for _ in range(self.pace.epochs):
            orders = torch.stack(
                [torch.randperm(count, generator=generator) for generator in self.generators]
            )
            for rows in orders.chunk(self.pace.minibatches, dim=1):
                flat = (rows + count * torch.arange(n)[:, None]).flatten()
                whose = torch.arange(n).repeat_interleave(rows.shape[1])[:, None]
                part, at = select(experience, flat), states[strings[flat]]
                fresh = Fresh(
                    logprobs=self.logits.log_softmax(-1)[whose, at, ids[strings[flat]]],
                    values=self.scales[whose] * self.values[whose, at],
                )
                self.optimizer.zero_grad()
                ppo.loss(part, fresh, self.settings, tokens=int(part.mask.sum())).total.backward()
                self.optimizer.step()
        self.decay.step()

    @torch.no_grad()
    def _experience(self, lane: int, beta: float) -> Experience:
        world, logits = self.model.world, self.logits[lane]
        scale = self.lanes[lane].scale
        seen = replace(
            self.everything,
            rollout_logprobs=world.token_logprobs(logits),
            kl=world.at_tokens(world.state_kl(logits, self.model.reference)),
            scores=scale * self.model.scores,
            values=scale * world.at_tokens(self.values[lane]),
        )
        return ppo.prepare(select(seen, self.drawn[lane]), beta, self.settings)


def variance_under(p: Float[Tensor, " string"], scores: Float[Tensor, " string"]) -> Tensor:
    return (p * scores.square()).sum() - (p * scores).sum().square()


def score_sd(model: ScoredModel) -> float:
    """Standard deviation of the score under the reference."""
    p = model.world.probabilities(model.reference)
    return float(variance_under(p, model.scores).sqrt())


def reference_scores(
    model: ScoredModel, lane: Lane, *, prompts: int = 32, responses: int = 32
) -> Float[Tensor, "prompt sample"]:
    """Scores of strings drawn from the reference, as a run draws them before its first update."""
    generator = torch.Generator().manual_seed(1000 + lane.seed)
    p = model.world.probabilities(model.reference)
    rows = torch.multinomial(p, prompts * responses, replacement=True, generator=generator)
    return lane.scale * model.scores[rows].view(prompts, responses)


@dataclass(frozen=True)
class GivenBeta:
    """A budget whose starting β was given: nobody measures the variance of the scores for it."""

    budget: BudgetBeta

    def init(self) -> BetaState:
        return self.budget.init()

    def update(self, state: BetaState, measurement: Measurement) -> BetaState:
        return self.budget.update(state, replace(measurement, score_variance=None))


@dataclass(frozen=True)
class Course:
    """What a run did, relative to its target; every figure is of the true KL."""

    settling: int
    """First iteration from which the running mean of 10 iterations stays within 10 %."""
    overshoot: float
    """Peak over target, less 1."""
    end: float
    """Mean of the last ten iterations over target, less 1."""
    after_third: float
    """Mean after the first third over target, less 1."""
    beta: float
    """Mean β of the last third over the exact β*, less 1."""
    last_beta: float
    """The last β over the exact β*, less 1."""


def course(
    kl: Float[Tensor, " iteration"],
    beta: Float[Tensor, " iteration"],
    *,
    target: float,
    exact_beta: float,
) -> Course:
    n = len(kl)
    running = kl.unfold(0, 10, 1).mean(1) / target - 1
    off = (running.abs() > 0.1).nonzero()
    return Course(
        settling=int(off[-1]) + 1 if len(off) else 0,
        overshoot=float(kl.max()) / target - 1,
        end=float(kl[-10:].mean()) / target - 1,
        after_third=float(kl[n // 3 :].mean()) / target - 1,
        beta=float(beta[-n // 3 :].mean()) / exact_beta - 1,
        last_beta=float(beta[-1]) / exact_beta - 1,
    )
