"""What a model itself does with a few fixed texts: the yardstick of every comparison of models.

The texts are drawn once from a fixed seed, so that two models, or one model before and after it
was merged, saved or padded, read the same tokens.
"""

import contextlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from kleash.errors import KleashError, ModelError
from kleash.models.sharding import layers_are_rounded
from kleash.models.trunk import trunk_of, trunk_states

TEXTS, LENGTH = 3, 12
_HALF = (torch.bfloat16, torch.float16)
_PADDING = {False: 5e-4, True: 0.2}
"""Largest distance, in nats, that padding may make: in float32, and in half precision."""


@contextlib.contextmanager
def own_code(model: nn.Module, path: str | Path) -> Generator[None]:
    """Name the model's class where its own code fails.

    Raises:
        ModelError: with the class, the kind of the error and its message.
    """
    try:
        yield
    except KleashError:
        raise
    # The code of several hundred architectures: it raises whatever it likes.
    except Exception as error:
        raise ModelError(
            f"expected {type(model).__name__} in {str(path)!r} to read a text, got an error in the "
            f"model's own code: {type(error).__name__}: {first_lines(error)}; check its "
            "configuration, or take another architecture"
        ) from error


def first_lines(error: Exception) -> str:
    """The first three lines of an error's message, as one: the first alone often says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]).removesuffix(".")[:400]


def probe_texts(
    words: int, *, include: Sequence[int] = (), device: torch.device | str = "cpu"
) -> Int[Tensor, "text token"]:
    """A few fixed texts of random tokens below `words`; those to include come first."""
    generator = torch.Generator().manual_seed(20)
    size = max(TEXTS, -(-len(include) // (LENGTH - 1)))
    ids = torch.randint(words, (size, LENGTH), generator=generator)
    wanted = torch.tensor([i for i in include if i < words], dtype=torch.long)
    body = ids[:, : LENGTH - 1].reshape(-1)
    body[: len(wanted)] = wanted
    return torch.cat([body.view(size, LENGTH - 1), ids[:, LENGTH - 1 :]], dim=1).to(device)


@torch.no_grad()
def text_logprobs(
    model: nn.Module, ids: Int[Tensor, "text token"], words: int
) -> Float[Tensor, "text token vocab"]:
    """log-probability of every word at every place, by the model's own logits; in float64, in
    main memory."""
    logits = model(input_ids=ids, use_cache=False).logits
    return logits[..., :words].double().cpu().log_softmax(-1)


def distance(
    ours: Float[Tensor, "*row vocab"], theirs: Float[Tensor, "*row vocab"]
) -> Float[Tensor, "*row"]:
    """Root of the mean squared difference of two rows of log-probabilities under the first.

        d = √ Σ_v p(v) · (log p(v) − log q(v))²       in nats; d² / 2 ≈ KL(p‖q) where it is small

    A word of probability 0 in both counts as no difference, one of probability 0 in the second
    alone as an infinite one.
    """
    apart = torch.where(ours == theirs, 0.0, ours - theirs).square()
    return torch.where(ours > -torch.inf, ours.exp() * apart, 0.0).sum(-1).sqrt()


def check_padding(model: PreTrainedModel, words: int, path: str | Path) -> None:
    """Check that a text gets the same numbers alone and padded beside a longer one.

    Two texts, read as training and audits read (prompt padded on the left, response on the right)
    and written as they write (prompts padded on the left, with a cache). Models that carry a
    recurrent state through padding (RWKV), or attend linearly to it (MiniMax), do not pass.

    Raises:
        ModelError: naming the class, padding as the cause, and the largest difference.
    """
    half = _computes_in_half(model)
    for doing, found in (
        ("reading", _padding_in_reading(model, words)),
        ("writing", _padding_in_writing(model, words)),
    ):
        if not found <= _PADDING[half]:
            raise ModelError(
                f"expected padding to change nothing for {type(model).__name__} in {str(path)!r}, "
                f"got log-probabilities that differ by {found:.3g} nats when {doing} a text alone "
                "and padded beside a longer one: the model does not leave padding out (it carries "
                "a state through it, or counts it in its positions), so every number would depend "
                "on the batch; take another architecture"
            )


def check_padding_of_states(trunk: nn.Module, words: int, path: str | Path) -> None:
    """The same for a trunk that is read without a head of words: that of a value model.

    Compared are the states themselves, relative to the largest.

    Raises:
        ModelError: naming the class, padding as the cause, and the largest difference.
    """
    worst = 0.0
    for alone, together in _states_alone_and_together(trunk, words):
        apart = (alone - together).float().abs().max() / alone.float().abs().max()
        worst = max(worst, float(apart))
    if not worst <= _PADDING[_computes_in_half(trunk)]:
        raise ModelError(
            f"expected padding to change nothing for {type(trunk).__name__} in {str(path)!r}, got "
            f"states that differ by {worst:.3g} of the largest when reading a text alone and "
            "padded beside a longer one: the model does not leave padding out (it carries a state "
            "through it, or counts it in its positions), so every value would depend on the "
            "batch; take another architecture, or a head on the policy's own states"
        )


def _computes_in_half(model: nn.Module) -> bool:
    """Whether the products of its layers are in half precision, by its weights or in spite of them.

    A divided model with `bf16` keeps float32 weights, and its layers compute in bfloat16.
    """
    return next(model.parameters()).dtype in _HALF or layers_are_rounded(model)


@torch.no_grad()
def _padding_in_reading(model: PreTrainedModel, words: int) -> float:
    """Largest distance between a short text alone and beside a longer one, in nats."""
    head = cast(nn.Module, model.get_output_embeddings())
    worst = 0.0
    for both in _states_alone_and_together(trunk_of(model), words):
        pair = [_rows(head, states, words) for states in both]
        worst = max(worst, float(distance(*pair).max()))
    return worst


@torch.no_grad()
def _states_alone_and_together(trunk: nn.Module, words: int) -> list[tuple[Tensor, Tensor]]:
    """States of two texts, each read alone and padded beside the other."""
    short, long = _two_texts(words, next(trunk.parameters()).device)
    (p, r), (q, s) = (3, 4), (7, 9)
    ids, mask = _padded_left([short[:p], long[:q]])
    answers = torch.stack([torch.cat([short[p : p + r], long[: s - r]]), long[q : q + s]])
    written = torch.arange(s, device=ids.device) < torch.tensor([[r], [s]], device=ids.device)
    together = trunk_states(trunk, ids, mask, answers, written)
    found: list[tuple[Tensor, Tensor]] = []
    for row, (given, length) in enumerate(((p, r), (q, s))):
        text = (short, long)[row]
        whole = torch.ones(1, given + length, dtype=torch.bool, device=ids.device)
        part = text[None, : given + length]
        alone = trunk_states(
            trunk, part[:, :given], whole[:, :given], part[:, given:], whole[:, given:]
        )
        found.append((alone[0, : length + 1], together[row, : length + 1]))
    return found


@torch.no_grad()
def _padding_in_writing(model: PreTrainedModel, words: int) -> float:
    """The same for the logits with which a continuation of fixed tokens is written."""
    texts = _two_texts(words, next(model.parameters()).device)
    prompts = [texts[0][:3], texts[1][:9]]
    ids, mask = _padded_left(prompts)
    together = _written(model, ids, mask, words)
    worst = 0.0
    for row, prompt in enumerate(prompts):
        alone = _written(
            model, prompt[None], torch.ones_like(prompt[None], dtype=torch.bool), words
        )
        worst = max(worst, float(distance(alone[0], together[row]).max()))
    return worst


def _two_texts(words: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(21)
    both = torch.randint(words, (2, 16), generator=generator).to(device)
    return both[0], both[1]


def _padded_left(
    prompts: Sequence[Tensor],
) -> tuple[Int[Tensor, "batch prompt"], Bool[Tensor, "batch prompt"]]:
    width = max(len(prompt) for prompt in prompts)
    # Padded with tokens of its own: an id that no mask hides is seen.
    ids = torch.stack([torch.cat([p[:1].expand(width - len(p)), p]) for p in prompts])
    lengths = torch.tensor([[len(p)] for p in prompts], device=ids.device)
    return ids, torch.arange(width, device=ids.device) >= width - lengths


def _rows(head: nn.Module, states: Tensor, words: int) -> Tensor:
    weight = cast(Tensor, head.weight)
    return head(states.to(weight.dtype))[..., :words].double().log_softmax(-1)


def _written(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, words: int
) -> Float[Tensor, "batch token vocab"]:
    """log-probabilities at three steps of `generate`, which writes fixed tokens."""
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=3,
        use_cache=True,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    own = model.generation_config
    model.generation_config = settings
    try:
        out = cast(Any, model).generate(
            input_ids=ids,
            attention_mask=mask.long(),
            generation_config=settings,
            logits_processor=LogitsProcessorList([_Same(ids.shape[1])]),
        )
    finally:
        model.generation_config = own
    return torch.stack(out.logits, dim=1)[..., :words].double().log_softmax(-1)


class _Same(LogitsProcessor):
    """Writes token 1, then 0, then 1, whatever the logits are."""

    def __init__(self, width: int):
        self._width = width

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        forced = torch.zeros_like(scores)
        forced[:, (input_ids.shape[1] - self._width + 1) % 2] = 1.0
        return forced
