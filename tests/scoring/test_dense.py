"""The oracle of the other scorers, held against scipy, mpmath, closed forms and differences."""

import math

import mpmath
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from kleash.scoring.api import QUANTITIES, WITHOUT_GRADIENT, TokenScores, check_request
from kleash.scoring.dense import token_scores
from kleash.types import Head

DIFFERENTIABLE = [name for name in QUANTITIES if name not in WITHOUT_GRADIENT]


def model(rows=5, width=3, words=7, seed=0, **head):
    make = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=make, dtype=torch.float64)
    weight = torch.randn(words, width, generator=make, dtype=torch.float64)
    return hidden, Head(weight, **head)


def of_distributions(p, q, want, targets=(0,), **kwargs):
    """Score explicit distributions: the logits are their logarithms, with the identity as head."""
    p, q = (torch.tensor([row], dtype=torch.float64) for row in (p, q))
    finite_p, finite_q = p.clamp(min=1e-300).log(), q.clamp(min=1e-300).log()
    eye = torch.eye(p.shape[1], dtype=torch.float64)
    bans = [torch.where(row[0] == 0, -torch.inf, 0.0).double() for row in (p, q)]
    return token_scores(
        finite_p,
        Head(eye, bans[0]),
        torch.tensor(targets),
        reference=(finite_q, Head(eye, bans[1])),
        want=want,
        **kwargs,
    )


FINITE = [  # p, q
    ([0.7, 0.3], [0.5, 0.5]),
    ([0.2, 0.3, 0.5], [0.2, 0.3, 0.5]),
    ([0.9, 0.1, 0.0], [0.2, 0.8, 0.0]),
    ([1e-12, 1 - 1e-12], [0.5, 0.5]),
]


@pytest.mark.parametrize(("p", "q"), FINITE)
def test_scores_of_explicit_distributions_agree_with_scipy(p, q):
    scores = of_distributions(p, q, QUANTITIES, top_k=1)
    assert scores.kl.item() == pytest.approx(scipy.stats.entropy(p, q), abs=1e-14)
    assert scores.reverse_kl.item() == pytest.approx(scipy.stats.entropy(q, p), abs=1e-14)
    assert scores.entropy.item() == pytest.approx(scipy.stats.entropy(p), abs=1e-14)
    assert scores.ref_entropy.item() == pytest.approx(scipy.stats.entropy(q), abs=1e-14)
    assert scores.logprobs.item() == pytest.approx(math.log(p[0]), abs=1e-12)
    assert scores.ref_logprobs.item() == pytest.approx(math.log(q[0]), abs=1e-12)
    both = np.array(p) > 0
    ratio = np.log(np.array(p)[both] / np.array(q)[both])
    variance = np.cov(ratio, aweights=np.array(p)[both], ddof=0)
    assert scores.log_ratio_variance.item() == pytest.approx(float(variance), abs=1e-12)
    best = int(np.argmax(p))
    coarse = [p[best], 1 - p[best]], [q[best], 1 - q[best]]
    assert scores.top_k_mass.item() == pytest.approx(p[best], abs=1e-14)
    assert scores.top_k_kl.item() == pytest.approx(scipy.stats.entropy(*coarse), abs=1e-12)
    assert scores.same_top.item() == (best == int(np.argmax(q)))


INFINITE = [  # p, q, kl, reverse_kl
    ([0.5, 0.5, 0.0], [0.5, 0.0, 0.5], math.inf, math.inf),
    ([0.5, 0.5, 0.0], [0.4, 0.4, 0.2], math.log(1.25), math.inf),
    ([0.4, 0.4, 0.2], [0.5, 0.5, 0.0], math.inf, math.log(1.25)),
]


@pytest.mark.parametrize(("p", "q", "kl", "reverse_kl"), INFINITE)
def test_a_kl_is_infinite_exactly_where_a_word_is_missing(p, q, kl, reverse_kl):
    scores = of_distributions(p, q, ["kl", "reverse_kl", "log_ratio_variance"])
    assert scores.kl.item() == pytest.approx(kl)
    assert scores.reverse_kl.item() == pytest.approx(reverse_kl)
    assert scores.log_ratio_variance.isinf().item() == math.isinf(kl)


