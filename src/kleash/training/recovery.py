"""What keeps a run on its leash: sealed references, refused steps, rollbacks, anchors, checkpoints.

The loop attempts a step. If it is refused, everything is put back to where it was before, the
batch goes into the run directory with the offender's name, the refusal into its log, and the run
stops, or returns to the last good checkpoint with a higher β.
"""

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from kleash.config.schema import Config
from kleash.errors import NonFiniteScoreError, ReferenceChangedError, RefusedError, TripwireError
from kleash.kl.control.groups import key_of, raise_betas
from kleash.kl.statistics import clustered_mean, response_kl
from kleash.rollout.prompts import PromptCursor
from kleash.rollout.scoring_pass import score
from kleash.storage.atomic_directories import (
    drop_directory,
    list_checkpoints,
    step_of,
)
from kleash.storage.events import new_event
from kleash.storage.run_directory import RunWriter
from kleash.training.components import Components, learning
from kleash.training.evaluation import write_answers
from kleash.training.evidence import Attempt, keep_evidence
from kleash.training.metrics import Number, with_error
from kleash.training.reference_guard import Seal, reference_changed, seal
from kleash.training.snapshot import (
    put_back,
    remember,
    weights_are_finite,
)
from kleash.training.state import (
    TrainingState,
    latest_checkpoint,
    restore_anchor,
    restore_run_state,
    save_run_state,
)
from kleash.training.tripwires import check_entropy, check_kl
from kleash.types import ScoredRollout

_OTHER_DRAWS = 0x9E3779B9
"""Added to the seed with each rollback, so that the same responses are not drawn again."""


def attempt_step(
    config: Config, components: Components, state: TrainingState, before: Attempt | None = None
) -> Attempt:
    """The next step, before anything of it has happened.

    Args:
        config: the run.
        components: whose step it is.
        state: after the step before.
        before: the attempt before, whose memory is used again.
    """
    # What follows the last update may still refuse it, so a step of one update is copied there.
    risky = several_updates(config) or state.step + 1 == config.steps
    reuse = None if before is None else before.undo
    undo = remember(components, weights=risky and keeps_copy(config, components), reuse=reuse)
    return Attempt(state.step + 1, undo)


def several_updates(config: Config) -> bool:
    """Whether a step can be refused when some of its updates are made already."""
    return config.algorithm.epochs * config.algorithm.minibatches > 1


def keeps_copy(config: Config, components: Components) -> bool:
    """Whether a step is undone by a copy of what learns, and not by the last checkpoint."""
    if config.tripwires.undo != "auto":
        return config.tripwires.undo == "memory"
    return copy_bytes(components) <= config.tripwires.undo_copy_mib << 20


def copy_bytes(components: Components) -> int:
    """Weights that learn and their two moments."""
    return sum(3 * p.numel() * p.element_size() for p in learning(components))


def check_bounds(config: Config, scored: ScoredRollout, original_kl: Tensor) -> None:
    """The tripwires on a rollout; the KL is that to the reference the run began with.

    Raises:
        TripwireError: a bound was passed.
    """
    mask = scored.rollout.response_mask
    if config.tripwires.stop_kl is not None:
        check_kl(original_kl, mask, stop_kl=config.tripwires.stop_kl)
    if config.tripwires.min_entropy is not None:
        check_entropy(scored.entropy, mask, min_entropy=config.tripwires.min_entropy)


def check_last(
    config: Config, components: Components, cursor: PromptCursor, attempt: Attempt
) -> dict[str, Number]:
    """After the last update of a run: the policy it leaves keeps the bounds too.

    No later rollout would show it, so one is written to the prompts that come next, of which
    nothing is learnt. Its answers take the place of the attempt's: they are the evidence.

    Returns:
        What was measured; nothing where there is no bound.

    Raises:
        TripwireError: a bound was passed, by the policy as the last update left it.
    """
    if config.tripwires.stop_kl is None and config.tripwires.min_entropy is None:
        return {}
    numbers, _ = cursor.take(config.rollout.prompts_per_step)
    attempt.answers, attempt.scores, attempt.scored = None, None, None
    attempt.answers = write_answers(
        components,
        [components.prompts[number] for number in numbers],
        responses_per_prompt=config.rollout.responses_per_prompt,
        microbatch=config.responses_per_step,
    )
    rollout = attempt.answers.rollout
    attempt.scored = score(
        rollout,
        policy=components.policy,
        reference=components.original,
        scores=torch.zeros(len(rollout.response_ids), device=components.policy.device),
        temperature=components.sampling.temperature,
        microbatch=config.rollout.microbatch_size,
    )
    try:
        check_bounds(config, attempt.scored, attempt.scored.kl)
    except TripwireError as error:
        error.args = (f"after the last update, {error}",)
        raise
    spent = response_kl(attempt.scored.kl, rollout.response_mask)
    return with_error("objective/kl_after", clustered_mean(spent, rollout.prompt_index))


