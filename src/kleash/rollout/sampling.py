"""Writing responses: the policy samples, through the library's `generate`, and nothing cuts in.

Left out: samplers that cut or reshape the distribution (top-p, top-k, penalties). What they write
could not be replayed by a log-probability. Rows that have ended leave the batch: `finished_rows`.
"""

import contextlib
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kleash.errors import ConfigError, NonFiniteError, PromptError
from kleash.models.lm_head import as_scored
from kleash.models.policy import Policy
from kleash.models.writing_products import writing_products
from kleash.rollout.finished_rows import generate_going
from kleash.rollout.prompts import PromptBatch
from kleash.types import Rollout

# Settings that change the distribution sampled from, with the value that leaves it alone.
_NEUTRAL: dict[str, Any] = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
}
_OTHER_SHAPERS = (
    "encoder_repetition_penalty",
    "bad_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "guidance_scale",
    "watermarking_config",
    "stop_strings",
    "num_beams",
    "max_time",
)


@dataclass(frozen=True)
class SamplingSpec:
    """How responses are written. Only what both models can replay is accepted."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    """Divides the logits in sampling and in every scoring, of policy and reference alike."""
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be replayed.

        Raises:
            ConfigError: naming the setting.
        """
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(
                f"expected a temperature above 0, got {self.temperature}: greedy or inverted "
                "sampling has no log-probabilities to learn from"
            )
        if self.max_new_tokens < 1:
            raise ConfigError(f"expected max_new_tokens of at least 1, got {self.max_new_tokens}")
        for name, neutral in _NEUTRAL.items():
            value = getattr(self, name, neutral)
            if value != neutral:
                raise ConfigError(
                    f"expected {name} = {neutral}, got {value}: its samples do not come from the "
                    "distribution that policy and reference are scored on, and every KL would be "
                    "wrong; use temperature to sharpen"
                )


