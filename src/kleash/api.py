"""The public functions `kleash.train`, `kleash.check` and `kleash.plan`.

`kleash.audit` is in `kleash.auditing`.
Each takes a configuration as a path of a YAML file, the name of a recipe, a mapping of plain
values, or a `Config`, and dotted keys that override it: `train("run.yaml", **{"leash.beta": 0.1})`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from kleash.cli.plan import plan as make_plan
from kleash.cli.plan import plan_request
from kleash.config.inputs import IN_MEMORY
from kleash.config.loading import dump_config, load_config, make_config
from kleash.config.schema import Config
from kleash.errors import ConfigError, RunError
from kleash.playground.build import with_world
from kleash.preflight.findings import Report
from kleash.preflight.runner import check as run_checks
from kleash.preflight.runner import require_sound
from kleash.preflight.runtime_monitor import RuntimeMonitor
from kleash.report.html import write_report
from kleash.storage.events import Event
from kleash.storage.plan_file import Frontier
from kleash.storage.run_directory import read_run
from kleash.training.assembly import Reward
from kleash.training.loop import Trainer
from kleash.training.state import latest_checkpoint

if TYPE_CHECKING:
    from pandas import DataFrame

Configuration = Config | Path | str | Mapping[str, Any]


@dataclass(frozen=True)
class TrainedRun:
    """A run directory; known to users as `kleash.Run`."""

    path: Path

    @property
    def status(self) -> str:
        """`finished`, `running`, `interrupted` or `failed`."""
        return read_run(self.path).status

    @property
    def metrics(self) -> list[dict[str, float | int | None]]:
        """The numbers of each step; `docs/metrics.md` defines every key."""
        return list(read_run(self.path).metrics)

    @property
    def events(self) -> list[Event]:
        """Refusals, rollbacks, alarms and whatever else happened."""
        return list(read_run(self.path).events)

    @property
    def policy_path(self) -> Path:
        """The newest checkpoint's policy, which transformers or PEFT opens.

        Raises:
            RunError: the run has no checkpoint.
        """
        checkpoint = latest_checkpoint(self.path / "checkpoints")
        if checkpoint is None:
            raise RunError(f"expected a checkpoint in {str(self.path)!r}, got none: train it first")
        return checkpoint / "policy"

    def metrics_frame(self) -> "DataFrame":
        """The metrics as a pandas DataFrame, a row for each step.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            pandas: Any = import_module("pandas")
        except ImportError as error:
            raise ConfigError(
                "expected pandas for a data frame: pip install 'kleash[pandas]'"
            ) from error
        return pandas.DataFrame(self.metrics)

    def report(self, into: Path | str | None = None) -> Path:
        """Write the report page and return its path.

        Args:
            into: directory; the run's own unless given.

        Raises:
            RunError: the run has no step yet, or the page cannot be written.
        """
        return write_report([self.path], into=into)[0]


def train(
    config: Configuration,
    *,
    reward: Reward | Mapping[str, Reward] | None = None,
    prompts: Sequence[object] | None = None,
    heldout: Sequence[object] | None = None,
    callbacks: Sequence[object] = (),
    check: bool = True,
    **overrides: Any,
) -> TrainedRun:
    """Train a policy on a KL leash.

    Args:
        config: path of a YAML file, a mapping of plain values, or a `Config`.
        reward: a function `reward(prompts, completions, **columns)`, an object, an async function,
            or several by name; takes the place of `reward_models`. Weights are 1.
        prompts: texts, conversations or rows with `prompt` or `messages` and columns for the
            reward, in the place of `prompts.train`.
        heldout: the same, in the place of `prompts.heldout`.
        callbacks: objects with `on_start`, `on_rollout`, `on_step`, `on_refusal`, `on_checkpoint`.
        check: run the quick part of `kleash check` first.
        overrides: dotted keys, such as `**{"leash.target_kl": 2}`; top-level keys as they are.

    Returns:
        The run, finished.

    Raises:
        KleashError: something the user can fix; the run directory says "failed" and why if it had
            begun.

    Example:
        A reward as people write it, prompts in memory, and no file:

        >>> def shorter(prompts, completions, **columns):
        ...     return [-len(text.split()) for text in completions]
        >>> tree = {"policy": {"path": "./models/sft"}, "output": "runs/shorter"}
        >>> train(tree, reward=shorter, prompts=["Why?"], **{"leash.target_kl": 2})
        Traceback (most recent call last):
        kleash.errors.ConfigError: ...models/sft...
    """
    rewards = _rewards(reward)
    given = {"train": prompts, "heldout": heldout}
    rows = {name: each for name, each in given.items() if each is not None}
    in_memory = {f"prompts.{name}": IN_MEMORY for name in rows}
    trainer = Trainer(
        _configuration(config, {**overrides, **in_memory}, rewards),
        callbacks=[RuntimeMonitor(), *callbacks],
        preflight=require_sound if check else None,
        argv=["kleash.train"],
        rewards=rewards,
        rows=rows,
    )
    return TrainedRun(trainer.fit())


def check(config: Configuration, *, quick: bool = False, **overrides: Any) -> Report:
    """Examine a run before it costs anything; nothing is trained or written.

    Args:
        config: as of `train`.
        quick: only what `train` checks by itself.
        overrides: dotted keys.

    Returns:
        Every finding, with its measured value, cause and remedy.

    Raises:
        ConfigError: the configuration cannot be read.
    """
    return run_checks(_configuration(config, overrides, {}), quick=quick)


def plan(
    config: Configuration,
    *,
    betas: Sequence[float] = (),
    budgets: Sequence[float] = (),
    **overrides: Any,
) -> Frontier:
    """Before training: which β spends which KL for which score, from reference samples alone.

    Args:
        config: as of `train`.
        betas: in score per nat, to plan for; a ladder of them unless given.
        budgets: KL in nats per response, to plan for beside the run's own target.
        overrides: dotted keys.

    Returns:
        The frontier: a row for each β or budget, with intervals.

    Raises:
        KleashError: something the user can fix; nothing was written.
    """
    made = _configuration(config, overrides, {})
    return make_plan(made, plan_request(made.leash, betas=betas, budgets=budgets))


def _rewards(reward: Reward | Mapping[str, Reward] | None) -> dict[str, Reward]:
    if reward is None:
        return {}
    return dict(reward) if isinstance(reward, Mapping) else {"reward": reward}


def _configuration(
    config: Configuration, overrides: Mapping[str, Any], rewards: Mapping[str, Reward]
) -> Config:
    """The configuration with its overrides; rewards in memory are recorded by their names."""
    texts = {
        key: value if isinstance(value, str) else _text(value) for key, value in overrides.items()
    }
    if rewards:
        texts["reward_models"] = json.dumps({k: {"callable": _name(r)} for k, r in rewards.items()})
    if isinstance(config, str | Path):
        return with_world(load_config(Path(config), texts, base=Path(config)))
    tree = yaml.safe_load(dump_config(config)) if isinstance(config, Config) else dict(config)
    return with_world(make_config(tree, texts))


def _name(reward: Reward) -> str:
    """How run.json and config.yaml call a reward that was given in memory."""
    kind: Any = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{kind.__module__}:{kind.__qualname__}"


def _text(value: object) -> str:
    """A value as it would be written on the command line."""
    return "none" if value is None else json.dumps(value)
