"""Held-out evaluation: prompts nobody trains on, a second opinion, and the texts side by side.

A response that is kept is read once more, by itself, for what both models thought likely at its
tokens. So samples are to be made while the policy is still the one that wrote them.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kleash.algorithms import dispatch
from kleash.kl.control.groups import States, betas_of
from kleash.kl.statistics import clustered_mean, response_kl
from kleash.models.reward_model import Content, text_of
from kleash.rollout.prompts import Prompt, batch_prompts, columns_of
from kleash.rollout.sampling import response_columns, response_texts
from kleash.rollout.text_metrics import distinct_n
from kleash.rollout.top_tokens import ROWS, Wanted, distributions, likeliest, text_of_id
from kleash.storage.samples import Kind, Likely, Sample, Who
from kleash.training import distributed
from kleash.training.components import Components
from kleash.training.metrics import Number, objective_measures
from kleash.types import Rollout, ScoredRollout

TOPS_PER_SAMPLE = 64
"""Tokens of a kept response, those of largest KL, at which the likeliest words are kept as well."""


@dataclass(frozen=True)
class Answers:
    """Responses as tensors and as texts, before anyone has judged them."""

    rollout: Rollout
    prompts: list[Content]
    """As their author wrote them: what reward models read."""
    responses: list[str]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """The prompts' further columns, and each response's tokens and undropped text."""


@dataclass(frozen=True)
class Written:
    """Responses as tensors and as texts, with what the reward model says of them."""

    rollout: Rollout
    prompts: list[Content]
    """As their author wrote them: what reward models read."""
    responses: list[str]
    raw_scores: Tensor
    """[batch] weighted sum of the reward models, before normalisation."""
    parts: dict[str, Tensor]
    """[batch] score of each reward model."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """See `Answers`."""


def write_responses(
    components: Components, prompts: list[Prompt], *, responses_per_prompt: int, microbatch: int
) -> Written:
    """Let the policy answer prompts, and the reward models read the answers.

    Raises:
        RewardError: a reward model did not keep its contract.
    """
    answers = write_answers(
        components, prompts, responses_per_prompt=responses_per_prompt, microbatch=microbatch
    )
    return judge(components, answers)


def write_answers(
    components: Components, prompts: list[Prompt], *, responses_per_prompt: int, microbatch: int
) -> Answers:
    """Let the policy answer prompts.

    Raises:
        NonFiniteError: the policy's logits are not finite.
    """
    rows = [prompt for prompt in prompts for _ in range(responses_per_prompt)]
    batch = batch_prompts(rows, pad_id=components.policy.pad_id, device=components.policy.device)
    rollout = distributed.generate(components, batch, microbatch=microbatch)
    texts: list[Content] = [prompt.content for prompt in rows]
    policy = components.policy
    responses = response_texts(policy.tokenizer, rollout, stop_ids=policy.stop_ids)
    columns = columns_of(rows) | response_columns(policy.tokenizer, rollout)
    return Answers(rollout, texts, responses, columns)


def judge(components: Components, answers: Answers) -> Written:
    """Let the reward models read answers.

    Raises:
        RewardError: a reward model did not keep its contract.
    """
    judged = components.reward.score_each(answers.prompts, answers.responses, answers.columns)
    return Written(
        rollout=answers.rollout,
        prompts=answers.prompts,
        responses=answers.responses,
        raw_scores=judged.total.to(components.policy.device),
        parts=dict(judged.parts),
        columns=answers.columns,
    )


def evaluate_heldout(
    components: Components,
    *,
    step: int,
    betas: States,
    responses_per_prompt: int,
    microbatch: int,
    samples: int,
    who: Who,
) -> tuple[dict[str, Number], list[Sample]]:
    """Answer every held-out prompt and say how good and how far the answers are.

    Args:
        components: whose held-out prompts.
        step: the step after which it happens.
        betas: the leash of each group, which prices the KL.
        responses_per_prompt: to each prompt.
        microbatch: responses written at once.
        samples: how many prompts' responses to keep.
        who: whose answers they are, for the samples.

    Returns:
        Metrics under `heldout/`, scores as the reward models give them; and samples of the first
        prompts, so that the same prompts can be read before and after training.
    """
    written = write_responses(
        components,
        components.heldout,
        responses_per_prompt=responses_per_prompt,
        microbatch=microbatch,
    )
    scored = distributed.score(
        components, written.rollout, written.raw_scores, microbatch=microbatch, critic=False
    )
    groups = [group for group in components.heldout_groups for _ in range(responses_per_prompt)]
    price = dispatch.price(betas_of(betas, groups), components.settings)
    metrics = {
        key.replace("objective/", "heldout/"): value
        for key, value in objective_measures(scored, beta=price).items()
    }
    metrics["heldout/responses"] = len(written.responses)
    metrics["heldout/distinct_2"] = distinct_n(written.responses, 2)
    metrics["heldout/length"] = float(written.rollout.response_mask.sum(-1).double().mean())
    metrics["heldout/eos_fraction"] = float(written.rollout.ended.double().mean())
    golds: Tensor | None = None
    if components.gold is not None:
        golds = components.gold.score(written.prompts, written.responses, written.columns)
        estimate = clustered_mean(golds, written.rollout.prompt_index.cpu())
        metrics["heldout/gold"] = estimate.mean
        metrics["heldout/gold_se"] = estimate.standard_error
    first = [row * responses_per_prompt for row in range(min(samples, len(components.heldout)))]
    kept: list[tuple[int, Kind]] = [(row, "heldout") for row in first]
    return metrics, make_samples(components, scored, written, kept, step=step, who=who, golds=golds)


def training_samples(
    components: Components, scored: ScoredRollout, written: Written, *, step: int, count: int
) -> list[Sample]:
    """Half the samples from the farthest responses of a step, the rest at random."""
    distances = response_kl(scored.kl, scored.rollout.response_mask).tolist()
    worst = (count + 1) // 2
    kept = rows_to_keep(distances, worst=worst, at_random=count - worst, seed=step)
    return make_samples(components, scored, written, kept, step=step, who="policy", golds=None)


def make_samples(
    components: Components,
    scored: ScoredRollout,
    written: Written,
    rows: list[tuple[int, Kind]],
    *,
    step: int,
    who: Who,
    golds: Tensor | None,
) -> list[Sample]:
    """Chosen responses with the numbers of both models at each of their tokens."""
    mask = scored.rollout.response_mask
    distances = response_kl(scored.kl, mask)
    samples: list[Sample] = []
    for row, kind in rows:
        kept = mask[row]
        ids = scored.rollout.response_ids[row][kept]
        policy_top, reference_top = _likeliest_along(components, scored, row)
        samples.append(
            Sample(
                step=step,
                kind=kind,
                who=who,
                prompt=text_of(written.prompts[row]),
                response=written.responses[row],
                score=float(written.raw_scores[row]),
                kl=float(distances[row]),
                tokens=_token_texts(components, ids),
                logprobs=scored.rollout_logprobs[row][kept].tolist(),
                ref_logprobs=scored.ref_logprobs[row][kept].tolist(),
                token_kl=scored.kl[row][kept].tolist(),
                entropy=scored.entropy[row][kept].tolist(),
                gold=None if golds is None else float(golds[row]),
                policy_top=policy_top,
                reference_top=reference_top,
            )
        )
    return samples


@torch.no_grad()
def _likeliest_along(
    components: Components, scored: ScoredRollout, row: int
) -> tuple[list[Likely | None], list[Likely | None]]:
    """The likeliest words of policy and reference at the tokens of largest KL of a response."""
    rollout = scored.rollout
    kept = rollout.response_mask[row]
    length = int(kept.sum())
    chosen = tokens_to_keep(torch.where(kept, scored.kl[row], -torch.inf)[:length])
    part = (
        rollout.prompt_ids[row : row + 1],
        rollout.prompt_mask[row : row + 1],
        rollout.response_ids[row : row + 1, :length],
        rollout.response_mask[row : row + 1, :length],
    )
    found: list[list[Likely | None]] = []
    for model in (components.policy, components.reference):
        states = model.hidden_states(*part)[0, :-1][chosen]
        wanted: list[Wanted] = []
        for some in states.split(ROWS):
            shares = distributions(model.head, some, temperature=components.sampling.temperature)
            wanted += likeliest(shares)
        named = iter(wanted)
        found.append(
            [_named(components, next(named)) if here else None for here in chosen.tolist()]
        )
    return found[0], found[1]


def tokens_to_keep(kl: Float[Tensor, " token"]) -> Bool[Tensor, " token"]:
    """Which tokens of a response are looked at closely: the `TOPS_PER_SAMPLE` of largest KL."""
    best: Int[Tensor, " kept"] = kl.topk(min(TOPS_PER_SAMPLE, len(kl))).indices
    return torch.zeros_like(kl, dtype=torch.bool).index_fill(0, best, True)


def _named(components: Components, wanted: Wanted) -> Likely:
    words = [text_of_id(components.policy.tokenizer, number) for number in wanted.ids]
    return Likely(words, wanted.probabilities)


def rows_to_keep(
    response_kl: Sequence[float], *, worst: int, at_random: int, seed: int
) -> list[tuple[int, Kind]]:
    """Choose which responses of a step to keep: those of largest KL, and some at random.

    A KL that is NaN counts as the worst of all: it is what one wants to look at. The random ones
    are drawn from the rest, so that no response is kept twice.

    Example:
        >>> rows_to_keep([0.1, 3.0, float("nan"), 0.2], worst=2, at_random=1, seed=0)
        [(2, 'worst'), (1, 'worst'), (0, 'random')]
    """
    order = sorted(
        range(len(response_kl)),
        key=lambda row: math.inf if math.isnan(response_kl[row]) else response_kl[row],
        reverse=True,
    )
    # Python's sort is stable also in reverse, so NaN and inf keep their order among themselves.
    rest = order[worst:]
    chosen = random.Random(seed).sample(rest, min(at_random, len(rest)))
    kinds: tuple[Kind, Kind] = ("worst", "random")
    return [
        (row, kind)
        for kind, rows in zip(kinds, (order[:worst], sorted(chosen)), strict=True)
        for row in rows
    ]


def _token_texts(components: Components, ids: Tensor) -> list[str]:
    """The text of each token alone; a token that is no text by itself shows its name."""
    tokenizer = components.policy.tokenizer
    names = tokenizer.convert_ids_to_tokens(ids.tolist())
    texts = [tokenizer.decode([token]) for token in ids.tolist()]
    return [str(text) or str(name) for text, name in zip(texts, names, strict=True)]


def reference_scores(
    components: Components, prompts: Sequence[int], *, responses: int, microbatch: int
) -> tuple[Float[Tensor, "prompt sample"], float]:
    """Scores of responses written before the first update, several to each of some prompts.

    Args:
        components: whose policy is the reference still.
        prompts: numbers of training prompts.
        responses: to each of them.
        microbatch: responses written at once.

    Returns:
        Their scores before normalisation, and the mean length of a response.
    """
    written = write_responses(
        components,
        [components.prompts[index] for index in prompts],
        responses_per_prompt=responses,
        microbatch=microbatch,
    )
    length = float(written.rollout.response_mask.sum(-1).double().mean())
    return written.raw_scores.view(len(prompts), responses), length
