"""Every correction's expected gradient when another law wrote, by enumeration, and its closed form.

121 strings (vocabulary 4, at most 4 tokens). The sampler σ is a table of its own, 0.11 nats from
the policy π that learns. The closed forms go over *states*: visits of σ, a measure m(v|c) of the
token that a correction really weighs by, and values by backward recursion. The gradients under test
go over *strings*, or over all pairs of them through `rloo.prepare` and `rloo.loss`.
"""

import math
from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
from expected_gradients import expected_gradient
from ragged_rollouts import ragged, with_padding
from torch import Tensor

from kleash.algorithms import grpo, ppo, rloo
from kleash.algorithms.grpo import GRPOSettings
from kleash.algorithms.ppo import PPOSettings
from kleash.algorithms.rloo import RLOOSettings
from kleash.algorithms.sampler_correction import (
    Correction,
    check_correction,
    correction_gradient,
    correction_numbers,
    prefix_start,
    sampler_weights,
)
from kleash.errors import ScoringError
from kleash.kl.placements import Placement
from kleash.types import Fresh, ScoredRollout

MODELS = oracles.gradient_models()
WORLD = MODELS.world
POLICY, SAMPLER, REFERENCE = MODELS.policy, MODELS.sampler, MODELS.reference
BETA = 0.3
SCORES = WORLD.random_scores(5)
STRINGS = {
    "rollout_logprobs": WORLD.token_logprobs(POLICY),
    "sampler_logprobs": WORLD.token_logprobs(SAMPLER),
    "mask": WORLD.mask,
}


def found(
    correction: Correction, clip: float | None, placement: Placement = "reward_k1", **more: float
) -> Tensor:
    """Expected gradient, to go up, of what RLOO makes of responses that σ wrote."""
    settings = RLOOSettings(
        correction=correction, correction_clip=clip, placement=placement, **more
    )
    return -expected_gradient(rloo.prepare, rloo.loss, settings, SCORES, BETA, sampler=SAMPLER)


def objective_gradient(beta: float = BETA) -> Tensor:
    """∇(E_π[score] − β KL(π‖π_ref)): what samples of the policy itself would give."""
    table = POLICY.clone().requires_grad_()
    (true,) = torch.autograd.grad(WORLD.objective(table, REFERENCE, SCORES, beta), table)
    return true


def laws() -> tuple[Tensor, Tensor, Tensor]:
    """π, σ and their ratio in every state, for every token."""
    pi, sigma = POLICY.softmax(-1), SAMPLER.softmax(-1)
    return pi, sigma, pi / sigma


def objective_of_strings() -> Tensor:
    """score − β Σ k1 of every string, less its mean under σ: RLOO's advantage, on average."""
    k1 = WORLD.string_logprobs(POLICY) - WORLD.string_logprobs(REFERENCE)
    objective = SCORES - BETA * k1
    return objective - (WORLD.probabilities(SAMPLER) * objective).sum()


def closed_form_of_token_weights(measure: Tensor) -> Tensor:
    r"""Σ_c d_σ(c) Σ_v m(v|c) ∇log π(v|c) Q_σ(c, v): states and what follows stay the sampler's."""
    sigma = SAMPLER.softmax(-1)
    _, q = WORLD.backward(objective_of_strings(), lambda i, ahead: (sigma[i] * ahead).sum())
    weighted = measure * q
    # Σ_v w_v ∇log π(v) with respect to the logits of the state: w − π Σ w.
    gradient = weighted - POLICY.softmax(-1) * weighted.sum(-1, keepdim=True)
    return WORLD.visits(SAMPLER)[:, None] * gradient


def closed_form_of_whole_responses(clip: float) -> Tensor:
    """Σ_y min(π(y), c σ(y)) A(y) ∇log π(y): the mass of the policy that the clip leaves."""
    kept = torch.minimum(WORLD.probabilities(POLICY), clip * WORLD.probabilities(SAMPLER))
    table = POLICY.clone().requires_grad_()
    sum_ = (kept * objective_of_strings() * WORLD.string_logprobs(table)).sum()
    return torch.autograd.grad(sum_, table)[0]


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


