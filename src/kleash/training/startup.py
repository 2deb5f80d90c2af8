"""A run directory opened for training: begun anew, or continued from its newest checkpoint.

Nothing is written before everything that can be wrong at the start has been looked at.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import yaml

from kleash.algorithms.rewards import ScoreStatistics
from kleash.config.loading import dump_config
from kleash.config.schema import Config
from kleash.errors import ModelError
from kleash.rollout.prompts import PromptCursor
from kleash.storage.plan_file import PLAN_FILE, Frontier, holds_plan, read_frontier, write_frontier
from kleash.storage.run_directory import RunWriter, read_run
from kleash.training.assembly import Reward, assemble, make_leash
from kleash.training.calibration import begin
from kleash.training.callbacks import Callbacks
from kleash.training.components import Components
from kleash.training.continuation import find_run
from kleash.training.metadata import run_meta
from kleash.training.process_group import WorkerGroup
from kleash.training.recovery import undone_in_memory
from kleash.training.reference_guard import ReferenceGuard
from kleash.training.session import Session
from kleash.training.state import (
    TrainingState,
    latest_checkpoint,
    restore_anchor,
    restore_run_state,
)
from kleash.training.worker import assemble_everywhere

Preflight = Callable[[Config, Components], list[str]]
"""Looks at what was assembled; raises what must stop the run, and returns its warnings."""


def open_session(
    config: Config,
    *,
    argv: Sequence[str],
    preflight: Preflight | None,
    group: WorkerGroup | None,
    rewards: Mapping[str, Reward],
    callbacks: Callbacks,
) -> Session:
    """Assemble the components and open the run directory.

    Args:
        config: the run; `{world}` already replaced.
        argv: the command line, for the record.
        preflight: asked once, before the run is begun.
        group: the other processes, if there are any.
        rewards: given in memory, by their names in `reward_models`.
        callbacks: of the run.

    Raises:
        KleashError: something the user can fix; nothing was begun.
    """
    path = Path(config.output)
    found = find_run(config)
    begun = found is not None
    torch.manual_seed(config.seed)
    components = assemble(config, rewards) if group is None else assemble_everywhere(group, config)
    warnings = preflight(config, components) if preflight is not None and not begun else []
    guard = ReferenceGuard.of(components.original, components.reference)
    checkpoint = latest_checkpoint(path / "checkpoints") if begun else None
    if checkpoint is None:
        frontier, state = _begin(config, components)
    else:
        state = restore_run_state(checkpoint, components, guard.original)
        anchor = restore_anchor(checkpoint, components.policy, components.original, state)
        components = replace(components, reference=anchor)
        guard = ReferenceGuard.of(components.original, anchor)
        frontier = read_frontier(path / PLAN_FILE) if holds_plan(path) else None
    tree = yaml.safe_load(dump_config(config))
    if found is not None:
        _require_same_teacher(path, components)
        run = RunWriter.reopen(path, through_step=-1 if checkpoint is None else state.step)
        if found.changes:
            run.change_config(tree, found.changes, after_step=state.step)
    else:
        meta = run_meta(
            config,
            components.policy,
            guard.original,
            argv,
            state=state,
            undo_in_memory=undone_in_memory(config.tripwires, components.optimizer),
        )
        if components.teacher is not None:
            meta["teacher"] = asdict(components.teacher.identity())
        run = RunWriter.create(path, settings=tree, meta={**meta, "warnings": warnings})
    if frontier is not None and checkpoint is None:
        write_frontier(path / PLAN_FILE, frontier)
    return Session(
        config=config,
        components=replace(components, frontier=frontier),
        leash=make_leash(
            config.leash, starts=state.starts, responses_per_step=config.responses_per_step
        ),
        state=state,
        run=run,
        guard=guard,
        callbacks=callbacks,
        warnings=warnings,
        fresh=checkpoint is None,
    )


def _require_same_teacher(path: Path, components: Components) -> None:
    """A run goes on with the teacher that it began with.

    Raises:
        ModelError: the weights at its path are others.
    """
    if components.teacher is None:
        return
    began, now = read_run(path).meta.get("teacher"), components.teacher.identity()
    then = str(began["sha256"]) if isinstance(began, dict) else "none"
    if then != now.sha256:
        raise ModelError(
            f"expected the teacher that {str(path)!r} began with ({then[:12]}…), got "
            f"{now.sha256[:12]}… in {now.path!r}: put its weights back, or begin a new run"
        )


def _begin(config: Config, components: Components) -> tuple[Frontier | None, TrainingState]:
    """Look at the scores before the first update where something depends on them."""
    begun = begin(config, components)
    initial = config.score_normalisation == "initial"
    leash = make_leash(
        config.leash, starts=begun.starts, responses_per_step=config.responses_per_step
    )
    return begun.frontier, TrainingState(
        step=0,
        episodes=0,
        betas=leash.init(),
        scores=begun.statistics if initial else ScoreStatistics(),
        cursor=PromptCursor(size=len(components.prompts), seed=config.seed),
        mixing=components.settings.mixing,
        starts=begun.starts,
    )
