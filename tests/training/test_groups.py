"""A β for each response, a leash for each group: on the oracle, each comes to its own budget."""

import math
from collections.abc import Sequence
from dataclasses import replace

import oracles
import pytest
import torch
from jaxtyping import Float
from oracles import scored_rollout
from random_rollouts import scored
from tabular_ascent import concatenate
from torch import Tensor

from kleash.algorithms import grpo, ppo, rloo
from kleash.algorithms.common import select
from kleash.algorithms.rewards import kl_shaped_rewards
from kleash.errors import ScoringError
from kleash.kl.control.controllers import BetaState, BudgetBeta, Measurement, initial_beta
from kleash.kl.control.groups import OTHERS, Leash, betas_of, raise_betas, rows_by_group
from kleash.training.kl_control import measurements, read_groups
from kleash.training.metrics import account, objective_measures
from kleash.types import Experience, Fresh, ScoredRollout

BETAS = torch.tensor([0.5, 0.0, 0.25, 0.5, 2.0, 0.25], dtype=torch.float64)


def of_each(settings: ppo.PPOSettings, betas: Tensor | float) -> Experience:
    return ppo.prepare(scored(per_prompt=2), betas, settings)


def test_a_row_is_charged_at_its_own_price():
    data = scored()
    mask = data.rollout.response_mask
    rewards = kl_shaped_rewards(data.scores, data.kl, BETAS, mask)
    spent = torch.where(mask, data.kl, 0.0).sum(-1)
    torch.testing.assert_close(rewards.sum(-1), data.scores - BETAS.float() * spent)
    alone = [
        kl_shaped_rewards(data.scores[i : i + 1], data.kl[i : i + 1], float(b), mask[i : i + 1])
        for i, b in enumerate(BETAS)
    ]
    assert torch.equal(rewards, torch.cat(alone))
    poisoned = torch.where(mask & (torch.arange(6) == 1)[:, None], torch.nan, data.kl)
    assert torch.equal(kl_shaped_rewards(data.scores, poisoned, BETAS, mask), rewards)


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_a_price_is_a_number_and_not_negative(bad: float):
    data = scored()
    betas = BETAS.clone()
    betas[3] = bad
    with pytest.raises(ValueError, match="beta must be finite and not negative"):
        kl_shaped_rewards(data.scores, data.kl, betas, data.rollout.response_mask)


@pytest.mark.parametrize("placement", ["reward_k1", "exact"])
def test_one_price_for_each_is_one_price_for_all(placement: str):
    """Also whitened: whitening looks at the advantages, however they came to be priced."""
    settings = ppo.PPOSettings(placement=placement)  # pyright: ignore[reportArgumentType]
    one, each = of_each(settings, 0.3), of_each(settings, torch.full((6,), 0.3).double())
    for name in ("rewards", "advantages", "returns", "pathwise"):
        ours, theirs = getattr(one, name), getattr(each, name)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs), name


def test_the_differentiated_part_has_the_price_of_its_row():
    mask = scored().rollout.response_mask
    settings = ppo.PPOSettings(placement="exact", whiten_advantages=False)
    weight = of_each(settings, BETAS).pathwise
    assert weight is not None
    torch.testing.assert_close(weight, torch.where(mask, BETAS.float()[:, None], 0.0))


@pytest.mark.parametrize("algorithm", [ppo, grpo, rloo])
@pytest.mark.parametrize("placement", ["reward_k1", "exact"])
def test_every_algorithm_adds_up_to_score_less_price_times_kl(algorithm, placement: str):
    data = scored(per_prompt=2)
    betas = torch.tensor([0.5, 0.5, 0.25, 0.25, 2.0, 2.0], dtype=torch.float64)
    kinds = {ppo: ppo.PPOSettings, grpo: grpo.GRPOSettings, rloo: rloo.RLOOSettings}
    whole = algorithm.prepare(data, betas, kinds[algorithm](placement=placement))
    for group in range(3):  # prompts do not meet in rewards: each alone gives the same
        rows = torch.tensor([2 * group, 2 * group + 1])
        alone = algorithm.prepare(
            select(data, rows), float(betas[2 * group]), kinds[algorithm](placement=placement)
        )
        assert torch.equal(whole.rewards[rows], alone.rewards)


def test_the_accounting_identity_holds_with_a_price_for_each():
    settings = ppo.PPOSettings(placement="mixed", mixing=0.5)
    experience = of_each(settings, BETAS)
    assert account(settings, experience, BETAS) < 1e-6
    with pytest.raises(ScoringError, match="do not add up"):
        account(settings, experience, BETAS.flip(0))
    data = scored()
    spent = torch.where(data.rollout.response_mask, data.kl, 0.0).sum(-1).double()
    told = objective_measures(data, beta=BETAS)
    objective = float((data.scores.double() - BETAS * spent).mean())
    assert told["objective/rlhf_reward"] == pytest.approx(objective)


def test_a_group_that_was_not_read_stays_as_it_is():
    leash = Leash({"a": BudgetBeta(1.0, 0.5), OTHERS: BudgetBeta(2.0, 0.25)})
    states = leash.init()
    after = leash.update(states, {"a": Measurement(3.0, 0.1, 8)})
    assert after[OTHERS] == states[OTHERS] and after["a"].updates == 1
    assert betas_of(states, [OTHERS, "a", OTHERS]).tolist() == [0.25, 0.5, 0.25]
    assert [s.beta for s in raise_betas(states, 2.0).values()] == [1.0, 0.5]