def save_if_due(
    config: Config,
    components: Components,
    state: TrainingState,
    metrics: dict[str, Number],
    sealed: Seal,
    run: RunWriter,
) -> TrainingState:
    """A checkpoint where one is due; the references must have the weights they had, every bit.

    Returns:
        The state, with the best held-out objective so far if this step has it.

    Raises:
        RunError: a reference changed, or the checkpoint cannot be written.
    """
    every = config.logging.checkpoint_every
    if state.step < config.steps and not (every and state.step % every == 0):
        return state
    if components.original.identity() != sealed.original:
        raise reference_changed(components.original, sealed.original)
    if (
        components.reference is not components.original
        and components.reference.identity() != sealed.anchor
    ):
        raise reference_changed(components.reference, sealed.anchor)
    objective = metrics.get("heldout/rlhf_reward")
    best = state.best_objective
    if objective is not None and (best is None or objective > best):
        state = replace(state, best_step=state.step, best_objective=objective)
    save_run_state(run.checkpoints, components, state, sealed.original, keep=config.logging.keep)
    run.update_meta(best_checkpoint=state.best_step, best_objective=state.best_objective)
    return state


def refuse(
    error: RefusedError,
    attempt: Attempt,
    config: Config,
    components: Components,
    state: TrainingState,
    sealed: Seal,
    run: RunWriter,
) -> tuple[Components, TrainingState, Seal]:
    """Undo a refused step, keep the evidence, and stop or go back to a good checkpoint.

    Returns:
        Everyone as of that checkpoint, with a higher β; later metrics are dropped.

    Raises:
        RefusedError: the error, where the run stops; it says where the run stands.
    """
    put_back(components, attempt.undo)
    sentence = str(error)
    where = keep_evidence(run.path / "refused", error, attempt, components, state)
    event = new_event(
        attempt.step,
        "refused",
        sentence,
        wire=error.wire,
        response=error.response,
        token=error.token,
        evidence=str(where.relative_to(run.path)),
    )
    run.append_event(event)
    undone = not attempt.updating or attempt.undo.weights is not None
    wires = config.tripwires
    if wires.then == "stop" or isinstance(error, ReferenceChangedError):
        _stop(error, attempt, config, components, state, sealed, run, where=where, undone=undone)
    if state.rollbacks == wires.max_rollbacks:
        error.args = (f"{sentence} (rollbacks so far: {state.rollbacks}, no more are allowed)",)
        _stop(error, attempt, config, components, state, sealed, run, where=where, undone=undone)
    # A policy that was out of bounds when it wrote is that of the step before: no way back to it.
    guilty = not attempt.within_bounds and not isinstance(error, NonFiniteScoreError)
    limit = state.step - 1 if guilty else state.step
    good = [c for c in list_checkpoints(run.checkpoints) if step_of(c) <= limit]
    if not good:
        error.args = (f"{sentence}; there is no good checkpoint to go back to yet",)
        _stop(error, attempt, config, components, state, sealed, run, where=where, undone=undone)
    return _roll_back(good[-1], config, components, state, sealed, run, refused=attempt.step)


def _roll_back(
    checkpoint: Path,
    config: Config,
    components: Components,
    state: TrainingState,
    sealed: Seal,
    run: RunWriter,
    *,
    refused: int,
) -> tuple[Components, TrainingState, Seal]:
    """Return to a checkpoint and raise β; killed at any point, a resumed run comes to the same."""
    rollbacks = state.rollbacks + 1
    restored = restore_run_state(checkpoint, components, sealed.original)
    components = restore_anchor(checkpoint, components, restored)
    factor = config.tripwires.beta_factor
    raised = raise_betas(restored.betas, factor)
    after = replace(restored, betas=raised, rollbacks=rollbacks)
    torch.manual_seed(config.seed + _OTHER_DRAWS * rollbacks)
    run.append_event(
        new_event(
            refused,
            "rolled_back",
            f"from step {refused} back to step {after.step}, {_moves(restored, after)} (rollback "
            f"{rollbacks} of {config.tripwires.max_rollbacks})",
            to_step=after.step,
            **{key_of("beta_before", g, raised): s.beta for g, s in restored.betas.items()},
            **{key_of("beta", g, raised): s.beta for g, s in raised.items()},
        )
    )
    # The newest go first: the last one left is always one that a run can resume from.
    for later in reversed(list_checkpoints(run.checkpoints)):
        if step_of(later) > after.step:
            drop_directory(later)
    save_run_state(run.checkpoints, components, after, sealed.original, keep=config.logging.keep)
    run.rewind(after.step)
    return components, after, seal(components)


def _moves(before: TrainingState, after: TrainingState) -> str:
    """From which β to which, in words."""
    return ", ".join(
        f"{key_of('β', group, after.betas)} from {state.beta:.4g} to {after.betas[group].beta:.4g}"
        for group, state in before.betas.items()
    )


def _stop(
    error: RefusedError,
    attempt: Attempt,
    config: Config,
    components: Components,
    state: TrainingState,
    sealed: Seal,
    run: RunWriter,
    *,
    where: Path,
    undone: bool,
) -> NoReturn:
    """End the run with one sentence; the state before the refused step is on the disk."""
    newest = latest_checkpoint(run.checkpoints)
    saved = -1 if newest is None else step_of(newest)
    if undone and saved < state.step and state.step > 0 and weights_are_finite(components):
        # One more than usual, so that no good checkpoint goes for one that may not be.
        keep = config.logging.keep + 1
        newest = save_run_state(run.checkpoints, components, state, sealed.original, keep=keep)
    stands = "at its beginning" if newest is None else f"at {newest}"
    error.args = (
        f"{error}; step {attempt.step} was not made, the run stands {stands}, and the batch is in "
        f"{where}",
    )
    run.append_event(new_event(attempt.step, "stopped", str(error)))
    raise error
