"""The control variate between k1 and exact, on the way from the reference to the optimum.

The model: 121 strings, β = 0.3, the optimum 3.44 nats away. Position s lies on the geometric path,
log π_s ∝ (1 − s) log π_ref + s log π*. Variances are of the gradient of the whole objective with
respect to all logits, with exact baselines, by enumeration.
"""

import math
from functools import cache

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kleash.kl import control_variate, placements
from kleash.kl.control_variate import GradientGeometry

MODEL = oracles.fixed_point_model()
WORLD, REFERENCE, SCORES, BETA = MODEL.world, MODEL.reference, MODEL.scores, MODEL.beta
MASK, IDS = WORLD.mask, WORLD.rollout.response_ids
POSITIONS = {0.0: 1.00, 0.1: 0.83, 0.25: 0.58, 0.5: 0.26, 0.75: 0.064, 0.9: 0.010, 1.0: 0.0}
"""Position, and the known ratio Var(k1)/Var(exact) there."""


def policy_at(position: float) -> Tensor:
    best = WORLD.optimal_logits(REFERENCE, SCORES, BETA)
    return (1 - position) * REFERENCE.log_softmax(-1) + position * best


def to_go(x: Tensor) -> Tensor:
    return x.flip(-1).cumsum(-1).flip(-1)


def expected_by_state(logits: Tensor, per_token: Tensor) -> Tensor:
    """E[number of the token | state], at each token of each string."""
    weight = WORLD.probabilities(logits)[:, None] * MASK
    total = torch.zeros(len(WORLD.prefixes), dtype=torch.float64)
    total = total.scatter_add(0, WORLD.string_states.flatten(), (weight * per_token).flatten())
    return WORLD.at_tokens(total / WORLD.visits(logits))


def tokens_of(logits: Tensor) -> dict[str, Tensor]:
    return {
        "logprobs": WORLD.token_logprobs(logits),
        "ref_logprobs": WORLD.token_logprobs(REFERENCE),
        "kl": WORLD.at_tokens(WORLD.state_kl(logits, REFERENCE)),
        "mask": MASK,
    }


def advantages(logits: Tensor, c: float) -> Tensor:
    """Return to go less its expectation in each state, with the charges of `mixed`."""
    charge = placements.charges("mixed", mixing=c, **tokens_of(logits))
    returns = torch.where(MASK, SCORES[:, None] - BETA * to_go(charge), 0.0)
    return returns - expected_by_state(logits, returns)


def gradients(position: float, c: float) -> Tensor:
    """[string, parameters]: each string's ascent direction under `mixed`, by autograd."""
    logits = policy_at(position).requires_grad_()
    now = WORLD.token_logprobs(logits)
    weight = placements.loss_weights("mixed", mask=MASK, mixing=c, dtype=torch.float64)
    term = placements.loss_terms(
        "mixed",
        logprobs=now,
        rollout_logprobs=now.detach(),
        ref_logprobs=WORLD.token_logprobs(REFERENCE),
        kl=WORLD.at_tokens(WORLD.state_kl(logits, REFERENCE)),
        mask=MASK,
    )
    gain = (advantages(logits.detach(), c) * now - BETA * weight * term).sum(-1)
    rows = torch.eye(len(gain), dtype=torch.float64)
    return torch.autograd.grad(gain, logits, rows, is_grads_batched=True)[0].flatten(1)


class Line:
    """The gradient at one position as a function of c: ĝ(c) = ĝ(0) + c·(ĝ(1) − ĝ(0))."""

    def __init__(self, position: float) -> None:
        self.weight = WORLD.probabilities(policy_at(position))
        self.k1, self.exact = gradients(position, 0.0), gradients(position, 1.0)

    def at(self, c: float) -> Tensor:
        return self.k1 + c * (self.exact - self.k1)

    def mean(self, c: float) -> Tensor:
        return self.weight @ self.at(c)

    def variance(self, c: float) -> float:
        return (self.weight @ (self.at(c) - self.mean(c)).square()).sum().item()

    def best(self) -> float:
        """Vertex of the parabola through three variances: knows nothing of inner products."""
        low, middle, high = (self.variance(c) for c in (-1.0, 0.0, 1.0))
        curvature = high - 2 * middle + low
        return (low - high) / (2 * curvature) if curvature > 1e-15 else 0.0


@pytest.fixture(scope="module")
def lines() -> dict[float, Line]:
    return {position: Line(position) for position in POSITIONS}


@cache
def every_string(position: float) -> tuple[Tensor, Tensor, GradientGeometry]:
    """Advantages, excess and geometry of all strings."""
    logits = policy_at(position)
    log_p, log_q = (t.log_softmax(-1)[WORLD.string_states] for t in (logits, REFERENCE))
    geometry = control_variate.gradient_geometry(log_p, log_q, IDS)
    return advantages(logits, 0.0), control_variate.kl_excess(**tokens_of(logits)), geometry


