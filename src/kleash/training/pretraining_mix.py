"""InstructGPT's pretraining mix: keep predicting ordinary text while the reward is climbed.

    loss += −γ · mean over tokens of log π(x_t | x_<t)

The mean is per token, so γ does not depend on how long the texts are.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kleash.errors import PromptError
from kleash.models.policy import LanguageModel
from kleash.rollout.prompt_files import file_rows
from kleash.scoring import token_scores


@dataclass(frozen=True)
class PretrainingMix:
    """Texts, how many of them join each optimiser step, and their weight."""

    texts: list[list[int]]
    """Token ids; each text has at least two."""
    coefficient: float
    """γ."""
    texts_per_minibatch: int

    def draw(self) -> list[list[int]]:
        """Texts for one optimiser step, drawn from torch's global generator."""
        rows = torch.randint(len(self.texts), (self.texts_per_minibatch,))
        return [self.texts[row] for row in rows.tolist()]


def read_texts(
    path: str, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int
) -> list[list[int]]:
    """Read a .jsonl, .csv or .parquet file of `text`; each is tokenised and cut to `max_tokens`.

    Raises:
        PromptError: the file is missing, empty or of another kind, or a row cannot be read or has
            no `text` of two tokens or more; the message names the row.
    """
    if not Path(path).is_file():
        raise PromptError(f"expected pretraining texts at {path!r}, got no file: check the path")
    texts: list[list[int]] = []
    for where, row in file_rows(Path(path)):
        text = row.get("text")
        if not isinstance(text, str):
            raise PromptError(f"expected the key 'text' with a text on {where}, got {text!r}")
        ids = cast("list[int]", tokenizer(text)["input_ids"])[:max_tokens]
        if len(ids) < 2:
            raise PromptError(f"expected a text of at least two tokens on {where}, got {text!r}")
        texts.append(ids)
    if not texts:
        raise PromptError(f"expected pretraining texts in {path!r}, got an empty file")
    return texts


def pretraining_loss(
    model: LanguageModel,
    texts: list[list[int]],
    *,
    tokens: int,
    pad_id: int,
    device: torch.device,
) -> Float[Tensor, ""]:
    """Negative log-likelihood of some texts per token of all that were drawn, in nats.

    The first token of a text is given. Of all texts it is the mean per token.

    Args:
        model: the policy.
        texts: token ids of each text.
        tokens: predicted tokens of all texts, which the sum is divided by.
        pad_id: any id; it is never looked at.
        device: where the model is.
    """
    width = max(len(ids) for ids in texts)
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in texts], device=device)
    lengths = torch.tensor([len(row) for row in texts], device=device)
    mask = torch.arange(width, device=device) < lengths[:, None]
    given, rest = slice(0, 1), slice(1, None)
    hidden = model.hidden_states(ids[:, given], mask[:, given], ids[:, rest], mask[:, rest])
    kept = mask[:, rest]
    scores = token_scores(hidden[:, :-1][kept], model.head, ids[:, rest][kept])
    assert scores.logprobs is not None
    return -scores.logprobs.sum() / tokens
