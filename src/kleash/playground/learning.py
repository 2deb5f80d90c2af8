"""Teach the world's two models: to reply like the desk, and to choose like the raters."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from kleash.playground.preferences import Preference

CONTEXT = 128
"""Positions of the models: a question and a reply take at most 64."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the transformer that policy and reward model share."""

    width: int = 128
    layers: int = 2
    heads: int = 4
    feedforward: int = 256


@dataclass(frozen=True)
class Schooling:
    """How a model is taught: AdamW, warmed up for a tenth of the steps, then lowered to zero."""

    batch: int
    lr: float
    epochs: int = 1


def supervise(
    examples: Sequence[tuple[str, str]],
    tokenizer: PreTrainedTokenizerFast,
    shape: Shape,
    schooling: Schooling,
    *,
    seed: int,
) -> LlamaForCausalLM:
    """Teach a new transformer to reply.

    The loss is the mean of −log p over the words of the replies and their ends; questions are
    given.

    Args:
        examples: questions, each with a reply.
        tokenizer: its vocabulary is the model's.
        shape: sizes of the model.
        schooling: batch size, learning rate, epochs.
        seed: decides initial weights and order.
    """
    prompts = _encode(tokenizer, [prompt for prompt, _ in examples])
    replies = _encode(tokenizer, [reply for _, reply in examples])
    end = cast(int, tokenizer.eos_token_id)
    rows = [[*p, *r[1:], end] for p, r in zip(prompts, replies, strict=True)]
    model = _new(LlamaForCausalLM, tokenizer, shape, seed)

    def loss(chosen: list[int]) -> Tensor:
        ids, mask = _pad([rows[i] for i in chosen], tokenizer)
        starts = torch.tensor([len(prompts[i]) for i in chosen])
        written = mask & (torch.arange(ids.shape[1]) >= starts[:, None])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return cross_entropy(logits[written[:, 1:]], ids[:, 1:][written[:, 1:]])

    _descend(model, [len(row) for row in rows], loss, schooling, seed=seed)
    return model


def learn_choices(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[Preference],
    shape: Shape,
    schooling: Schooling,
    *,
    centring: float,
    seed: int,
) -> LlamaForSequenceClassification:
    """Train a reward model on the raters' choices, starting from the supervised weights.

        loss = −log σ(s_chosen − s_rejected) + centring · (s_chosen + s_rejected)²

    The score is read at the last token of "question reply". There is no end token in it: the
    model judges texts, finished or not.

    References:
        Bradley and Terry, "Rank Analysis of Incomplete Block Designs", 1952. Eisenstein et al.,
        "Helping or Herding?", 2023, https://arxiv.org/abs/2312.09244 (the centring term).
    """
    model = _new(LlamaForSequenceClassification, tokenizer, shape, seed)
    model.model.load_state_dict(policy.model.state_dict())
    nn.init.zeros_(model.score.weight)  # every text scores 0 before any choice is seen
    good = _encode(tokenizer, [f"{pair.prompt} {pair.chosen}" for pair in pairs])
    bad = _encode(tokenizer, [f"{pair.prompt} {pair.rejected}" for pair in pairs])

    def loss(chosen: list[int]) -> Tensor:
        ids, _ = _pad([good[i] for i in chosen] + [bad[i] for i in chosen], tokenizer)
        preferred, other = model(input_ids=ids, use_cache=False).logits.squeeze(-1).chunk(2)
        centre = centring * (preferred + other).square()
        return (softplus(other - preferred) + centre).mean()

    lengths = [max(len(a), len(b)) for a, b in zip(good, bad, strict=True)]
    _descend(model, lengths, loss, schooling, seed=seed)
    return model


@torch.no_grad()
def reward_scores(
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    responses: Sequence[str],
) -> list[float]:
    """Scores of a reward model in memory, one per reply."""
    texts = [f"{p} {r}" for p, r in zip(prompts, responses, strict=True)]
    rows = _encode(tokenizer, texts)
    scores: list[float] = []
    for start in range(0, len(rows), 256):
        ids, mask = _pad(rows[start : start + 256], tokenizer)
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        scores += cast(list[float], logits.squeeze(-1).tolist())
    return scores


def standardise(
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    responses: Sequence[str],
) -> tuple[float, float]:
    """Scale the head so that these replies score with standard deviation 1.

    The head has no bias to shift the mean with; the centring term of the loss keeps it near 0.

    Returns:
        Mean score after scaling, and the standard deviation before.
    """
    scores = torch.tensor(reward_scores(model, tokenizer, prompts, responses))
    sd = float(scores.std())
    with torch.no_grad():
        model.score.weight.div_(sd)
    return float(scores.mean()) / sd, sd


def _new(kind: Any, tokenizer: PreTrainedTokenizerFast, shape: Shape, seed: int) -> Any:
    """A model of the given class with new weights."""
    tokens: dict[str, Any] = {
        name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")
    }
    one_score: dict[str, Any] = {"num_labels": 1}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.feedforward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        **tokens,
        **one_score,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config)


def _descend(
    model: nn.Module,
    lengths: Sequence[int],
    loss: Callable[[list[int]], Tensor],
    schooling: Schooling,
    *,
    seed: int,
) -> None:
    """Go through rows of these lengths, so many epochs, in batches of similar length."""
    rng = random.Random(f"order {seed}")
    batches = [b for _ in range(schooling.epochs) for b in _batches(lengths, schooling.batch, rng)]
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=schooling.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    steps = len(batches)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min((i + 1) / warm, (steps - i) / max(1, steps - warm))
    )
    model.train()
    for rows in batches:
        optimiser.zero_grad()
        loss(rows).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval()


def _batches(lengths: Sequence[int], size: int, rng: random.Random) -> list[list[int]]:
    """Every row once, in batches of similar length, the batches in random order.

    Rows are sorted by length within stretches of sixteen batches: little padding, little bias.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, len(order), 16 * size):
        stretch = sorted(order[start : start + 16 * size], key=lambda i: lengths[i])
        batches += [stretch[i : i + size] for i in range(0, len(stretch), size)]
    rng.shuffle(batches)
    return batches


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Ids of each text, `<bos>` first."""
    return cast(list[list[int]], tokenizer(texts)["input_ids"])


def _pad(
    rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerFast
) -> tuple[Int[Tensor, "batch token"], Bool[Tensor, "batch token"]]:
    """Rows padded on the right, and the mask of what is not padding.

    Under causal attention nothing to the right is seen, so that training needs no mask.
    """
    pad = cast(int, tokenizer.pad_token_id)
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    return ids, mask
