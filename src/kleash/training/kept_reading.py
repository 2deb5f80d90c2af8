"""One reading of the policy for scoring a rollout and for the beginning of its first update.

Until the policy is updated it says in the update what it said in scoring: all ratios are 1. So the
graph of scoring is kept for the first microbatch of the first minibatch, and that is left with the
backward pass. Which rows it has is known before scoring, for the order of the first epoch is drawn
there. It costs the memory of the activations of one microbatch, from scoring to the update, while
the gradients of the update before are not held any more.

Left out: microbatches that are larger than scoring's own; several processes, which update on other
rows than they scored; distillation.
"""

from dataclasses import dataclass, replace
from functools import partial

from jaxtyping import Float, Int
from torch import Tensor

from kleash.algorithms.common import select
from kleash.algorithms.distill import DistillSettings
from kleash.models.batching import Limit
from kleash.models.gradients_in_place import embedding_gradient_in_place
from kleash.rollout import scoring_pass
from kleash.scoring import token_scores
from kleash.training.components import Components
from kleash.types import Fresh, Rollout, ScoredRollout


@dataclass(frozen=True, eq=False)
class SharedReading:
    """Reads a rollout for scoring, and some of its rows for the first update too."""

    components: Components
    minibatches: int
    """Optimiser steps in an epoch."""
    scoring: Limit
    """How large a microbatch may be in scoring."""
    updating: Limit
    """How large it may be in the update."""

    def rows(self, rollout: Rollout, order: Int[Tensor, " kept"]) -> Int[Tensor, " rows"] | None:
        """The rows whose graph scoring can keep: the first microbatch of the first update.

        Args:
            rollout: what was written.
            order: rows of the first epoch, in the order in which it takes them.

        Returns:
            In the order in which the update reads them; None where nothing can be kept.
        """
        distilled = isinstance(self.components.settings, DistillSettings)
        if self.components.mesh.size > 1 or distilled or not len(order):
            return None
        minibatch = order.chunk(self.minibatches)[0]
        parts = scoring_pass.microbatches(select(rollout, minibatch), self.updating)
        first = minibatch[parts[0]]
        # Scoring is not to read more at once than it was allowed.
        fits = len(scoring_pass.microbatches(select(rollout, first), self.scoring)) == 1
        return first if fits else None

    def score(
        self, rollout: Rollout, scores: Float[Tensor, " batch"], rows: Int[Tensor, " rows"]
    ) -> tuple[ScoredRollout, Fresh]:
        """`components.score`, and what the models say of some rows, for `PolicyUpdater.update`.

        Args:
            rollout: what was written.
            scores: of the reward models, passed through.
            rows: those of `rows`.

        Returns:
            The numbers of all rows without gradient, and those of `rows` with their graph.

        Raises:
            NonFiniteError, ScoringError: as `scoring_pass.score`.
        """
        components = self.components
        with embedding_gradient_in_place(components.policy):
            scored, kept = scoring_pass.score_and_keep(
                rollout,
                rows,
                policy=components.policy,
                reference=components.reference,
                scores=scores,
                value=components.value,
                temperature=components.sampling.temperature,
                microbatch=self.scoring,
                keep_ref_hidden=components.differentiates_kl,
                scorer=partial(token_scores, tiles=components.update_tiles),
            )
        # As of a second reading, which has a KL where the loss differentiates it.
        return scored, kept if components.differentiates_kl else replace(kept, kl=None)