def batch(position: float, rows: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], GradientGeometry]:
    """What an update knows of these strings: (advantages, excess, mask), geometry."""
    gains, excess, geometry = every_string(position)
    parts = (geometry.score, geometry.cross, geometry.pathwise)
    return (gains[rows], excess[rows], MASK[rows]), GradientGeometry(*(p[rows] for p in parts))


def drawn(position: float, n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = WORLD.probabilities(policy_at(position))
    return torch.multinomial(weight, n, replacement=True, generator=generator)


def test_the_gradient_is_right_at_every_position_for_every_coefficient(lines) -> None:
    for position, line in lines.items():
        logits = policy_at(position).requires_grad_()
        WORLD.objective(logits, REFERENCE, SCORES, BETA).backward()
        for c in (-7.0, 0.0, 0.3, 1.0):
            torch.testing.assert_close(line.mean(c), logits.grad.flatten(), atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(line.at(0.3), gradients(position, 0.3))


def test_variance_at_seven_positions(lines) -> None:
    """k1 beats exact all the way; the best mixture beats both, even with c from samples."""
    print("\nposition  k1/exact (known)     best c   mixed/k1   from 256 responses: c    mixed/k1")
    for position, known in POSITIONS.items():
        line = lines[position]
        k1, exact, best = line.variance(0.0), line.variance(1.0), line.best()
        rows = drawn(position, 256, seed=7)
        known_batch, geometry = batch(position, rows)
        estimated = control_variate.mixing_coefficient(*known_batch, beta=BETA, geometry=geometry)
        cheap = control_variate.mixing_coefficient(*known_batch, beta=BETA)
        share = [line.variance(c) / k1 if k1 > 1e-20 else 0.0 for c in (best, estimated, cheap)]
        print(
            f"{position:8} {k1 / exact:9.4f} ({known:5.3f}) {best:10.4f} {share[0]:10.4f}"
            f" {estimated:18.4f}, {cheap:8.4f} {share[1]:8.4f}, {share[2]:.4f}"
        )
        assert k1 / exact == pytest.approx(known, abs=0.006)
        for c in (best, estimated, cheap):
            assert line.variance(c) <= min(k1, exact) * (1 + 1e-9) + 1e-20
        if 0 < position < 1:
            assert line.variance(best) < 0.5 * k1
            # No more than a tenth of what was gained is lost to estimating c.
            for c in (estimated, cheap):
                assert line.variance(c) - line.variance(best) < 0.1 * (k1 - line.variance(best))


def test_best_coefficient_on_the_path_is_what_is_left_over_what_is_done(lines) -> None:
    for position in (0.5, 0.75, 0.9):
        assert lines[position].best() == pytest.approx((position - 1) / position, rel=0.05)


@pytest.mark.parametrize("position", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_coefficient_of_a_representative_batch_is_the_best(lines, position: float) -> None:
    """Each string as often as its probability says, in 200,000 rows: the exact sums, nearly."""
    line = lines[position]
    rows = torch.repeat_interleave((line.weight * 200_000).round().long())
    known_batch, geometry = batch(position, rows)
    found = control_variate.mixing_coefficient(*known_batch, beta=BETA, geometry=geometry)
    assert found == pytest.approx(line.best(), rel=2e-3)


def test_cross_fitted_gradient_is_unbiased_and_less_noisy(lines) -> None:
    """Means of 64 responses, c of each half from the other: 600 of them against the truth."""
    position, line = 0.5, lines[0.5]
    rows = drawn(position, 64 * 600, seed=3).view(600, 64)
    half = torch.arange(64) % 2 == 0
    means = {"cross-fitted": [], "k1": []}
    for some in rows:
        known_batch, _ = batch(position, some)
        c = control_variate.cross_fitted_mixing(*known_batch, half, beta=BETA)
        each = line.k1[some] + c[:, None] * (line.exact - line.k1)[some]
        means["cross-fitted"].append(each.mean(0))
        means["k1"].append(line.k1[some].mean(0))
    spread = {name: torch.stack(rows).var(0).sum().item() for name, rows in means.items()}
    share = spread["cross-fitted"] / spread["k1"]
    print(f"\nvariance of a mean of 64, cross-fitted / k1: {share:.3f}")
    assert share < 0.25
    estimate = torch.stack(means["cross-fitted"])
    error = (estimate.mean(0) - line.mean(0)).square().sum().sqrt().item()
    assert error < 3 * math.sqrt(spread["cross-fitted"] / 600)


def test_cross_fitting_uses_the_other_half_only() -> None:
    (a, x, mask), geometry = batch(0.5, drawn(0.5, 20, seed=0))
    half = torch.arange(20) < 10
    c = control_variate.cross_fitted_mixing(a, x, mask, half, beta=BETA, geometry=geometry)
    for rows in (half, ~half):
        poisoned = torch.where(rows[:, None], math.nan, a)
        again = control_variate.cross_fitted_mixing(
            poisoned, x, mask, half, beta=BETA, geometry=geometry
        )
        assert torch.equal(again[rows], c[rows])
        assert again[~rows].isnan().all()
    assert c[0] != c[-1]


def test_advantages_move_by_beta_c_excess() -> None:
    logits = policy_at(0.5)
    excess = control_variate.kl_excess(**tokens_of(logits))
    assert expected_by_state(logits, excess).abs().max() < 1e-12
    for c in (-1.0, 0.4, 1.0):
        moved = advantages(logits, 0.0) + c * BETA * excess
        torch.testing.assert_close(advantages(logits, c), moved)


@given(st.floats(0, 1), st.floats(-2, 2))
def test_generalised_advantages_move_by_the_decayed_excess(lam: float, c: float) -> None:
    logits = policy_at(0.5)

    def gae(share: float) -> np.ndarray:
        """Generalised advantage estimation as a double sum, values fitted to the charges."""
        charge = placements.charges("mixed", mixing=share, **tokens_of(logits))
        last = MASK & ~torch.nn.functional.pad(MASK[:, 1:], (0, 1))
        rewards = (-BETA * charge + SCORES[:, None] * last).numpy()
        values = expected_by_state(logits, to_go(torch.tensor(rewards))).numpy()
        following = np.concatenate([values[:, 1:], np.zeros((len(values), 1))], -1)
        delta = rewards + following - values
        n = delta.shape[1]
        powers = [[lam ** (s - t) if s >= t else 0.0 for s in range(n)] for t in range(n)]
        return np.where(MASK, delta @ np.array(powers).T, 0.0)

    excess = control_variate.kl_excess(**tokens_of(logits), decay=lam)
    np.testing.assert_allclose(gae(c), gae(0.0) + c * BETA * excess.numpy(), atol=1e-10)


def test_geometry_is_that_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    z, w = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    w[5] = z[5] = -math.inf
    w[4] = -math.inf
    z[4] = -math.inf
    for token in range(4):
        logits = z.clone().requires_grad_()
        log_p, log_q = logits.log_softmax(-1), w.log_softmax(-1)
        (u,) = torch.autograd.grad(log_p[token], logits, retain_graph=True)
        p, q = log_p[:4], log_q[:4]
        (v,) = torch.autograd.grad((p.exp() * (p - q)).sum(), logits)
        found = control_variate.gradient_geometry(log_p, log_q, torch.tensor(token))
        assert not found.score.requires_grad
        expected = [(u @ u).item(), (u @ v).item(), (v @ v).item()]
        given_ = [found.score.item(), found.cross.item(), found.pathwise.item()]
        assert given_ == pytest.approx(expected, abs=1e-12)


def test_geometry_outside_the_mask_never_matters() -> None:
    (a, x, mask), geometry = batch(0.5, torch.arange(121))
    spoiled = GradientGeometry(
        *(
            torch.where(mask, part, math.nan)
            for part in (geometry.score, geometry.cross, geometry.pathwise)
        )
    )
    clean = control_variate.mixing_coefficient(a, x, mask, beta=BETA, geometry=geometry)
    a, x = (torch.where(mask, t, math.inf) for t in (a, x))
    assert control_variate.mixing_coefficient(a, x, mask, beta=BETA, geometry=spoiled) == clean
    logits = tokens_of(policy_at(0.5))
    spoiled_tokens = {k: torch.where(MASK, t, math.nan) for k, t in logits.items() if k != "mask"}
    assert torch.equal(
        control_variate.kl_excess(**spoiled_tokens, mask=MASK), control_variate.kl_excess(**logits)
    )


def test_rounding_errors_are_not_amplified_at_the_first_step() -> None:
    """Policy = reference: h is nothing but rounding, and any c ≠ 0 would only add to it."""
    generator = torch.Generator().manual_seed(0)
    noise = 1e-7 * torch.randn(64, 8, generator=generator)
    scores = torch.randn(64, 8, generator=generator)
    mask = torch.ones(64, 8, dtype=torch.bool)
    assert abs(control_variate.mixing_coefficient(scores, noise, mask, beta=0.05)) < 1e-2
    # Well above rounding the ridge is invisible: noise that is the rewards' mirror is removed.
    c = control_variate.mixing_coefficient(scores, 0.5 * scores, mask, beta=1.0)
    assert c == pytest.approx(-2.0, rel=1e-5)


def test_coefficient_where_nothing_is_to_mix() -> None:
    zero, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    assert control_variate.mixing_coefficient(zero, zero, mask, beta=0.1) == 0
    assert control_variate.mixing_coefficient(zero + 1, zero + 1, mask, beta=0.0) == 0


def test_refusals() -> None:
    zero, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"beta must not be negative, got -0\.1"):
        control_variate.mixing_coefficient(zero, zero, mask, beta=-0.1)
    with pytest.raises(ValueError, match="at least one kept token"):
        control_variate.mixing_coefficient(zero, zero, ~mask, beta=0.1)
    with pytest.raises(ValueError, match="at least one kept token"):
        control_variate.cross_fitted_mixing(zero, zero, mask, torch.tensor([True, True]), beta=0.1)
    for decay in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="decay must be in"):
            control_variate.kl_excess(zero, zero, zero, mask, decay=decay)
