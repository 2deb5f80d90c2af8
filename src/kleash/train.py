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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
import yaml
from torch import Tensor, nn

from kleash.algorithms import ppo
from kleash.algorithms.losses import average, combine, explained_variance
from kleash.assembly import (
    Crew,
    assemble,
    learning_rate_factor,
    make_controller,
    target_per_response,
)
from kleash.beginning import begin, start_line
from kleash.beta.controllers import BetaController, Measurement
from kleash.beta.starting import Start
from kleash.config import Config, dump_config, parse_config
from kleash.errors import ConfigError, ModelError, NonFiniteError, RunError
from kleash.evaluation import (
    Written,
    evaluate_heldout,
    training_samples,
    write_responses,
)
from kleash.frontier import PLAN_FILE, Frontier, holds_plan, read_frontier, write_frontier
from kleash.masked import masked_mean
from kleash.measures import (
    Clock,
    Number,
    account,
    efficiency_measure,
    first_ratio_error,
    next_mixing,
    objective_measures,
    rollout_measures,
    score_variance,
)
from kleash.models import Identity
from kleash.pretraining import pretraining_loss
from kleash.progress import TrainingDisplay
from kleash.prompts import PromptCursor
from kleash.record import objective_line, run_meta
from kleash.resume import (
    TrainingState,
    latest_checkpoint,
    restore_run_state,
    save_run_state,
)
from kleash.rewards import ScoreStatistics
from kleash.rollout import fresh, microbatches, score
from kleash.runs import Run, RunWriter, holds_run, read_run
from kleash.trackers import Trackers
from kleash.types import Experience, Loss, ScoredRollout

_FIRST_RATIO_TOLERANCE = 1e-3
"""How far the first ratio of a step may be from 1 by rounding alone (float32, long responses)."""
_SAME_MODEL = 1e-4
"""Nats per token below which two models count as one."""
_HELDOUT_SAMPLES = 8