CLIP = 1.5
"""Small enough that some ratios of the planted sampler are beyond it, both ways."""


def test_the_planted_sampler_has_ratios_beyond_the_clip() -> None:
    _, _, ratio = laws()
    assert float(ratio.max()) > CLIP
    assert float(ratio.min()) < 1 / CLIP
    whole = WORLD.probabilities(POLICY) / WORLD.probabilities(SAMPLER)
    assert float(whole.max()) > CLIP
    assert float(WORLD.kl(SAMPLER, POLICY)) == pytest.approx(0.1051, abs=1e-4)


@pytest.mark.parametrize(
    ("correction", "clip"),
    [
        ("none", None),
        ("token_truncated", None),
        ("token_truncated", CLIP),
        ("masked", CLIP),
    ],
)
def test_token_weights_have_the_gradient_of_their_row(
    correction: Correction, clip: float | None
) -> None:
    pi, sigma, ratio = laws()
    measure = {
        ("none", None): sigma,
        ("token_truncated", None): pi,
        ("token_truncated", CLIP): torch.minimum(pi, CLIP * sigma),
        ("masked", CLIP): torch.where((ratio <= CLIP) & (ratio >= 1 / CLIP), pi, 0.0),
    }[correction, clip]
    assert far(found(correction, clip), closed_form_of_token_weights(measure)) < 1e-8
    assert far(found(correction, clip), objective_gradient()) > 0.05
    kind = correction_gradient(correction, clip, "reward_k1").kind
    assert kind == ("uncorrected" if correction == "none" else "token-local")


@pytest.mark.parametrize("clip", [1.1, CLIP, 2.0])
def test_truncated_responses_have_the_gradient_of_their_row(clip: float) -> None:
    gradient = found("sequence_truncated", clip)
    assert far(gradient, closed_form_of_whole_responses(clip)) < 1e-8
    assert correction_gradient("sequence_truncated", clip, "reward_k1").kind == "truncated"
    # ‖bias‖ ≤ (mass of π beyond the clip) · max_y ‖A(y) ∇log π(y)‖.
    pi, sigma = WORLD.probabilities(POLICY), WORLD.probabilities(SAMPLER)
    lost = float((pi - clip * sigma).clamp(min=0).sum())
    table = POLICY.clone().requires_grad_()
    rows = torch.autograd.functional.jacobian(WORLD.string_logprobs, table).flatten(1)
    largest = float((objective_of_strings()[:, None] * rows).norm(dim=-1).max())
    bias = float((gradient - objective_gradient()).norm())
    assert 0 < bias <= lost * largest


@pytest.mark.parametrize("placement", ["reward_k1", "exact", "exact_weighted"])
def test_whole_responses_without_a_clip_are_unbiased(placement: Placement) -> None:
    assert correction_gradient("sequence_truncated", None, placement).kind == "exact"
    assert far(found("sequence_truncated", None, placement), objective_gradient()) < 1e-8


def test_whole_responses_without_a_clip_are_unbiased_for_a_mixture() -> None:
    gradient = found("sequence_truncated", None, "mixed", mixing=-0.6)
    assert far(gradient, objective_gradient()) < 1e-8


@pytest.mark.parametrize("correction", ["token_truncated", "sequence_truncated", "masked"])
def test_the_kl_of_exact_weighted_is_exact_under_every_correction(correction: Correction) -> None:
    """With equal scores the advantages of this placement are 0 and the KL is all there is."""
    assert correction_gradient(correction, CLIP, "exact_weighted").kind == "exact"
    settings = RLOOSettings(correction=correction, correction_clip=CLIP, placement="exact_weighted")
    equal = torch.zeros_like(SCORES)
    got = expected_gradient(rloo.prepare, rloo.loss, settings, equal, BETA, sampler=SAMPLER)
    table = POLICY.clone().requires_grad_()
    (true,) = torch.autograd.grad(BETA * WORLD.kl(table, REFERENCE), table)
    assert far(got, true) < 1e-8
    uncorrected = replace(settings, correction="none", correction_clip=None)
    biased = expected_gradient(rloo.prepare, rloo.loss, uncorrected, equal, BETA, sampler=SAMPLER)
    assert far(biased, true) > 0.05


