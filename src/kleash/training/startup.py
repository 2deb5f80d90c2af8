"""A run directory opened for training: begun anew, or continued from its newest checkpoint.

Nothing is written before everything that can be wrong at the start has been looked at.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml

from kleash.algorithms.rewards import ScoreStatistics
from kleash.config.loading import dump_config, parse_config
from kleash.config.schema import Config
from kleash.errors import RunError
from kleash.kl.control.groups import Leash
from kleash.kl.planning.initial_beta import Start
from kleash.models.policy import Identity
from kleash.rollout.prompts import PromptCursor
from kleash.storage.plan_file import PLAN_FILE, Frontier, holds_plan, read_frontier, write_frontier
from kleash.storage.run_directory import Run, RunWriter, holds_run, read_run
from kleash.training.calibration import begin
from kleash.training.components import Components, assemble, make_leash
from kleash.training.distributed import assemble_everywhere
from kleash.training.metadata import run_meta
from kleash.training.process_group import WorkerGroup
from kleash.training.state import (
    TrainingState,
    latest_checkpoint,
    restore_anchor,
    restore_run_state,
)
from kleash.training.trackers import Trackers

Preflight = Callable[[Config, Components], list[str]]
"""Looks at what was assembled; raises what must stop the run, and returns its warnings."""


@dataclass(frozen=True, eq=False)
class Opened:
    """A run that is ready for its next step."""

    components: Components
    leash: Leash
    state: TrainingState
    run: RunWriter
    trackers: Trackers
    warnings: list[str]
    """What the preflight said; nothing where a run is continued."""
    fresh: bool
    """No step of it has been kept: it begins with what the reference does."""


def open_run(
    config: Config,
    *,
    argv: Sequence[str] = (),
    preflight: Preflight | None = None,
    workers: WorkerGroup | None = None,
) -> Opened:
    """Assemble everyone and open the run directory.

    Args:
        config: the run; `{world}` already replaced.
        argv: the command line, for the record.
        preflight: asked once, before the run is begun.
        workers: the other processes, if there are any.

    Raises:
        KleashError: something the user can fix; nothing was begun.
    """
    path = Path(config.output)
    begun = holds_run(path)
    if begun:
        _require_same_run(config, read_run(path))
    torch.manual_seed(config.seed)
    components = assemble(config) if workers is None else assemble_everywhere(workers, config)
    warnings = preflight(config, components) if preflight is not None and not begun else []
    reference = components.reference.identity()
    trackers = Trackers(config.logging.trackers, path)
    checkpoint = latest_checkpoint(path / "checkpoints") if begun else None
    if checkpoint is None:
        frontier, state = _begin(config, components)
    else:
        state = restore_run_state(checkpoint, components, reference)
        components = restore_anchor(checkpoint, components, state)
        frontier = read_frontier(path / PLAN_FILE) if holds_plan(path) else None
    if begun:
        run = RunWriter.reopen(path, through_step=-1 if checkpoint is None else state.step)
    else:
        run = _create(config, components, state, reference, argv=argv, warnings=warnings)
    if frontier is not None and checkpoint is None:
        write_frontier(path / PLAN_FILE, frontier)
    return Opened(
        components=replace(components, frontier=frontier),
        leash=_leash(config, state.starts),
        state=state,
        run=run,
        trackers=trackers,
        warnings=warnings,
        fresh=checkpoint is None,
    )


def _create(
    config: Config,
    components: Components,
    state: TrainingState,
    reference: Identity,
    *,
    argv: Sequence[str],
    warnings: list[str],
) -> RunWriter:
    meta = run_meta(config, components, reference, argv, betas=state.betas, starts=state.starts)
    tree = yaml.safe_load(dump_config(config))
    return RunWriter.create(Path(config.output), config=tree, meta={**meta, "warnings": warnings})


def _begin(config: Config, components: Components) -> tuple[Frontier | None, TrainingState]:
    """Look at the scores before the first update where something depends on them."""
    begun = begin(config, components)
    initial = config.score_normalisation == "initial"
    return begun.frontier, TrainingState(
        step=0,
        episodes=0,
        betas=_leash(config, begun.starts).init(),
        scores=begun.statistics if initial else ScoreStatistics(),
        cursor=PromptCursor(size=len(components.prompts), seed=config.seed),
        mixing=components.settings.mixing,
        starts=begun.starts,
    )


def _leash(config: Config, starts: Mapping[str, Start]) -> Leash:
    return make_leash(config.leash, starts=starts, responses_per_step=config.responses_per_step)


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
