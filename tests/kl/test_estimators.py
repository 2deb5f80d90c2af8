import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kleash.kl.estimators import Estimator, sampled_kl

ESTIMATORS: tuple[Estimator, ...] = ("k1", "k2", "k3")


def gaussian_moments(mu: float, estimator: Estimator) -> tuple[float, float]:
    """(bias, sd)/KL of our estimator for π = N(0, 1), π_ref = N(μ, 1), by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    x, w = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    estimate = sampled_kl(-x.square() / 2, -(x - mu).square() / 2, estimator)
    mean = (w * estimate).sum()
    sd = (w * (estimate - mean).square()).sum().sqrt()
    kl = mu**2 / 2
    return (mean.item() - kl) / kl, sd.item() / kl


def closed_form(mu: float, estimator: Estimator) -> tuple[float, float]:
    match estimator:
        case "k1":
            return 0.0, 2 / mu
        case "k2":
            return mu**2 / 4, math.sqrt(2 + mu**2)
        case "k3":
            return 0.0, 2 * math.sqrt(math.expm1(mu**2) - mu**2) / mu**2


def test_schulmans_table() -> None:
    print("\nπ = N(0,1), π_ref = N(μ,1)      bias/true  closed form     sd/true  closed form")
    for mu in (0.1, 0.5, 1.0, 2.0):
        for estimator in ESTIMATORS:
            found, expected = gaussian_moments(mu, estimator), closed_form(mu, estimator)
            cells = (found[0], expected[0], found[1], expected[1])
            print(
                f"μ = {mu:<4} KL = {mu**2 / 2:<6.3f} {estimator} "
                + " ".join(f"{abs(cell):12.5f}" for cell in cells)
            )
            assert found == pytest.approx(expected, abs=1e-9, rel=1e-9)


def test_schulmans_published_numbers() -> None:
    published = {
        (0.1, "k1"): 20,
        (0.1, "k2"): 1.42,
        (0.1, "k3"): 1.42,
        (1.0, "k1"): 2,
        (1.0, "k2"): 1.73,
        (1.0, "k3"): 1.7,
    }
    for (mu, estimator), sd in published.items():
        assert gaussian_moments(mu, estimator)[1] == pytest.approx(sd, abs=6e-3)
    assert gaussian_moments(1.0, "k2")[0] == pytest.approx(0.25, abs=1e-9)


def test_k3_is_the_noisier_one_from_0_628_nats_on() -> None:
    for mu_squared, k3_is_better in ((1.256, True), (1.257, False)):
        mu = math.sqrt(mu_squared)
        better = gaussian_moments(mu, "k3")[1] < gaussian_moments(mu, "k1")[1]
        assert better is k3_is_better


def test_worked_token() -> None:
    token = sampled_kl(torch.tensor(0.25).log(), torch.tensor(0.05).log())
    assert round(token.item(), 2) == 1.61


@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 3))
def test_expectation_over_a_vocabulary(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(2, 7, generator=generator, dtype=torch.float64)
    p, q = z.log_softmax(-1).numpy()
    kl = (np.exp(p) * (p - q)).sum()
    expected = {"k1": kl, "k2": (np.exp(p) * (p - q) ** 2).sum() / 2, "k3": kl}
    for estimator in ESTIMATORS:
        value = sampled_kl(torch.tensor(p), torch.tensor(q), estimator)
        assert (np.exp(p) * value.numpy()).sum() == pytest.approx(expected[estimator], abs=1e-10)


def test_expectation_over_all_strings() -> None:
    models = oracles.gradient_models()
    world = models.world
    weight = world.probabilities(models.policy)
    logprobs, ref = world.token_logprobs(models.policy), world.token_logprobs(models.reference)
    total = world.kl(models.policy, models.reference)
    assert total.item() == pytest.approx(0.302825, abs=1e-6)
    by_token = {e: (weight * sampled_kl(logprobs, ref, e).sum(-1)).sum() for e in ESTIMATORS}
    whole = {e: (weight * sampled_kl(logprobs.sum(-1), ref.sum(-1), e)).sum() for e in ESTIMATORS}
    for estimates in (by_token, whole):
        assert estimates["k1"].item() == pytest.approx(total.item(), abs=1e-10)
        assert estimates["k3"].item() == pytest.approx(total.item(), abs=1e-10)
        assert abs(estimates["k2"].item() - total.item()) > 0.01


def test_exact_kl_of_visited_states_is_the_least_noisy_estimate_of_the_value() -> None:
    models = oracles.gradient_models()
    world = models.world
    weight = world.probabilities(models.policy)
    k1 = world.string_logprobs(models.policy) - world.string_logprobs(models.reference)
    rao_blackwell = world.at_tokens(world.state_kl(models.policy, models.reference)).sum(-1)
    total = world.kl(models.policy, models.reference)

    def variance(x: Tensor) -> Tensor:
        return (weight * (x - total).square()).sum()

    assert (weight * rao_blackwell).sum().item() == pytest.approx(total.item(), abs=1e-10)
    assert variance(rao_blackwell) < variance(k1) / 2


def test_expected_gradients_at_one_token() -> None:
    """k1: none. k2: that of KL(π‖π_ref). k3: that of KL(π_ref‖π), which is π − π_ref."""
    generator = torch.Generator().manual_seed(3)
    z, w = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    z.requires_grad_()
    log_p, log_q = z.log_softmax(-1), w.log_softmax(-1)
    p, q = log_p.detach().exp(), log_q.exp()
    kl = (p * (p / q).log()).sum()
    expected = {"k1": torch.zeros(7), "k2": p * ((p / q).log() - kl), "k3": p - q}
    for estimator in ESTIMATORS:
        mean = (p * sampled_kl(log_p, log_q, estimator)).sum()
        (gradient,) = torch.autograd.grad(mean, z, retain_graph=True)
        np.testing.assert_allclose(gradient, expected[estimator], atol=1e-10)


@given(st.floats(-30, 30))
def test_signs(delta: float) -> None:
    policy, reference = torch.tensor([delta], dtype=torch.float64), torch.zeros(1).double()
    assert sampled_kl(policy, reference).item() == delta
    assert sampled_kl(policy, reference, "k2").item() >= 0
    assert sampled_kl(policy, reference, "k3").item() >= 0


EXTREMES = [
    # log π, log π_ref, k1, k2, k3
    (-1.0, -1.0, 0.0, 0.0, 0.0),
    (-1.0, -math.inf, math.inf, math.inf, math.inf),
    (-1000.0, -1.0, -999.0, 499000.5, math.inf),  # e^999: an infinity is a finding, not clamped
    (-1.0, -1000.0, 999.0, 499000.5, 998.0),
    (-1.0, -1.0 - 1e-6, 1e-6, 5e-13, 5e-13),  # expm1 keeps what e^x − 1 would lose
]


@pytest.mark.parametrize(("logprob", "ref_logprob", "k1", "k2", "k3"), EXTREMES)
def test_extremes(logprob, ref_logprob, k1, k2, k3) -> None:
    pair = torch.tensor([[logprob], [ref_logprob]], dtype=torch.float64)
    for estimator, expected in zip(ESTIMATORS, (k1, k2, k3), strict=True):
        assert sampled_kl(*pair, estimator).item() == pytest.approx(expected, rel=1e-3, abs=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_subtracted_in_float32(dtype: torch.dtype) -> None:
    a, b = torch.tensor([-100.0], dtype=dtype), torch.tensor([-0.03125], dtype=dtype)
    value = sampled_kl(a, b)
    assert (value.dtype, value.item()) == (torch.float32, -99.96875)


def test_unknown_estimator_is_refused() -> None:
    # Past the types that are checked while testing: a caller's are not.
    unchecked = getattr(sampled_kl, "__wrapped__", sampled_kl)
    with pytest.raises(ValueError, match="must be 'k1', 'k2' or 'k3', got 'k4'"):
        unchecked(torch.zeros(1), torch.zeros(1), "k4")
