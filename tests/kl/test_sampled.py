"""Sampled estimates of an explicit KL, against closed forms and the estimators of tensors."""

import math

import pytest
import torch

from kleash.kl.discrete import explicit_kl
from kleash.kl.estimators import sampled_kl
from kleash.kl.sampled import sampled_explicit_kl

P, Q = [0.25, 0.6, 0.15], [0.05, 0.75, 0.2]
PAIR = explicit_kl(P, Q)


def moments(name: str) -> tuple[float, float]:
    """Mean and variance of an estimator of one sample, by the sum over all outcomes."""
    delta = [math.log(p / q) for p, q in zip(P, Q, strict=True)]
    value = {
        "k1": delta,
        "k2": [d**2 / 2 for d in delta],
        "k3": [q / p - 1 + d for p, q, d in zip(P, Q, delta, strict=True)],
    }[name]
    mean = sum(p * v for p, v in zip(P, value, strict=True))
    return mean, sum(p * (v - mean) ** 2 for p, v in zip(P, value, strict=True))


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_estimates_converge_to_the_closed_form_with_its_standard_error(name: str) -> None:
    mean, variance = moments(name)
    found = sampled_explicit_kl(PAIR, [100, 200_000], seed=3).rows
    for size in (100, 200_000):
        one = found[size][name]  # type: ignore[index]
        error = math.sqrt(variance / size)
        assert abs(one.mean - mean) < 4 * error
        # The sample's own standard error, to within that of a standard deviation.
        assert one.standard_error == pytest.approx(error, rel=0.4 if size == 100 else 0.01)
    if name != "k2":
        assert mean == pytest.approx(PAIR.forward)
    else:
        assert abs(mean - PAIR.forward) > 0.01


def test_coverage_is_that_of_a_standard_error() -> None:
    inside = [
        abs(one.mean - PAIR.forward) < 1.96 * (one.standard_error or 0)
        for seed in range(400)
        for one in [sampled_explicit_kl(PAIR, [200], seed=seed).rows[200]["k1"]]
    ]
    assert 0.91 < sum(inside) / len(inside) < 0.98


def test_a_token_is_worked_as_the_estimators_of_tensors_do() -> None:
    token = sampled_explicit_kl(PAIR, [1], seed=0).token
    logprobs = torch.tensor([[math.log(P[token.outcome])]], dtype=torch.float64)
    ref_logprobs = torch.tensor([[math.log(Q[token.outcome])]], dtype=torch.float64)
    for name in ("k1", "k2", "k3"):
        expected = float(sampled_kl(logprobs, ref_logprobs, name))
        assert token.values[name] == pytest.approx(expected)


def test_the_seed_repeats_and_more_samples_contain_fewer() -> None:
    one, same, other = (sampled_explicit_kl(PAIR, [1, 5], seed=seed) for seed in (1, 1, 2))
    assert one == same and one.rows != other.rows
    assert sampled_explicit_kl(PAIR, [5, 900], seed=1).rows[5] == one.rows[5]
    assert one.rows[1]["k1"].mean == one.token.values["k1"]
    assert one.rows[1]["k1"].standard_error is None


def test_what_the_reference_never_does_is_infinite() -> None:
    found = sampled_explicit_kl(explicit_kl([0.5, 0.5], [1.0, 0.0]), [100], seed=0).rows[100]
    for one in found.values():
        assert one.mean == math.inf and one.standard_error is not None
        assert math.isnan(one.standard_error)


@pytest.mark.parametrize("sizes", [[], [0], [5, -1]])
def test_a_size_is_one_or_more(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        sampled_explicit_kl(PAIR, sizes, seed=0)
