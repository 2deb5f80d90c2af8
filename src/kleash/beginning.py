"""Before the first update: look at the reference's scores where something depends on them.

Several responses to each of some prompts say how scores are to be normalised, at which β the
optimum would spend the budget, and how much score that budget can buy at all.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.algorithms.advantages import group_relative
from kleash.assembly import Crew, target_per_response
from kleash.beta.controllers import initial_beta
from kleash.beta.starting import Start, starting_beta
from kleash.beta.tilting import spread
from kleash.config import Config
from kleash.errors import RewardError
from kleash.evaluation import reference_scores
from kleash.frontier import Frontier, make_frontier
from kleash.rewards import ScoreStatistics


@dataclass(frozen=True)
class Beginning:
    """What the reference's responses said.

    Attributes:
        statistics: of the scores, for normalisation; empty if nobody looked.
        start: where a moving β starts; None where it does not move, or was told.
        frontier: the plan; None if nobody looked, or it is not in the units of training.
    """

    statistics: ScoreStatistics
    start: Start | None
    frontier: Frontier | None


@dataclass(frozen=True, eq=False)
class Drawn:
    """Reference responses to some prompts: which, and their scores in the units of training."""

    prompts: list[int]
    scores: Float[Tensor, "prompt sample"]
    statistics: ScoreStatistics
    """Of the scores before normalisation."""
    length: float
    """Mean tokens of a response."""


def draw(config: Config, crew: Crew) -> Drawn:
    """Let the policy answer before its first update, and the reward models read the answers.

    Raises:
        RewardError: every response has the same score.
    """
    prompts, raw, length = reference_scores(
        crew,
        prompts=config.plan.prompts,
        responses=config.plan.responses,
        seed=config.seed,
        microbatch=max(config.responses_per_step, config.rollout.microbatch_size),
    )
    statistics = ScoreStatistics().update(raw.flatten())
    if config.algorithm == "grpo":
        groups = torch.arange(len(raw)).repeat_interleave(raw.shape[1])
        relative = group_relative(raw.flatten(), groups)
        return Drawn(prompts, relative.view_as(raw), statistics, length)
    if config.score_normalisation == "none":
        return Drawn(prompts, raw, statistics, length)
    try:
        # Where statistics run, those of the first step are close to these.
        scores = statistics.normalise(raw.flatten()).view_as(raw)
        return Drawn(prompts, scores, statistics, length)
    except ValueError as error:
        raise RewardError(f"before the first update: {error}") from error


def begin(config: Config, crew: Crew) -> Beginning:
    """Draw reference responses if normalisation or a starting β needs them.

    Raises:
        RewardError: the scores say nothing because they do not vary.
    """
    leash = config.leash
    planned = leash.initial_beta is None and leash.target_kl is not None
    if not (planned or leash.target_kl_per_token or config.score_normalisation == "initial"):
        return Beginning(ScoreStatistics(), None, None)
    drawn = draw(config, crew)
    length = None if leash.target_kl_per_token is None else drawn.length
    target = target_per_response(leash, length)
    start = None if target is None else _start(config, drawn, target)
    if start is not None and length is not None:
        start = replace(start, response_length=length)
    frontier = _frontier(config, crew, drawn, target)
    return Beginning(drawn.statistics, start, frontier)


def _start(config: Config, drawn: Drawn, target: float) -> Start:
    if config.leash.initial_beta is not None:
        return Start(config.leash.initial_beta, "given")
    try:
        if config.reference.reference_differs:
            sd = spread(drawn.scores.double())
            reason = "the policy does not start at the reference"
            return Start(initial_beta(target, sd), "spread", reason=reason)
        return starting_beta(drawn.scores, target)
    except ValueError as error:
        raise RewardError(f"before the first update: {error}") from error


def start_line(config: Config, start: Start) -> str:
    """Where β starts and why, in a sentence for the run's log."""
    match start.source:
        case "given":
            how = "as it was told"
        case "plan":
            target = target_per_response(config.leash, start.response_length)
            how = f"the plan's for {target:.4g} nats"
        case "edge":
            how = f"carried on from the last β that the plan knows, because {start.reason}"
        case _:
            how = f"from the spread of the reference's scores, because {start.reason}"
    return f"β starts near {start.beta:.4g}: {how}"


def about(config: Config, crew: Crew) -> dict[str, Any]:
    """What a plan was made for."""
    return {
        "reference": asdict(crew.reference.identity()),
        "reward_models": {
            name: reward.model_dump(mode="json", exclude_none=True)
            for name, reward in config.reward_models.items()
        },
        "score_normalisation": config.score_normalisation,
        "prompts": config.prompts.train,
        "max_new_tokens": config.rollout.max_new_tokens,
        "temperature": config.rollout.temperature,
        "seed": config.seed,
    }


def _frontier(config: Config, crew: Crew, drawn: Drawn, target: float | None) -> Frontier | None:
    """The plan in the units of training; where those are not the score's own, there is none.

    A policy that does not start at the reference wrote samples that plan nothing either.
    """
    moving = config.score_normalisation == "running" or config.algorithm == "grpo"
    moving = moving or config.reference.reference_differs
    if moving or len(drawn.prompts) < 2:
        return None
    return make_frontier(
        drawn.scores,
        prompts=drawn.prompts,
        about=about(config, crew),
        budgets=[] if target is None else [target],
    )
