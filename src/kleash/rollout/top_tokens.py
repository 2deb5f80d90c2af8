"""What a model thought likely at a token: its few likeliest words, with their probabilities.

Whole next-token distributions are held here, so this is for the few responses that a report shows.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kleash.models.lm_head import apply_head
from kleash.types import Head

TOP = 5
"""Words named at a token."""
ROWS = 64
"""Distributions that a caller may hold at once."""
COLUMNS = 4096
"""Rows of a head that are read at once."""


@dataclass(frozen=True)
class TopTokens:
    """What a model found likeliest, by id, with probabilities; the likeliest first."""

    ids: list[int]
    probabilities: list[float]


def distributions(
    head: Head, hidden: Float[Tensor, "N hidden"], *, temperature: float
) -> Float[Tensor, "N vocab"]:
    """softmax(z / temperature) over the words of the head, row by row.

    Args:
        head: the model's head; rows beyond its words take no part.
        hidden: final hidden states, some dozens.
        temperature: that of sampling.
    """
    # Some columns at a time: a head that is a window over few numbers must not be written out.
    logits = [
        apply_head(_columns(head, slice(start, min(start + COLUMNS, head.words))), hidden)
        for start in range(0, head.words, COLUMNS)
    ]
    return (torch.cat(logits, dim=1) / temperature).softmax(-1)


def _columns(head: Head, span: slice) -> Head:
    bias = None if head.bias is None else head.bias[span]
    return replace(head, weight=head.weight[span], bias=bias, vocab_size=-1)


def top_tokens(probabilities: Float[Tensor, "N vocab"]) -> list[TopTokens]:
    """The `TOP` likeliest words of each row; all of them where there are fewer.

    Example:
        >>> import torch
        >>> top_tokens(torch.tensor([[0.1, 0.7, 0.2]]))
        [TopTokens(ids=[1, 2, 0], probabilities=[0.7, 0.2, 0.1])]
    """
    values, ids = probabilities.topk(min(TOP, probabilities.shape[1]), dim=1)
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    # Four digits are more than is shown.
    return [
        TopTokens(words, [float(f"{value:.4g}") for value in masses]) for words, masses in pairs
    ]


def text_of_id(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    """How one token reads on its own, with the space that it stands for."""
    text = decode(tokenizer, [number])
    piece = str(tokenizer.convert_ids_to_tokens(number))
    if piece.startswith("▁") and not text.startswith(" "):
        return f" {text}"
    return text or piece


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of some tokens, as they are."""
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text if isinstance(text, str) else "".join(text)
