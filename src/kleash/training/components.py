"""The models, prompts and optimiser of a run, and what they do together.

`assembly.assemble` makes the object from a configuration. With several processes the heavy work
(writing, scoring, gradients) is divided by rows, and every process has the numbers of all of them;
they are those of one process but for rounding.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kleash.algorithms import dispatch
from kleash.algorithms.common import select
from kleash.algorithms.dispatch import Settings
from kleash.algorithms.distill import DistillSettings
from kleash.algorithms.sampler_correction import prefix_start
from kleash.errors import RefusedError
from kleash.kl.placements import DIFFERENTIATES_KL, prefix_weights
from kleash.mesh import ALONE, Mesh
from kleash.models import batching
from kleash.models.batching import Limit
from kleash.models.gradients_in_place import embedding_gradient_in_place
from kleash.models.policy import LanguageModel, Policy, Reference
from kleash.models.reference_offload import FrozenReference
from kleash.models.reward_model import NoReward, RewardModel, WeightedSum
from kleash.models.sharding import gathered, release
from kleash.models.value_model import ValueFunction
from kleash.rollout import scoring_pass
from kleash.rollout.engine import (
    RolloutEngine,
    SeparateEngine,
    TransformersEngine,
    writing_request,
)
from kleash.rollout.hand_over import write_with
from kleash.rollout.prompts import Prompt, batch_prompts, columns_of
from kleash.rollout.sampling import response_columns, response_texts
from kleash.rollout.scoring_pass import (
    SamplingSpec,
    distilled,
    fresh,
    microbatches,
    row_lengths,
)
from kleash.scoring import float64_check, token_scores
from kleash.scoring.tiles import Tiles
from kleash.storage.plan_file import Frontier
from kleash.training.data_parallel import (
    SharedReward,
    balanced_rows,
    generate,
    scored_columns,
    together,
)
from kleash.training.metrics import first_ratio_error
from kleash.training.optimizers import trained_parameters
from kleash.training.pretraining_mix import PretrainingMix
from kleash.training.responses import JudgedResponses, Responses
from kleash.types import Experience, Fresh, Loss, Rollout, ScoredRollout


@dataclass(frozen=True, eq=False)
class BackwardPass:
    """What the backward passes of some rows say."""

    metrics: list[dict[str, float]]
    """Of each microbatch's loss; they combine to those of the minibatch."""
    ratio_error: float
    """How far a ratio was from 1."""
    weights: Float[Tensor, "batch token"]
    """Prefix weights Π π/π_rollout, in float64."""


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
    reward: WeightedSum | NoReward
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
    teacher: Reference | None = None
    """Whom a student is drawn to, where that is not the reference; see `teacher_of`."""
    mesh: Mesh = ALONE
    """The processes of the run."""
    engine: SeparateEngine | None = None
    """What writes responses with weights of its own; None: the policy writes by itself."""

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained, in the optimiser's order."""
        return trained_parameters(self.optimizer)

    def replicated_parameters(self) -> list[nn.Parameter]:
        """What is trained and lies whole in every process."""
        return [p for p in self.parameters() if not isinstance(p, DTensor)]

    @property
    def divided(self) -> bool:
        """Whether models are divided among the processes, which then have to read as often."""
        return self.policy.sharding is not None

    def release(self) -> None:
        """Give up what was gathered of divided models."""
        for model in (self.policy, self.reference, self.original, self.teacher, self.value):
            held = getattr(getattr(model, "inner", model), "model", model)
            if isinstance(held, nn.Module):
                release(held)

    def groups_of(self, rollout: Rollout) -> list[str]:
        """The leash group of each response to training prompts."""
        numbers = cast("list[int]", rollout.prompt_index.tolist())
        return [self.groups[number] for number in numbers]

    @property
    def differentiates_kl(self) -> bool:
        """Whether the loss differentiates the exact KL."""
        return self.settings.placement in DIFFERENTIATES_KL

    @property
    def teacher_of(self) -> FrozenReference | None:
        """Whom the student is drawn to; None where nothing is distilled."""
        if not isinstance(self.settings, DistillSettings):
            return None
        return self.reference if self.teacher is None else self.teacher

    def write(
        self,
        prompts: Sequence[Prompt],
        *,
        responses_per_prompt: int,
        microbatch: int,
        written: Rollout | None = None,
    ) -> Responses:
        """Sample responses to prompts, or take those that were `written` to them already.

        Raises:
            NonFiniteError: the policy's logits are not finite.
            EngineError: the engine failed, or holds other weights than the policy.
        """
        rows = [prompt for prompt in prompts for _ in range(responses_per_prompt)]
        rollout = written
        if rollout is None:
            batch = batch_prompts(rows, pad_id=self.policy.pad_id, device=self.policy.device)
            engine = self.current_engine()
            request = writing_request(engine, batch, self.sampling, microbatch=microbatch)
            if self.engine is None:
                with gathered(self.policy.model):
                    rollout = engine.write(request)
            else:
                rollout = write_with(self.engine, self.policy, request, mesh=self.mesh)
        tokenizer = self.policy.tokenizer
        return Responses(
            rollout,
            prompts=[prompt.content for prompt in rows],
            texts=response_texts(tokenizer, rollout, stop_ids=self.policy.stop_ids),
            columns=columns_of(rows) | response_columns(tokenizer, rollout),
        )

    def current_engine(self) -> RolloutEngine:
        """What writes: an engine with weights of its own, or the policy by itself."""
        if self.engine is None:
            alone = self.mesh.size == 1
            return TransformersEngine(
                self.policy, scoring_pass.generate if alone else partial(generate, mesh=self.mesh)
            )
        return self.engine

    def close(self) -> None:
        """Give back the engine, if there is one."""
        if self.engine is not None:
            self.engine.close()

    def judge(self, responses: Responses) -> JudgedResponses:
        """Score responses by the reward models.

        Raises:
            RewardError: a reward model did not keep its contract.
        """
        shared = {
            name: (self._shared(model), weight)
            for name, (model, weight) in self.reward.rewards.items()
        }
        reward = WeightedSum(shared) if shared else self.reward
        judged = reward.score_each(responses.prompts, responses.texts, responses.columns)
        total = judged.total.to(self.policy.device)
        return JudgedResponses(responses, total, dict(judged.parts))

    def gold_scores(self, responses: Responses) -> Float[Tensor, " batch"] | None:
        """Scores of the second opinion; None where there is none.

        Raises:
            RewardError: it did not keep its contract.
        """
        if self.gold is None:
            return None
        return self._shared(self.gold).score(responses.prompts, responses.texts, responses.columns)

    def _shared(self, model: RewardModel) -> RewardModel:
        return model if self.mesh.size == 1 else SharedReward(model, self.mesh)

    def score(
        self,
        rollout: Rollout,
        scores: Float[Tensor, " batch"],
        *,
        microbatch: Limit,
        critic: bool = True,
        spot_check: bool = False,
        reference: LanguageModel | None = None,
    ) -> ScoredRollout:
        """Log-probabilities, exact KL, entropy and values of every response token.

        Args:
            rollout: what was written.
            scores: of the reward models, passed through.
            microbatch: responses read at once, or a budget of tokens.
            critic: whether the value model reads them too.
            spot_check: compare a few numbers with an obvious implementation in float64.
            reference: another model to measure the KL to.

        Raises:
            NonFiniteError, ScoringError: as `scoring_pass.score`.
        """
        # A process updates on other rows than it scored: hidden states are too much to send.
        alone = self.mesh.size == 1
        against = self.reference if reference is None else reference
        teacher = self.teacher_of if reference is None else None
        needed = self.differentiates_kl or teacher is not None
        local = partial(
            scoring_pass.score,
            policy=self.policy,
            reference=against,
            value=self.value if critic else None,
            temperature=self.sampling.temperature,
            microbatch=microbatch,
            keep_ref_hidden=critic and needed and alone and reference is None,
            teacher=teacher,
            scorer=float64_check.token_scores if spot_check else token_scores,
        )
        if alone:
            return local(rollout, scores=scores)
        frozen = _each(against, teacher)
        return self._score_together(
            rollout, scores, local, frozen, microbatch=microbatch, critic=critic
        )

    def _score_together(
        self,
        rollout: Rollout,
        scores: Float[Tensor, " batch"],
        local: Callable[..., ScoredRollout],
        frozen: Sequence[LanguageModel],
        *,
        microbatch: Limit,
        critic: bool,
    ) -> ScoredRollout:
        """`local` of each process's rows, put together."""
        shares = balanced_rows(rollout, self.mesh.size)
        share = shares[self.mesh.rank]

        def read() -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            refused: RefusedError | None = None
            try:
                if len(share):
                    found = scored_columns(local(select(rollout, share), scores=scores[share]))
            except RefusedError as error:
                # The others may have more to read, and of divided models not without this process.
                refused = error
            with torch.no_grad():
                for _ in range(self._idle_passes(rollout, shares, microbatch)):
                    self._idle(rollout, frozen, critic=critic)
            if refused is not None:
                raise refused
            return found

        own = self.mesh.agree(read, rows=share.tolist())
        self.release()
        columns = together(own, share, len(rollout.response_ids), self.mesh)
        return ScoredRollout(rollout=rollout, scores=scores, **columns)

    @property
    def update_tiles(self) -> Tiles:
        """How the update walks over the logits; divided weights need their gradients returned."""
        return replace(
            self.tiles,
            keep_reference=self.differentiates_kl,
            weight_gradients="returned" if self.divided else "in_place",
        )

    def _idle_passes(self, rollout: Rollout, shares: Sequence[Tensor], microbatch: Limit) -> int:
        """How many more microbatches the process with the most reads; 0 if models are whole.

        Args:
            rollout: the rows of all processes.
            shares: which of them each process has.
            microbatch: rows at once, or a budget of tokens.
        """
        if not self.divided:
            return 0
        lengths = row_lengths(rollout)
        passes = [
            len(batching.microbatches([lengths[i] for i in share.tolist()], microbatch))
            for share in shares
        ]
        return max(passes) - passes[self.mesh.rank]

    def _idle(self, rollout: Rollout, frozen: Sequence[LanguageModel], *, critic: bool) -> Tensor:
        """Read a row for nothing, in the order of scoring and update: the others then read theirs.

        Returns:
            A number that all trained weights have a gradient of 0 in.
        """
        row = (rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.response_mask)
        part = (row[0][:1], row[1][:1], row[2][:1], row[3][:1])
        hidden = self.policy.hidden_states(*part)
        with torch.no_grad():
            for model in frozen:
                model.hidden_states(*part)
        total = hidden.sum() + self.policy.head.weight.sum()
        for model in frozen:
            total = total + 0 * model.head.weight.detach().sum().to(total.device)
        if critic and self.value is not None:
            total = total + self.value.state_values(*part, hidden).sum()
        return 0 * total

    def loss(
        self, part: Experience, *, tokens: int, kept: Fresh | None = None
    ) -> tuple[Loss, Fresh]:
        """The loss of one microbatch and what the models say of it now; gradients flow.

        Args:
            part: the rows.
            tokens: kept tokens of the whole minibatch, which the loss divides by.
            kept: what the models said of them in scoring, where they have not learnt since.
        """
        now = self._read_again(part) if kept is None else kept
        return dispatch.algorithm_of(self.settings).loss(
            part, now, self.settings, tokens=tokens
        ), now

    def _read_again(self, part: Experience) -> Fresh:
        """What the models say of some rows now; gradients flow."""
        if isinstance(self.settings, DistillSettings):
            assert self.teacher_of is not None
            # The mean over tokens, and nothing else, is known before the weights of the loss are.
            alone = self.settings.gradient == "token" and not self.differentiates_kl
            return distilled(
                part,
                policy=self.policy,
                teacher=self.teacher_of,
                divergence=self.settings.divergence,
                reference=self.reference if self.differentiates_kl else None,
                temperature=self.sampling.temperature,
                tiles=self.tiles,
                gradient="forward" if alone else "backward",
            )
        in_place = contextlib.nullcontext()
        if not self.divided:
            in_place = embedding_gradient_in_place(self.policy)
        with in_place:
            return fresh(
                part,
                policy=self.policy,
                value=self.value,
                reference=self.reference,
                temperature=self.sampling.temperature,
                want=("logprobs", "kl") if self.differentiates_kl else ("logprobs",),
                scorer=partial(token_scores, tiles=self.update_tiles),
            )

    def backward(
        self,
        rows: Experience,
        *,
        tokens: int,
        microbatch: Limit,
        numbers: Sequence[int] | None = None,
        kept: Fresh | None = None,
    ) -> BackwardPass:
        """Add the gradients of some rows, a microbatch at a time; any split adds to the same.

        Args:
            rows: a minibatch, or some responses of it.
            tokens: kept tokens of the whole minibatch.
            microbatch: responses at once, or a budget of tokens.
            numbers: which responses of the minibatch the rows are; all of them by default.
            kept: what `SharedReading.score` said of the first microbatch.

        Raises:
            RefusedError: a number is not finite; it names the response among the minibatch.
        """
        metrics: list[dict[str, float]] = []
        error, weights = 0.0, torch.zeros_like(rows.mask, dtype=torch.float64)
        named = range(len(rows.mask)) if numbers is None else numbers
        # Where models are divided all processes go backwards together, or none does.
        mesh = self.mesh if self.divided else ALONE
        for chosen in microbatches(rows.scored.rollout, microbatch) if len(rows.mask) else ():
            part = select(rows, chosen)
            loss, now = mesh.agree(
                partial(self.loss, part, tokens=tokens, kept=kept),
                rows=[named[i] for i in chosen.tolist()],
            )
            kept = None
            loss.total.backward()
            logprobs, then = now.logprobs.detach(), part.scored.rollout_logprobs
            error = max(error, first_ratio_error(logprobs, then, part.mask))
            start = prefix_start(part.scored, self.settings.correction, self.settings.placement)
            weights[chosen] = prefix_weights(logprobs.double(), start.double(), part.mask)
            metrics.append(loss.metrics)
        return BackwardPass(metrics, error, weights)

    def backward_of_minibatch(
        self, minibatch: Experience, *, microbatch: Limit, kept: Fresh | None = None
    ) -> BackwardPass:
        """`backward` of a whole minibatch; of several processes each has gradients of its rows.

        Args:
            minibatch: the rows of an optimiser step.
            microbatch: responses at once, or a budget of tokens.
            kept: as in `backward`, in one process.

        Raises:
            RefusedError: as it does.
        """
        tokens, mesh = int(minibatch.mask.sum()), self.mesh
        if mesh.size == 1:
            return self.backward(minibatch, tokens=tokens, microbatch=microbatch, kept=kept)
        shares = balanced_rows(minibatch.scored.rollout, mesh.size)
        share = shares[mesh.rank]
        work = partial(
            self.backward,
            select(minibatch, share),
            tokens=tokens,
            microbatch=microbatch,
            numbers=share.tolist(),
        )
        if self.divided:
            own = work()
            rollout = minibatch.scored.rollout
            # In the order in which an update reads them.
            frozen = _each(self.teacher_of, self.reference if self.differentiates_kl else None)
            for _ in range(self._idle_passes(rollout, shares, microbatch)):
                mesh.agree(partial(self._idle, rollout, frozen, critic=True)).backward()
            self.release()
        else:
            own = mesh.agree(work)
        said = mesh.gather([own.metrics, own.ratio_error])
        return BackwardPass(
            metrics=[metrics for some, _ in said for metrics in some],
            ratio_error=max(error for _, error in said),
            weights=together({"weights": own.weights}, share, len(minibatch.mask), mesh)["weights"],
        )

    def add_gradients(self) -> None:
        """The gradients of all processes' rows, summed in each of them.

        The losses divide by the tokens of the whole minibatch, so that a sum is right and a mean
        would be too small by the number of processes.
        """
        if self.mesh.size == 1:
            return
        # Those of divided weights were summed when they were made.
        parameters = self.replicated_parameters()
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.mesh.add([cast(Tensor, parameter.grad) for parameter in parameters])


def _each(*models: LanguageModel | None) -> list[LanguageModel]:
    """The models that there are, each once: the reference may be the teacher."""
    return list({id(model): model for model in models if model is not None}.values())
