"""The models, prompts and optimiser of a run, and what they do together.

`assembly.assemble` makes the object from a configuration. With several processes the heavy work
(writing, scoring, gradients) is shared out by `workers`; the numbers are the same but for rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kleash.algorithms import dispatch
from kleash.algorithms.common import select
from kleash.algorithms.dispatch import Settings
from kleash.errors import RefusedError
from kleash.kl.placements import DIFFERENTIATES_KL, prefix_weights
from kleash.models.policy import LanguageModel, Policy
from kleash.models.reference_offload import FrozenReference
from kleash.models.reward_model import RewardModel, WeightedSum
from kleash.models.value_model import ValueFunction
from kleash.rollout import scoring_pass
from kleash.rollout.prompts import Prompt, batch_prompts, columns_of
from kleash.rollout.sampling import response_columns, response_texts
from kleash.rollout.scoring_pass import SamplingSpec, fresh, microbatches
from kleash.scoring import float64_check, token_scores
from kleash.scoring.tiles import Tiles
from kleash.storage.plan_file import Frontier
from kleash.training.distributed import BackwardPass, Workers
from kleash.training.metrics import first_ratio_error
from kleash.training.pretraining_mix import PretrainingMix
from kleash.training.responses import JudgedResponses, Responses
from kleash.types import Experience, Fresh, Loss, Rollout, ScoredRollout


@dataclass(frozen=True, eq=False)
class Components:
    """Everything a run works with; built once, before the run directory exists."""

    policy: Policy
    reference: FrozenReference
    """What the KL is measured to."""
    original: FrozenReference
    """The reference at the start; another than `reference` once the run has re-anchored."""
    value: ValueFunction | None
    """The critic; None where the algorithm has none."""
    reward: WeightedSum
    gold: RewardModel | None
    """A second opinion on held-out responses, never trained on."""
    prompts: list[Prompt]
    heldout: list[Prompt]
    groups: Sequence[str]
    """The leash group of each prompt, by its number in the file."""
    heldout_groups: Sequence[str]
    pretraining: PretrainingMix | None
    sampling: SamplingSpec
    settings: Settings
    """The numbers of the algorithm; their type says which algorithm it is."""
    optimizer: torch.optim.Optimizer
    tiles: Tiles
    """How the update walks over the logits, and how many of them it keeps."""
    frontier: Frontier | None = None
    """The plan: what the reference's responses show to be possible, where they were drawn."""
    workers: Workers | None = None
    """The other processes; None: there are none."""

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained, in the optimiser's order."""
        return trained_parameters(self.optimizer)

    def groups_of(self, rollout: Rollout) -> list[str]:
        """The leash group of each response to training prompts."""
        numbers = cast("list[int]", rollout.prompt_index.tolist())
        return [self.groups[number] for number in numbers]

    @property
    def differentiates_kl(self) -> bool:
        """Whether the loss differentiates the exact KL."""
        return self.settings.placement in DIFFERENTIATES_KL

    def write(
        self, prompts: Sequence[Prompt], *, responses_per_prompt: int, microbatch: int
    ) -> Responses:
        """Sample responses to prompts.

        Raises:
            NonFiniteError: the policy's logits are not finite.
        """
        rows = [prompt for prompt in prompts for _ in range(responses_per_prompt)]
        batch = batch_prompts(rows, pad_id=self.policy.pad_id, device=self.policy.device)
        write = scoring_pass.generate if self.workers is None else self.workers.generate
        rollout = write(self.policy, batch, self.sampling, microbatch=microbatch)
        tokenizer = self.policy.tokenizer
        return Responses(
            rollout,
            prompts=[prompt.content for prompt in rows],
            texts=response_texts(tokenizer, rollout, stop_ids=self.policy.stop_ids),
            columns=columns_of(rows) | response_columns(tokenizer, rollout),
        )

    def judge(self, responses: Responses) -> JudgedResponses:
        """Score responses by the reward models.

        Raises:
            RewardError: a reward model did not keep its contract.
        """
        judged = self.reward.score_each(responses.prompts, responses.texts, responses.columns)
        total = judged.total.to(self.policy.device)
        return JudgedResponses(responses, total, dict(judged.parts))

    def score(
        self,
        rollout: Rollout,
        scores: Float[Tensor, " batch"],
        *,
        microbatch: int,
        critic: bool = True,
        spot_check: bool = False,
        reference: LanguageModel | None = None,
    ) -> ScoredRollout:
        """Log-probabilities, exact KL, entropy and values of every response token.

        Args:
            rollout: what was written.
            scores: of the reward models, passed through.
            microbatch: responses read at once.
            critic: whether the value model reads them too.
            spot_check: compare a few numbers with an obvious implementation in float64.
            reference: another model to measure the KL to, by this process alone.

        Raises:
            NonFiniteError, ScoringError: as `scoring_pass.score`.
        """
        # The workers' shares are put together without hidden states: too much to send.
        keep = critic and self.differentiates_kl and self.workers is None and reference is None
        local = partial(
            scoring_pass.score,
            policy=self.policy,
            reference=self.reference if reference is None else reference,
            value=self.value if critic else None,
            temperature=self.sampling.temperature,
            microbatch=microbatch,
            keep_ref_hidden=keep,
            scorer=float64_check.token_scores if spot_check else token_scores,
        )
        if self.workers is None or reference is not None:
            return local(rollout, scores=scores)
        facts = {"microbatch": microbatch, "critic": critic, "spot_check": spot_check}
        return self.workers.score(local, rollout, scores, facts)

    def loss(self, part: Experience, *, tokens: int) -> tuple[Loss, Fresh]:
        """The loss of one microbatch and what the models say of it now; gradients flow.

        Args:
            part: the rows.
            tokens: kept tokens of the whole minibatch, which the loss divides by.
        """
        now = fresh(
            part,
            policy=self.policy,
            value=self.value,
            reference=self.reference,
            temperature=self.sampling.temperature,
            want=("logprobs", "kl") if self.differentiates_kl else ("logprobs",),
            scorer=partial(token_scores, tiles=self.tiles),
        )
        return dispatch.algorithm_of(self.settings).loss(
            part, now, self.settings, tokens=tokens
        ), now

    def backward(self, rows: Experience, *, tokens: int, microbatch: int) -> BackwardPass:
        """Add the gradients of some rows, a microbatch at a time; any split adds to the same.

        Args:
            rows: a minibatch, or some responses of it.
            tokens: kept tokens of the whole minibatch.
            microbatch: responses at once.

        Raises:
            RefusedError: a number is not finite; it names the response among these rows.
        """
        metrics: list[dict[str, float]] = []
        error, weights = 0.0, torch.zeros_like(rows.mask, dtype=torch.float64)
        for chosen in microbatches(rows.scored.rollout, microbatch):
            part = select(rows, chosen)
            try:
                loss, now = self.loss(part, tokens=tokens)
            except RefusedError as refused:
                refused.among(chosen.tolist())
                raise
            loss.total.backward()
            logprobs, then = now.logprobs.detach(), part.scored.rollout_logprobs
            error = max(error, first_ratio_error(logprobs, then, part.mask))
            weights[chosen] = prefix_weights(logprobs.double(), then.double(), part.mask)
            metrics.append(loss.metrics)
        return BackwardPass(metrics, error, weights)

    def backward_of_minibatch(self, minibatch: Experience, *, microbatch: int) -> BackwardPass:
        """`backward` of a whole minibatch, by this process alone or shared out.

        Raises:
            RefusedError: as it does.
        """
        tokens = int(minibatch.mask.sum())
        if self.workers is None:
            return self.backward(minibatch, tokens=tokens, microbatch=microbatch)
        local = partial(self.backward, tokens=tokens, microbatch=microbatch)
        facts = {"microbatch": microbatch, "tokens": tokens}
        return self.workers.backward(local, minibatch, facts)


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The optimiser's parameters, in its order."""
    return [p for group in optimizer.param_groups for p in group["params"]]
