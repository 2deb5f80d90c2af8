"""Where a β that follows a target starts: from the plan, or from the best estimate beside it.

Three sources, in this order; the result names the one that was used:

    plan     β whose optimum spends the target, from the reference's samples
    edge     the last β that the plan covers, extrapolated with the slope it has there
    spread   sd(r)/√(2·target), which is right where scores are normal or the target small

From the edge on the start is an extrapolation, which the controller corrects.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from kleash.kl.control.budget import SMALL_TILT_GAIN, initial_beta
from kleash.kl.control.state import check_target
from kleash.kl.planning.frontier import PlanRow, beta_ladder, plan_for_betas, plan_for_budgets
from kleash.kl.planning.tilting import spread

Source = Literal["plan", "edge", "spread", "given"]
_RUNGS = 24
_LEAST_GAIN = 0.5
"""A flatter frontier than this is extrapolated as if it were this steep: β by 1/gain of the KL."""


@dataclass(frozen=True)
class Start:
    """β before the first update, and why.

    Attributes:
        beta: β in score per nat.
        source: where it comes from; "given" is a value of the configuration.
        plant_gain: −d ln KL*/d ln β that goes with it; None where nothing is known of it.
        reason: why it is not the plan's; empty if it is, or no plan was made.
        response_length: mean tokens of a reference response, by which a target per token is
            multiplied; None where nothing is per token.
    """

    beta: float
    source: Source
    plant_gain: float | None = None
    reason: str = ""
    response_length: float | None = None


def starting_beta(scores: Float[Tensor, "prompt sample"], target_kl: float) -> Start:
    """β whose optimum spends `target_kl`, as well as samples of the reference determine it.

        KL* ∝ β^(−g)   so   β = β_edge · (KL_edge/target)^(1/g)          beyond what is known

    with g the plan's own slope where its knowledge ends: 2 for normal scores, less as they
    saturate.

    Args:
        scores: reward of N reference responses to each prompt, in the units β is wanted in.
        target_kl: nats per response.

    Returns:
        β, its source, and the reason why it is not the plan's.

    Raises:
        ValueError: if the target is no positive number, or scores do not vary within any prompt.

    Example:
        >>> import torch
        >>> scores = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
        >>> starting_beta(scores, 0.3).source, starting_beta(scores, 8.0).source
        ('plan', 'edge')
    """
    check_target(target_kl)
    if scores.shape[1] < 2 or (sd := spread(scores.double())) == 0:
        raise ValueError(
            "scores that vary within a prompt are needed to start β from, got none: give "
            "leash.initial_beta, or check the reward"
        )
    if min(len(scores), scores.shape[1] - 1) < 2:
        return Start(initial_beta(target_kl, sd), "spread", reason="a plan needs 2 prompts or more")
    row = plan_for_budgets(scores, [target_kl])[0]
    if isinstance(row, PlanRow) and row.known:
        return Start(row.beta.value, "plan", plant_gain=row.plant_gain)
    known = [rung for rung in plan_for_betas(scores, beta_ladder(scores, _RUNGS)) if rung.known]
    if not known:
        return Start(initial_beta(target_kl, sd), "spread", reason=row.reason)
    edge = known[-1]
    gain = min(SMALL_TILT_GAIN, max(_LEAST_GAIN, edge.plant_gain))
    beta = edge.beta.value * (edge.kl.value / target_kl) ** (1 / gain)
    return Start(beta, "edge", plant_gain=gain, reason=row.reason)
