"""Distillation by enumeration: which gradient each choice really has, for every divergence."""

import math
from dataclasses import replace

import pytest
import torch
from oracles import GradientModels, TabularModel, gradient_models, scored_rollout
from ragged_rollouts import ragged, with_padding
from torch import Tensor

from kleash.algorithms import distill
from kleash.algorithms.common import select
from kleash.algorithms.distill import DistillSettings
from kleash.errors import NonFiniteError
from kleash.rollout.scoring_pass import distilled
from kleash.scoring.divergences import Divergence
from kleash.types import Experience, Fresh

DIVERGENCES: tuple[Divergence, ...] = ("reverse_kl", "forward_kl", "jensen_shannon")


def state_divergence(name: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """Of every state, from the tables; no probability is 0."""
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    log_m = (log_p.exp() + log_q.exp()).log() - math.log(2)

    def kl(one: Tensor, other: Tensor) -> Tensor:
        return (one.exp() * (one - other)).sum(-1)

    match name:
        case "reverse_kl":
            return kl(log_p, log_q)
        case "forward_kl":
            return kl(log_q, log_p)
        case "jensen_shannon":
            return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


def teacher_of(models: GradientModels) -> Tensor:
    """Another table than the policy, the reference and the sampler."""
    return models.world.random_logits(7)


def every_string(models: GradientModels, sampler: Tensor, settings: DistillSettings) -> Experience:
    scored = scored_rollout(
        models.world,
        models.world.rollout,
        policy=sampler,
        reference=models.reference,
        scores=models.world.random_scores(2),
    )
    return distill.prepare(scored, 0.4, settings)


def expected_gradient(models: GradientModels, sampler: Tensor, settings: DistillSettings) -> Tensor:
    """Of the loss over all strings, each at its probability under who wrote it."""
    experience = every_string(models, sampler, settings)
    student, teacher, start = (
        TabularModel(models.world, table)
        for table in (models.policy, teacher_of(models), models.reference)
    )
    fresh = distilled(
        experience,
        policy=student,
        teacher=teacher,
        divergence=settings.divergence,
        reference=None if settings.placement == "measure" else start,
    )
    weight = models.world.probabilities(sampler)[:, None]
    assert fresh.divergence is not None
    pathwise = experience.pathwise
    weighted = replace(experience, pathwise=None if pathwise is None else pathwise * weight)
    once = replace(fresh, divergence=fresh.divergence * weight)
    result = distill.loss(weighted, once, settings, tokens=1)
    (found,) = torch.autograd.grad(result.total, student.logits)
    return found


def along_the_way(models: GradientModels, table: Tensor, of_state: Tensor) -> Tensor:
    """Expected sum over the tokens of a response, of a number per state."""
    return (models.world.visits(table) * of_state).sum()


def gap(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_token_gradient_holds_the_prefixes_fixed(divergence: Divergence) -> None:
    models = gradient_models()
    table = models.policy.clone().requires_grad_()
    of_state = state_divergence(divergence, table, teacher_of(models))
    fixed = (models.world.visits(models.policy).detach() * of_state).sum()
    (token,) = torch.autograd.grad(fixed, table)
    found = expected_gradient(models, models.policy, DistillSettings(divergence=divergence))
    assert gap(found, token) < 1e-8
    (whole,) = torch.autograd.grad(
        along_the_way(models, table, state_divergence(divergence, table, teacher_of(models))), table
    )
    assert gap(found, whole) > 0.05


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("writer", ["policy", "sampler"])
def test_a_sequence_gradient_is_that_of_the_expected_sum_whoever_wrote(
    divergence: Divergence, writer: str
) -> None:
    models = gradient_models()
    table = models.policy.clone().requires_grad_()
    of_state = state_divergence(divergence, table, teacher_of(models))
    (true,) = torch.autograd.grad(along_the_way(models, table, of_state), table)
    settings = DistillSettings(divergence=divergence, gradient="sequence")
    assert gap(expected_gradient(models, getattr(models, writer), settings), true) < 1e-8


def test_the_sequence_gradient_of_the_reverse_kl_is_that_of_whole_responses() -> None:
    models = gradient_models()
    table = models.policy.clone().requires_grad_()
    (true,) = torch.autograd.grad(models.world.kl(table, teacher_of(models)), table)
    settings = DistillSettings(gradient="sequence")
    assert gap(expected_gradient(models, models.policy, settings), true) < 1e-8


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_leash_adds_the_gradient_of_its_own_kl(divergence: Divergence) -> None:
    models = gradient_models()
    table = models.policy.clone().requires_grad_()
    of_state = state_divergence(divergence, table, teacher_of(models))
    objective = along_the_way(models, table, of_state)
    objective = objective + 0.4 * models.world.kl(table, models.reference)
    (true,) = torch.autograd.grad(objective, table)
    settings = DistillSettings(
        divergence=divergence, gradient="sequence", placement="exact_weighted"
    )
    assert gap(expected_gradient(models, models.sampler, settings), true) < 1e-8


def test_what_padding_holds_changes_nothing() -> None:
    scored, fresh = ragged()
    mask = scored.rollout.response_mask
    settings = DistillSettings(gradient="sequence", placement="exact_weighted")
    results = []
    for poison in (0.0, math.nan, math.inf):
        batch = distill.prepare(with_padding(scored, mask, poison), 0.2, settings)
        now = with_padding(replace(fresh, divergence=fresh.kl), mask, poison)
        results.append(distill.loss(batch, now, settings, tokens=30))
    assert all(torch.equal(results[0].total, spoiled.total) for spoiled in results[1:])
    assert {"loss/distill", "loss/kl", "policy/approx_kl"} <= set(results[0].metrics)


def test_no_score_takes_part_and_dropped_responses_are_out() -> None:
    scored, fresh = ragged()
    now = replace(fresh, divergence=fresh.kl)
    kept, dropped = DistillSettings(), DistillSettings(truncated="drop")
    for settings in (kept, dropped):
        one = distill.prepare(scored, 0.0, settings)
        other = distill.prepare(replace(scored, scores=scored.scores + 5), 0.0, settings)
        assert not any(x.any() for x in (one.rewards, one.advantages, one.returns))
        totals = [distill.loss(each, now, settings, tokens=9).total for each in (one, other)]
        assert torch.equal(*totals)
    assert torch.equal(distill.prepare(scored, 0.0, dropped).mask.any(-1), scored.rollout.ended)


def test_an_infinite_divergence_names_response_and_token() -> None:
    scored, fresh = ragged()
    settings = DistillSettings()
    batch = distill.prepare(scored, 0.0, settings)
    divergence = fresh.kl.clone()
    divergence[6, 1] = math.inf
    with pytest.raises(NonFiniteError, match=r"divergence from the teacher .* token 1 of response"):
        distill.loss(batch, Fresh(fresh.logprobs, divergence=divergence), settings, tokens=1)
    with pytest.raises(ValueError, match=r"needs Fresh\.divergence, got None"):
        distill.loss(batch, Fresh(fresh.logprobs), settings, tokens=1)


def test_a_leash_that_charges_rewards_is_refused() -> None:
    with pytest.raises(ValueError, match="distillation has no rewards: use 'exact_weighted'"):
        DistillSettings(placement="reward_k1")
    with pytest.raises(ValueError, match="allow_biased"):
        DistillSettings(placement="loss_exact")
    with pytest.raises(ValueError, match="got an algorithm without a critic"):
        DistillSettings(truncated="bootstrap")
    assert DistillSettings(placement="loss_exact", allow_biased=True).mixing is None


def test_a_microbatch_that_is_cut_short_gives_the_numbers_of_the_whole() -> None:
    models = gradient_models()
    experience = every_string(models, models.policy, DistillSettings())
    student = TabularModel(models.world, models.policy)
    teacher = TabularModel(models.world, teacher_of(models))
    whole = distilled(experience, policy=student, teacher=teacher, divergence="jensen_shannon")
    short = (experience.mask.sum(-1) <= 2).nonzero().flatten()
    some = select(experience, short)
    part = distilled(some, policy=student, teacher=teacher, divergence="jensen_shannon")
    assert whole.divergence is not None and part.divergence is not None
    torch.testing.assert_close(part.divergence, whole.divergence[short])
