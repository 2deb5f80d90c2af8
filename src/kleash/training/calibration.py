"""Before the first update: look at the reference's scores where something depends on them.

Several responses to each of some prompts say how scores are to be normalised, at which β the
optimum would spend the budget, and how much score that budget can buy at all. Where groups of
prompts have budgets of their own, so many prompts of each group are asked, and speak for it alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.algorithms.advantages import group_relative
from kleash.algorithms.rewards import ScoreStatistics
from kleash.config.algorithm import GRPOConfig
from kleash.config.leash import LeashConfig
from kleash.config.schema import Config
from kleash.errors import RewardError
from kleash.kl.control.controllers import initial_beta
from kleash.kl.control.groups import is_grouped, rows_by_group
from kleash.kl.planning.initial_beta import Start, starting_beta
from kleash.kl.planning.tilting import spread
from kleash.models.policy import Identity
from kleash.report.plan_page import start_sentence
from kleash.storage.plan_file import Frontier, make_frontier
from kleash.training.assembly import target_per_response
from kleash.training.components import Components


@dataclass(frozen=True)
class Beginning:
    """What the reference's responses said.

    Attributes:
        statistics: of the scores, for normalisation; empty if nobody looked.
        starts: where the moving β of each group starts; empty where it does not move, or was given.
        frontier: the plan; None if nobody looked, or it is not in the units of training.
    """

    statistics: ScoreStatistics
    starts: Mapping[str, Start]
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
    groups: list[str]
    """Whose leash each prompt is on."""

    def scores_of(self, group: str) -> Float[Tensor, "prompt sample"]:
        """Scores of the prompts of one group."""
        return self.scores[rows_by_group(self.groups)[group]]


def draw(config: Config, components: Components) -> Drawn:
    """Let the policy answer before its first update, and the reward models read the answers.

    Raises:
        RewardError: every response has the same score.
    """
    prompts = _chosen(components.groups, config.plan.prompts, config.seed)
    groups = [components.groups[prompt] for prompt in prompts]
    written = components.judge(
        components.write(
            [components.prompts[prompt] for prompt in prompts],
            responses_per_prompt=config.plan.responses,
            microbatch=max(config.responses_per_step, config.rollout.microbatch_size),
        )
    )
    raw = written.raw_scores.view(len(prompts), config.plan.responses)
    length = float(written.rollout.response_mask.sum(-1).double().mean())
    statistics = ScoreStatistics().update(raw.flatten())
    if isinstance(config.algorithm, GRPOConfig):
        rows = torch.arange(len(raw)).repeat_interleave(raw.shape[1])
        relative = group_relative(raw.flatten(), rows, epsilon=config.algorithm.epsilon)
        return Drawn(prompts, relative.view_as(raw), statistics, length, groups)
    if config.score_normalisation == "none":
        return Drawn(prompts, raw, statistics, length, groups)
    try:
        # Where statistics run, those of the first step are close to these.
        scores = statistics.normalise(raw.flatten()).view_as(raw)
        return Drawn(prompts, scores, statistics, length, groups)
    except ValueError as error:
        raise RewardError(f"before the first update: {error}") from error


def _chosen(groups: Sequence[str], count: int, seed: int) -> list[int]:
    """Numbers of `count` prompts of each group, drawn by `seed`; all of it, if there are fewer."""
    chosen: list[int] = []
    for members in rows_by_group(groups).values():
        order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))
        chosen += [members[place] for place in order[:count].tolist()]
    return chosen


def begin(config: Config, components: Components) -> Beginning:
    """Draw reference responses if normalisation or a starting β needs them.

    Raises:
        RewardError: the scores say nothing because they do not vary.
    """
    leash = config.leash
    moves = leash.beta is None and leash.schedule is None
    planned = moves and leash.initial_beta == "auto"
    if not (planned or leash.target_kl_per_token or config.score_normalisation == "initial"):
        return Beginning(ScoreStatistics(), {}, None)
    drawn = draw(config, components)
    length = None if leash.target_kl_per_token is None else drawn.length
    targets = group_targets(leash, length)
    differs = config.reference.reference_differs
    starts = {
        name: replace(
            _start(
                drawn.scores_of(name),
                target,
                given=leash.initial_beta,
                reference_differs=differs,
            ),
            response_length=length,
        )
        for name, target in targets.items()
    }
    # There is a plan only in the units of training, and only of samples of the reference.
    moving = config.score_normalisation == "running" or isinstance(config.algorithm, GRPOConfig)
    frontier = None
    if not (moving or differs or len(drawn.prompts) < 2):
        made_for = about(config, components.reference.identity(), drawn)
        frontier = frontier_of(drawn, about=made_for, targets=targets)
    return Beginning(drawn.statistics, starts, frontier)


def group_targets(leash: LeashConfig, response_length: float | None) -> dict[str, float]:
    """The budget of each group in nats per response; empty where β holds none."""
    targets = {
        name: target_per_response(own, response_length) for name, own in leash.each().items()
    }
    return {name: target for name, target in targets.items() if target is not None}


def _start(
    scores: Float[Tensor, "prompt sample"],
    target: float,
    *,
    given: float | Literal["auto"],
    reference_differs: bool,
) -> Start:
    """Where β starts, for a budget in nats per response."""
    if given != "auto":
        return Start(given, "given")
    try:
        if reference_differs:
            sd = spread(scores.double())
            reason = "the policy does not start at the reference"
            return Start(initial_beta(target, sd), "spread", reason=reason)
        return starting_beta(scores, target)
    except ValueError as error:
        raise RewardError(f"before the first update: {error}") from error


def start_lines(leash: LeashConfig, starts: Mapping[str, Start]) -> list[str]:
    """Where the β of each group starts and why, in sentences for the run's log."""
    leashes = leash.each()
    return [
        f"{f'{name}: ' if is_grouped(leashes) else ''}{_start_line(leashes[name], start)}"
        for name, start in starts.items()
    ]


