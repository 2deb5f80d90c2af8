"""Every placement's expected gradient, by enumeration of all strings, against the true one.

The models: V = 4, T = 4, 121 strings, KL(π‖π_ref) = 0.302825 nats. The true gradient comes from
finite differences of a KL written separately, in numpy.
"""

import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kleash.kl import placements
from kleash.kl.estimators import sampled_kl
from kleash.kl.placements import Placement

MODELS = oracles.gradient_models()
WORLD = MODELS.world
MASK = WORLD.mask
REF = WORLD.token_logprobs(MODELS.reference)

PER_STRING = Callable[[Tensor], Tensor]


def to_go(x: Tensor) -> Tensor:
    return x.flip(-1).cumsum(-1).flip(-1)


def state_kl(logits: Tensor) -> Tensor:
    return WORLD.at_tokens(WORLD.state_kl(logits, MODELS.reference))


def penalty(placement: Placement, rollout: Tensor, mixing: float | None = None) -> PER_STRING:
    """What an update adds to the loss for each string, sampled from `rollout`, at β = 1.

    Returns-to-go of the charges times the ratio, plus weights times loss terms; the charges, as
    the functions under test have them, from the policy now.
    """

    def of(logits: Tensor) -> Tensor:
        logprobs, kl = WORLD.token_logprobs(logits), state_kl(logits)
        ratio = (logprobs - WORLD.token_logprobs(rollout)).exp()
        charge = placements.charges(
            placement, logprobs=logprobs, ref_logprobs=REF, kl=kl, mask=MASK, mixing=mixing
        )
        assert not charge.requires_grad
        loss = (ratio * to_go(charge) * MASK).sum(-1)
        weight = placements.loss_weights(placement, mask=MASK, mixing=mixing, dtype=torch.float64)
        term = placements.loss_terms(
            placement,
            logprobs=logprobs,
            rollout_logprobs=WORLD.token_logprobs(rollout),
            ref_logprobs=REF,
            kl=kl,
            mask=MASK,
        )
        assert (weight is None) == (term is None)
        return loss if weight is None else loss + (weight * term).sum(-1)

    return of


