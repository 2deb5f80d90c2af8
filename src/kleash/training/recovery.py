"""Refused steps: undone, kept as evidence, and answered by stopping or by a rollback.

A step is refused when a tripwire's bound is passed or a number is not finite. Everything is put
back to where it was before the step, the batch goes into the run directory with the offender's
name, the refusal into its log, and the run stops, or returns to the last good checkpoint with a
higher β.
"""

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from kleash.config.algorithm import PassesConfig
from kleash.config.leash import TripwiresConfig
from kleash.errors import (
    EngineError,
    NonFiniteScoreError,
    ReferenceChangedError,
    RefusedError,
    TripwireError,
)
from kleash.kl.control.groups import key_of, raise_betas
from kleash.kl.statistics import clustered_mean, response_kl
from kleash.models.sharding import own
from kleash.storage.atomic_directories import drop_directory, list_checkpoints, step_of
from kleash.storage.events import new_event
from kleash.training.callbacks import RefusalEvent
from kleash.training.evidence import PendingStep, keep_evidence
from kleash.training.metrics import Number, with_error
from kleash.training.optimizers import trained_parameters
from kleash.training.session import Session
from kleash.training.snapshot import put_back, remember, weights_are_finite
from kleash.training.state import TrainingState
from kleash.training.tripwires import check_entropy, check_kl
from kleash.types import ScoredRollout

_OTHER_DRAWS = 0x9E3779B9
"""Added to the seed with each rollback, so that the same responses are not drawn again."""


def begin_step(session: Session, previous: PendingStep | None = None) -> PendingStep:
    """The next step, before anything of it has happened.

    Args:
        session: the run.
        previous: the step before, whose memory is used again.
    """
    config, step = session.config, session.state.step + 1
    # What follows the last update may still refuse it, so a step of one update is copied there.
    risky = several_updates(config.algorithm) or step == config.steps
    optimizer = session.components.optimizer
    copy = risky and undone_in_memory(config.tripwires, optimizer)
    reuse = None if previous is None else previous.undo
    return PendingStep(step, remember(optimizer, weights=copy, reuse=reuse))


def several_updates(algorithm: PassesConfig) -> bool:
    """Whether a step can be refused when some of its updates are made already."""
    return algorithm.epochs * algorithm.minibatches > 1


