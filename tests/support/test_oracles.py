"""The oracle against itself, against numpy, and against numbers derived elsewhere."""

import itertools
import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

MODEL = oracles.fixed_point_model()
WORLD, REFERENCE, SCORES, BETA = MODEL.world, MODEL.reference, MODEL.scores, MODEL.beta


def worlds() -> st.SearchStrategy[oracles.World]:
    return st.builds(oracles.World, st.integers(2, 5), st.integers(1, 4))


@given(worlds())
def test_strings_are_all_there_are(world: oracles.World) -> None:
    tuples = itertools.product(range(world.vocabulary), repeat=world.max_length)
    ended = {t[: t.index(0) + 1] if 0 in t else t for t in tuples}
    assert set(world.strings) == ended
    assert len(world.strings) == len(ended)
    rollout = world.rollout
    assert [
        tuple(ids[m].tolist())
        for ids, m in zip(rollout.response_ids, rollout.response_mask, strict=True)
    ] == world.strings
    assert rollout.ended.tolist() == [s[-1] == 0 for s in world.strings]
    assert world.numbers_of(rollout).tolist() == list(range(len(world.strings)))


@given(worlds(), st.integers(0, 999))
def test_probabilities_sum_to_one_and_factorise(world: oracles.World, seed: int) -> None:
    logits = world.random_logits(seed)
    p = world.probabilities(logits)
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    table = logits.softmax(-1).numpy()
    for number in (0, len(world.strings) // 2, -1):
        string = world.strings[number]
        rows = [world.prefixes.index(string[:t]) for t in range(len(string))]
        expected = math.prod(table[r, v] for r, v in zip(rows, string, strict=True))
        assert p[number].item() == pytest.approx(expected, rel=1e-12)
    visits = world.visits(logits)
    assert visits[0].item() == pytest.approx(1)
    assert visits.sum().item() == pytest.approx((p * world.mask.sum(-1)).sum().item())


@given(worlds(), st.integers(0, 999))
def test_chain_rules(world: oracles.World, seed: int) -> None:
    """Over strings or over visited states: the same KL and the same entropy."""
    p, q = world.random_logits(seed), world.random_logits(seed + 1)
    visits = world.visits(p)
    assert (visits * world.state_kl(p, q)).sum().item() == pytest.approx(world.kl(p, q).item())
    assert (visits * world.state_entropy(p)).sum().item() == pytest.approx(world.entropy(p).item())


def test_numbers_derived_elsewhere() -> None:
    models = oracles.gradient_models()
    assert len(models.world.strings) == len(WORLD.strings) == 121
    there = models.world.kl(models.policy, models.reference).item()
    back = models.world.kl(models.reference, models.policy).item()
    assert (there, back) == pytest.approx((0.3028250920461, 0.3855319901828), abs=1e-12)
    best = WORLD.optimal_logits(REFERENCE, SCORES, BETA)
    assert WORLD.objective(best, REFERENCE, SCORES, BETA).item() == pytest.approx(
        1.382404, abs=1e-6
    )
    assert WORLD.mean_score(best, SCORES).item() == pytest.approx(2.41420, abs=1e-5)
    assert WORLD.kl(best, REFERENCE).item() == pytest.approx(3.43931, abs=1e-5)
    for target, beta in ((0.1, 1.93638), (0.5, 0.872090), (1.0, 0.616259), (2.0, 0.427211)):
        assert WORLD.beta_for_kl(REFERENCE, SCORES, target) == pytest.approx(beta, abs=1e-5)


@given(worlds(), st.integers(0, 999), st.floats(0.2, 3))
def test_identities_of_the_optimum(world: oracles.World, seed: int, beta: float) -> None:
    ref, other = world.random_logits(seed), world.random_logits(seed + 1)
    scores = world.random_scores(seed)
    best = world.optimal_logits(ref, scores, beta)
    p_best = world.optimal_probabilities(ref, scores, beta)
    torch.testing.assert_close(world.probabilities(best), p_best, atol=1e-12, rtol=1e-9)
    top = beta * world.log_partition(ref, scores, beta)
    assert world.optimal_values(ref, scores, beta)[0].item() == pytest.approx(top.item(), abs=1e-9)
    assert world.objective(best, ref, scores, beta).item() == pytest.approx(top.item(), abs=1e-9)
    assert world.optimal_kl(ref, scores, beta) == pytest.approx(
        world.kl(best, ref).item(), abs=1e-9
    )
    # J* − J(π) = β KL(π‖π*) for every π.
    gap = (top - world.objective(other, ref, scores, beta)).item()
    assert gap == pytest.approx(beta * world.kl(other, best).item(), abs=1e-9)


def test_slope_of_the_optimal_kl() -> None:
    """dKL*/dβ = −Var*(score)/β³."""
    step = 1e-5
    kl = [WORLD.optimal_kl(REFERENCE, SCORES, BETA + s) for s in (step, -step)]
    best = WORLD.optimal_probabilities(REFERENCE, SCORES, BETA)
    variance = (best * SCORES.square()).sum() - (best * SCORES).sum().square()
    slope = (kl[0] - kl[1]) / (2 * step)
    assert slope == pytest.approx(-variance.item() / BETA**3, rel=1e-6)
    assert slope == pytest.approx(-14.42650, abs=1e-4)


def test_no_variance_is_left_at_the_optimum() -> None:
    """score − β Σ_{s≥t} k1_s = V*(c_t) for every string, and J has no gradient."""
    best = WORLD.optimal_logits(REFERENCE, SCORES, BETA).requires_grad_()
    k1 = WORLD.token_logprobs(best.detach()) - WORLD.token_logprobs(REFERENCE)
    to_go = SCORES[:, None] - BETA * k1.flip(-1).cumsum(-1).flip(-1)
    values = WORLD.at_tokens(WORLD.optimal_values(REFERENCE, SCORES, BETA))
    torch.testing.assert_close(torch.where(WORLD.mask, to_go, 0.0), values)
    WORLD.objective(best, REFERENCE, SCORES, BETA).backward()
    assert best.grad.abs().max() < 1e-12


def test_expected_values_are_conditional_means() -> None:
    logits = WORLD.random_logits(5)
    p = WORLD.probabilities(logits)
    values = WORLD.expected_values(logits, SCORES)
    for number, prefix in enumerate(WORLD.prefixes):
        below = torch.tensor([s[: len(prefix)] == prefix for s in WORLD.strings])
        mean = (p * SCORES)[below].sum() / p[below].sum()
        assert values[number].item() == pytest.approx(mean.item(), abs=1e-12)


def test_best_of_n_by_drawing_and_by_brute_force() -> None:
    world = oracles.World(2, 2)  # strings 0, 10, 11
    ref, scores = world.random_logits(0), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    p = world.probabilities(ref).numpy()
    expected = np.zeros(3)
    for draw in itertools.product(range(3), repeat=3):
        winners = [i for i in draw if scores[i] == max(scores[j] for j in draw)]
        for i in winners:
            expected[i] += math.prod(p[j] for j in draw) / len(winners)
    np.testing.assert_allclose(world.best_of_n(ref, scores, 3), expected, atol=1e-12)


def rows_of(model: oracles.TabularModel, rollout) -> Tensor:
    hidden = model.hidden_states(
        rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.response_mask
    )
    assert hidden.shape[1] == rollout.response_ids.shape[1] + 1
    return hidden @ model.head.weight.T


def test_tabular_model_gives_the_logits_of_each_prefix_and_their_gradient() -> None:
    logits = WORLD.random_logits(1)
    model = oracles.TabularModel(WORLD, logits)
    assert model.head.words == WORLD.vocabulary
    out = rows_of(model, WORLD.rollout)
    for i, string in enumerate(WORLD.strings):
        for t in range(WORLD.max_length + 1):
            inside = t < len(string)
            row = logits[WORLD.prefix_number[string[:t]]] if inside else torch.zeros(4)
            assert torch.equal(out[i, t].detach(), row.double())
    logprobs = out[:, :-1].log_softmax(-1).gather(-1, WORLD.rollout.response_ids[..., None])[..., 0]
    torch.testing.assert_close(torch.where(WORLD.mask, logprobs, 0.0), WORLD.token_logprobs(logits))
    weight = WORLD.random_scores(2)
    (torch.where(WORLD.mask, logprobs, 0.0).sum(-1) * weight).sum().backward()
    table = logits.requires_grad_()
    (WORLD.string_logprobs(table) * weight).sum().backward()
    torch.testing.assert_close(model.logits.grad, table.grad)


def test_tabular_model_continues_a_response_that_was_cut_short() -> None:
    model = oracles.TabularModel(WORLD, WORLD.random_logits(1))
    rollout = WORLD.rollout
    short = rollout.response_mask & (torch.arange(4) < 2)
    states = WORLD.states(rollout.response_ids, short)
    at = WORLD.string_number[(1, 2, 3, 0)]
    expected = [WORLD.prefix_number[p] for p in ((), (1,), (1, 2))]
    assert states[at].tolist() == [*expected, len(WORLD.prefixes), len(WORLD.prefixes)]
    assert model.logits.dtype == torch.float64


def test_samples_come_as_often_as_they_should() -> None:
    logits = WORLD.random_logits(3)
    model = oracles.TabularModel(WORLD, logits)
    n = 40_000
    rollout = model.sample(n, torch.Generator().manual_seed(0), group=4)
    counts = torch.bincount(WORLD.numbers_of(rollout), minlength=121).numpy()
    expected = n * WORLD.probabilities(logits).numpy()
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 120 + 5 * math.sqrt(240)  # 120 degrees of freedom
    assert rollout.prompt_index.tolist() == [i // 4 for i in range(n)]
    again = model.sample(n, torch.Generator().manual_seed(0))
    assert torch.equal(again.response_ids, rollout.response_ids)
    assert again.prompt_index.unique().tolist() == [0]


def test_scored_rollout_is_consistent() -> None:
    policy = WORLD.random_logits(3)
    rollout = oracles.TabularModel(WORLD, policy).sample(50, torch.Generator().manual_seed(0))
    values = WORLD.expected_values(policy, SCORES)
    scored = oracles.scored_rollout(
        WORLD, rollout, policy=policy, reference=REFERENCE, scores=SCORES, values=values
    )
    numbers = WORLD.numbers_of(rollout)
    torch.testing.assert_close(
        scored.rollout_logprobs.sum(-1).exp(), WORLD.probabilities(policy)[numbers]
    )
    torch.testing.assert_close(scored.scores, SCORES[numbers])
    assert scored.values is not None
    torch.testing.assert_close(scored.values[:, 0], values[:1].expand(50))
    for x in (scored.rollout_logprobs, scored.ref_logprobs, scored.kl, scored.entropy):
        assert (x[~rollout.response_mask] == 0).all()
    bare = oracles.scored_rollout(WORLD, rollout, policy=policy, reference=REFERENCE, scores=SCORES)
    assert bare.values is None
