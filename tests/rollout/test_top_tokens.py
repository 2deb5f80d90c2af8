"""The words a model thought likely, against the whole distribution by numpy."""

import numpy as np
import torch
from tiny_models import tokenizer

from kleash.rollout.top_tokens import TOP, decode, distributions, text_of_id, top_tokens
from kleash.types import Head


def test_the_likeliest_are_the_largest_of_the_softmax() -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(7, 5), torch.randn(12, 5), torch.randn(12)
    head = Head(weight, bias=bias, scale=0.5, softcap=3.0, vocab_size=10)
    found = top_tokens(distributions(head, hidden, temperature=0.7))
    logits = 0.5 * (hidden.double().numpy() @ weight.double().numpy().T + bias.double().numpy())
    logits = (3.0 * np.tanh(logits / 3.0))[:, :10] / 0.7
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for one, row in zip(found, shares, strict=True):
        order = np.argsort(-row)[:TOP]
        assert one.ids == order.tolist()
        assert np.allclose(one.probabilities, row[order], rtol=1e-3)


def test_a_small_vocabulary_is_named_whole() -> None:
    (one,) = top_tokens(torch.tensor([[0.2, 0.8]]))
    assert (one.ids, one.probabilities) == ([1, 0], [0.8, 0.2])


def test_words_read_as_text() -> None:
    tok = tokenizer()
    number = tok.convert_tokens_to_ids("w3")
    assert text_of_id(tok, number) == "w3" and decode(tok, [number, number]) == "w3 w3"
    assert text_of_id(tok, tok.eos_token_id)