def gradients(per_string: PER_STRING) -> Tensor:
    """[string, parameters]: the gradient of each string's loss at the policy."""
    logits = MODELS.policy.clone().requires_grad_()
    loss = per_string(logits)
    rows = torch.eye(len(loss), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(loss, logits, rows, is_grads_batched=True)
    return gradient.flatten(1)


@pytest.fixture(scope="module")
def truth() -> Tensor:
    """∇KL(π‖π_ref) of whole strings by central differences of a recursion in numpy."""

    def table(logits: np.ndarray) -> np.ndarray:
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    log_q = table(MODELS.reference.numpy())

    def kl(logits: np.ndarray, prefix: tuple[int, ...] = ()) -> float:
        row = WORLD.prefix_number[prefix]
        p, q = table(logits[row]), log_q[row]
        total = float((np.exp(p) * (p - q)).sum())
        if len(prefix) < WORLD.max_length - 1:
            for v in range(1, WORLD.vocabulary):
                total += math.exp(p[v]) * kl(logits, (*prefix, v))
        return total

    z, step = MODELS.policy.numpy(), 1e-4
    assert kl(z) == pytest.approx(0.302825, abs=1e-6)
    result = np.empty_like(z)
    for i in np.ndindex(*z.shape):
        # Fourth order: the error is far below the 1e-8 that the placements are held to.
        values = []
        for shift in (2, 1, -1, -2):
            moved = z.copy()
            moved[i] += shift * step
            values.append(kl(moved))
        result[i] = (-values[0] + 8 * values[1] - 8 * values[2] + values[3]) / (12 * step)
    return torch.tensor(result).flatten()


def compare(per_string: PER_STRING, sampled_from: Tensor, truth: Tensor) -> tuple[float, ...]:
    """Relative error of the expected gradient, its cosine with the truth, and sd/|G|."""
    weight, sample = WORLD.probabilities(sampled_from), gradients(per_string)
    mean = weight @ sample
    sd = (weight @ (sample - mean).square()).sum().sqrt()
    error = (mean - truth).norm() / truth.norm()
    cosine = mean @ truth / (mean.norm() * truth.norm())
    return (
        error.item(),
        cosine.item() if mean.norm() > 1e-9 else math.nan,
        (sd / truth.norm()).item(),
    )


def check_row(name: str, found: tuple[float, ...], expected: tuple[float, ...]) -> None:
    print(
        f"{name:44} "
        + " ".join(f"{x:8.3f} ({y:6.3f})" for x, y in zip(found, expected, strict=True))
    )
    error, cosine, sd = expected
    if error == 0:
        assert found[0] < 1e-8
        assert found[1] == pytest.approx(1, abs=1e-12)
    assert found[0] == pytest.approx(error, abs=6e-4)
    assert found[1] == pytest.approx(cosine, abs=6e-3, nan_ok=True)
    assert found[2] == pytest.approx(sd, abs=6e-3)


HEADER = f"\n{'':44} rel. error          cosine            sd/|G|"

ON_POLICY: list[tuple[Placement, float | None, tuple[float, float, float]]] = [
    ("loss_k1", None, (1.0, math.nan, 8.51)),
    ("loss_k2", None, (0.744, 0.910, 4.09)),
    ("loss_k3_weighted", None, (0.744, 0.910, 4.09)),
    ("loss_k3", None, (0.623, 0.930, 5.90)),
    ("loss_exact", None, (0.744, 0.910, 2.12)),
    ("reward_k1", None, (0, 1, 6.86)),
    ("reward_k2", None, (1.374, -0.38, 4.26)),
    ("reward_k3", None, (1.433, -0.53, 6.10)),
    ("reward_exact", None, (1.529, -0.53, 3.42)),
    ("exact", None, (0, 1, 3.31)),
    ("exact_weighted", None, (0, 1, 3.31)),
    ("mixed", 0.0, (0, 1, 6.86)),
    ("mixed", 1.0, (0, 1, 3.31)),
]


def test_gradient_of_each_placement_on_policy(truth: Tensor) -> None:
    print(HEADER)
    for placement, mixing, expected in ON_POLICY:
        found = compare(penalty(placement, MODELS.policy, mixing), MODELS.policy, truth)
        check_row(f"{placement} {'' if mixing is None else mixing}", found, expected)
    assert {row[0] for row in ON_POLICY} | {"measure"} == set(get_args(Placement))


def test_gradient_of_combinations_on_policy(truth: Tensor) -> None:
    print(HEADER)

    def both(share: float) -> PER_STRING:
        parts = [penalty(p, MODELS.policy) for p in ("reward_k3", "loss_k3")]
        return lambda logits: share * sum(part(logits) for part in parts)

    def whole_k2(logits: Tensor) -> Tensor:
        return sampled_kl(WORLD.token_logprobs(logits).sum(-1), REF.sum(-1), "k2")

    def own_token_only(logits: Tensor) -> Tensor:
        logprobs = WORLD.token_logprobs(logits)
        return (logprobs * sampled_kl(logprobs, REF).detach()).sum(-1)

    rows = [
        ("k2 loss on the whole string's log-ratio", whole_k2, (0, 1, 7.28)),
        ("k1 in reward, own token only", own_token_only, (0.744, 0.910, 4.09)),
        ("k3 in reward and loss", both(1.0), (0, 1, 6.03)),
        ("k3 in reward and loss, half each", both(0.5), (0.5, 1, 3.02)),
    ]
    for name, per_string, expected in rows:
        check_row(name, compare(per_string, MODELS.policy, truth), expected)


def test_gradient_of_each_placement_off_policy(truth: Tensor) -> None:
    print(HEADER)
    mu = MODELS.sampler
    rollout_logprobs = WORLD.token_logprobs(mu)
    kl_then = WORLD.at_tokens(WORLD.state_kl(mu, MODELS.reference))

    def whole_weight(logits: Tensor) -> Tensor:
        logprobs = WORLD.token_logprobs(logits)
        weight = (logprobs - rollout_logprobs).sum(-1).exp().detach()
        return weight * (logprobs * to_go(sampled_kl(logprobs, REF)).detach()).sum(-1)

    def prefix_weighted(logits: Tensor) -> Tensor:
        logprobs, kl = WORLD.token_logprobs(logits), state_kl(logits)
        return placements.off_policy_exact_loss(logprobs, rollout_logprobs, kl, MASK)

    def charged_at_rollout(logits: Tensor) -> Tensor:
        charge = placements.charges(
            "reward_k1", logprobs=rollout_logprobs, ref_logprobs=REF, kl=kl_then, mask=MASK
        )
        ratio = (WORLD.token_logprobs(logits) - rollout_logprobs).exp()
        return (ratio * to_go(charge) * MASK).sum(-1)

    rows = [
        ("loss_k2, no weights", penalty("loss_k2", mu), (0.910, 0.830, 3.93)),
        ("loss_k3, no weights", penalty("loss_k3", mu), (0.760, 0.837, 8.59)),
        ("loss_k3_weighted", penalty("loss_k3_weighted", mu), (0.754, 0.880, 4.14)),
        ("reward_k1, token ratios, charged now", penalty("reward_k1", mu), (0.381, 0.944, 7.28)),
        ("reward_k1, token ratios, charged at rollout", charged_at_rollout, (0.782, 0.904, 9.157)),
        ("reward_k1 to-go, weight of the whole string", whole_weight, (0, 1, 8.57)),
        ("off_policy_exact_loss", prefix_weighted, (0, 1, 3.81)),
        ("exact_weighted", penalty("exact_weighted", mu), (0, 1, 3.81)),
    ]
    for name, per_string, expected in rows:
        check_row(name, compare(per_string, mu, truth), expected)


def test_token_local_placements_follow_the_kl_of_frozen_states() -> None:
    """Their wrong value in closed form: Σ_c d(c) ∇KL_c, the visits d held still."""
    p, q = MODELS.policy.softmax(-1), MODELS.reference.softmax(-1)
    log_ratio = (p / q).log()
    visits = WORLD.visits(MODELS.policy)[:, None]
    kl = (p * log_ratio).sum(-1, keepdim=True)
    expected = {
        "loss_k2": visits * p * (log_ratio - kl),
        "loss_exact": visits * p * (log_ratio - kl),
        "loss_k3_weighted": visits * p * (log_ratio - kl),
        "loss_k3": visits * (p - q),
        "loss_k1": torch.zeros_like(p),
    }
    weight = WORLD.probabilities(MODELS.policy)
    for placement, gradient in expected.items():
        mean = weight @ gradients(penalty(placement, MODELS.policy))
        torch.testing.assert_close(mean, gradient.flatten(), atol=1e-10, rtol=0)


@given(st.floats(-8, 8))
def test_mixed_is_unbiased_for_any_coefficient(mixing: float) -> None:
    weight = WORLD.probabilities(MODELS.policy)
    mixed = weight @ gradients(penalty("mixed", MODELS.policy, mixing))
    k1 = weight @ gradients(penalty("reward_k1", MODELS.policy))
    assert (mixed - k1).norm() < 1e-10 * k1.norm()


def test_mixed_takes_a_coefficient_per_response() -> None:
    each = torch.linspace(-1, 2, len(MASK), dtype=torch.float64)
    tensors = {
        "logprobs": WORLD.token_logprobs(MODELS.policy),
        "ref_logprobs": REF,
        "mask": MASK,
        "kl": state_kl(MODELS.policy),
    }
    together = placements.charges("mixed", mixing=each, **tensors)
    weights = placements.loss_weights("mixed", mask=MASK, mixing=each, dtype=torch.float64)
    for i in (0, 50, 120):
        alone = placements.charges("mixed", mixing=float(each[i]), **tensors)
        torch.testing.assert_close(together[i], alone[i])
        assert (weights[i] == torch.where(MASK[i], each[i], 0.0)).all()


def test_exact_has_at_most_55_percent_of_the_noise_of_k1(truth: Tensor) -> None:
    exact = compare(penalty("exact", MODELS.policy), MODELS.policy, truth)
    k1 = compare(penalty("reward_k1", MODELS.policy), MODELS.policy, truth)
    print(f"\nsd of the KL-only gradient, exact / k1 to go: {exact[2] / k1[2]:.3f}")
    assert exact[2] <= 0.55 * k1[2]


def test_gradient_of_says_what_enumeration_finds() -> None:
    found = {"exact": [], "token-local": [], "zero": [], "biased": []}
    for placement, _, (error, _, _) in ON_POLICY:
        kind = "exact" if error == 0 else "zero" if error == 1 else "biased"
        if error == 0.744:
            kind = "token-local"
        found[kind].append(placement)
    for kind, names in found.items():
        assert {placements.gradient_of(name).kind for name in names} == {kind}
    assert placements.gradient_of("measure").kind == "none"


def test_off_policy_loss_estimates_the_kl_itself() -> None:
    loss = placements.off_policy_exact_loss(
        WORLD.token_logprobs(MODELS.policy),
        WORLD.token_logprobs(MODELS.sampler),
        state_kl(MODELS.policy),
        MASK,
    )
    mean = (WORLD.probabilities(MODELS.sampler) * loss).sum()
    assert mean.item() == pytest.approx(0.3028250920461, abs=1e-12)


def test_off_policy_loss_on_fresh_samples_is_exact_string_by_string() -> None:
    then = WORLD.token_logprobs(MODELS.policy)

    def weighted(logits: Tensor) -> Tensor:
        logprobs = WORLD.token_logprobs(logits)
        return placements.off_policy_exact_loss(logprobs, then, state_kl(logits), MASK)

    torch.testing.assert_close(gradients(weighted), gradients(penalty("exact", MODELS.policy)))


def test_prefix_weights_carry_visits_from_one_policy_to_another() -> None:
    weights = placements.prefix_weights(
        WORLD.token_logprobs(MODELS.policy), WORLD.token_logprobs(MODELS.sampler), MASK
    )
    mass = (WORLD.probabilities(MODELS.sampler)[:, None] * weights).flatten()
    visits = torch.zeros(len(WORLD.prefixes), dtype=torch.float64)
    visits = visits.scatter_add(0, WORLD.string_states.flatten(), mass)
    torch.testing.assert_close(visits, WORLD.visits(MODELS.policy))
    assert (weights[:, 0] == 1).all()
    assert (weights[~MASK] == 0).all()


WEIGHTS = st.lists(st.just(0.0) | st.floats(1e-3, 1e3), min_size=1, max_size=8).filter(any)


@given(WEIGHTS, st.floats(1e-3, 1e3))
def test_effective_sample_size(raw: list[float], factor: float) -> None:
    w = np.array(raw)
    weights = torch.tensor([[*raw, math.nan]], dtype=torch.float64)
    mask = torch.tensor([[True] * len(raw) + [False]])
    size = placements.effective_sample_size(weights, mask).item()
    shares = w / w.max()
    assert size == pytest.approx(shares.sum() ** 2 / (shares**2).sum(), rel=1e-9)
    assert 1 - 1e-9 <= size <= len(raw) + 1e-9
    assert placements.effective_sample_size(weights * factor, mask).item() == pytest.approx(size)


def test_effective_sample_size_of_equal_and_of_huge_weights() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert placements.effective_sample_size(torch.full((2, 3), 0.2), mask).item() == 6
    huge = torch.full((2, 3), 1e30)  # its square is infinite in float32
    assert placements.effective_sample_size(huge, mask).item() == 6


@pytest.mark.parametrize(
    "weights", [torch.zeros(1, 2), torch.full((1, 2), math.nan), torch.zeros(1, 0)]
)
def test_effective_sample_size_without_weight_is_refused(weights: Tensor) -> None:
    with pytest.raises(ValueError, match="positive kept one"):
        placements.effective_sample_size(weights, torch.ones_like(weights) > 0)


@pytest.mark.parametrize("placement", get_args(Placement))
def test_nothing_outside_the_mask_matters(placement: Placement) -> None:
    """Value and gradient stay when NaN and infinity are written wherever nothing is kept."""
    mixing = 0.3 if placement == "mixed" else None
    results = []
    for fill in (0.0, math.nan, math.inf, -math.inf):
        now, then, ref, kl = (
            torch.where(MASK, x, fill)
            for x in (
                WORLD.token_logprobs(MODELS.policy),
                WORLD.token_logprobs(MODELS.sampler),
                REF,
                state_kl(MODELS.policy),
            )
        )
        now, kl = now.requires_grad_(), kl.requires_grad_()
        charge = placements.charges(
            placement, logprobs=now, ref_logprobs=ref, kl=kl, mask=MASK, mixing=mixing
        )
        term = placements.loss_terms(
            placement, logprobs=now, rollout_logprobs=then, ref_logprobs=ref, kl=kl, mask=MASK
        )
        extra = placements.off_policy_exact_loss(now, then, kl, MASK)
        loss = extra.sum() if term is None else extra.sum() + term.sum()
        loss.backward()
        assert (charge[~MASK] == 0).all()
        assert (now.grad[~MASK] == 0).all()
        assert (kl.grad[~MASK] == 0).all()
        results.append(
            torch.stack(
                [charge, torch.zeros_like(charge) if term is None else term, now.grad, kl.grad]
            )
        )
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def test_sums_of_charges() -> None:
    """k1 adds up to the string's log-ratio; exact to its KL less the first state's."""
    tensors = {
        "logprobs": WORLD.token_logprobs(MODELS.policy),
        "ref_logprobs": REF,
        "mask": MASK,
        "kl": state_kl(MODELS.policy),
    }
    k1 = placements.charges("reward_k1", **tensors).sum(-1)
    log_ratio = WORLD.string_logprobs(MODELS.policy) - WORLD.string_logprobs(MODELS.reference)
    torch.testing.assert_close(k1, log_ratio)
    exact = placements.charges("exact", **tensors).sum(-1)
    torch.testing.assert_close(exact, tensors["kl"].sum(-1) - tensors["kl"][:, 0])
    for placement in ("measure", "loss_exact", "loss_k2"):
        assert (placements.charges(placement, **tensors) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    x, mask = torch.zeros(2, 3, dtype=dtype), torch.ones(2, 3, dtype=torch.bool)
    wide = torch.promote_types(dtype, torch.float32)
    for placement in get_args(Placement):
        mixing = 0.5 if placement == "mixed" else None
        charge = placements.charges(
            placement, logprobs=x, ref_logprobs=x, kl=x, mask=mask, mixing=mixing
        )
        assert charge.dtype == wide
    assert placements.loss_weights("exact", mask=mask).dtype == torch.float32


SOUND = ("reward_k1", "exact", "exact_weighted", "mixed", "measure")
BIASED = [placement for placement in get_args(Placement) if placement not in SOUND]


@pytest.mark.parametrize("placement", BIASED)
def test_unsound_placements_are_refused_unless_allowed(placement: Placement) -> None:
    reason = placements.gradient_of(placement)
    with pytest.raises(ValueError, match=r"has a (biased|token-local|zero) gradient") as refusal:
        placements.check_placement(placement, allow_biased=False)
    assert reason.why in str(refusal.value)
    assert "allow_biased" in str(refusal.value)
    placements.check_placement(placement, allow_biased=True)


def test_sound_placements_are_accepted() -> None:
    for placement in SOUND:
        placements.check_placement(placement, allow_biased=False)


def test_unknown_placement_is_refused_by_every_function() -> None:
    x, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    tensors = {"logprobs": x, "ref_logprobs": x, "kl": x, "mask": mask}
    told = pytest.raises((ValueError, TypeError), match="rewards_k1")
    with told:
        placements.gradient_of("rewards_k1")
    with told:
        placements.check_placement("rewards_k1", allow_biased=True)
    with told:
        placements.charges("rewards_k1", **tensors)
    with told:
        placements.loss_weights("rewards_k1", mask=mask)
    with told:
        placements.loss_terms("rewards_k1", rollout_logprobs=x, **tensors)


def test_unknown_placement_is_named_with_the_known_ones() -> None:
    # Past the types that are checked while testing: a caller's are not.
    unchecked = getattr(placements.gradient_of, "__wrapped__", placements.gradient_of)
    with pytest.raises(ValueError, match=r"one of reward_k1, .*, got 'kl'"):
        unchecked("kl")


@pytest.mark.parametrize(("placement", "mixing"), [("mixed", None), ("exact", 0.5)])
def test_mixing_goes_with_mixed_and_nothing_else(placement, mixing) -> None:
    x, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    told = pytest.raises(ValueError, match="mixing must be given for placement 'mixed'")
    with told:
        placements.charges(placement, logprobs=x, ref_logprobs=x, kl=x, mask=mask, mixing=mixing)
    with told:
        placements.loss_weights(placement, mask=mask, mixing=mixing)
