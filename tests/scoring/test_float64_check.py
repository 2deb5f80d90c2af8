"""The spot check: silent on right scores of every kind of head, loud on a small error."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kleash.errors import ScoringError
from kleash.scoring import float64_check, streaming
from kleash.types import Head

TARGETS = torch.arange(200) % 1000


def make(size: float = 3.0) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 64, generator=make)
    return hidden, torch.randn(1003, 64, generator=make) * size / 8


@pytest.mark.parametrize("size", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_right_scores_pass(size: float, softcap: float | None) -> None:
    hidden, weight = make(size)
    bias = torch.zeros(1003)
    bias[7] = -torch.inf
    head = Head(weight, bias, scale=0.5, softcap=softcap, vocab_size=1000)
    ref = Head(weight.bfloat16(), vocab_size=1000)
    scores = float64_check.token_scores(
        hidden,
        head,
        TARGETS,
        reference=(hidden.bfloat16(), ref),
        temperature=0.7,
        want=("logprobs", "ref_logprobs", "kl"),
    )
    assert scores.kl is not None
    expected = streaming.token_scores(hidden, head, TARGETS, temperature=0.7)
    assert torch.equal(scores.logprobs, expected.logprobs)


@pytest.mark.parametrize("common", [0.0, 20.0])
def test_large_logits_are_allowed_their_rounding(common: float) -> None:
    """As of a trained model: sure of its word, its logits of 50 and 70 with much in common."""
    make = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(256, 896, generator=make), torch.randn(2000, 896, generator=make)
    shared = torch.nn.functional.normalize(torch.randn(896, generator=make), dim=0)
    hidden, weight = 8 * hidden + common * shared, weight / 896**0.5 + shared
    targets = (hidden @ weight.T).argmax(-1)
    scores = float64_check.token_scores(hidden, Head(weight), targets)
    assert scores.logprobs.abs().min() < 1e-3


def test_a_head_of_several_parts_is_checked_to_its_last_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(float64_check, "WORDS", 300)
    hidden, weight = make()
    head = Head(weight, torch.linspace(0, 3, 1003), softcap=9.0, vocab_size=1000)
    float64_check.token_scores(hidden, head, TARGETS + 800)
    right = streaming.token_scores
    last = weight.clone()
    last[999] += 0.01
    monkeypatch.setattr(
        float64_check.streaming,
        "token_scores",
        lambda hidden, head, *given, **named: right(
            hidden, replace(head, weight=last), *given, **named
        ),
    )
    with pytest.raises(ScoringError, match="got logprobs"):
        float64_check.token_scores(hidden, head, TARGETS + 800)


def test_a_banned_word_that_is_given_a_probability_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, weight = make()
    # So unlikely that the other words' probabilities do not show it.
    rare, banned = torch.zeros(1003), torch.zeros(1003)
    rare[66], banned[66] = -200.0, -torch.inf
    free = streaming.token_scores(hidden, Head(weight, rare), TARGETS)
    monkeypatch.setattr(float64_check.streaming, "token_scores", lambda *_, **__: free)
    with pytest.raises(ScoringError, match="and -inf at token 66"):
        float64_check.token_scores(hidden, Head(weight, banned), TARGETS)


@pytest.mark.parametrize("fault", [1e-4, float("nan"), float("inf")])
def test_one_wrong_score_is_named(monkeypatch: pytest.MonkeyPatch, fault: float) -> None:
    hidden, weight = make()
    right = streaming.token_scores(hidden, Head(weight), TARGETS)

    def wrong(*_: object, **__: object) -> object:
        right.logprobs[66] += fault
        return right

    monkeypatch.setattr(float64_check.streaming, "token_scores", wrong)
    with pytest.raises(ScoringError, match=r"got logprobs .* at token 66: please report"):
        float64_check.token_scores(hidden, Head(weight), TARGETS)
