"""The loop: write, score, reward, climb, and move β, in that order, once a step.

    1. the policy writes responses to the prompts
    2. the same tokens go through the frozen reference, which never writes
    3. per token: log π, log π_ref, exact KL, entropy
    4. rewards: the score on the last token, −β·kl on each
    5. advantages, clipped updates
    6. β moves, so that the KL spent meets its target

Where a launcher started several processes, this one leads and the others lend a hand (`sharing`).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from kleash.algorithms import dispatch
from kleash.algorithms.rewards import ScoreStatistics
from kleash.config.schema import Config
from kleash.errors import ModelError, RefusedError
from kleash.kl.control.groups import Leash, States, betas_of, is_grouped
from kleash.kl.statistics import clustered_mean, response_kl
from kleash.masked import masked_mean
from kleash.preflight import runtime_monitor
from kleash.rollout.scoring_pass import score
from kleash.storage.run_directory import RunWriter
from kleash.storage.samples import Sample
from kleash.training import distributed
from kleash.training.calibration import start_lines
from kleash.training.components import Components
from kleash.training.evaluation import (
    Written,
    evaluate_heldout,
    judge,
    training_samples,
    write_answers,
)
from kleash.training.evidence import Attempt
from kleash.training.kl_control import (
    controller_measures,
    leash_measures,
    measurements,
    read_groups,
)
from kleash.training.metadata import objective_line
from kleash.training.metrics import (
    Clock,
    Number,
    account,
    next_mixing,
    objective_measures,
    reward_measures,
    rollout_measures,
    with_error,
)
from kleash.training.optimization import update
from kleash.training.progress import TrainingDisplay
from kleash.training.recovery import (
    attempt_step,
    check_bounds,
    check_last,
    refuse,
    save_if_due,
    several_updates,
)
from kleash.training.reference_guard import reanchor_if_due, require_unchanged, seal
from kleash.training.startup import Opened, Preflight, open_run
from kleash.training.state import TrainingState
from kleash.types import Experience, ScoredRollout

_SAME_MODEL = 1e-4
"""Nats per token below which two models count as one."""
_HELDOUT_SAMPLES = 8


def train(config: Config, *, argv: Sequence[str] = (), preflight: Preflight | None = None) -> Path:
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
        KleashError: something the user can fix; nothing was begun if it shows at the start, and
            the run directory says "failed" and why if it shows later.
    """
    with distributed.leading(config) as workers:
        opened = open_run(config, argv=argv, preflight=preflight, workers=workers)
        return _run(config, opened)


def _run(config: Config, opened: Opened) -> Path:
    """Every step that is still to be made."""
    components, state, run, trackers = opened.components, opened.state, opened.run, opened.trackers
    display = TrainingDisplay(
        config.steps,
        title=run.path.name,
        target_kl=None if is_grouped(state.betas) else config.leash.target_kl,
        done=state.step,
    )
    with run, trackers, display:
        display.say(objective_line(config, state.betas))
        for warning in opened.warnings:
            display.say(f"warning: {warning}")
        for line in start_lines(config, state.starts):
            display.say(line)
        if opened.fresh and components.heldout:
            run.append_metrics({"step": 0, **_evaluate(config, components, state, run)})
        sealed, attempt = seal(components), None
        while state.step < config.steps:
            attempt = attempt_step(config, components, state, attempt)
            try:
                require_unchanged(components, sealed)
                state, metrics = _step(config, components, opened.leash, state, run, attempt)
            except RefusedError as error:
                display.say(f"step {attempt.step} refused: {error}")
                components, state, sealed = refuse(
                    error, attempt, config, components, state, sealed, run
                )
                continue
            trackers.log(metrics)
            display.show(metrics)
            components, state, sealed = reanchor_if_due(config, components, state, sealed, run)
            state = save_if_due(config, components, state, metrics, sealed, run)
    return run.path


def _step(
    config: Config,
    components: Components,
    leash: Leash,
    state: TrainingState,
    run: RunWriter,
    attempt: Attempt,
) -> tuple[TrainingState, dict[str, Number]]:
    """One rollout and its updates; every number of it goes into the run directory."""
    clock, step = Clock(), state.step + 1

    # 1. The policy writes; the reward models read.
    numbers, cursor = state.cursor.take(config.rollout.prompts_per_step)
    with clock.measure("time/generate"):
        written = _write(config, components, numbers, attempt)
    scores, seen = _normalise(config, written.raw_scores, state.scores)
    attempt.scores = scores
    betas = betas_of(state.betas, components.groups_of(written.rollout))

    # 2–3. Policy, reference and critic score the same tokens.
    with clock.measure("time/score"):
        attempt.scored = scored = _read(config, components, written, scores, step=step)
        original_kl = _original_kl(config, components, scored)
    _require_sound(config, components, written, scored, original_kl, attempt, run)
    # Looked at closely while the policy is still the one that wrote them.
    count = config.logging.samples_per_step
    samples = training_samples(components, scored, written, step=step, count=count)

    # 4–5. Rewards, advantages, clipped updates.
    with clock.measure("time/update"):
        settings = replace(components.settings, mixing=state.mixing)
        experience = dispatch.prepare(scored, betas, settings)
        updates = _climb(config, components, experience, attempt)
    if step == config.steps:
        updates |= check_last(config, components, cursor, attempt)

    # 6. β moves.
    moved, steered = _move(config, components, leash, state, experience.scored)

    metrics = {
        **objective_measures(experience.scored, beta=dispatch.price(betas, settings)),
        **_rollout_numbers(config, written, scored, original_kl),
        **updates,
        "objective/accounting_residual": account(settings, experience, betas),
        **steered,
    }
    after = replace(
        state,
        step=step,
        episodes=state.episodes + len(written.responses),
        betas=moved,
        scores=seen,
        cursor=cursor,
        mixing=next_mixing(settings, experience, betas),
        seconds=state.seconds + clock.total,
    )
    metrics |= _progress(clock, scored, after)
    _write_down(config, components, samples, after, metrics, run)
    return after, metrics


