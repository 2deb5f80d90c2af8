"""The spot check: silent on right scores of every kind of head, loud on a small error."""

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