@pytest.mark.parametrize(
    ("placement", "correction", "clip"),
    [
        ("loss_exact", "token_truncated", CLIP),
        ("loss_exact", "masked", CLIP),
        ("loss_k2", "token_truncated", CLIP),
        ("loss_k2", "token_truncated", None),
        ("loss_k3_weighted", "token_truncated", None),
        ("loss_k2", "masked", CLIP),
    ],
)
def test_the_differentiable_kl_of_token_weights_is_that_of_the_samplers_states(
    placement: Placement, correction: Correction, clip: float | None
) -> None:
    """Σ_c d_σ(c) Σ_v m(v|c) ∇term: an exact KL needs no ratio, a sampled one takes the token's."""
    pi, sigma, ratio = laws()
    inside = (ratio <= CLIP) & (ratio >= 1 / CLIP)
    log_ratio = (pi / REFERENCE.softmax(-1)).log()
    if placement == "loss_exact":
        kept = 1.0 if correction != "masked" else (sigma * inside).sum(-1, keepdim=True)
        row = kept * pi * (log_ratio - (pi * log_ratio).sum(-1, keepdim=True))
    else:
        measure = {
            ("token_truncated", CLIP): torch.minimum(pi, CLIP * sigma),
            ("token_truncated", None): pi,
            ("masked", CLIP): torch.where(inside, pi, 0.0),
        }[correction, clip]
        # ∇k2 = δ ∇log π; ∇(ρ k3) = (k3 + 1 − e^(−δ)) ∇log π = δ ∇log π.
        weighted = measure * log_ratio
        row = weighted - pi * weighted.sum(-1, keepdim=True)
    closed = BETA * WORLD.visits(SAMPLER)[:, None] * row
    settings = RLOOSettings(
        correction=correction, correction_clip=clip, placement=placement, allow_biased=True
    )
    equal = torch.zeros_like(SCORES)
    got = expected_gradient(rloo.prepare, rloo.loss, settings, equal, BETA, sampler=SAMPLER)
    assert far(got, closed) < 1e-8


TABLE: list[tuple[Correction, float | None, tuple[float, float, float]]] = [
    ("none", None, (0.198, 0.981, 3.348)),
    ("token_truncated", None, (0.177, 0.988, 3.829)),
    ("token_truncated", 2.0, (0.178, 0.988, 3.772)),
    ("token_truncated", CLIP, (0.161, 0.988, 3.618)),
    ("masked", 2.0, (0.182, 0.987, 3.689)),
    ("masked", CLIP, (0.570, 0.828, 3.077)),
    ("sequence_truncated", 2.0, (0.059, 0.998, 4.050)),
    ("sequence_truncated", CLIP, (0.090, 0.996, 3.752)),
    ("sequence_truncated", None, (0, 1, 4.936)),
]
"""Relative error and cosine of the expected gradient of score − β·KL, and sd of one response's."""


def test_the_table_of_the_documentation() -> None:
    truth, probability = objective_gradient().flatten(), WORLD.probabilities(SAMPLER)
    steps = torch.autograd.functional.jacobian(WORLD.token_logprobs, POLICY).flatten(2)
    print(f"\n{'':27} rel. error    cosine    sd/|G|")
    for correction, clip, expected in TABLE:
        weights = sampler_weights(correction, **STRINGS, clip=clip)
        samples = ((weights * objective_of_strings()[:, None])[..., None] * steps).sum(1)
        mean = probability @ samples
        spread = (probability @ (samples - mean).square()).sum().sqrt() / truth.norm()
        cosine = mean @ truth / (mean.norm() * truth.norm())
        got = (far(mean, truth), float(cosine), float(spread))
        print(f"{correction:20} c = {clip!s:5} " + " ".join(f"{x:9.3f}" for x in got))
        if expected[0] == 0:
            assert got[0] < 1e-8
        assert got == pytest.approx(expected, abs=6e-4)


