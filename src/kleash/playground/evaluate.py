"""Judge a policy on held-out questions: what the reward model thinks, and what is true.

The proxy score is the reward model's, the gold score the rubric's; where the first rises and the
second falls, the reward model is being exploited. Standard errors are clustered by question.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from kleash.errors import PromptError
from kleash.kl.statistics import Estimate, clustered_mean, response_kl
from kleash.models.policy import Policy, load_policy, load_reference
from kleash.models.reward_model import ClassifierReward
from kleash.playground import gold
from kleash.playground.language import MAX_WORDS
from kleash.playground.preferences import polite_phrases
from kleash.playground.sampling import write_replies
from kleash.rollout.scoring_pass import score
from kleash.rollout.text_metrics import distinct_n
from kleash.types import Rollout


@dataclass(frozen=True)
class Reply:
    """One reply, with both opinions of it."""

    prompt: str
    response: str
    proxy: float
    gold: float


@dataclass(frozen=True)
class Evaluation:
    """A policy on held-out questions."""

    proxy: Estimate
    """Score of the reward model: about 0 for the reference, whose standard deviation is 1."""
    gold: Estimate
    kl: Estimate
    """Exact KL to the world's supervised policy, in nats per response."""
    distinct_2: float | None
    """Distinct pairs of neighbouring words over all pairs, mean over replies; None if there are
    no pairs."""
    polite: float
    """Polite phrases per reply."""
    words: float
    """Tokens per reply, the end included."""
    ended: float
    """Share of replies that end by themselves."""
    gold_parts: dict[str, float]
    """What each line of the rubric contributes to the gold mean."""
    samples: tuple[Reply, ...]
    """One reply to each of the first questions."""


def evaluate_policy(
    policy_directory: Path,
    world: Path,
    *,
    replies_per_question: int = 4,
    seed: int = 0,
    samples: int = 8,
) -> Evaluation:
    """Let a policy reply to every held-out question of a world, and judge the replies.

    Args:
        policy_directory: the policy, in Hugging Face format.
        world: a directory of `build_world`.
        replies_per_question: replies to each; more make standard errors smaller.
        seed: decides the samples.
        samples: how many replies to keep for reading.

    Raises:
        ModelError: if the policy or the world's models cannot be loaded.
        PromptError: if the world holds no held-out questions.
    """
    questions = held_out_questions(world)
    prompts = questions * replies_per_question
    policy = load_policy(policy_directory)
    replies, rollout = write_replies(policy, prompts, seed=seed, max_new_tokens=MAX_WORDS)
    proxies = ClassifierReward(world / "reward_model", batch_size=256).score(
        prompts, [f" {reply}" for reply in replies]
    )
    truths = torch.tensor(gold.score(prompts, replies), dtype=torch.float64)
    kl = _response_kl(policy, rollout, proxies, world)
    rows = zip(prompts, replies, proxies.tolist(), truths.tolist(), strict=True)
    clusters = rollout.prompt_index
    return Evaluation(
        proxy=clustered_mean(proxies, clusters),
        gold=clustered_mean(truths, clusters),
        kl=clustered_mean(kl, clusters),
        distinct_2=distinct_n(replies, 2),
        polite=sum(map(polite_phrases, replies)) / len(replies),
        words=float(rollout.response_mask.sum(-1).double().mean()),
        ended=float(rollout.ended.double().mean()),
        gold_parts=_mean_parts(prompts, replies),
        samples=tuple(Reply(*row) for row in list(rows)[:samples]),
    )


def held_out_questions(world: Path) -> list[str]:
    """The held-out questions of a world, in their order.

    Raises:
        PromptError: if the world has none.
    """
    path = world / "heldout.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise PromptError(
            f"expected held-out questions at {str(path)!r}, got {error}: build the world first"
        ) from error
    return [json.loads(line)["prompt"] for line in lines]


def beyond(higher: Estimate, lower: Estimate, *, errors: float = 2.0) -> bool:
    """True if one mean is above another by more than `errors` standard errors of the difference.

    The two are taken as independent, which errs on the side of a tie: on common questions their
    errors are positively correlated.

    >>> beyond(Estimate(1.0, 0.1, 9, 9), Estimate(0.5, 0.1, 9, 9))
    True
    """
    if higher.standard_error is None or lower.standard_error is None:
        return False
    spread = (higher.standard_error**2 + lower.standard_error**2) ** 0.5
    return higher.mean - lower.mean > errors * spread


def _response_kl(policy: Policy, rollout: Rollout, scores: Tensor, world: Path) -> Tensor:
    """Exact KL of each reply, [batch], to the world's supervised policy."""
    scored = score(
        rollout,
        policy=policy,
        reference=load_reference(world / "policy"),
        scores=scores,
        microbatch=128,
    )
    return response_kl(scored.kl, rollout.response_mask)


def _mean_parts(prompts: Sequence[str], replies: Sequence[str]) -> dict[str, float]:
    parts = [gold.explain(p, r) for p, r in zip(prompts, replies, strict=True)]
    return {
        field.name: sum(getattr(part, field.name) for part in parts) / len(parts)
        for field in fields(gold.GoldParts)
    }
