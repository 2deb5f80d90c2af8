"""Exact scores of a transformers model and its reference, for loops that are not kleash's own.

From token ids to per-token numbers in one call: positions that do not depend on padding, hidden
states of both models, the shift by one, and the streamed scores of `kleash.scoring`. The loop of
kleash itself uses `scoring_pass`, which knows prompts from responses.
"""

import contextlib
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from kleash.errors import ModelError, NonFiniteError
from kleash.models.lm_head import read_checked_head, unwrapped
from kleash.models.trunk import trunk_of, trunk_states
from kleash.scoring import Quantity, token_scores
from kleash.scoring.tiles import Tiles
from kleash.types import Head


@dataclass(frozen=True)
class PairScores:
    """What a model and its reference say about each token of a batch, in nats.

    Column t is about token t: the distributions are those that the tokens before it lead to.
    Numbers are 0 where `mask` is False.
    """

    logprobs: Float[Tensor, "batch token"]
    """log π of the token."""
    ref_logprobs: Float[Tensor, "batch token"]
    """log π_ref of the token."""
    kl: Float[Tensor, "batch token"]
    """Exact KL(π‖π_ref) over the whole vocabulary."""
    entropy: Float[Tensor, "batch token"]
    """Entropy of π."""
    mask: Bool[Tensor, "batch token"]
    """True on the tokens that were scored."""


def score(
    model: nn.Module,
    reference: nn.Module | Literal["adapter_off"],
    input_ids: Int[Tensor, "batch token"],
    attention_mask: Bool[Tensor, "..."] | Int[Tensor, "..."],
    *,
    response_mask: Bool[Tensor, "..."] | Int[Tensor, "..."] | None = None,
    temperature: float = 1.0,
    words: int | None = None,
    tiles: Tiles | None = None,
) -> PairScores:
    r"""Log-probabilities, exact KL and entropy of every token, without the logits in memory.

        kl_t = Σ_v π(v | c_t) · (log π(v | c_t) − log π_ref(v | c_t)),   c_t the tokens before t

    Gradients flow into the parameters of `model` where autograd is on, and never into the
    reference: call it under `torch.no_grad()` to measure. The first time a model is seen, its head
    is compared with its own logits. Dropout is the caller's: in `model.train()` every number
    belongs to one draw of it.

    Args:
        model: a transformers causal language model, or a PEFT model around one.
        reference: another one of the same tokens in evaluation mode; "adapter_off" for the PEFT
            model `model` without its adapter; None for the model's own numbers alone.
        input_ids: texts, padded on either side or both.
        attention_mask: True (or 1) on their tokens, which follow one another without a gap.
        response_mask: True (or 1) on the tokens to score; None: all but the first of each text.
        temperature: that of sampling; divides the logits of both.
        words: number of token ids that stand for text, where a head is padded beyond them; None:
            every row.
        tiles: how to walk over the vocabulary; None: what suits the device.

    Returns:
        One number per token, aligned with `input_ids`; float32, or float64 for a float64 model.

    Raises:
        ModelError: if a model cannot be used: its logits are not its head's, the reference is in
            training mode, or there is no adapter to turn off.
        NonFiniteError: if a number is NaN; an infinite KL is a finding, and stays.
        ValueError: if shapes, masks, ids or vocabularies do not fit.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1)
        >>> config = LlamaConfig(vocab_size=9, num_attention_heads=1, **sizes)
        >>> model = LlamaForCausalLM(config).eval()
        >>> ids = torch.tensor([[1, 5, 7]])
        >>> scores = score(model, model, ids, torch.ones_like(ids))
        >>> scores.mask, scores.kl.sum().item()
        (tensor([[False,  True,  True]]), 0.0)
    """
    mask = _one_stretch(input_ids, attention_mask)
    kept = _scored(mask, response_mask)
    policy, head = _readable(model, "model", words)
    _require_ids(input_ids, mask, head.words)
    against = _reference_states(reference, model, input_ids, mask, kept, words)
    got = token_scores(
        _states(policy, input_ids, mask)[kept],
        head,
        input_ids[:, 1:][kept[:, 1:]],
        reference=against,
        temperature=temperature,
        want=_WANT,
        tiles=tiles,
    )
    numbers = {name: _placed(getattr(got, name), kept) for name in _WANT}
    _refuse_nan(numbers)
    return PairScores(mask=kept, **numbers)


_WANT: tuple[Quantity, ...] = ("logprobs", "ref_logprobs", "kl", "entropy")


