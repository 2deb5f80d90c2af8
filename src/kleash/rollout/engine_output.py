"""What an engine returned, as a rollout: complete and possible, or an error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kleash.errors import EngineError, NonFiniteError
from kleash.rollout.engine import WritingRequest
from kleash.types import Rollout


@dataclass(frozen=True)
class EngineResponse:
    """One response as an engine returned it."""

    ids: Sequence[int]
    """Its tokens, the one that ends it included."""
    logprobs: Sequence[float]
    """log-probability of each, in nats, at the temperature of sampling."""


def rollout_of(
    written: Sequence[EngineResponse],
    request: WritingRequest,
    *,
    words: int,
    stop_ids: tuple[int, ...],
    pad_id: int,
) -> Rollout:
    """The rollout of an engine's responses, in the order of the request.

    Args:
        written: one response for each row of the prompts.
        request: what was asked for.
        words: token ids below this stand for text.
        stop_ids: tokens that end a response.
        pad_id: fills rows that ended.

    Raises:
        EngineError: a response is missing, empty, too long, goes on behind a stop token, ends
            without one before the limit, or has a token that is no word.
        NonFiniteError: a log-probability is NaN or infinite; it names response and token.
    """
    prompts = request.prompts
    if len(written) != len(prompts.ids):
        raise EngineError(
            f"expected {len(prompts.ids)} responses from the engine, got {len(written)}: nothing "
            "of them is used; restart it and resume the run"
        )
    limit, stops = request.sampling.max_new_tokens, frozenset(stop_ids)
    for number, response in enumerate(written):
        _require_whole(response, number, limit=limit, stops=stops, words=words)
    lengths = torch.tensor([len(response.ids) for response in written])
    width = int(lengths.max())
    ids = torch.full((len(written), width), pad_id, dtype=torch.long)
    logprobs = torch.zeros(len(written), width)
    for row, response in enumerate(written):
        ids[row, : len(response.ids)] = torch.tensor(response.ids)
        logprobs[row, : len(response.ids)] = torch.tensor(response.logprobs)
    device = prompts.ids.device
    ended = torch.tensor([response.ids[-1] in stops for response in written])
    return Rollout(
        prompt_ids=prompts.ids,
        prompt_mask=prompts.mask,
        response_ids=ids.to(device),
        response_mask=(torch.arange(width) < lengths[:, None]).to(device),
        ended=ended.to(device),
        prompt_index=prompts.index,
        sampler_logprobs=logprobs.to(device),
    )


def _require_whole(
    response: EngineResponse, number: int, *, limit: int, stops: frozenset[int], words: int
) -> None:
    ids, fault = response.ids, None
    if not 1 <= len(ids) <= limit:
        fault = f"{len(ids)} tokens"
    elif len(response.logprobs) != len(ids):
        fault = f"{len(response.logprobs)} log-probabilities for {len(ids)} tokens"
    elif any(not 0 <= token < words for token in ids):
        fault = f"a token that is none of the policy's {words} words"
    elif any(token in stops for token in ids[:-1]):
        fault = "tokens behind the one that ends it"
    elif len(ids) < limit and ids[-1] not in stops:
        fault = f"no token that ends it after {len(ids)} tokens"
    if fault is not None:
        raise EngineError(
            f"expected response {number} of the engine to have 1 to {limit} tokens and to end with "
            f"a stop token or at the limit, got {fault}: nothing of this rollout is used; check "
            "that the engine serves this run alone, restart it and resume the run"
        )
    for place, logprob in enumerate(response.logprobs):
        if not math.isfinite(logprob):
            raise NonFiniteError(
                "expected finite log-probabilities from the engine, got NaN or infinity for "
                "{place}: the policy's weights are damaged or have diverged",
                response=number,
                token=place,
            )
