"""Two written-out distributions against the tensor implementation, scipy and by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr

from kleash.kl.discrete import explicit_kl
from kleash.kl.exact import exact_kl


def test_the_readme_example_by_hand() -> None:
    result = explicit_kl([0.7, 0.3], [0.5, 0.5])
    assert result.forward_terms == pytest.approx([0.7 * math.log(1.4), 0.3 * math.log(0.6)])
    assert round(result.forward, 4) == 0.0823
    assert [round(term, 4) for term in result.forward_terms] == [0.2355, -0.1532]
    assert round(result.reverse, 4) == 0.0872


@st.composite
def pairs(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    size = draw(st.integers(1, 6))
    weights = st.lists(st.floats(0, 1), min_size=size, max_size=size)
    p, q = (
        draw(weights.filter(lambda w: sum(w) > 1e-3)),
        draw(weights.filter(lambda w: sum(w) > 1e-3)),
    )
    return [w / sum(p) for w in p], [w / sum(q) for w in q]


@given(pairs())
@settings(max_examples=100, deadline=None)
def test_agrees_with_scipy_and_with_the_tensors(pair: tuple[list[float], list[float]]) -> None:
    p, q = pair
    result = explicit_kl(p, q)
    assert result.forward == pytest.approx(float(rel_entr(p, q).sum()), abs=1e-12)
    log_p, log_q = (torch.tensor(x, dtype=torch.float64).log() for x in (p, q))
    assert result.forward == pytest.approx(float(exact_kl(log_p, log_q)), abs=1e-6)
    assert result.reverse == pytest.approx(float(exact_kl(log_q, log_p)), abs=1e-6)


@pytest.mark.parametrize(
    ("p", "q", "sentence"),
    [
        ([0.7, 0.3], [1.0], "same outcomes, got 2 and 1"),
        ([0.7, 0.2], [0.5, 0.5], "sum to 1, got 0.9 in the first"),
        ([0.5, 0.5], [0.7, 0.7], "sum to 1, got 1.4 in the second"),
        ([-0.1, 1.1], [0.5, 0.5], "between 0 and 1, got -0.1 in the first"),
        ([0.5, 0.5], [math.nan, 0.5], "between 0 and 1, got nan in the second"),
    ],
)
def test_what_is_not_a_pair_of_distributions_is_refused(
    p: list[float], q: list[float], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        explicit_kl(p, q)