def planted() -> tuple[ScoredRollout, Fresh]:
    """Ragged responses whose sampler differs from the policy at every token."""
    scored, fresh = ragged()
    noise = torch.Generator().manual_seed(3)
    apart = 0.5 * torch.randn(scored.rollout_logprobs.shape, generator=noise).double()
    rollout = replace(scored.rollout, sampler_logprobs=scored.rollout_logprobs + apart)
    return replace(scored, rollout=rollout), fresh


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [(ppo, PPOSettings()), (grpo, GRPOSettings()), (rloo, RLOOSettings())],
)
@pytest.mark.parametrize("correction", ["token_truncated", "sequence_truncated", "masked"])
def test_every_algorithm_weighs_its_advantages_alike(
    algorithm: Any, settings: Any, correction: Correction
) -> None:
    """By hand, row for row, in plain Python: and rewards and returns stay as they were."""
    scored, _ = planted()
    mask, clip = scored.rollout.response_mask, 1.3
    plain = algorithm.prepare(scored, 0.2, replace(settings, placement="exact"))
    other = replace(settings, placement="exact", correction=correction, correction_clip=clip)
    weighed = algorithm.prepare(scored, 0.2, other)
    assert torch.equal(plain.rewards, weighed.rewards)
    assert torch.equal(plain.returns, weighed.returns)
    assert scored.rollout.sampler_logprobs is not None
    for row, token in mask.nonzero().tolist():
        gaps = (scored.rollout_logprobs - scored.rollout.sampler_logprobs)[row][mask[row]]
        ratio = math.exp(float(gaps.sum() if correction[0] == "s" else gaps[token]))
        weight = min(ratio, clip)
        if correction == "masked":
            weight = ratio if 1 / clip <= ratio <= clip else 0.0
        expected = weight * float(plain.advantages[row, token])
        assert float(weighed.advantages[row, token]) == pytest.approx(expected, abs=1e-12)
        kl = {"token_truncated": 1.0, "masked": float(weight > 0)}.get(correction, weight)
        assert plain.pathwise is not None and weighed.pathwise is not None
        expected = kl * float(plain.pathwise[row, token])
        assert float(weighed.pathwise[row, token]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("placement", ["reward_k1", "exact", "exact_weighted", "loss_k2"])
@pytest.mark.parametrize("correction", ["token_truncated", "sequence_truncated", "masked"])
def test_what_padding_holds_changes_nothing(placement: Placement, correction: Correction) -> None:
    scored, fresh = planted()
    settings = RLOOSettings(
        placement=placement, allow_biased=True, correction=correction, correction_clip=1.3
    )
    mask = scored.rollout.response_mask
    results = []
    for poison in (0.0, math.nan, math.inf):
        spoiled = with_padding(scored, mask, poison)
        assert scored.rollout.sampler_logprobs is not None
        written = torch.where(mask, scored.rollout.sampler_logprobs, poison)
        spoiled = replace(spoiled, rollout=replace(scored.rollout, sampler_logprobs=written))
        batch = rloo.prepare(spoiled, 0.2, settings)
        total = rloo.loss(batch, with_padding(fresh, mask, poison), settings, tokens=30).total
        results.append((batch.advantages, total))
    for spoiled in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], spoiled, strict=True))


def test_what_a_correction_has_to_do_is_counted() -> None:
    """Two tokens of ratios 4 and 1/4, and a response of one token of ratio 1."""
    then = torch.tensor([[0.2, 0.8], [0.5, 1.0]]).double().log()
    now = torch.tensor([[0.8, 0.2], [0.5, 1.0]]).double().log()
    mask = torch.tensor([[True, True], [True, False]])
    laws = {"rollout_logprobs": now, "sampler_logprobs": then, "mask": mask}
    numbers = correction_numbers("token_truncated", **laws, clip=2.0)
    share = (2 + 0.25 + 1) ** 2 / (4 + 0.0625 + 1) / 3
    assert numbers["effective_samples"] == pytest.approx(share)
    assert numbers["clipped"] == pytest.approx(1 / 3)
    assert numbers["mean_weight"] == pytest.approx(3.25 / 3)
    assert correction_numbers("masked", **laws, clip=2.0) == pytest.approx(
        {"effective_samples": 1 / 3, "clipped": 2 / 3, "mean_weight": 1 / 3}
    )
    assert correction_numbers("sequence_truncated", **laws, clip=None) == pytest.approx(
        {"effective_samples": 1.0, "clipped": 0.0, "mean_weight": 1.0}
    )


