"""Log-probabilities of an engine in the form of a model: scores are those of the laws themselves.

The engine is a table of random laws; vLLM's own are in `test_served_policy.py`.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kleash.auditing import served_policy
from kleash.auditing.served_policy import Reversal, ServedArchitecture, ServedModel
from kleash.models.lm_head import read_head
from kleash.models.policy import Identity
from kleash.rollout.top_tokens import distributions
from kleash.rollout.vllm_engine import VLLMEngine
from kleash.scoring import token_scores

WORDS = 40_000
"""Of which an identity matrix would take 6 GiB."""
IDENTITY = Identity(path="served", how="as vLLM computes it", dtype="float32", sha256="")


class RandomLaws(VLLMEngine):
    """The law after a token depends on nothing but that token."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def law(self, token: int) -> Tensor:
        generator = torch.Generator().manual_seed(token)
        return torch.randn(WORDS, generator=generator).double().mul(3).log_softmax(-1)

    def next_token_logprobs(
        self, texts: Sequence[Sequence[int]], *, temperature: float = 1.0
    ) -> list[Tensor]:
        assert temperature == 1.0
        self.asked.append(len(texts))
        return [torch.stack([self.law(token) for token in text[:-1]]) for text in texts]


def test_scores_of_a_large_vocabulary_are_those_of_the_laws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(served_policy, "_AT_ONCE", 4 * WORDS)
    engine = RandomLaws()
    model = ServedModel(ServedArchitecture(), engine, IDENTITY, WORDS).eval()
    ids = torch.tensor([[0, 7, 8], [9, 10, 11], [12, 13, 39_999]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 1]])
    (states,) = model.trunk(ids, mask)
    assert engine.asked == [1, 1, 1] and not states[0, 0].any()
    head = read_head(model, WORDS)
    assert head.weight.untyped_storage().nbytes() < 2**19
    kept = mask.bool()
    ref_weight = torch.randn(WORDS, 4, generator=torch.Generator().manual_seed(1))
    ref_states = torch.randn(8, 4, generator=torch.Generator().manual_seed(2))
    targets = torch.tensor([8, 1, 10, 11, 2, 13, 39_999, 3])
    found = token_scores(
        states[kept],
        head,
        targets,
        reference=(ref_states, type(head)(ref_weight)),
        temperature=0.7,
        want=("logprobs", "kl", "entropy"),
    )
    law = torch.stack([engine.law(int(token)) for token in ids[kept]])
    p = (law / 0.7).log_softmax(-1)
    q = (ref_states.double() @ ref_weight.double().T / 0.7).log_softmax(-1)
    near: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(found.logprobs, p.gather(1, targets[:, None]).squeeze(1), **near)
    torch.testing.assert_close(found.kl, (p.exp() * (p - q)).sum(-1), **near)
    torch.testing.assert_close(found.entropy, -(p.exp() * p).sum(-1), **near)
    shown = distributions(head, states[kept][:2], temperature=0.7)
    torch.testing.assert_close(shown.double(), p[:2].exp(), rtol=1e-3, atol=1e-8)


def test_short_texts_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_policy, "_AT_ONCE", 5 * WORDS)
    engine = RandomLaws()
    trunk = ServedModel(ServedArchitecture(), engine, IDENTITY, WORDS).trunk
    trunk(
        torch.zeros(4, 6, dtype=torch.long),
        torch.tensor([[1] * n + [0] * (6 - n) for n in (2, 3, 6, 1)]),
    )
    assert engine.asked == [2, 1, 1]


def test_the_matrix_reverses() -> None:
    assert torch.equal(Reversal(5).weight @ torch.arange(5.0), torch.arange(4.0, -1, -1))
