"""Held-out evaluation: prompts nobody trains on, a second opinion, and the texts side by side.

A response that is kept is read once more, by itself, for what both models thought likely at its
tokens. So samples are to be made while the policy is still the one that wrote them.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kleash.algorithms import dispatch
from kleash.kl.control.groups import States, betas_of
from kleash.kl.statistics import clustered_mean, response_kl
from kleash.models.batching import Limit
from kleash.models.policy import Policy
from kleash.models.reference_offload import FrozenReference
from kleash.models.reward_model import text_of
from kleash.rollout.text_metrics import distinct_n
from kleash.rollout.top_tokens import ROWS, TopTokens, distributions, text_of_id, top_tokens
from kleash.storage.samples import Kind, Likely, Sample, Who
from kleash.training.components import Components
from kleash.training.metrics import Number, distill_measures, objective_measures
from kleash.training.responses import JudgedResponses
from kleash.types import ScoredRollout

TOPS_PER_SAMPLE = 64
"""Tokens of a kept response, those of largest KL, at which the likeliest words are kept as well."""


@dataclass(frozen=True, eq=False)
class SampleReader:
    """Reads chosen responses closely, with both models."""

    policy: Policy
    reference: FrozenReference
    temperature: float

    def training_samples(
        self, scored: ScoredRollout, written: JudgedResponses, *, step: int, count: int
    ) -> list[Sample]:
        """Half the samples from the farthest responses of a step, the rest at random."""
        distances = response_kl(scored.kl, scored.rollout.response_mask).tolist()
        worst = (count + 1) // 2
        kept = rows_to_keep(distances, worst=worst, at_random=count - worst, seed=step)
        return self.samples(scored, written, kept, step=step, who="policy", golds=None)

    def samples(
        self,
        scored: ScoredRollout,
        written: JudgedResponses,
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
            policy_top, reference_top = self._top_tokens(scored, row)
            samples.append(
                Sample(
                    step=step,
                    kind=kind,
                    who=who,
                    prompt=text_of(written.prompts[row]),
                    response=written.texts[row],
                    score=float(written.raw_scores[row]),
                    kl=float(distances[row]),
                    tokens=self._token_texts(ids),
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
    def _top_tokens(
        self, scored: ScoredRollout, row: int
    ) -> tuple[list[Likely | None], list[Likely | None]]:
        """The likeliest words of both models at the tokens of largest KL of a response."""
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
        for model in (self.policy, self.reference):
            states = model.hidden_states(*part)[0, :-1][chosen]
            wanted: list[TopTokens] = []
            for some in states.split(ROWS):
                wanted += top_tokens(distributions(model.head, some, temperature=self.temperature))
            named = iter(wanted)
            found.append([self._named(next(named)) if here else None for here in chosen.tolist()])
        return found[0], found[1]

    def _named(self, wanted: TopTokens) -> Likely:
        words = [text_of_id(self.policy.tokenizer, number) for number in wanted.ids]
        return Likely(words, wanted.probabilities)

    def _token_texts(self, ids: Tensor) -> list[str]:
        """The text of each token alone; a token that is no text by itself shows its name."""
        tokenizer = self.policy.tokenizer
        names = tokenizer.convert_ids_to_tokens(ids.tolist())
        texts = [tokenizer.decode([token]) for token in ids.tolist()]
        return [str(text) or str(name) for text, name in zip(texts, names, strict=True)]


@dataclass(frozen=True, eq=False)
class HeldoutEvaluator:
    """Responses to every held-out prompt: how good, and how far from the reference."""

    components: Components
    responses_per_prompt: int
    written_at_once: int
    """Responses."""
    microbatch: Limit
    """What is scored at once at most."""
    samples: int
    """How many prompts' responses are kept as samples."""

    def evaluate(
        self, *, step: int, betas: States, who: Who
    ) -> tuple[dict[str, Number], list[Sample]]:
        """Write, judge and score.

        Args:
            step: the step after which it happens.
            betas: β of each group, which prices the KL.
            who: whose responses they are, for the samples.

        Returns:
            Metrics under `heldout/`, scores as the reward models give them; and samples of the
            first prompts, so that the same prompts can be read before and after training.
        """
        components, count = self.components, self.responses_per_prompt
        judged = components.judge(
            components.write(
                components.heldout, responses_per_prompt=count, microbatch=self.written_at_once
            )
        )
        scored = components.score(
            judged.rollout, judged.raw_scores, microbatch=self.microbatch, critic=False
        )
        groups = [group for group in components.heldout_groups for _ in range(count)]
        price = dispatch.price(betas_of(betas, groups), components.settings)
        metrics = {
            key.replace("objective/", "heldout/"): value
            for key, value in objective_measures(scored, beta=price).items()
        }
        metrics |= {
            key.replace("distill/", "heldout/"): value
            for key, value in distill_measures(scored).items()
        }
        metrics["heldout/responses"] = len(judged.texts)
        metrics["heldout/distinct_2"] = distinct_n(judged.texts, 2)
        metrics["heldout/length"] = float(judged.rollout.response_mask.sum(-1).double().mean())
        metrics["heldout/eos_fraction"] = float(judged.rollout.ended.double().mean())
        golds = components.gold_scores(judged.responses)
        if golds is not None:
            estimate = clustered_mean(golds, judged.rollout.prompt_index.cpu())
            metrics["heldout/gold"] = estimate.mean
            metrics["heldout/gold_se"] = estimate.standard_error
        first = [row * count for row in range(min(self.samples, len(components.heldout)))]
        kept: list[tuple[int, Kind]] = [(row, "heldout") for row in first]
        reader = SampleReader(
            components.policy, components.reference, components.sampling.temperature
        )
        return metrics, reader.samples(scored, judged, kept, step=step, who=who, golds=golds)


def tokens_to_keep(kl: Float[Tensor, " token"]) -> Bool[Tensor, " token"]:
    """Which tokens of a response are looked at closely: the `TOPS_PER_SAMPLE` of largest KL."""
    best: Int[Tensor, " kept"] = kl.topk(min(TOPS_PER_SAMPLE, len(kl))).indices
    return torch.zeros_like(kl, dtype=torch.bool).index_fill(0, best, True)


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