def undone_in_memory(tripwires: TripwiresConfig, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is undone by a copy of what is trained, and not by the last checkpoint."""
    if tripwires.undo != "auto":
        return tripwires.undo == "memory"
    return copy_bytes(optimizer) <= tripwires.undo_copy_mib << 20


def copy_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Trained weights and their two moments, as far as this process holds them."""
    parts = [own(parameter) for parameter in trained_parameters(optimizer)]
    return sum(3 * part.numel() * part.element_size() for part in parts)


def check_bounds(tripwires: TripwiresConfig, scored: ScoredRollout, original_kl: Tensor) -> None:
    """The tripwires on a rollout; the KL is that to the reference the run began with.

    Raises:
        TripwireError: a bound was passed.
    """
    mask = scored.rollout.response_mask
    if tripwires.stop_kl is not None:
        check_kl(original_kl, mask, stop_kl=tripwires.stop_kl)
    if tripwires.min_entropy is not None:
        check_entropy(scored.entropy, mask, min_entropy=tripwires.min_entropy)


def check_after_last_update(session: Session, pending: PendingStep) -> dict[str, Number]:
    """The policy that a run leaves keeps the bounds too.

    No later rollout would show it, so one is written to the prompts that come next, of which
    nothing is learnt. It takes the place of the step's own rollout: it is the evidence.

    Returns:
        What was measured; nothing where there is no bound.

    Raises:
        TripwireError: a bound was passed, by the policy as the last update left it.
    """
    config, components = session.config, session.components
    if config.tripwires.stop_kl is None and config.tripwires.min_entropy is None:
        return {}
    count = config.rollout.prompts_per_step
    # The step has not moved the cursor yet: the prompts after its own.
    numbers, _ = session.state.cursor.take(count)[1].take(count)
    pending.responses, pending.scores, pending.scored = None, None, None
    pending.responses = components.write(
        [components.prompts[number] for number in numbers],
        responses_per_prompt=config.rollout.responses_per_prompt,
        microbatch=config.responses_per_step,
    )
    rollout = pending.responses.rollout
    pending.scored = components.score(
        rollout,
        torch.zeros(len(rollout.response_ids), device=components.policy.device),
        reference=components.original,
        critic=False,
        microbatch=config.rollout.microbatch,
    )
    try:
        check_bounds(config.tripwires, pending.scored, pending.scored.kl)
    except TripwireError as error:
        error.args = (f"after the last update, {error}",)
        raise
    spent = response_kl(pending.scored.kl, rollout.response_mask)
    return with_error("objective/kl_after", clustered_mean(spent, rollout.prompt_index))


def recover(error: RefusedError, pending: PendingStep, session: Session) -> None:
    """Undo a refused step, keep the evidence, and stop or go back to a good checkpoint.

    Afterwards the session is as of that checkpoint, with a higher β; later metrics are dropped.

    Raises:
        RefusedError: the error, where the run stops; it says where the run stands.
    """
    run, state, wires = session.run, session.state, session.config.tripwires
    session.components.release()
    put_back(session.components.optimizer, pending.undo)
    sentence = str(error)
    evidence = run.path / "refused" / f"step-{pending.step:06d}-{state.rollbacks}"
    mesh = session.components.mesh
    if mesh.is_first:
        keep_evidence(evidence, error, pending, session.components.policy.tokenizer)
    event = new_event(
        pending.step,
        "refused",
        sentence,
        wire=error.wire,
        response=error.response,
        token=error.token,
        evidence=str(evidence.relative_to(run.path)),
    )
    run.append_event(event)
    session.callbacks.on_refusal(
        RefusalEvent(pending.step, sentence, error.response, error.token, evidence)
    )
    if wires.then == "stop" or isinstance(error, ReferenceChangedError):
        _stop(error, pending, session, evidence)
    if state.rollbacks == wires.max_rollbacks:
        error.args = (f"{sentence} (rollbacks so far: {state.rollbacks}, no more are allowed)",)
        _stop(error, pending, session, evidence)
    # A policy that was out of bounds when it wrote is that of the step before: no way back to it.
    at_fault = not pending.within_bounds and not isinstance(error, NonFiniteScoreError)
    limit = state.step - 1 if at_fault else state.step
    good = [step_of(c) for c in list_checkpoints(run.checkpoints) if step_of(c) <= limit]
    if not good:
        error.args = (f"{sentence}; there is no good checkpoint to go back to yet",)
        _stop(error, pending, session, evidence)
    _roll_back(session, good[-1], refused=pending.step)


def keep_for_later(error: EngineError, pending: PendingStep, session: Session) -> None:
    """The engine that writes failed: undo the step, and keep the run as it was before it.

    Nothing of a rollout that is not whole was learnt from. The sentence then says where the run
    stands and how it goes on.
    """
    newest = session.newest_checkpoint()
    if _can_be_undone(pending):
        put_back(session.components.optimizer, pending.undo)
        if session.state.step > 0:
            newest = session.ensure_saved()
    stands = "at its beginning" if newest is None else f"at {newest}"
    error.args = (
        f"{error}; step {pending.step} was not made and the run stands {stands}; go on with: "
        f"kleash train --resume {session.run.path}",
    )
    session.run.append_event(new_event(pending.step, "stopped", str(error)))


def _can_be_undone(pending: PendingStep) -> bool:
    """Whether weights have not moved in this step, or a copy of them was kept."""
    return not pending.updating or pending.undo.weights is not None


def _roll_back(session: Session, step: int, *, refused: int) -> None:
    """Return to a checkpoint and raise β; killed at any point, a resumed run comes to the same."""
    config, run, wires = session.config, session.run, session.config.tripwires
    rollbacks = session.state.rollbacks + 1
    session.restore(step)
    restored = session.state
    raised = raise_betas(restored.betas, wires.beta_factor)
    session.state = after = replace(restored, betas=raised, rollbacks=rollbacks)
    torch.manual_seed(config.seed + _OTHER_DRAWS * rollbacks)
    session.next_rollout = None  # the same responses would be refused again
    run.append_event(
        new_event(
            refused,
            "rolled_back",
            f"from step {refused} back to step {step}, {_moves(restored, after)} (rollback "
            f"{rollbacks} of {wires.max_rollbacks})",
            to_step=step,
            **{key_of("beta_before", g, raised): s.beta for g, s in restored.betas.items()},
            **{key_of("beta", g, raised): s.beta for g, s in raised.items()},
        )
    )
    # The newest go first: the last one left is always one that a run can resume from.
    if session.components.mesh.is_first:
        for later in reversed(list_checkpoints(run.checkpoints)):
            if step_of(later) > step:
                drop_directory(later)
    session.save(keep=config.logging.keep)
    run.rewind(step)


def _moves(before: TrainingState, after: TrainingState) -> str:
    """From which β to which, in words."""
    return ", ".join(
        f"{key_of('β', group, after.betas)} from {state.beta:.4g} to {after.betas[group].beta:.4g}"
        for group, state in before.betas.items()
    )


def _stop(error: RefusedError, pending: PendingStep, session: Session, evidence: Path) -> NoReturn:
    """End the run with one sentence; the state before the refused step is on the disk."""
    state, run, parameters = session.state, session.run, session.components.parameters()
    newest = session.newest_checkpoint()
    saved = -1 if newest is None else step_of(newest)
    undone = _can_be_undone(pending)
    finite = all(session.components.mesh.gather(weights_are_finite(parameters)))
    if undone and saved < state.step and state.step > 0 and finite:
        # One more than usual, so that no good checkpoint goes for one that may not be.
        session.save(keep=session.config.logging.keep + 1)
        newest = session.newest_checkpoint()
    stands = "at its beginning" if newest is None else f"at {newest}"
    error.args = (
        f"{error}; step {pending.step} was not made, the run stands {stands}, and the batch is in "
        f"{evidence}",
    )
    run.append_event(new_event(pending.step, "stopped", str(error)))
    raise error
