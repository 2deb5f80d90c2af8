"""Where an audited checkpoint stands in the run that it belongs to: score against √KL.

An audit knows how far a checkpoint has gone, and no score. If the checkpoint lies in a run
directory, RUN/checkpoints/step-NNNNNN/policy, and was held to the very reference it is audited
against, the run knows the score: of this checkpoint, of the steps that led to it, and, where it
was planned, of the optimum at each KL.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kleash.auditing.confidence_intervals import ConfidenceInterval
from kleash.auditing.options import IN_MEMORY
from kleash.models.policy import Identity
from kleash.report.metric_charts import ROOT_KL, known_frontier, over_root_kl
from kleash.report.svg_chart import Chart, Point, Series
from kleash.storage.atomic_directories import step_of
from kleash.storage.plan_file import PLAN_FILE, holds_plan, read_frontier
from kleash.storage.run_directory import Metrics, Run, holds_run, read_run

MeasuredOn = Literal["held-out prompts", "the next rollout"]


@dataclass(frozen=True)
class Spot:
    """A place on the plane of √KL and score."""

    root_kl: float
    score: float
    standard_error: float | None


@dataclass(frozen=True)
class CheckpointInRun:
    """What a run knows of one of its checkpoints."""

    run: str
    step: int
    score: float
    score_se: float | None
    measured_on: MeasuredOn
    gold: float | None
    gold_se: float | None
    trail: list[Spot]
    """The steps up to the checkpoint, √KL and score both as training measured them."""
    frontier: list[Spot]
    """What the run's plan held possible, as far as it knew; empty without a plan."""


@dataclass(frozen=True)
class RunSampling:
    """How a run sampled; None where its configuration does not say."""

    run: str
    temperature: float | None
    max_new_tokens: int | None
    chat_template: str | None = None
    """Name of the template of its prompts; None: the tokenizer's default."""


def run_of(policy: Identity) -> Path | None:
    """The directory of the run that a checkpoint lies in, RUN/checkpoints/NAME/policy."""
    if policy.how == IN_MEMORY:
        return None
    checkpoint = Path(policy.path).resolve().parent
    run = checkpoint.parent.parent
    return run if checkpoint.parent.name == "checkpoints" and holds_run(run) else None


def sampling_of_run(policy: Identity) -> RunSampling | None:
    """How the run of a checkpoint sampled; None for what is no checkpoint of a run.

    Raises:
        RunError: the run cannot be read.
    """
    folder = run_of(policy)
    if folder is None:
        return None
    run = read_run(folder)
    rollout: Mapping[str, Any] = run.config.get("rollout") or {}
    temperature, length = rollout.get("temperature"), rollout.get("max_new_tokens")
    template = (run.config.get("prompts") or {}).get("chat_template")
    return RunSampling(
        run.name,
        None if temperature is None else float(temperature),
        None if length is None else int(length),
        None if template is None else str(template),
    )


def checkpoint_in_run(
    policy: Identity, reference: Identity, *, temperature: float
) -> CheckpointInRun | None:
    """Look the checkpoint up in its run.

    Args:
        policy: the checkpoint, by its path.
        reference: what it is audited against.
        temperature: of the audit.

    Returns:
        None where it is no checkpoint of a run, the run was held to another reference or wrote at
        another temperature, or no score of this very policy was measured.

    Raises:
        RunError: the run cannot be read.
    """
    folder = run_of(policy)
    step = Path(policy.path).resolve().parent
    if folder is None or re.fullmatch(r"step-\d+", step.name) is None:
        return None
    run = read_run(folder)
    held_to: Mapping[str, Any] = run.meta.get("reference") or {}
    sampling: Mapping[str, Any] = run.config.get("rollout") or {}
    if held_to.get("sha256") != reference.sha256 or sampling.get("temperature", 1) != temperature:
        return None
    return _standing(run, step_of(step))


def _standing(run: Run, step: int) -> CheckpointInRun | None:
    lines = {line["step"]: line for line in run.metrics}
    here, after = lines.get(step, {}), lines.get(step + 1, {})
    # A plan and a trail are in the units of training, which held-out scores are in as well
    # unless they are normalised. The policy saved at a step writes the rollout of the next.
    same_units = run.config.get("score_normalisation", "none") == "none"
    found = _mean(here, "heldout/scores") if same_units else None
    measured_on: MeasuredOn = "held-out prompts"
    if found is None:
        found, measured_on = _mean(after, "objective/scores"), "the next rollout"
    if found is None:
        return None
    gold, gold_se = _mean(here, "heldout/gold") or (None, None)
    done = [line for line in run.metrics if (line["step"] or 0) <= step]
    trail = over_root_kl(done, "objective/kl_ref", "objective/scores", error="objective/scores_se")
    planned = holds_plan(run.path)
    frontier = known_frontier(read_frontier(run.path / PLAN_FILE)) if planned else []
    return CheckpointInRun(
        run.name, step, *found, measured_on, gold, gold_se, _spots(trail), _spots(frontier)
    )


def _mean(line: Metrics, key: str) -> tuple[float, float | None] | None:
    value, error = line.get(key), line.get(f"{key}_se")
    return None if value is None else (float(value), None if error is None else float(error))


def _spots(points: list[Point]) -> list[Spot]:
    return [Spot(point.x, point.y, point.error) for point in points]


def charts_over_root_kl(
    placed: Sequence[tuple[ConfidenceInterval, CheckpointInRun]],
) -> list[Chart]:
    """Score against √KL, and gold where several checkpoints have one.

    Args:
        placed: audited KL per response of each checkpoint, and where it stands in its run.

    References:
        Gao, Schulman, Hilton, "Scaling Laws for Reward Model Overoptimization", 2022, for the
        axes, https://arxiv.org/abs/2210.10760
    """
    runs = list(dict.fromkeys(one.run for _, one in placed))
    scores: list[Series] = []
    golds: list[Series] = []
    for colour, run in enumerate(runs):
        own = [(kl, one) for kl, one in placed if one.run == run and kl.mean >= 0]
        if not own:
            continue
        last = own[-1][1]
        name = f"{run}, " if len(runs) > 1 else ""
        audited = [Point(math.sqrt(kl.mean), one.score, one.score_se) for kl, one in own]
        gold = [
            Point(math.sqrt(kl.mean), one.gold, one.gold_se)
            for kl, one in own
            if one.gold is not None
        ]
        scores += [
            Series(f"{name}audited", audited, "spot", colour if name else 1),
            Series(f"{name}steps of the run, by its own KL", _points(last.trail), "dots", colour),
            Series(f"{name}the optimum, as planned", _points(last.frontier), "line", colour),
        ]
        golds.append(
            Series(run if len(runs) > 1 else "audited", gold, "spot", colour if name else 1)
        )
    measured = " or ".join(dict.fromkeys(one.measured_on for _, one in placed))
    drawn = [("Score against √KL", scores)]
    if sum(len(series.points) for series in golds) > 1:
        drawn.append(("Gold score against √KL", golds))
    return [
        Chart(
            title=title,
            unit="score",
            sample=f"measured by the run on {measured}",
            key="standing",
            series=[one for one in series if one.points],
            x_title=ROOT_KL,
        )
        for title, series in drawn
        if any(math.isfinite(point.y) for one in series for point in one.points)
    ]


def _points(spots: Sequence[Spot]) -> list[Point]:
    return [Point(one.root_kl, one.score, one.standard_error) for one in spots]