@pytest.mark.parametrize(
    ("correction", "clip", "says"),
    [
        ("masked", None, "needs one, got None"),
        ("token_truncated", 1.0, "above 1 and finite, got 1.0"),
        ("token_truncated", math.inf, "above 1 and finite, got inf"),
        ("token_truncated", math.nan, "above 1 and finite, got nan"),
    ],
)
def test_a_correction_that_cannot_be_is_refused(
    correction: Any, clip: float | None, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        check_correction(correction, clip)
    with pytest.raises(ValueError, match=says):
        RLOOSettings(correction=correction, correction_clip=clip)


def test_an_unknown_correction_is_refused_by_its_name() -> None:
    unknown: Any = "clipped"
    with pytest.raises(ValueError, match=r"must be one of none, .*, got 'clipped'"):
        check_correction(unknown, None)


def test_without_the_samplers_logprobs_there_is_nothing_to_correct_by() -> None:
    scored, _ = ragged()
    silent = replace(scored, rollout=replace(scored.rollout, sampler_logprobs=None))
    with pytest.raises(ValueError, match="got sampler_logprobs=None"):
        rloo.prepare(silent, 0.2, RLOOSettings(correction="masked", correction_clip=2.0))


@pytest.mark.parametrize("wrong", [-math.inf, math.nan])
@pytest.mark.parametrize("correction", ["token_truncated", "sequence_truncated", "masked"])
def test_an_impossible_token_of_the_sampler_is_named(correction: Correction, wrong: float) -> None:
    """Neither clipped to c nor left out in silence."""
    scored, _ = planted()
    assert scored.rollout.sampler_logprobs is not None
    spoiled = scored.rollout.sampler_logprobs.clone()
    spoiled[2, 1] = wrong
    scored = replace(scored, rollout=replace(scored.rollout, sampler_logprobs=spoiled))
    with pytest.raises(ScoringError, match="at token 1 of response 2"):
        rloo.prepare(scored, 0.2, RLOOSettings(correction=correction, correction_clip=2.0))


def test_a_weight_beyond_all_numbers_is_refused_where_no_clip_holds_it() -> None:
    scored, _ = planted()
    far_off = scored.rollout_logprobs - 1000
    scored = replace(scored, rollout=replace(scored.rollout, sampler_logprobs=far_off))
    with pytest.raises(ScoringError, match="needs a clip"):
        rloo.prepare(scored, 0.2, RLOOSettings(correction="sequence_truncated"))


def test_a_batch_of_which_nothing_is_left_is_refused() -> None:
    scored, _ = planted()
    far_off = scored.rollout_logprobs - 1
    scored = replace(scored, rollout=replace(scored.rollout, sampler_logprobs=far_off))
    with pytest.raises(ScoringError, match=r"ratio π/σ within 1/2 and 2 .*, got none"):
        rloo.prepare(scored, 0.2, RLOOSettings(correction="masked", correction_clip=2.0))


def test_the_guard_of_prefix_weights_sees_the_sampler_where_the_loss_does() -> None:
    """With its prefix weights begun at σ, a rollout far from σ leaves few samples effective."""
    scored, _ = planted()
    written = scored.rollout.sampler_logprobs
    assert prefix_start(scored, "masked", "exact_weighted") is written
    assert prefix_start(scored, "none", "exact_weighted") is scored.rollout_logprobs
    assert prefix_start(scored, "masked", "exact") is scored.rollout_logprobs
