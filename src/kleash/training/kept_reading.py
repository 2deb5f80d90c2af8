"""One reading of the policy for scoring a rollout and for its first update.

Until the policy is updated it says in the update what it said in scoring: all ratios are 1. So the
graph of the scoring pass is kept, and the update is left with the backward pass. It costs the
memory of the activations from scoring to the update, while the gradients of the update before are
not held any more.

Left out: rollouts that are read in several microbatches, whose graphs would all have to be held;
several processes, which update on other rows than they scored; distillation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from jaxtyping import Float
from torch import Tensor

from kleash.algorithms.distill import DistillSettings
from kleash.models.batching import Limit
from kleash.models.gradients_in_place import embedding_gradient_in_place
from kleash.rollout import scoring_pass
from kleash.scoring import token_scores
from kleash.training.components import Components
from kleash.types import Fresh, Rollout, ScoredRollout


@dataclass(frozen=True)
class WholeReading:
    """Reads a rollout at once, for scoring and for its first update."""

    components: Components

    def fits(self, rollout: Rollout, limits: Sequence[Limit]) -> bool:
        """Whether the graph of scoring a rollout can be kept for its first update.

        Args:
            rollout: what was written.
            limits: of a microbatch, in scoring and in the update.
        """
        distilled = isinstance(self.components.settings, DistillSettings)
        if self.components.mesh.size > 1 or distilled:
            return False
        return all(len(scoring_pass.microbatches(rollout, limit)) == 1 for limit in limits)

    def score(
        self, rollout: Rollout, scores: Float[Tensor, " batch"]
    ) -> tuple[ScoredRollout, Fresh]:
        """`components.score`, and what the models say, with its graph, for `PolicyUpdater.update`.

        Raises:
            NonFiniteError, ScoringError: as `scoring_pass.score`.
        """
        components = self.components
        with embedding_gradient_in_place(components.policy):
            scored, kept = scoring_pass.score_and_keep(
                rollout,
                policy=components.policy,
                reference=components.reference,
                scores=scores,
                value=components.value,
                temperature=components.sampling.temperature,
                keep_ref_hidden=components.differentiates_kl,
                scorer=partial(token_scores, tiles=components.update_tiles),
            )
        # As of a second reading, which has a KL where the loss differentiates it.
        return scored, kept if components.differentiates_kl else replace(kept, kl=None)