def test_the_groups_of_a_rollout_are_read_apart():
    data, groups = scored(batch=6, per_prompt=2), ["b", "b", "a", "a", "b", "b"]
    readings = read_groups(data, groups, trained=data.scores)
    for group, rows in rows_by_group(groups).items():
        part = select(data, torch.tensor(rows))
        alone = read_groups(part, [OTHERS] * len(rows), trained=part.scores)[OTHERS]
        assert readings[group] == alone
    assert readings["a"].kl.standard_error is None  # a single prompt
    told = measurements(readings, {}, follow_scores=True)
    assert math.isnan(told["a"].standard_error) and told["b"].standard_error > 0
    assert told["a"].score_variance == pytest.approx(float(data.scores[2:4].var()))
    assert measurements(readings, {}, follow_scores=False)["a"].score_variance is None


# --- two prompts on the oracle, each in a group of its own, in one batch

MODEL = oracles.fixed_point_model()
WORLD = MODEL.world
TARGETS = {"near": 0.25, "far": 1.0}
SCORES = {"near": MODEL.scores, "far": 4 * MODEL.scores.flip(0)}
RESPONSES, ITERATIONS = 256, 60


class TwoPrompts:
    """Tables of two prompts that share nothing, trained by PPO on one batch of both."""

    settings = ppo.PPOSettings(value_clip_range=None, whiten_advantages=False)

    def __init__(self) -> None:
        self.logits = MODEL.reference.repeat(2, 1, 1).requires_grad_()
        self.values = torch.zeros(2, len(WORLD.prefixes), dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.Adam(
            [{"params": [self.logits], "lr": 0.02}, {"params": [self.values], "lr": 0.05}]
        )
        self.decay = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda i: 1 - 0.9 * i / ITERATIONS
        )
        self.generator = torch.Generator().manual_seed(0)

    def kl(self) -> list[float]:
        return [float(WORLD.kl(table, MODEL.reference)) for table in self.logits.detach()]

    @torch.no_grad()
    def write(self) -> tuple[ScoredRollout, Tensor]:
        parts, drawn = list[ScoredRollout](), list[Tensor]()
        for number, (table, scores) in enumerate(zip(self.logits, SCORES.values(), strict=True)):
            p = WORLD.probabilities(table)
            drawn.append(torch.multinomial(p, RESPONSES, True, generator=self.generator))
            seen = scored_rollout(
                WORLD,
                WORLD.rollout_of(drawn[-1]),
                policy=table,
                reference=MODEL.reference,
                scores=scores,
                values=self.values[number],
            )
            # Each response counts as a prompt of its own: standard errors have clusters.
            index = torch.arange(RESPONSES) + RESPONSES * number
            parts.append(replace(seen, rollout=replace(seen.rollout, prompt_index=index)))
        return concatenate(parts), torch.cat(drawn)

    def learn(self, experience: Experience, strings: Tensor) -> None:
        states, ids = WORLD.string_states, WORLD.rollout.response_ids
        whose = torch.arange(2).repeat_interleave(RESPONSES)
        for _ in range(2):
            for rows in torch.randperm(2 * RESPONSES, generator=self.generator).chunk(4):
                part, own = select(experience, rows), whose[rows][:, None]
                at, chosen = states[strings[rows]], ids[strings[rows]]
                fresh = Fresh(
                    logprobs=self.logits.log_softmax(-1)[own, at, chosen],
                    values=self.values[own, at],
                )
                self.optimizer.zero_grad()
                ppo.loss(part, fresh, self.settings, tokens=int(part.mask.sum())).total.backward()
                self.optimizer.step()
        self.decay.step()


def spread_of(scores: Float[Tensor, " string"]) -> float:
    p = WORLD.probabilities(MODEL.reference)
    return math.sqrt(float((p * scores.square()).sum() - (p * scores).sum().square()))


def test_two_groups_come_each_to_its_own_budget_and_beta():
    world, groups = TwoPrompts(), [name for name in TARGETS for _ in range(RESPONSES)]
    leash = Leash(
        {
            name: BudgetBeta(target, initial_beta(target, spread_of(SCORES[name])))
            for name, target in TARGETS.items()
        }
    )
    states, kls, betas = leash.init(), list[list[float]](), list[Sequence[float]]()
    for _ in range(ITERATIONS):
        seen, strings = world.write()
        kls.append(world.kl())
        betas.append([state.beta for state in states.values()])
        world.learn(ppo.prepare(seen, betas_of(states, groups), world.settings), strings)
        told = measurements(read_groups(seen, groups, trained=seen.scores), {}, follow_scores=True)
        states = leash.update(states, told)
    last = slice(-ITERATIONS // 3, None)
    for i, (name, target) in enumerate(TARGETS.items()):
        exact = WORLD.beta_for_kl(MODEL.reference, SCORES[name], target)
        assert torch.tensor(kls)[last, i].mean() == pytest.approx(target, rel=0.1), name
        assert torch.tensor(betas)[last, i].mean() == pytest.approx(exact, rel=0.1), name
    assert all(isinstance(state, BetaState) for state in states.values())
