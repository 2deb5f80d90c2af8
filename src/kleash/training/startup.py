"""A run directory opened for training: new, or continued from its newest checkpoint.

Nothing is written before everything that can be wrong at the start has been looked at.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import yaml

import kleash
from kleash.algorithms.rewards import ScoreStatistics
from kleash.config.loading import dump_config
from kleash.config.schema import Config
from kleash.errors import RunError
from kleash.mesh import Mesh
from kleash.models.policy import Reference
from kleash.rollout.prompts import PromptCursor
from kleash.storage.plan_file import PLAN_FILE, Frontier, holds_plan, read_frontier, write_frontier
from kleash.storage.run_directory import RunWriter, read_run
from kleash.training.assembly import Reward, assemble, make_leash
from kleash.training.calibration import begin
from kleash.training.callbacks import Callbacks
from kleash.training.components import Components
from kleash.training.continuation import EarlierRun, find_run
from kleash.training.metadata import run_meta
from kleash.training.record import SilentRun
from kleash.training.recovery import undone_in_memory
from kleash.training.reference_guard import ReferenceGuard
from kleash.training.session import Session
from kleash.training.state import (
    TrainingState,
    latest_checkpoint,
    restore_anchor,
    restore_next_rollout,
    restore_run_state,
)
from kleash.training.teacher import require_same_teacher

Preflight = Callable[[Config, Components], list[str]]
"""Looks at what was assembled; raises what must stop the run, and returns its warnings."""


def open_session(
    config: Config,
    *,
    argv: Sequence[str],
    preflight: Preflight | None,
    mesh: Mesh,
    rewards: Mapping[str, Reward],
    rows: Mapping[str, Sequence[object]],
    callbacks: Callbacks,
) -> Session:
    """Assemble the components and open the run directory.

    Args:
        config: the run; `{world}` already replaced.
        argv: the command line, for the record.
        preflight: asked once, before the run is begun.
        mesh: the processes of the run; the first one writes.
        rewards, rows: rewards and prompts given in memory, by their names.
        callbacks: of the run.

    Raises:
        KleashError: something the user can fix; nothing was begun.
    """
    path = Path(config.output)
    found = mesh.first(lambda: find_run(config))
    torch.manual_seed(config.seed)
    components = mesh.agree(lambda: assemble(config, rewards, rows, mesh=mesh))
    look = partial(preflight, config, components) if preflight else list[str]
    warnings = _said_again(found) if found else look()
    guard = ReferenceGuard.of(components.original, components.reference)
    _require_alike(dump_config(config), components, guard)
    checkpoint = None
    if found is not None:
        checkpoint = latest_checkpoint(path / "checkpoints")
        require_same_teacher(read_run(path).meta, components.teacher, str(path))
    if checkpoint is None:
        frontier, state = _begin(config, components)
    else:
        state = restore_run_state(checkpoint, components, guard.original)
        anchor = restore_anchor(checkpoint, components.policy, components.original, state)
        components = replace(components, reference=anchor)
        guard = ReferenceGuard.of(components.original, anchor)
        frontier = read_frontier(path / PLAN_FILE) if holds_plan(path) else None
    undo = undone_in_memory(config.tripwires, components.optimizer)
    # Made by every process, for the hash of divided weights needs all of them.
    meta = run_meta(
        config, components.policy, guard.original, argv, state=state, undo_in_memory=undo
    )
    meta |= {"warnings": warnings, "saved_step": None, **_teacher_meta(components.teacher)}
    if found is not None and checkpoint is None:
        _require_same_beginning(read_run(path).meta, meta, str(path))
    run = SilentRun(path)
    if mesh.is_first:
        through_step = -1 if checkpoint is None else state.step
        run = _open_directory(path, found, dump_config(config), meta, through_step=through_step)
        if frontier is not None and checkpoint is None:
            write_frontier(path / PLAN_FILE, frontier)
    per_step = config.responses_per_step
    return Session(
        config=config,
        components=replace(components, frontier=frontier),
        leash=make_leash(config.leash, starts=state.starts, responses_per_step=per_step),
        state=state,
        run=run,
        guard=guard,
        callbacks=callbacks,
        warnings=warnings,
        fresh=checkpoint is None,
        next_rollout=restore_next_rollout(checkpoint, components.policy.device),
    )


def _teacher_meta(teacher: Reference | None) -> dict[str, Any]:
    """Which teacher, for the record; hashed by all processes together."""
    return {} if teacher is None else {"teacher": asdict(teacher.identity())}


def _said_again(found: EarlierRun) -> list[str]:
    """What is to be said of a run that begins again; of one that goes on, nothing."""
    return [] if found.restart is None else [found.restart.sentence]


def _open_directory(
    path: Path,
    found: EarlierRun | None,
    written: str,
    meta: Mapping[str, Any],
    *,
    through_step: int,
) -> RunWriter:
    """The run directory, new, or that of an earlier run as it was after a step.

    Args:
        path: of the run.
        found: the run that is there already.
        written: the configuration, as `dump_config` writes it.
        meta: for run.json.
        through_step: the last step of an earlier run that stays.
    """
    settings = yaml.safe_load(written)
    if found is None:
        return RunWriter.create(path, settings=settings, meta=meta)
    run = RunWriter.reopen(path, through_step=through_step, event=found.restart)
    if found.changes:
        run.change_config(settings, found.changes, after_step=max(through_step, 0))
    return run


def _require_same_beginning(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """A run that begins again does so with the weights that it began with.

    Args:
        before: what run.json says.
        now: what it would say.
        where: the run directory, for the message.

    Raises:
        RunError: policy or reference are others.
    """
    for model in ("policy", "reference"):
        then, given = before.get(model), now[model]
        if then is not None and then["sha256"] != given["sha256"]:
            raise RunError(
                f"the run in {where!r} has no checkpoint yet and would begin again with another "
                f"{model}: expected the weights {then['sha256'][:12]}… of {then['path']}, got "
                f"{given['sha256'][:12]}…; put them back, or give another output directory"
            )


def _require_alike(written: str, components: Components, guard: ReferenceGuard) -> None:
    """Every process runs the same code on the same files.

    Args:
        written: the configuration as YAML.
        components: of this process.
        guard: of its references.

    Raises:
        RunError: one does not.
    """
    if components.mesh.size == 1:
        return
    prompts = repr([components.prompts, components.heldout])
    code = b"".join(
        file.read_bytes() for file in sorted(Path(kleash.__file__).parent.rglob("*.py"))
    )
    components.mesh.require_same(
        {
            "code of kleash": sha256(code).hexdigest(),
            "configuration": written,
            "policy": components.policy.identity().sha256,
            "reference": guard.original.sha256,
            "set of prompts": sha256(prompts.encode("utf-8", "surrogatepass")).hexdigest(),
        }
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