def overridden_settings(policy: Policy) -> dict[str, Any]:
    """Sampling settings left in the model's own generation_config.json, which do not apply here.

    They would change what is sampled but not what is scored: a repetition penalty gives a phantom
    KL of a nat with policy = reference. The run's record lists them.
    """
    own = policy.model.generation_config
    names = (*_NEUTRAL, *_OTHER_SHAPERS, "temperature")
    values = {name: getattr(own, name, None) for name in names}
    neutral = {**_NEUTRAL, "temperature": 1.0, "num_beams": 1, "encoder_repetition_penalty": 1.0}
    return {k: v for k, v in values.items() if v is not None and v != neutral.get(k)}


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: PromptBatch,
    spec: SamplingSpec,
    *,
    microbatch: int | None = None,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Let the policy write a response to each prompt.

    A response ends with the first stop token *it* contains, which counts; a stop token in the
    prompt (a BOS that is the EOS as well) does not.

    Args:
        policy: the model that writes.
        prompts: prompts, padded on the left; repeat a row to write several responses to it.
        spec: how to sample.
        microbatch: responses written at once; None: all. Changes memory and the draws.
        generator: of the random numbers, on the policy's device; None: torch's global one.

    Raises:
        PromptError: if a prompt leaves no room for `max_new_tokens` in the policy's context.
        NonFiniteError: if a logit is NaN or infinite, naming response and token.
    """
    require_room(policy, prompts, spec)
    size = len(prompts.ids) if microbatch is None else microbatch
    pieces: list[Piece] = []
    for first in range(0, len(prompts.ids), size):
        ids, mask = prompts.ids[first : first + size], prompts.mask[first : first + size]
        try:
            pieces.append(write_piece(policy, ids, mask, spec, generator=generator))
        except NonFiniteError as error:
            error.among(range(first, first + len(ids)))
            raise
    return join_pieces(policy, prompts, pieces)


def require_room(policy: Policy, prompts: PromptBatch, spec: SamplingSpec) -> None:
    """Responses of the longest kind fit behind every prompt.

    Raises:
        PromptError: they do not.
    """
    width = int(prompts.mask.sum(dim=1).max())
    if policy.context is not None and width + spec.max_new_tokens > policy.context:
        raise PromptError(
            f"expected prompts of at most {policy.context - spec.max_new_tokens} tokens (context "
            f"{policy.context} less {spec.max_new_tokens} new tokens), got {width}"
        )


@dataclass(frozen=True)
class Piece:
    """What was written at once, before anyone looks where it ends."""

    ids: Int[Tensor, "batch token"]
    """Rows that ended are padded."""
    logprobs: Float[Tensor, "batch token"]
    draws: int
    """How often random numbers were drawn, one a row of the whole batch each time."""


def join_pieces(policy: Policy, prompts: PromptBatch, pieces: Sequence[Piece]) -> Rollout:
    """The rollout of prompts whose responses were written in pieces, in their order."""
    longest = max(piece.ids.shape[1] for piece in pieces)
    ids = torch.cat([_pad_columns(piece.ids, longest, policy.pad_id) for piece in pieces])
    logprobs = torch.cat([_pad_columns(piece.logprobs, longest, 0.0) for piece in pieces])
    lengths, ended = _lengths(ids, policy.stop_ids)
    mask = torch.arange(longest, device=ids.device) < lengths[:, None]
    return Rollout(
        prompt_ids=prompts.ids,
        prompt_mask=prompts.mask,
        response_ids=ids,
        response_mask=mask,
        ended=ended,
        prompt_index=prompts.index,
        sampler_logprobs=torch.where(mask, logprobs, 0.0),
    )


def response_texts(
    tokenizer: PreTrainedTokenizerBase, rollout: Rollout, *, stop_ids: Collection[int] = ()
) -> list[str]:
    """What each response adds to its prompt's text, without the tokens that end or pad it.

    Other special tokens are text like any other: `<think>` and calls of tools are what a reward is
    to read. Tokenizers that mark a word's beginning drop the space before the first word they
    decode, so the response is read as the text of prompt + response less the text of the prompt;
    if that is no prefix (a token that joins with the prompt's last), it is decoded alone.

    Args:
        tokenizer: the policy's.
        rollout: its responses.
        stop_ids: tokens that end a response, beside the tokenizer's own.
    """
    own = cast("tuple[int | None, int | None]", (tokenizer.eos_token_id, tokenizer.pad_token_id))
    dropped = {*stop_ids, *own}
    return [
        _text_after(tokenizer, before, [token for token in written if token not in dropped])
        for before, written in _written(rollout)
    ]


def response_columns(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> dict[str, list[Any]]:
    """Each response as it was written, for rewards that ask for it.

    Returns:
        `completion_ids`, the tokens with the one that ends them; and
        `completions_with_special_tokens`, their text with nothing dropped.
    """
    written = list(_written(rollout))
    return {
        "completion_ids": [ids for _, ids in written],
        "completions_with_special_tokens": [_text_after(tokenizer, *pair) for pair in written],
    }


def _written(rollout: Rollout) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of each prompt and its response."""
    for row in range(len(rollout.response_ids)):
        yield (
            rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist(),
            rollout.response_ids[row][rollout.response_mask[row]].tolist(),
        )


def _text_after(tokenizer: PreTrainedTokenizerBase, before: list[int], written: list[int]) -> str:
    prefix, whole = (_decode(tokenizer, ids) for ids in (before, before + written))
    return whole[len(prefix) :] if whole.startswith(prefix) else _decode(tokenizer, written)


class _Sampler(LogitsProcessor):
    """The only step between logits and token: temperature, padding rows out, one draw per row.

    A word is found by bisection in the cumulated probabilities (float64), for one random number a
    row; the library's own draw takes an exponential random number for every word of the vocabulary
    and costs as much as a small model's forward pass. `generate` is left with an argmax to take.
    """

    def __init__(
        self,
        temperature: float,
        words: int,
        rows: slice,
        of: int,
        generator: torch.Generator | None = None,
    ):
        self._temperature, self._words, self._rows, self._of = temperature, words, rows, of
        self._generator = generator
        self._drawn: list[Tensor] = []
        self._numbers: list[Tensor] = []
        self._going: Tensor | None = None

    def rewind(self, written: int) -> None:
        """Only so many tokens stand; random numbers of further ones are used again."""
        del self._drawn[written:]

    def keep(self, going: Int[Tensor, " going"]) -> None:
        """Go on with some of the rows alone, by their numbers among those of the last call."""
        self._going = going if self._going is None else self._going[going]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        logits = scores[:, : self._words].float()
        if self._temperature != 1:
            logits = logits / self._temperature
        below = logits - logits.amax(dim=-1, keepdim=True)
        if len(self._numbers) == len(self._drawn):
            self._numbers.append(random_numbers(self._of, below.device, self._generator))
        uniform = self._numbers[len(self._drawn)][self._rows]
        rows = len(uniform)
        if self._going is not None:
            uniform = uniform[self._going]
        words, mass = _draw(below.exp(), uniform)
        finite = mass.isfinite()
        if not bool(finite.all()):
            raise NonFiniteError(
                "expected finite logits from the policy, got NaN or infinity for {place}: its "
                "weights are damaged or have diverged",
                response=int(self._rows_of(~finite.flatten())[0]),
                token=len(self._drawn),
            )
        drawn = (below.gather(1, words) - mass.log()).squeeze(1).float()
        if self._going is not None:
            drawn = drawn.new_zeros(rows).index_copy(0, self._going, drawn)
        self._drawn.append(drawn)
        return torch.zeros_like(scores).scatter_(1, words, 1.0)

    def _rows_of(self, chosen: Bool[Tensor, " going"]) -> Int[Tensor, " some"]:
        """Numbers of chosen rows, among all that the sampler began with."""
        numbers = chosen.nonzero().flatten()
        return numbers if self._going is None else self._going[numbers]

    @property
    def draws(self) -> int:
        """How often random numbers were drawn."""
        return len(self._numbers)

    def logprobs(self, tokens: int) -> Float[Tensor, "batch token"]:
        """log-probabilities of the first so many tokens."""
        return torch.stack(self._drawn[:tokens], dim=1)


def random_numbers(
    rows: int, device: torch.device, generator: torch.Generator | None = None
) -> Float[Tensor, "rows 1"]:
    """One number of [0, 1) for each row of a batch: what one token costs of them."""
    return torch.rand(rows, 1, dtype=torch.float64, device=device, generator=generator)


def _draw(
    weights: Float[Tensor, "batch words"], uniform: Float[Tensor, "batch 1"]
) -> tuple[Int[Tensor, "batch 1"], Float[Tensor, "batch 1"]]:
    """One index per row, in proportion to its weight, and the row's whole weight in float64."""
    cumulated = weights.cumsum(dim=-1, dtype=torch.float64)
    mass = cumulated[:, -1:].contiguous()
    # Strictly below the whole weight, also where the product rounds up to it: the first sum above
    # the point is then there, and its word has a weight above 0.
    point = torch.minimum(uniform * mass, mass.nextafter(torch.zeros_like(mass)))
    return torch.searchsorted(cumulated, point, right=True), mass


def write_piece(
    policy: Policy,
    prompt_ids: Int[Tensor, "batch prompt"],
    prompt_mask: Bool[Tensor, "batch prompt"],
    spec: SamplingSpec,
    *,
    rows: slice = slice(None),
    generator: torch.Generator | None = None,
) -> Piece:
    """Write responses to some rows of a batch, with the random numbers that are theirs in it.

    Raises:
        NonFiniteError: a logit is NaN or infinite; it names the response among these rows.
    """
    first = int(prompt_mask.long().argmax(dim=1).min())
    mine = prompt_ids[rows, first:]
    sampler = _Sampler(spec.temperature, policy.words, rows, len(prompt_ids), generator)
    settings = _clean_settings(policy, spec)
    fast = writing_products(policy.model, rows=len(mine), tokens=spec.max_new_tokens)
    # `generate` fills settings left at None from the model's own file, so that file is put aside.
    with _settings(policy.model, settings), as_scored(policy.model, policy.precision), fast:
        response = generate_going(policy.model, mine, prompt_mask[rows, first:], settings, sampler)
    return Piece(response, sampler.logprobs(response.shape[1]), sampler.draws)


def _clean_settings(policy: Policy, spec: SamplingSpec) -> GenerationConfig:
    """Settings from scratch: the likeliest of what `_Sampler` leaves, which is the word it drew."""
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=spec.max_new_tokens,
        num_beams=1,
        use_cache=True,
        eos_token_id=list(policy.stop_ids),
        pad_token_id=policy.pad_id,
        bos_token_id=policy.tokenizer.bos_token_id,
    )


@contextlib.contextmanager
def _settings(model: PreTrainedModel, settings: GenerationConfig) -> Generator[None]:
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own


def _lengths(
    ids: Int[Tensor, "batch token"], stops: Sequence[int]
) -> tuple[Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """Length of each response, its first stop token included, and whether it has one.

    A response without one is as long as the limit, and so as the batch: padding begins only after
    a stop token, which is why a padding id that is a stop id as well does no harm.
    """
    stop = torch.isin(ids, torch.tensor(stops, device=ids.device))
    ended = stop.any(dim=1)
    return torch.where(ended, stop.long().argmax(dim=1) + 1, ids.shape[1]), ended


def _pad_columns(x: Tensor, width: int, fill: int | float) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[1]), value=fill)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text if isinstance(text, str) else "".join(text)
