"""Writing without the rows that have ended: they leave the batch, and so do their keys and values.

`generate` carries a row that has ended to the end of the longest. Here it is stopped when a quarter
of its rows have ended, goes on with the others, and so on. Random numbers are those of the whole
batch, so that every response is the same.
"""

from collections.abc import Sequence
from copy import copy
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_ENDED = 0.25
"""Share of the rows that have to have ended before the others go on alone: a copy of their keys and
values costs about what one step costs, and there are some log(rows)/log(4/3) copies."""


@runtime_checkable
class RowSampler(Protocol):
    """A processor of logits that draws a word for each row that goes on."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores whose largest is the word drawn."""
        ...

    def rewind(self, written: int) -> None:
        """Only so many tokens stand; random numbers of further ones are used again."""
        ...

    def keep(self, going: Int[Tensor, " going"]) -> None:
        """Go on with some of the rows alone, by their numbers among those of the last call."""
        ...


class _SomeEnded(StoppingCriteria):
    """Stops all rows when enough of them have ended."""

    def __init__(self, stops: Tensor, rows: int) -> None:
        self._stops, self._most = stops, max(1, int(_ENDED * rows))
        self._ended = torch.zeros(rows, dtype=torch.bool, device=stops.device)

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self._ended = self._ended | torch.isin(input_ids[:, -1], self._stops)
        return torch.full_like(self._ended, int(self._ended.sum()) >= self._most)


def generate_going(
    model: PreTrainedModel,
    prompt_ids: Int[Tensor, "batch prompt"],
    prompt_mask: Bool[Tensor, "batch prompt"],
    settings: GenerationConfig,
    sampler: RowSampler,
) -> Int[Tensor, "batch token"]:
    """Token ids of responses, padded behind their stop tokens, as `generate` gives them.

    Args:
        model: what writes.
        prompt_ids: prompts, padded on the left.
        prompt_mask: True on their tokens.
        settings: of `generate`; greedy, for `sampler` leaves one word a row.
        sampler: draws the words.
    """
    cache = _cache_by_rows(model)
    stops = torch.tensor(cast("Sequence[int]", settings.eos_token_id), device=prompt_ids.device)
    ids, mask = prompt_ids, prompt_mask.long()
    going = torch.arange(len(ids), device=ids.device)
    limit, written = cast(int, settings.max_new_tokens), 0
    out = ids.new_full((len(ids), limit), cast(int, settings.pad_token_id))
    while len(going) and written < limit:
        left = copy(settings)
        left.max_new_tokens = limit - written
        if settings.min_new_tokens is not None:
            left.min_new_tokens = max(0, settings.min_new_tokens - written)
        criteria = [] if cache is None else [_SomeEnded(stops, len(going))]
        made = cast(Any, model).generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=left,
            logits_processor=LogitsProcessorList([cast(LogitsProcessor, sampler)]),
            stopping_criteria=StoppingCriteriaList(criteria),
            # A divided model is gathered for writing, and waits for no other process.
            synced_gpus=False,
            **({} if cache is None else {"past_key_values": cache}),
        )
        new = made[:, ids.shape[1] :]
        out[going, written : written + new.shape[1]] = new
        written += new.shape[1]
        # On some devices the library looks one step late whether all rows are to stop.
        sampler.rewind(written)
        on = (~torch.isin(new, stops).any(dim=1)).nonzero().flatten()
        if cache is None:
            break
        if len(on) < len(going):
            cache.batch_select_indices(on)
            sampler.keep(on)
        ids, going = made[on], going[on]
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)[on]
    return out[:, :written]


def _cache_by_rows(model: PreTrainedModel) -> DynamicCache | None:
    """An empty cache whose rows can be dropped; None where layers keep other states too."""
    supported = getattr(type(model), "_supports_default_dynamic_cache", None)
    if supported is None or not supported():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return cache
    return None
