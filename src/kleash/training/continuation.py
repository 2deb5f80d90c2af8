"""Which output directories a run may be begun in, and with what an earlier run may be continued."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kleash.config.changes import config_differences, resumable_change
from kleash.config.loading import load_config, parse_config
from kleash.config.schema import Config
from kleash.errors import RunError
from kleash.storage.atomic_directories import step_of
from kleash.storage.events import Event, new_event
from kleash.storage.plan_file import PLAN_FILE
from kleash.storage.run_directory import Run, half_begun, holds_run, read_run
from kleash.training.state import latest_checkpoint

Change = tuple[str, Any, Any]
"""Dotted key, old value, new value."""


@dataclass(frozen=True)
class EarlierRun:
    """A run that is there already and can be continued with a configuration."""

    changes: Sequence[Change]
    """Keys whose values are others from now on; none of them changes a step already made."""
    restart: Event | None = None
    """Why it is begun again, where it made steps and was interrupted before its first checkpoint;
    None: it goes on from a checkpoint, or made no step."""


def find_run(config: Config) -> EarlierRun | None:
    """The run in the output directory of a configuration; None where a new one can begin.

    Raises:
        RunError: the output is something else, or a run that this configuration cannot continue.
    """
    path = Path(config.output)
    if not (holds_run(path) and (path / "run.json").is_file()):
        _require_free(path)
        return None
    run = read_run(path)
    before = parse_config(dict(run.config), where=f"{run.path}/config.yaml")
    changes = config_differences(before, config)
    fatal = [
        change
        for change in changes
        if not resumable_change(change[0], schedule=before.optimizer.schedule)
    ]
    if fatal:
        raise RunError(
            f"{config.output!r} already holds a run of another configuration ({_listed(fatal)}); "
            "leave these as they were to continue it, or give another output directory"
        )
    _require_steps_left(run, steps=config.steps)
    return EarlierRun(changes, _restart(run))


def config_of_run(directory: Path, overrides: Mapping[str, str]) -> Config:
    """The configuration that a run directory was made with, its output where it lies now.

    Args:
        directory: a run directory.
        overrides: dotted key → value as written on the command line.

    Raises:
        RunError: it holds no run.
        ConfigError: the configuration cannot be read, or what it names is gone.
        UsageError: an override names no key, or has an impossible value.
    """
    run = read_run(directory)
    file = directory / "config.yaml"
    config = load_config(file, overrides, base=file)
    moved = Path(str(run.config.get("output"))).resolve() != directory.resolve()
    if moved and "output" not in overrides:
        return config.model_copy(update={"output": str(directory)})
    return config


def _require_free(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise RunError(f"expected an output directory, but {str(path)!r} is a file: give another")
    # A plan is made before its run, and may lie where the run will.
    own = {PLAN_FILE, "plan.html", *(file.name for file in half_begun(path))}
    if path.is_dir() and (held := sorted({entry.name for entry in path.iterdir()} - own)):
        raise RunError(
            f"the output {str(path)!r} is a folder of something else (it holds {held[0]!r} and no "
            "run.json): give a new or empty one"
        )


def _require_steps_left(run: Run, *, steps: int) -> None:
    """A run has steps to make, and weights to make them from.

    Raises:
        RunError: it is finished, or its checkpoints are gone.
    """
    checkpoint = latest_checkpoint(run.path / "checkpoints")
    done = 0 if checkpoint is None else step_of(checkpoint)
    # A run of an earlier version does not say whether it ever saved one.
    saved = run.meta.get("saved_step", "unknown")
    if checkpoint is None and saved is not None and (made := _steps_made(run)):
        raise RunError(
            f"the run in {str(run.path)!r} made {made} steps and its checkpoints are gone (the "
            f"last was written after step {saved}), so it cannot be continued: put them back, or "
            "move it away or give another output directory to begin anew"
        )
    if steps < done:
        raise RunError(
            f"`steps: {steps}` is fewer than the {done} that the run has made; leave it out "
            "or give more"
        )
    if run.status == "finished" and steps == done:
        raise RunError(
            f"{str(run.path)!r} already holds this run, finished after step {done} of "
            f"{steps}: give more `steps` to extend it, or another output directory"
        )


def _restart(run: Run) -> Event | None:
    """What is to be said where steps of a run are made again from the first one."""
    made = _steps_made(run)
    if not made or latest_checkpoint(run.path / "checkpoints") is not None:
        return None
    before = sum(event.kind == "restarted" for event in run.events)
    return new_event(
        0,
        "restarted",
        f"the run was interrupted after step {made} and before its first checkpoint: it begins "
        "again, and the same steps are made once more",
        steps=made,
        restarts=before + 1,
    )


def _steps_made(run: Run) -> int:
    return max((int(line["step"] or 0) for line in run.metrics), default=0)


def _listed(changes: Sequence[Change]) -> str:
    return "; ".join(f"{key}: {_shown(old)}, now {_shown(new)}" for key, old, new in changes)


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