def train(config: Config, *, argv: Sequence[str] = ()) -> Path:
    """Train a policy on the leash and leave a run directory.

    If the output already holds this very run, unfinished, it is continued from its newest
    checkpoint: numbers and weights are those of a run that was never interrupted.

    Args:
        config: the run, written down; `{world}` already replaced.
        argv: the command line, for the record.

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
    reference = crew.reference.identity()
    trackers = Trackers(config.logging.trackers, path)
    checkpoint = latest_checkpoint(path / "checkpoints") if begun else None
    if checkpoint is not None:
        state = restore_run_state(checkpoint, crew, reference)
        frontier = read_frontier(path / PLAN_FILE) if holds_plan(path) else None
    else:
        frontier, state = _begin(config, crew)
    crew = replace(crew, frontier=frontier)
    controller = _controller(config, state.start)
    if begun:
        run = RunWriter.reopen(path, through_step=state.step if checkpoint else -1)
    else:
        meta = run_meta(config, crew, reference, argv, beta=state.beta.beta, start=state.start)
        run = RunWriter.create(path, config=yaml.safe_load(dump_config(config)), meta=meta)
    if frontier is not None and checkpoint is None:
        write_frontier(path / PLAN_FILE, frontier)
    display = TrainingDisplay(
        config.steps, title=path.name, target_kl=config.leash.target_kl, done=state.step
    )
    with run, trackers, display:
        display.say(objective_line(config, state.beta.beta))
        if state.start is not None:
            display.say(start_line(config, state.start))
        if checkpoint is None:
            _heldout(config, crew, state, run)
        while state.step < config.steps:
            state, metrics = _step(config, crew, controller, state, run)
            trackers.log(metrics)
            display.show(metrics)
            _save(config, crew, state, reference, run)
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


def _save(
    config: Config, crew: Crew, state: TrainingState, reference: Identity, run: RunWriter
) -> None:
    """A checkpoint where one is due; the reference must still be what it was."""
    every = config.logging.checkpoint_every
    if state.step < config.steps and not (every and state.step % every == 0):
        return
    now = crew.reference.identity()
    if now != reference:
        raise RunError(
            f"the reference changed while training: its weights were {reference.sha256[:12]}…, got "
            f"{now.sha256[:12]}…; every KL since is void, start again from the last checkpoint"
        )
    save_run_state(run.checkpoints, crew, state, reference, keep=config.logging.keep)


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
) -> tuple[TrainingState, dict[str, Number]]:
    """One rollout and its updates; every number of it goes into the run directory."""
    clock, beta = Clock(), state.beta.beta
    step = state.step + 1

    # 1. The policy writes; the reward models read.
    numbers, cursor = state.cursor.take(config.rollout.prompts_per_step)
    with clock.measure("time/generate"):
        written = write_responses(
            crew,
            [crew.prompts[number] for number in numbers],
            responses_per_prompt=config.rollout.responses_per_prompt,
            microbatch=config.responses_per_step,
        )
    scores, seen = _normalise(config, written.raw_scores, state.scores)

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
            keep_ref_hidden=_needs_exact_kl(crew),
        )

    if step == 1 and not config.reference.reference_differs:
        _require_reference_is_start(scored)

    # 4–5. Rewards, advantages, clipped updates.
    with clock.measure("time/update"):
        settings = replace(crew.settings, mixing=state.mixing)
        experience = ppo.prepare(scored, beta, settings)
        updates = _update(config, crew, experience, done=state.step)

    # 6. β moves.
    metrics = {
        **objective_measures(experience.scored, beta=beta),
        **rollout_measures(scored, written.responses),
        **updates,
        "objective/accounting_residual": account(settings, experience, beta),
    }
    episodes = state.episodes + len(written.responses)
    after = TrainingState(
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


def _update(config: Config, crew: Crew, experience: Experience, *, done: int) -> dict[str, Number]:
    """Passes over the rollout in minibatches; each is one optimiser step."""
    factor = learning_rate_factor(config.optimizer, step=done, steps=config.steps)
    for group in crew.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    minibatches: list[dict[str, float]] = []
    ratio_error: float | None = None
    rows = ppo.kept_rows(experience)
    for _ in range(config.ppo.epochs):
        order = rows[torch.randperm(len(rows)).to(rows.device)]
        for chosen in order.chunk(config.ppo.minibatches):
            losses = _backward(config, crew, ppo.select(experience, chosen))
            if ratio_error is None:
                ratio_error = max(error for _, error in losses)
                _require_first_ratio(ratio_error)
            minibatch = combine([loss for loss, _ in losses])
            minibatch["optim/grad_norm"] = _optimise(config, crew)
            minibatches.append(minibatch)
    foreseen = experience.scored.values
    return {
        **average(minibatches),
        "policy/ratio_first_error": ratio_error,
        "optim/lr": config.optimizer.lr * factor,
        "value/explained_variance": None
        if foreseen is None
        else explained_variance(foreseen, experience.returns, experience.mask),
    }


def _backward(config: Config, crew: Crew, minibatch: Experience) -> list[tuple[Loss, float]]:
    """Gradients of one minibatch, a microbatch at a time; they add to the same whatever the split.

    Returns:
        Each microbatch's loss, and how far its ratio was from 1.
    """
    crew.optimizer.zero_grad(set_to_none=True)
    tokens = int(minibatch.mask.sum())
    losses: list[tuple[Loss, float]] = []
    for rows in microbatches(minibatch.scored.rollout, config.ppo.microbatch_size):
        part = ppo.select(minibatch, rows)
        now = fresh(
            part,
            policy=crew.policy,
            value=crew.value,
            reference=crew.reference,
            temperature=crew.sampling.temperature,
            want=("logprobs", "kl") if _needs_exact_kl(crew) else ("logprobs",),
        )
        loss = ppo.loss(part, now, crew.settings, tokens=tokens)
        loss.total.backward()
        error = first_ratio_error(now.logprobs.detach(), part.scored.rollout_logprobs, part.mask)
        losses.append((loss, error))
    mix = crew.pretraining
    if mix is not None:
        likelihood = pretraining_loss(
            crew.policy, mix.draw(), pad_id=crew.policy.pad_id, device=crew.policy.device
        )
        (mix.coefficient * likelihood).backward()
        losses[0][0].metrics["loss/pretraining"] = float(likelihood.detach())
        for loss, _ in losses[1:]:
            loss.metrics["loss/pretraining"] = 0.0
    return losses


def _optimise(config: Config, crew: Crew) -> float:
    """One optimiser step; refused if a gradient is not finite, so that the weights stay good."""
    parameters: list[nn.Parameter] = [*crew.policy.parameters(), *crew.value.parameters()]
    norm = float(nn.utils.clip_grad_norm_(parameters, config.optimizer.max_grad_norm))
    if not norm < float("inf"):
        raise NonFiniteError(
            f"the gradient's norm is {norm}: the update was refused and the weights are those of "
            "the last good step; lower optimizer.lr or look at the scores of this step"
        )
    crew.optimizer.step()
    return norm


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


def _needs_exact_kl(crew: Crew) -> bool:
    """Whether the loss differentiates the exact KL."""
    return crew.settings.placement in ("exact", "mixed", "loss_exact")


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


def _require_first_ratio(error: float) -> None:
    if error > _FIRST_RATIO_TOLERANCE:
        raise RunError(
            f"before the first update the policy must give its own tokens the probability it gave "
            f"them when they were scored, got a ratio off by {error:.3g}: the model is not "
            "deterministic (dropout, a low-precision kernel); use policy.dtype: float32 or "
            "policy.attention: eager"
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
