"""Step 6 of the loop: what each leash reads of a rollout, and what it decided, as metrics.

Without groups there is one leash for all, and its numbers stand under their plain keys; with
groups, each has its own reading from the responses to its own prompts, under `key/<group>`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, sqrt

from jaxtyping import Float
from torch import Tensor

from kleash.config.leash import LeashConfig
from kleash.kl.control.controllers import BudgetBeta, FixedBeta, Measurement, ScheduledBeta
from kleash.kl.control.groups import Leash, States, is_grouped, key_of, rows_by_group
from kleash.kl.control.shortfall import explain_shortfall
from kleash.kl.control.state import BetaState
from kleash.kl.planning.initial_beta import Start
from kleash.kl.statistics import Estimate, clustered_mean, response_kl, variance_of
from kleash.storage.plan_file import Frontier
from kleash.training.assembly import target_per_response
from kleash.training.metrics import Number, with_error
from kleash.types import ScoredRollout


@dataclass(frozen=True)
class Reading:
    """What a rollout says of the responses on one leash."""

    kl: Estimate
    """KL to the anchor, in nats per response."""
    scores: Estimate
    variance: float | None
    """Of the scores as they are trained on; within prompts where each has several responses."""
    length: float
    """Mean tokens of a response."""


def read_groups(
    scored: ScoredRollout, groups: Sequence[str], *, trained: Float[Tensor, " batch"]
) -> dict[str, Reading]:
    """The rollout as each leash sees it; a group that has no response in it is missing.

    Args:
        scored: the rollout.
        groups: whose leash each response is on.
        trained: scores in the units that β is a price in.
    """
    mask, prompts = scored.rollout.response_mask, scored.rollout.prompt_index
    spent, lengths = response_kl(scored.kl, mask), mask.sum(-1).double()
    return {
        group: Reading(
            kl=clustered_mean(spent[rows], prompts[rows]),
            scores=clustered_mean(scored.scores[rows], prompts[rows]),
            variance=variance_of(trained[rows], prompts[rows]),
            length=float(lengths[rows].mean()),
        )
        for group, rows in rows_by_group(groups).items()
    }


def measurements(
    readings: Mapping[str, Reading], starts: Mapping[str, Start], *, follow_scores: bool
) -> dict[str, Measurement]:
    """What each controller measures.

    Under a target per token the reading is that of responses as long as the reference's, which is
    what the controller's target is of.

    Args:
        readings: of this step.
        starts: where each β started, where it was not given.
        follow_scores: whether β goes on following the spread of the scores it came from; a
            starting β that was given is taken at its word.
    """
    measured: dict[str, Measurement] = {}
    for group, reading in readings.items():
        start, error = starts.get(group), reading.kl.standard_error
        longer = 1.0
        if start is not None and start.response_length is not None:
            longer = start.response_length / reading.length
        measured[group] = Measurement(
            response_kl=longer * reading.kl.mean,
            standard_error=float("nan") if error is None else longer * error,
            responses=reading.kl.n,
            score_variance=reading.variance if follow_scores else None,
        )
    return measured


def leash_measures(
    leash: LeashConfig,
    states: States,
    readings: Mapping[str, Reading],
    frontier: Frontier | None,
) -> dict[str, Number]:
    """β in force, its target and what was had for it; where there are groups, KL and score of each.

    The plain keys are means over the responses of the step.
    """
    total = sum(reading.kl.n for reading in readings.values())
    shares = {group: reading.kl.n / total for group, reading in readings.items()}
    targets = {
        group: target_per_response(own, readings[group].length)
        for group, own in leash.each().items()
        if group in readings
    }
    held = [share * target for g, share in shares.items() if (target := targets[g]) is not None]
    measures: dict[str, Number] = {
        "objective/beta": sum(share * states[group].beta for group, share in shares.items()),
        "objective/target_kl": sum(held) if held else None,
    }
    measures |= _efficiency(frontier, states, readings)
    if not is_grouped(states):
        return measures
    for group, reading in readings.items():
        own = {
            **with_error("objective/kl_ref", reading.kl),
            **with_error("objective/scores", reading.scores),
            "objective/beta": states[group].beta,
            "objective/target_kl": targets[group],
        }
        measures |= {key_of(key, group, states): value for key, value in own.items()}
    return measures


def _efficiency(
    frontier: Frontier | None, states: States, readings: Mapping[str, Reading]
) -> dict[str, Number]:
    """Score gained ÷ score that the plan holds possible at this KL; absent where it is silent.

    Groups have plans of their own: β differs between them, and no one plan is of all.
    """
    if frontier is None:
        return {}
    plans = frontier.groups if is_grouped(states) else dict.fromkeys(states, frontier)
    shares = {
        group: plans[group].efficiency(score=reading.scores.mean, kl=reading.kl.mean)
        for group, reading in readings.items()
        if group in plans
    }
    return {
        key_of("objective/kl_efficiency", group, states): share
        for group, share in shares.items()
        if share is not None
    }


def controller_measures(
    leash: Leash, before: States, measured: Mapping[str, Measurement], after: States
) -> dict[str, Number]:
    """What each controller that follows a KL measured in this step, and what it decided."""
    measures: dict[str, Number] = {}
    for group, measurement in measured.items():
        if isinstance(leash.controllers[group], FixedBeta | ScheduledBeta):
            continue
        own = {**_measured(measurement), **_decided(before[group], after[group])}
        measures |= {key_of(f"controller/{key}", group, after): own[key] for key in own}
    return measures


def shortfall_lines(leash: Leash, after: States, readings: Mapping[str, Reading]) -> list[str]:
    """Why budgets are not spent, of each group whose KL has been under its target for long."""
    lines: list[str] = []
    for group, reading in readings.items():
        controller = leash.controllers[group]
        if not isinstance(controller, BudgetBeta):
            continue
        sd = None if reading.variance is None else sqrt(reading.variance)
        line = explain_shortfall(after[group], controller.target_kl, sd)
        if line is not None:
            lines.append(f"{group}: {line}" if is_grouped(after) else line)
    return lines


def _measured(measurement: Measurement) -> dict[str, Number]:
    error = measurement.standard_error
    return {
        "kl_ref": measurement.response_kl,
        "kl_ref_se": None if isnan(error) else error,
        "responses": measurement.responses,
        "score_variance": measurement.score_variance,
    }


def _decided(before: BetaState, after: BetaState) -> dict[str, Number]:
    return {
        "beta_next": after.beta,
        "error": after.error,
        "gain": after.gain,
        "speed": after.speed,
        "feedforward": after.feedforward,
        "trim": after.trim,
        "ignored": after.ignored - before.ignored,
        "quiet": int(after.quiet),
        "limited": int(after.limited),
        "bounded": int(after.bounded),
    }
