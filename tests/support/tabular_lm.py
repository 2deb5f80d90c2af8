"""A table of logits as a transformers model, and everything it can write.

The hidden state is the one-hot vector of what was written after a prompt of one token; the head's
weight is the table. Word 0 ends a response.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

WORDS, LONGEST = 3, 3
PREFIXES = [
    prefix for n in range(LONGEST) for prefix in itertools.product(range(1, WORDS), repeat=n)
]
STATES = len(PREFIXES) + 1
"""One more for whatever is no prefix of a response."""


def responses() -> list[tuple[int, ...]]:
    """Everything that can be written: ended by word 0, or cut at the longest."""
    ended = [(*prefix, 0) for prefix in PREFIXES]
    cut = list(itertools.product(range(1, WORDS), repeat=LONGEST))
    return [*ended, *cut]


def log_probability(table: Tensor, response: Sequence[int]) -> Tensor:
    """Σ_t log softmax(table[prefix])[word]."""
    logs = table.log_softmax(-1)
    return torch.stack(
        [logs[PREFIXES.index(tuple(response[:t])), word] for t, word in enumerate(response)]
    ).sum()


class TabularConfig(PretrainedConfig):
    model_type = "tabular"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.vocab_size = WORDS


class TabularTrunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(WORDS, 1).requires_grad_(False).double()

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutput:
        numbers = [
            [
                PREFIXES.index(prefix) if (prefix := tuple(row[1 : t + 1])) in PREFIXES else -1
                for t in range(len(row))
            ]
            for row in input_ids.tolist()
        ]
        states = torch.tensor(numbers) % STATES
        return BaseModelOutput(nn.functional.one_hot(states, STATES).double())


class TabularLM(PreTrainedModel):
    config_class = TabularConfig
    base_model_prefix = "model"

    def __init__(self, table: Tensor) -> None:
        super().__init__(TabularConfig())
        self.model = TabularTrunk()
        self.lm_head = nn.Linear(STATES, WORDS, bias=False).double()
        self.lm_head.weight.data = table.T.clone()
        self.generation_config = GenerationConfig(eos_token_id=0)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids)[0]))