def test_an_infinite_kl_and_a_banned_word_leave_no_nan_in_the_gradient():
    hidden, head = model()
    hidden.requires_grad_()
    bias = torch.zeros(7, dtype=torch.float64)
    bias[2] = -torch.inf
    open_head = Head(head.weight + 0.1)
    banned = Head(head.weight, bias)
    scores = token_scores(
        hidden,
        banned,
        torch.zeros(5, dtype=torch.long),
        reference=(hidden.detach(), open_head),
        want=DIFFERENTIABLE,
    )
    (finite,) = torch.autograd.grad(scores.kl.sum(), hidden, retain_graph=True)
    (infinite,) = torch.autograd.grad(scores.reverse_kl.sum(), hidden)
    assert scores.reverse_kl.isinf().all()
    assert finite.isfinite().all()
    assert finite.any()
    assert not infinite.any()


def test_kl_with_banned_words_is_that_of_the_remaining_words():
    hidden, head = model()
    ref_hidden, ref_head = model(seed=1)
    keep = torch.tensor([0, 1, 3, 4, 6])
    bias = torch.full((7,), -torch.inf, dtype=torch.float64)
    bias[keep] = 0.0
    targets = torch.tensor([0, 1, 2, 3, 4])
    small = token_scores(
        hidden,
        Head(head.weight[keep]),
        targets,
        reference=(ref_hidden, Head(ref_head.weight[keep])),
        want=DIFFERENTIABLE,
    )
    large = token_scores(
        hidden,
        Head(head.weight, bias),
        keep[targets],
        reference=(ref_hidden, Head(ref_head.weight, bias)),
        want=DIFFERENTIABLE,
    )
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(getattr(large, name), getattr(small, name))


def test_the_head_is_scale_bias_softcap_and_padding_in_that_order():
    hidden, plain = model(rows=1, words=4)
    bias = torch.tensor([0.5, -1.0, 2.0, 9.0], dtype=torch.float64)
    head = Head(plain.weight, bias, scale=1.5, softcap=2.0, vocab_size=3)
    score = token_scores(hidden, head, torch.tensor([1]), temperature=0.7).logprobs
    products = [mpmath.fdot(row.tolist(), hidden[0].tolist()) for row in plain.weight[:3]]
    logits = [
        2 * mpmath.tanh(1.5 * (product + mpmath.mpf(b)) / 2) / mpmath.mpf("0.7")
        for product, b in zip(products, bias.tolist()[:3], strict=True)
    ]
    expected = logits[1] - mpmath.log(sum(mpmath.exp(logit) for logit in logits))
    assert score.item() == pytest.approx(float(expected), rel=1e-13)


def test_gradients_agree_with_finite_differences():
    hidden, head = model(rows=2, words=5, softcap=3.0, scale=1.2)
    ref_hidden, ref_head = model(rows=2, width=2, words=5, seed=1)

    def scores(h, w, g, v):
        found = token_scores(
            h,
            Head(w, softcap=3.0, scale=1.2),
            torch.tensor([0, 4]),
            reference=(g, Head(v)),
            temperature=0.9,
            want=DIFFERENTIABLE,
        )
        return tuple(getattr(found, name) for name in DIFFERENTIABLE)

    tensors = (hidden, head.weight, ref_hidden, ref_head.weight)
    assert torch.autograd.gradcheck(scores, [tensor.requires_grad_() for tensor in tensors])


