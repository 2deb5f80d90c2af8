import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kleash.kl import exact

PAIRS = (exact.exact_kl, exact.reverse_kl, exact.js_divergence)


def random_logprobs(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return z.log_softmax(-1)


def scipy_value(function, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    match function.__name__:
        case "exact_kl":
            return scipy.special.rel_entr(p, q).sum(-1)
        case "reverse_kl":
            return scipy.special.rel_entr(q, p).sum(-1)
    return (
        np.apply_along_axis(
            lambda r: scipy.spatial.distance.jensenshannon(*r.reshape(2, -1)),
            -1,
            np.concatenate([p, q], -1),
        )
        ** 2
    )


@pytest.mark.parametrize("function", PAIRS)
@given(seed=st.integers(0, 10_000), vocabulary=st.integers(1, 9), scale=st.floats(0.1, 30))
def test_values_are_scipys(function, seed: int, vocabulary: int, scale: float) -> None:
    p = random_logprobs(seed, 2, 3, vocabulary, scale=scale)
    q = random_logprobs(seed + 1, 2, 3, vocabulary, scale=scale)
    value = function(p, q)
    assert value.shape == (2, 3)
    np.testing.assert_allclose(
        value, scipy_value(function, p.exp().numpy(), q.exp().numpy()), rtol=1e-9, atol=1e-7
    )


@given(seed=st.integers(0, 10_000), vocabulary=st.integers(1, 9))
def test_entropy_is_scipys(seed: int, vocabulary: int) -> None:
    p = random_logprobs(seed, 3, vocabulary)
    np.testing.assert_allclose(exact.entropy(p), scipy.stats.entropy(p.exp(), axis=-1), atol=1e-12)


FINITE = [
    # p, q, KL(p‖q), KL(q‖p), JS
    ([0.7, 0.3], [0.5, 0.5], 0.0822831, 0.0871772, 0.0210059),
    ([1.0, 0.0], [0.5, 0.5], math.log(2), math.inf, 0.2157616),
    ([0.5, 0.5, 0.0], [0.5, 0.5, 0.0], 0.0, 0.0, 0.0),
    ([0.5, 0.5, 0.0], [0.25, 0.75, 0.0], 0.1438410, 0.1308120, 0.0338221),
    ([1.0, 0.0], [0.0, 1.0], math.inf, math.inf, math.log(2)),
    ([0.5, 0.5, 0.0], [0.5, 0.0, 0.5], math.inf, math.inf, math.log(2) / 2),
    ([0.0, 1.0], [0.0, 1.0], 0.0, 0.0, 0.0),
    ([1.0], [1.0], 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("p", "q", "forward", "backward", "js"), FINITE)
def test_table_of_values_with_forbidden_words(p, q, forward, backward, js) -> None:
    log_p, log_q = torch.tensor(p).log(), torch.tensor(q).log()
    assert exact.exact_kl(log_p, log_q).item() == pytest.approx(forward, abs=1e-6)
    assert exact.reverse_kl(log_p, log_q).item() == pytest.approx(backward, abs=1e-6)
    assert exact.js_divergence(log_p, log_q).item() == pytest.approx(js, abs=1e-6)


def test_terms_of_seventy_thirty_against_fair() -> None:
    p, q = torch.tensor([0.7, 0.3]), torch.tensor([0.5, 0.5])
    terms = p * (p.log() - q.log())
    np.testing.assert_allclose(terms, [0.2355, -0.1532], atol=5e-5)
    assert exact.exact_kl(p.log(), q.log()).item() == pytest.approx(terms.sum().item(), abs=1e-7)


def test_gradients_are_the_closed_forms() -> None:
    z = random_logprobs(0, 5, 7).requires_grad_()
    q = random_logprobs(1, 5, 7)
    log_p = z.log_softmax(-1)
    p, np_p, np_q = log_p.exp(), log_p.detach().exp().numpy(), q.exp().numpy()
    kl = (np_p * np.log(np_p / np_q)).sum(-1, keepdims=True)
    ent = -(np_p * np.log(np_p)).sum(-1, keepdims=True)
    middle = (np_p + np_q) / 2
    log_m = np.log(np_p / middle)
    closed = {
        exact.exact_kl: np_p * (np.log(np_p / np_q) - kl),
        exact.reverse_kl: np_p - np_q,
        exact.js_divergence: np_p * (log_m - (np_p * log_m).sum(-1, keepdims=True)) / 2,
    }
    for function, expected in closed.items():
        (gradient,) = torch.autograd.grad(function(log_p, q).sum(), z, retain_graph=True)
        np.testing.assert_allclose(gradient, expected, atol=1e-12)
    (gradient,) = torch.autograd.grad(exact.entropy(log_p).sum(), z)
    np.testing.assert_allclose(gradient, -np_p * (np.log(np_p) + ent), atol=1e-12)
    assert p.requires_grad


BANNED_BY = [
    ("both", PAIRS),
    ("policy", (exact.exact_kl, exact.js_divergence)),
    ("reference", (exact.reverse_kl, exact.js_divergence)),
]


@pytest.mark.parametrize(("by", "functions"), BANNED_BY)
def test_gradients_with_forbidden_words_are_the_limit_of_rare_ones(by: str, functions) -> None:
    """−∞ logits must act as −60 ones do: the same numbers, and no NaN anywhere."""
    results = []
    for banned in (-math.inf, -60.0):
        for function in functions:
            z = random_logprobs(0, 4, 6).requires_grad_()
            w = random_logprobs(1, 4, 6).requires_grad_()
            keep = torch.tensor([True, True, True, True, False, False])
            ban = [
                t if by == other else torch.where(keep, t, banned)
                for t, other in ((z, "reference"), (w, "policy"))
            ]
            value = function(*(t.log_softmax(-1) for t in ban))
            value.sum().backward()
            results.append([value.detach(), z.grad, w.grad])
    half = len(results) // 2
    for hard, soft in zip(results[:half], results[half:], strict=True):
        for a, b in zip(hard, soft, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_entropy_with_forbidden_words() -> None:
    z = torch.tensor([0.3, -0.2, -math.inf], dtype=torch.float64, requires_grad=True)
    short = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    for t in (z, short):
        exact.entropy(t.log_softmax(-1)).backward()
    torch.testing.assert_close(z.grad, torch.cat([short.grad, torch.zeros(1).double()]))
    assert exact.entropy(torch.tensor([0.0, -math.inf])).item() == 0


def test_underflowing_words_take_no_part_even_where_the_reference_forbids_them() -> None:
    logprobs = torch.tensor([0.0, -200.0])  # e^−200 is 0 in float32
    assert exact.exact_kl(logprobs, torch.tensor([0.0, -math.inf])).item() == 0


def test_nan_is_not_hidden() -> None:
    for function in PAIRS:
        assert function(torch.tensor([math.nan, 0.0]), torch.tensor([-1.0, -1.0])).isnan()
        assert function(torch.tensor([-1.0, -1.0]), torch.tensor([math.nan, 0.0])).isnan()


@given(seed=st.integers(0, 10_000), k=st.integers(1, 8))
def test_top_k_is_the_kl_of_merged_words_and_a_lower_bound(seed: int, k: int) -> None:
    p, q = random_logprobs(seed, 8), random_logprobs(seed + 1, 8)
    bounds = [exact.top_k_kl(p, q, j).item() for j in range(1, 9)]
    likeliest = np.argsort(-p.numpy())[:k]
    merged = [
        np.append(x[likeliest], max(0.0, 1 - x[likeliest].sum()) if k < 8 else 0.0)
        for x in (p.exp().numpy(), q.exp().numpy())
    ]
    assert bounds[k - 1] == pytest.approx(scipy.special.rel_entr(*merged).sum(), abs=1e-9)
    assert all(b >= -1e-15 for b in bounds)
    assert np.diff(bounds).min() > -1e-12  # finer can only see more
    assert bounds[-1] == pytest.approx(exact.exact_kl(p, q).item(), abs=1e-12)


def test_top_k_gradients() -> None:
    q = random_logprobs(1, 3, 6)

    def bound(z: Tensor) -> Tensor:
        return exact.top_k_kl(z.log_softmax(-1), q, 2)

    assert torch.autograd.gradcheck(bound, (random_logprobs(0, 3, 6).requires_grad_(),))


def test_top_k_where_the_tail_is_forbidden() -> None:
    z = torch.tensor([0.5, 0.1, -math.inf, -math.inf], dtype=torch.float64, requires_grad=True)
    q = random_logprobs(1, 4)
    value = exact.top_k_kl(z.log_softmax(-1), q, 2)
    torch.testing.assert_close(value, exact.exact_kl(z.log_softmax(-1), q))
    value.backward()
    assert z.grad.isfinite().all()
    assert (z.grad[2:] == 0).all()


@pytest.mark.parametrize("k", [0, -1, 5])
def test_top_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and the vocabulary size 4, got {k}"):
        exact.top_k_kl(torch.zeros(4), torch.zeros(4), k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    p, q = (torch.full((4096,), 1 / 4096).log().to(dtype) for _ in range(2))
    for value in (
        exact.entropy(p),
        exact.exact_kl(p, q),
        exact.js_divergence(p, q),
        exact.top_k_kl(p, q, 3),
    ):
        assert value.dtype == torch.float32
    # The exact answer for log-probabilities as rounded, summed in float64.
    rounded = p.double()
    assert exact.entropy(p).item() == pytest.approx(
        -(rounded.exp() * rounded).sum().item(), rel=1e-5
    )
