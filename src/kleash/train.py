"""The loop: write, score, reward, climb, and move β, in that order, once a step.

    1. the policy writes responses to the prompts
    2. the same tokens go through the frozen reference, which never writes
    3. per token: log π, log π_ref, exact KL, entropy
    4. rewards: the score on the last token, −β·kl on each
    5. advantages, clipped updates
    6. β moves, so that the KL spent meets its target

Left out: several processes. A run is one process on one device.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
import yaml
from torch import Tensor

from kleash.algorithms import ppo
from kleash.assembly import Crew, assemble, make_controller, target_per_response
from kleash.beginning import begin, start_line
from kleash.beta.controllers import BetaController, Measurement
from kleash.beta.starting import Start
from kleash.config import Config, dump_config, parse_config
from kleash.errors import ConfigError, ModelError, RefusedError, RunError
from kleash.evaluation import (
    Written,
    evaluate_heldout,
    judge,
    training_samples,
    write_answers,
)
from kleash.frontier import PLAN_FILE, Frontier, holds_plan, read_frontier, write_frontier
from kleash.holding import (
    Attempt,
    attempt_step,
    check_bounds,
    reanchor_if_due,
    refuse,
    require_unchanged,
    save_if_due,
    seal,
)
from kleash.kl.statistics import clustered_mean, response_kl
from kleash.masked import masked_mean
from kleash.measures import (
    Clock,
    Number,
    account,
    efficiency_measure,
    next_mixing,
    objective_measures,
    rollout_measures,
    score_variance,
    with_error,
)
from kleash.preflight import doctor
from kleash.progress import TrainingDisplay
from kleash.prompts import PromptCursor
from kleash.record import objective_line, run_meta
from kleash.resume import TrainingState, latest_checkpoint, restore_anchor, restore_run_state
from kleash.rewards import ScoreStatistics
from kleash.rollout import TokenScorer, score
from kleash.runs import Run, RunWriter, holds_run, read_run
from kleash.scoring import checked, token_scores
from kleash.trackers import Trackers
from kleash.types import ScoredRollout
from kleash.updates import needs_exact_kl, update

_SAME_MODEL = 1e-4
"""Nats per token below which two models count as one."""
_HELDOUT_SAMPLES = 8


def train(
    config: Config,
    *,
    argv: Sequence[str] = (),
    preflight: Callable[[Config, Crew], list[str]] | None = None,
) -> Path:
    """Train a policy on the leash and leave a run directory.

    If the output already holds this very run, unfinished, it is continued from its newest
    checkpoint: numbers and weights are those of a run that was never interrupted.

    Args:
        config: the run, written down; `{world}` already replaced.
        argv: the command line, for the record.
        preflight: looks at what was assembled before anything begins; raises what must stop the
            run, and returns its warnings, for the record.

    Returns:
        The run directory.

    Raises:
        KleashError: something the user can mend; nothing was begun if it shows at the start, and
            the run directory says "failed" and why if it shows later.
    """
    _require_one_process()
    path = Path(config.output)
    begun = holds_run(path)
    if begun:
        _require_same_run(config, read_run(path))
    torch.manual_seed(config.seed)
    crew = assemble(config)
    warnings = preflight(config, crew) if preflight is not None and not begun else []
    reference = crew.reference.identity()
    trackers = Trackers(config.logging.trackers, path)
    checkpoint = latest_checkpoint(path / "checkpoints") if begun else None
    if checkpoint is not None:
        state = restore_run_state(checkpoint, crew, reference)
        crew = restore_anchor(checkpoint, crew, state)
        frontier = read_frontier(path / PLAN_FILE) if holds_plan(path) else None
    else:
        frontier, state = _begin(config, crew)
    crew = replace(crew, frontier=frontier)
    controller = _controller(config, state.start)
    if begun:
        run = RunWriter.reopen(path, through_step=state.step if checkpoint else -1)
    else:
        meta = run_meta(config, crew, reference, argv, beta=state.beta.beta, start=state.start)
        meta["warnings"] = warnings
        run = RunWriter.create(path, config=yaml.safe_load(dump_config(config)), meta=meta)
    if frontier is not None and checkpoint is None:
        write_frontier(path / PLAN_FILE, frontier)
    display = TrainingDisplay(
        config.steps, title=path.name, target_kl=config.leash.target_kl, done=state.step
    )
    with run, trackers, display:
        display.say(objective_line(config, state.beta.beta))
        for warning in warnings:
            display.say(f"warning: {warning}")
        if state.start is not None:
            display.say(start_line(config, state.start))
        if checkpoint is None:
            _heldout(config, crew, state, run)
        sealed = seal(crew)
        while state.step < config.steps:
            attempt = attempt_step(config, crew, state)
            try:
                require_unchanged(crew, sealed)
                state, metrics = _step(config, crew, controller, state, run, attempt)
            except RefusedError as error:
                display.say(f"step {attempt.step} refused: {error}")
                crew, state, sealed = refuse(error, attempt, config, crew, state, sealed, run)
                continue
            trackers.log(metrics)
            display.show(metrics)
            crew, state, sealed = reanchor_if_due(config, crew, state, sealed, run)
            state = save_if_due(config, crew, state, metrics, sealed, run)
    return run.path


def _require_same_run(config: Config, run: Run) -> None:
    """An output directory is free, or holds this very run, unfinished."""
    if parse_config(dict(run.config), where=f"{run.path}/config.yaml") != config:
        raise RunError(
            f"{config.output!r} already holds a run of another configuration; give another output "
            "directory, or move that run away"
        )
    if run.status == "finished":
        raise RunError(
            f"{config.output!r} already holds this run, finished; give another output directory, "
            "or move it away"
        )


def _begin(config: Config, crew: Crew) -> tuple[Frontier | None, TrainingState]:
    """Look at the scores before the first update where something depends on them."""
    begun = begin(config, crew)
    initial = config.score_normalisation == "initial"
    return begun.frontier, TrainingState(
        step=0,
        episodes=0,
        beta=_controller(config, begun.start).init(),
        scores=begun.statistics if initial else ScoreStatistics(),
        cursor=PromptCursor(size=len(crew.prompts), seed=config.seed),
        mixing=crew.settings.mixing,
        start=begun.start,
    )


def _controller(config: Config, start: Start | None) -> BetaController:
    return make_controller(config.leash, start=start, responses_per_step=config.responses_per_step)


def _step(
    config: Config,
    crew: Crew,
    controller: BetaController,
    state: TrainingState,
    run: RunWriter,
    attempt: Attempt,
) -> tuple[TrainingState, dict[str, Number]]:
    """One rollout and its updates; every number of it goes into the run directory."""
    clock, beta = Clock(), state.beta.beta
    step = state.step + 1

    # 1. The policy writes; the reward models read.
    numbers, cursor = state.cursor.take(config.rollout.prompts_per_step)
    with clock.measure("time/generate"):
        attempt.answers = write_answers(
            crew,
            [crew.prompts[number] for number in numbers],
            responses_per_prompt=config.rollout.responses_per_prompt,
            microbatch=config.responses_per_step,
        )
        written = judge(crew, attempt.answers)
    scores, seen = _normalise(config, written.raw_scores, state.scores)
    attempt.scores = scores

    # 2–3. Policy, reference and critic score the same tokens.
    with clock.measure("time/score"):
        scored = score(
            written.rollout,
            policy=crew.policy,
            reference=crew.reference,
            scores=scores,
            value=crew.value,
            temperature=crew.sampling.temperature,
            microbatch=config.rollout.microbatch_size,
            keep_ref_hidden=needs_exact_kl(crew),
            scorer=_scorer(config, step),
        )
        original_kl = _original_kl(crew, scored, microbatch=config.rollout.microbatch_size)
    attempt.scored = scored

    if step == 1 and not config.reference.reference_differs:
        _require_reference_is_start(scored)
    doctor.look(config, crew, written, scored, step=step, folder=run.path)
    check_bounds(config, scored, original_kl)
    attempt.within_bounds = True

    # 4–5. Rewards, advantages, clipped updates.
    with clock.measure("time/update"):
        settings = replace(crew.settings, mixing=state.mixing)
        experience = ppo.prepare(scored, beta, settings)
        attempt.updating = True
        updates = update(config, crew, experience, done=state.step)

    # 6. β moves.
    metrics = {
        **objective_measures(experience.scored, beta=beta),
        **rollout_measures(scored, written.responses),
        **_original_measures(config, scored, original_kl),
        **updates,
        "objective/accounting_residual": account(settings, experience, beta),
    }
    episodes = state.episodes + len(written.responses)
    after = replace(
        state,
        step=step,
        episodes=episodes,
        beta=controller.update(
            state.beta, _measurement(config, metrics, scored, start=state.start)
        ),
        scores=seen,
        cursor=cursor,
        mixing=next_mixing(settings, experience, beta),
        start=state.start,
    )

    metrics |= _bookkeeping(config, crew, written, clock, scored, beta=beta)
    metrics |= efficiency_measure(crew.frontier, metrics)
    after = replace(after, seconds=state.seconds + clock.total)
    metrics |= {"step": step, "episodes": episodes, "seconds": after.seconds}
    every = config.heldout.every
    if step == config.steps or (every and step % every == 0):
        metrics |= _evaluate(config, crew, after, run)
    run.append_metrics(metrics)
    kept = config.logging.samples_per_step
    if kept:
        run.append_samples(training_samples(crew, scored, written, step=step, count=kept))
    return after, metrics


def _original_kl(crew: Crew, scored: ScoredRollout, *, microbatch: int) -> Tensor:
    """[batch, token] exact KL to the reference the run began with, wherever the anchor is now."""
    if crew.reference is crew.original:
        return scored.kl
    return score(
        scored.rollout,
        policy=crew.policy,
        reference=crew.original,
        scores=scored.scores,
        temperature=crew.sampling.temperature,
        microbatch=microbatch,
    ).kl


def _original_measures(
    config: Config, scored: ScoredRollout, original_kl: Tensor
) -> dict[str, Number]:
    """The KL to the original reference, where it is not that to the anchor."""
    if config.leash.reanchor_every is None:
        return {}
    mask, clusters = scored.rollout.response_mask, scored.rollout.prompt_index
    estimate = clustered_mean(response_kl(original_kl, mask), clusters)
    return with_error("objective/kl_original", estimate)


def _normalise(
    config: Config, raw: Tensor, seen: ScoreStatistics
) -> tuple[Tensor, ScoreStatistics]:
    match config.score_normalisation:
        case "none":
            return raw, seen
        case "initial":
            return seen.normalise(raw), seen
        case "running":
            seen = seen.update(raw)
            return seen.normalise(raw), seen


def _scorer(config: Config, step: int) -> TokenScorer:
    """Who scores a rollout: now and then someone who checks a few of the numbers."""
    every = config.logging.spot_check_every
    return checked.token_scores if every and step % every == 0 else token_scores


def _measurement(
    config: Config,
    metrics: dict[str, Number],
    scored: ScoredRollout,
    *,
    start: Start | None,
) -> Measurement:
    """What the controller reads. A starting β that was given is taken at its word; only one that
    came from the spread of the scores goes on following it. Under a target per token the reading
    is that of responses as long as the reference's, which is what the controller's target is of."""
    error = metrics["objective/kl_ref_se"]
    given = config.leash.initial_beta is not None
    longer = 1.0
    if start is not None and start.response_length is not None:
        longer = start.response_length / cast(float, metrics["rollout/length"])
    return Measurement(
        response_kl=longer * cast(float, metrics["objective/kl_ref"]),
        standard_error=float("nan") if error is None else longer * error,
        responses=len(scored.scores),
        score_variance=None if given else score_variance(scored),
    )


def _require_reference_is_start(scored: ScoredRollout) -> None:
    """Before the first update the policy is the reference, or someone has mixed up two models."""
    per_token = float(masked_mean(scored.kl, scored.rollout.response_mask))
    if per_token > _SAME_MODEL:
        raise ModelError(
            f"the reference is not the policy this run starts from: KL {per_token:.3g} nats per "
            f"token before any update, expected at most {_SAME_MODEL:g}; mend reference.path, or "
            "say reference.reference_differs: true if it is meant"
        )


def _bookkeeping(
    config: Config,
    crew: Crew,
    written: Written,
    clock: "Clock",
    scored: ScoredRollout,
    *,
    beta: float,
) -> dict[str, Number]:
    tokens = int(scored.rollout.response_mask.sum())
    return {
        **{f"reward/{name}": float(part.mean()) for name, part in written.parts.items()},
        "reward/total": float(written.raw_scores.mean()),
        "objective/beta": beta,
        "objective/target_kl": target_per_response(
            config.leash, float(scored.rollout.response_mask.sum(-1).double().mean())
        ),
        **clock.seconds,
        "tokens_per_second": tokens / clock.total,
    }


def _heldout(config: Config, crew: Crew, state: TrainingState, run: RunWriter) -> None:
    """Step 0: what the reference does, before anything is learnt."""
    if crew.heldout:
        run.append_metrics({"step": 0, **_evaluate(config, crew, state, run)})


def _evaluate(
    config: Config, crew: Crew, state: TrainingState, run: RunWriter
) -> dict[str, Number]:
    if not crew.heldout:
        return {}
    differs = config.reference.reference_differs
    metrics, samples = evaluate_heldout(
        crew,
        step=state.step,
        beta=state.beta.beta,
        responses_per_prompt=config.heldout.responses_per_prompt,
        microbatch=max(256, config.rollout.microbatch_size),
        samples=_HELDOUT_SAMPLES,
        who="reference" if state.step == 0 and not differs else "policy",
    )
    run.append_samples(samples)
    return metrics


def _require_one_process() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"kleash train runs in one process, got WORLD_SIZE={os.environ['WORLD_SIZE']}: "
            "start it without a distributed launcher"
        )