def _start_line(leash: LeashConfig, start: Start) -> str:
    """In the words of `kleash plan`."""
    if leash.target_kl is not None:
        return start_sentence(f"leash.target_kl {leash.target_kl:g}", start)
    return start_sentence(f"leash.target_kl_per_token {leash.target_kl_per_token:g}", start)


def about(config: Config, reference: Identity, drawn: Drawn) -> dict[str, Any]:
    """What a plan was made for."""
    return {
        "reference": asdict(reference),
        "reward_models": {
            name: reward.model_dump(mode="json", exclude_none=True)
            for name, reward in config.reward_models.items()
        },
        "score_normalisation": config.score_normalisation,
        "prompts": config.prompts.train,
        "max_new_tokens": config.rollout.max_new_tokens,
        "temperature": config.rollout.temperature,
        "response_length": drawn.length,
        "seed": config.seed,
    }


def frontier_of(
    drawn: Drawn,
    *,
    about: Mapping[str, Any],
    targets: Mapping[str, float],
    betas: Sequence[float] = (),
    budgets: Sequence[float] = (),
) -> Frontier:
    """The plan of what was drawn: of all prompts, and of each group where there are groups.

    Args:
        drawn: scores in the units that β is wanted in.
        about: what it is made for.
        targets: budget of each group, as far as they have one.
        betas: to plan for; a ladder of them unless given.
        budgets: to plan for besides the target.

    Raises:
        ValueError: as `make_frontier` does.
    """
    rows = rows_by_group(drawn.groups)
    grouped = is_grouped(rows)
    if grouped:
        about = {**about, "groups": dict(targets)}
    else:
        budgets = [*budgets, *(target for target in targets.values() if target not in budgets)]
    whole = make_frontier(
        drawn.scores, prompts=drawn.prompts, about=about, betas=betas, budgets=budgets
    )
    groups = {
        name: make_frontier(
            drawn.scores[rows[name]],
            prompts=[drawn.prompts[row] for row in rows[name]],
            about={},
            budgets=[target],
        )
        for name, target in targets.items()
        if grouped and len(rows[name]) > 1
    }
    return replace(whole, groups=groups)