def test_bfloat16_logits_are_not_rounded():
    hidden, head = model(rows=64, width=32, words=50)
    half, half_head = hidden.bfloat16(), Head(head.weight.bfloat16())
    targets = torch.arange(64) % 50
    score = token_scores(half, half_head, targets).logprobs
    exact = token_scores(half.double(), Head(half_head.weight.double()), targets).logprobs
    assert score.dtype == torch.float32
    torch.testing.assert_close(score.double(), exact, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(token_scores(half, half_head, targets).logprobs, score)


def test_only_what_is_asked_for_is_answered():
    hidden, head = model()
    scores = token_scores(hidden, head, torch.zeros(5, dtype=torch.long), want=["entropy"])
    assert [name for name in QUANTITIES if getattr(scores, name) is not None] == ["entropy"]
    assert TokenScores().logprobs is None


def test_nothing_to_score_is_no_error():
    head = Head(torch.zeros(3, 2))
    scores = token_scores(torch.zeros(0, 2), head, torch.zeros(0, dtype=torch.long))
    assert scores.logprobs.shape == (0,)


def test_top_k_kl_is_a_lower_bound_that_grows_to_the_kl():
    hidden, head = model(rows=20)
    reference = model(rows=20, seed=1)
    targets = torch.zeros(20, dtype=torch.long)
    found = [
        token_scores(hidden, head, targets, reference=reference, want=["kl", "top_k_kl"], top_k=k)
        for k in range(1, 8)
    ]
    exact = found[0].kl
    bounds = torch.stack([scores.top_k_kl for scores in found])
    assert (bounds >= -1e-12).all()
    assert (bounds <= exact + 1e-12).all()
    assert (bounds.diff(dim=0) >= -1e-12).all()
    torch.testing.assert_close(bounds[-1], exact)
    assert not bounds.requires_grad


HEAD = Head(torch.zeros(4, 3))
HIDDEN = torch.zeros(2, 3)
TARGETS = torch.tensor([0, 3])
UNFIT = Head(torch.zeros(4, 3))
object.__setattr__(UNFIT, "bias", torch.zeros(3))  # the annotations would refuse it at once
REFUSED = [
    ({"temperature": 0.0}, r"temperature must be a positive number, got 0\.0"),
    ({"temperature": math.nan}, "temperature must be a positive number, got nan"),
    ({"temperature": math.inf}, "temperature must be a positive number, got inf"),
    ({"want": ()}, "want must name some of logprobs, .*got \\(\\)"),
    ({"want": "kl"}, "want must name some of .*got 'kl'"),
    ({"want": ["kld"]}, r"want must name some of .*got \['kld'\]"),
    ({"want": ["logprobs", "kl"]}, r"kl need reference=\(hidden, head\), got none"),
    ({"want": ["top_k_mass"]}, "top_k_mass need top_k in 1…4, got None"),
    ({"want": ["top_k_mass"], "top_k": 5}, "need top_k in 1…4, got 5"),
    ({"want": ["top_k_mass"], "top_k": 0}, "need top_k in 1…4, got 0"),
    ({"hidden": torch.zeros(2, 5)}, "policy: head is for width 3, got hidden states of 5"),
    ({"head": Head(torch.zeros(4, 3), vocab_size=5)}, r"vocab_size must lie in 1…4, got 5"),
    ({"head": Head(torch.zeros(4, 3), vocab_size=0)}, r"vocab_size must lie in 1…4, got 0"),
    ({"head": UNFIT}, r"a bias of 4 rows, got \[3\]"),
    ({"head": Head(torch.zeros(4, 3), scale=-1.0)}, r"scale must be a positive number, got -1\.0"),
    ({"head": Head(torch.zeros(4, 3), softcap=0.0)}, r"softcap must be positive or None, got 0"),
    ({"targets": torch.tensor([0])}, r"one target per row, 2 in all, got \[1\]"),
    ({"targets": torch.tensor([0, 4])}, "targets must lie in 0…3, got 4"),
    ({"targets": torch.tensor([-100, 4])}, "targets must lie in 0…3, got -100"),
    ({"reference": (torch.zeros(3, 3), HEAD)}, "expected 2 rows of the reference, got 3"),
    ({"reference": (torch.zeros(2, 4), HEAD)}, "reference: head is for width 3"),
    (
        {"reference": (HIDDEN, Head(torch.zeros(5, 3)))},
        "must have the same words, got 4 and 5.*set Head.vocab_size",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_cannot_be_scored_is_refused(change, message):
    request = {
        "hidden": HIDDEN,
        "head": HEAD,
        "targets": TARGETS,
        "reference": None,
        "temperature": 1.0,
        "want": ("logprobs",),
        "top_k": None,
    } | change
    # Shapes are the annotations' business as well; here the function itself must refuse.
    bare = getattr(check_request, "__wrapped__", check_request)
    with pytest.raises(ValueError, match=message):
        bare(request.pop("hidden"), request.pop("head"), request.pop("targets"), **request)