def _write(
    config: Config, components: Components, numbers: Sequence[int], attempt: Attempt
) -> Written:
    """Responses to the prompts with these numbers, and what the reward models say of them."""
    attempt.answers = write_answers(
        components,
        [components.prompts[number] for number in numbers],
        responses_per_prompt=config.rollout.responses_per_prompt,
        microbatch=config.responses_per_step,
    )
    return judge(components, attempt.answers)


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


def _read(
    config: Config, components: Components, written: Written, scores: Tensor, *, step: int
) -> ScoredRollout:
    """What policy, reference and critic say of every token; now and then compared with float64."""
    every = config.logging.spot_check_every
    return distributed.score(
        components,
        written.rollout,
        scores,
        microbatch=config.rollout.microbatch_size,
        spot_check=bool(every) and step % every == 0,
    )


def _original_kl(config: Config, components: Components, scored: ScoredRollout) -> Tensor:
    """[batch, token] exact KL to the reference the run began with, wherever the anchor is now."""
    if components.reference is components.original:
        return scored.kl
    return score(
        scored.rollout,
        policy=components.policy,
        reference=components.original,
        scores=scored.scores,
        temperature=components.sampling.temperature,
        microbatch=config.rollout.microbatch_size,
    ).kl


def _require_sound(
    config: Config,
    components: Components,
    written: Written,
    scored: ScoredRollout,
    original_kl: Tensor,
    attempt: Attempt,
    run: RunWriter,
) -> None:
    """Before anything is learnt from a rollout: the start, the noise and the bounds are right.

    Raises:
        ModelError: the run does not start at its reference.
        TripwireError: a bound was passed.
    """
    if attempt.step == 1 and not config.reference.reference_differs:
        _require_reference_is_start(scored)
    step = attempt.step
    runtime_monitor.look(
        config, components, written, scored, step=step, folder=run.path, tell=run.append_event
    )
    check_bounds(config, scored, original_kl)
    attempt.within_bounds = True


def _require_reference_is_start(scored: ScoredRollout) -> None:
    """Before the first update the policy is the reference, or someone has mixed up two models."""
    per_token = float(masked_mean(scored.kl, scored.rollout.response_mask))
    if per_token > _SAME_MODEL:
        raise ModelError(
            f"the reference is not the policy this run starts from: KL {per_token:.3g} nats per "
            f"token before any update, expected at most {_SAME_MODEL:g}; fix reference.path, or "
            "say reference.reference_differs: true if it is meant"
        )


def _climb(
    config: Config, components: Components, experience: Experience, attempt: Attempt
) -> dict[str, Number]:
    """The clipped updates; the attempt knows from when on weights may have moved."""
    attempt.updating = several_updates(config)
    updates = update(config, components, experience, done=attempt.step - 1)
    attempt.updating = True
    return updates


def _move(
    config: Config,
    components: Components,
    leash: Leash,
    state: TrainingState,
    scored: ScoredRollout,
) -> tuple[States, dict[str, Number]]:
    """Where every β goes after this rollout, and the numbers of what was read and decided."""
    trained = dispatch.trained_scores(scored, components.settings)
    readings = read_groups(scored, components.groups_of(scored.rollout), trained=trained)
    told = measurements(readings, state.starts, follow_scores=config.leash.initial_beta == "auto")
    moved = leash.update(state.betas, told)
    return moved, {
        **leash_measures(config.leash, state.betas, readings, components.frontier),
        **controller_measures(leash, state.betas, told, moved),
    }


def _rollout_numbers(
    config: Config, written: Written, scored: ScoredRollout, original_kl: Tensor
) -> dict[str, Number]:
    """What was written and what it was given; the KL to the original, if the anchor is another."""
    measures = rollout_measures(scored, written.responses)
    measures |= reward_measures(written.parts, written.raw_scores)
    if config.leash.reanchor_every is not None:
        mask, clusters = scored.rollout.response_mask, scored.rollout.prompt_index
        estimate = clustered_mean(response_kl(original_kl, mask), clusters)
        measures |= with_error("objective/kl_original", estimate)
    return measures


def _progress(clock: Clock, scored: ScoredRollout, after: TrainingState) -> dict[str, Number]:
    """Where the run is, and how fast."""
    tokens = int(scored.rollout.response_mask.sum())
    return {
        **clock.seconds,
        "tokens_per_second": tokens / clock.total,
        "step": after.step,
        "episodes": after.episodes,
        "seconds": after.seconds,
    }


def _write_down(
    config: Config,
    components: Components,
    samples: Sequence[Sample],
    after: TrainingState,
    metrics: dict[str, Number],
    run: RunWriter,
) -> None:
    """A held-out evaluation where one is due, the step's numbers, and a few of its responses."""
    every = config.heldout.every
    due = after.step == config.steps or (every and after.step % every == 0)
    if components.heldout and due:
        metrics |= _evaluate(config, components, after, run)
    run.append_metrics(metrics)
    run.append_samples(samples)


def _evaluate(
    config: Config, components: Components, state: TrainingState, run: RunWriter
) -> dict[str, Number]:
    differs = config.reference.reference_differs
    metrics, samples = evaluate_heldout(
        components,
        step=state.step,
        betas=state.betas,
        responses_per_prompt=config.heldout.responses_per_prompt,
        microbatch=max(256, config.rollout.microbatch_size),
        samples=_HELDOUT_SAMPLES,
        who="reference" if state.step == 0 and not differs else "policy",
    )
    run.append_samples(samples)
    return metrics