def _states(
    model: PreTrainedModel, ids: Int[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch token hidden"]:
    """Hidden states that predict each token: column t is the state before token t, as `kept` is."""
    states = trunk_states(
        trunk_of(model), ids[:, :1], mask[:, :1], ids[:, 1:], mask[:, 1:], model=model
    )
    # The last state predicts what was never written; it stands in for the first, never selected.
    return states.roll(1, dims=1)


def _reference_states(
    reference: nn.Module | Literal["adapter_off"],
    model: nn.Module,
    ids: Int[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    kept: Bool[Tensor, "batch token"],
    words: int | None,
) -> tuple[Float[Tensor, "N hidden"], Head]:
    """Selected states and head of the reference; no gradient."""
    off: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if isinstance(reference, str):
        switch = getattr(model, "disable_adapter", None)
        if reference != "adapter_off" or switch is None:
            raise ModelError(
                "expected a reference model, or a PEFT model and reference='adapter_off', got "
                f"{type(model).__name__} and reference={reference!r}"
            )
        reference, off = model, switch()
    elif reference.training:
        raise ModelError(
            f"expected a reference in evaluation mode, got {type(reference).__name__} in training "
            "mode, whose dropout would count as KL: call reference.eval()"
        )
    with off, torch.no_grad():
        read, head = _readable(reference, "reference", words)
        _require_ids(ids, mask, head.words)
        frozen = replace(
            head,
            weight=head.weight.detach(),
            bias=None if head.bias is None else head.bias.detach(),
        )
        return _states(read, ids, mask)[kept], frozen


def _readable(model: nn.Module, role: str, words: int | None) -> tuple[PreTrainedModel, Head]:
    inner = unwrapped(model, role)
    return inner, read_checked_head(inner, words=words)


def _one_stretch(
    ids: Int[Tensor, "batch token"], given: Bool[Tensor, "..."] | Int[Tensor, "..."]
) -> Bool[Tensor, "batch token"]:
    """The attention mask as booleans: each text is one stretch of at least one token."""
    mask = _as_mask("attention_mask", given, ids)
    begins = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    starts = begins.sum(1)
    if bool((starts != 1).any()):
        row = int((starts != 1).nonzero()[0])
        raise ValueError(
            "expected an attention_mask that keeps one stretch of tokens in every row, got "
            f"{int(starts[row])} in row {row}: put the padding before or after the text"
        )
    return mask


def _scored(
    mask: Bool[Tensor, "batch token"],
    response: Bool[Tensor, "..."] | Int[Tensor, "..."] | None,
) -> Bool[Tensor, "batch token"]:
    """Tokens to score: those that have a token before them, or the chosen ones of them."""
    known = torch.nn.functional.pad(mask[:, 1:] & mask[:, :-1], (1, 0))
    if response is None:
        return known
    chosen = _as_mask("response_mask", response, mask)
    if bool((chosen & ~known).any()):
        row, token = (chosen & ~known).nonzero()[0].tolist()
        raise ValueError(
            "expected a response_mask of tokens that another one comes before, got padding or the "
            f"first token of the text at row {row}, token {token}"
        )
    return chosen


def _as_mask(name: str, given: Tensor, like: Tensor) -> Bool[Tensor, "batch token"]:
    if given.shape != like.shape:
        raise ValueError(f"expected a {name} of shape {list(like.shape)}, got {list(given.shape)}")
    if given.dtype != torch.bool and bool(((given != 0) & (given != 1)).any()):
        raise ValueError(f"expected a {name} of True and False or 1 and 0, got other numbers")
    return given.bool()


def _require_ids(
    ids: Int[Tensor, "batch token"], mask: Bool[Tensor, "batch token"], words: int
) -> None:
    outside = mask & ((ids < 0) | (ids >= words))
    if bool(outside.any()):
        row, token = outside.nonzero()[0].tolist()
        raise ValueError(
            f"expected token ids in 0…{words - 1}, got {int(ids[row, token])} at row {row}, token "
            f"{token}: both models need the tokenizer that the ids come from"
        )


def _refuse_nan(numbers: dict[str, Float[Tensor, "batch token"]]) -> None:
    for name, each in numbers.items():
        if bool((bad := each.isnan()).any()):
            row, token = bad.nonzero()[0].tolist()
            raise NonFiniteError(
                f"expected numbers, got NaN as {name} at {{place}} (and {int(bad.sum()) - 1} "
                "more): a model has diverged, or cannot read padded texts in this dtype",
                response=row,
                token=token,
            )


def _placed(
    numbers: Float[Tensor, " N"], kept: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch token"]:
    return numbers.new_zeros(kept.shape).masked_scatter(kept, numbers)
