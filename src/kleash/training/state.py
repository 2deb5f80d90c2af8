"""Everything that decides the future of a run, put away and taken out again.

    policy/             Hugging Face format, with its tokenizer
    value.safetensors   the critic, where there is one
    optimizer/          moments of the optimiser, in a file for each process that wrote
    random.safetensors  the random generators
    state.json          step, episodes, β states, score statistics, place in the prompts, reference
    anchor.safetensors  the policy that the leash was moved to, if it was moved
    next_rollout.safetensors  the responses of the next step, if they were written ahead

The reference itself is not stored: it is loaded as before, and its identity must be the same.
For the length of one step the same is kept in main memory, so that the step can be undone.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from kleash.algorithms.rewards import ScoreStatistics
from kleash.errors import RunError
from kleash.kl.control.controllers import BetaState
from kleash.kl.control.groups import States
from kleash.kl.planning.initial_beta import Start
from kleash.mesh import Mesh
from kleash.models.policy import Identity, Policy
from kleash.models.reference_offload import FrozenReference, anchor_at, underlying
from kleash.models.sharded_loading import read_slices
from kleash.models.sharding import release, whole
from kleash.models.value_model import ValueFunction
from kleash.rollout.prompts import PromptCursor
from kleash.storage.atomic_directories import (
    list_checkpoints,
    load_tensors,
    recover,
    save_tensors,
    verify_checkpoint,
    write_checkpoint,
)
from kleash.training.components import Components
from kleash.training.moments import begin_moments, load_moments, save_moments
from kleash.training.random_state import random_states, restore_random_states
from kleash.types import Rollout

_ANCHOR, _MOMENTS = "anchor.safetensors", "optimizer"
_NEXT = "next_rollout.safetensors"


@dataclass(frozen=True)
class TrainingState:
    """What changes from step to step beside weights and random numbers."""

    step: int
    episodes: int
    betas: States
    """What the controller of each group remembers; of the one for all, without groups."""
    scores: ScoreStatistics
    cursor: PromptCursor
    seconds: float = 0.0
    """Time spent in steps so far, interruptions left out."""
    mixing: float | None = None
    """Coefficient of the placement `mixed` in the next step; None for other placements."""
    rollbacks: int = 0
    """How often the run went back to a checkpoint with a raised β."""
    anchored: int = 0
    """The step whose policy the leash is tied to; 0: the reference it began with."""
    best_step: int | None = None
    """The checkpoint with the best held-out objective so far."""
    best_objective: float | None = None
    starts: Mapping[str, Start] = field(default_factory=dict)
    """Where the moving β of each group started, which its controller goes on building on; empty if
    it was given."""
    sampler_floor: float | None = None
    """KL of sampler against trainer before the first update, in nats per token; None: not measured
    yet, or by no engine that reports log-probabilities."""


def save_run_state(
    parent: Path,
    components: Components,
    state: TrainingState,
    reference: Identity,
    *,
    keep: int,
    card: str | None = None,
    next_rollout: Rollout | None = None,
) -> Path:
    """Write a checkpoint after a step; the older ones beyond `keep` go, the best one stays.

    Args:
        parent: the run's `checkpoints/`.
        components: whose weights.
        state: after the step.
        reference: the reference that the run began with.
        keep: how many checkpoints stay.
        card: text of the policy's README.md.
        next_rollout: of the next step, where it was written ahead. The weights that wrote it are
            gone, so it cannot be written again.

    Raises:
        RunError: it cannot be written; nothing of it remains.
    """

    mesh, policy = components.mesh, components.policy
    components.release()
    # Gathered first: what one process writes must not keep the others waiting for a weight.
    tensors = mesh.agree(lambda: policy.gather_weights(keep=mesh.is_first))
    critic = None if components.value is None else whole_state(components.value, mesh)
    anchor = whole_state(underlying(components.reference).model, mesh) if state.anchored else {}

    def write(directory: Path) -> None:
        policy.save(directory / "policy", tensors=tensors)
        if card is not None:
            (directory / "policy" / "README.md").write_text(card, encoding="utf-8")
        begin_moments(directory / _MOMENTS, components.optimizer)
        if critic is not None:
            save_tensors(directory / "value.safetensors", critic)
        save_tensors(directory / "random.safetensors", random_states())
        record = {**asdict(state), "reference": asdict(reference)}
        (directory / "state.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        if state.anchored:
            save_tensors(directory / _ANCHOR, anchor)
        if next_rollout is not None:
            columns = {name: x for name, x in vars(next_rollout).items() if x is not None}
            save_tensors(directory / _NEXT, columns)

    def together(directory: Path) -> None:
        policy.verify(directory / "policy", mesh)
        save_moments(directory / _MOMENTS, components.optimizer, mesh)

    return write_checkpoint(
        parent,
        state.step,
        write,
        keep=keep,
        spare=() if state.best_step is None else (state.best_step,),
        together=together,
        mesh=mesh,
    )


def latest_checkpoint(parent: Path) -> Path | None:
    """The newest finished checkpoint of a run; None if it has none yet."""
    if not parent.is_dir():
        return None
    recover(parent)
    found = list_checkpoints(parent)
    return found[-1] if found else None


def restore_run_state(
    directory: Path, components: Components, reference: Identity
) -> TrainingState:
    """Put weights, optimiser and random numbers back as the checkpoint has them.

    Raises:
        RunError: the checkpoint is damaged, belongs to another model, or was made with another
            reference; nothing was changed then.
    """
    mesh = components.mesh
    mesh.agree(lambda: verify_checkpoint(directory) if mesh.is_first else None)
    record = cast("dict[str, Any]", json.loads((directory / "state.json").read_text("utf-8")))
    try:
        state = _state_of(record)
        _require_reference(directory, record["reference"], reference)
    except (KeyError, TypeError) as error:
        raise RunError(
            f"the checkpoint {directory} was written by another version of kleash (its state.json "
            f"is not as expected: {error}); continue the run with that version: see `versions` in "
            "its run.json"
        ) from None
    components.policy.restore(directory / "policy")
    device = components.policy.device
    components.release()
    if components.value is not None:
        fill(_module(components.value), directory / "value.safetensors")
    load_moments(directory / _MOMENTS, components.optimizer, mesh)
    random = load_tensors(directory / "random.safetensors")
    if mesh.size > 1 and device.type == "cuda":
        # Every process has a device of its own, and draws on it what the first one draws.
        random[f"cuda:{device.index}"] = random["cuda:0"]
    restore_random_states(random)
    return state


def _state_of(record: Mapping[str, Any]) -> TrainingState:
    return TrainingState(
        step=record["step"],
        episodes=record["episodes"],
        betas={name: BetaState(**state) for name, state in record["betas"].items()},
        scores=ScoreStatistics(**record["scores"]),
        cursor=PromptCursor(**record["cursor"]),
        seconds=record["seconds"],
        mixing=record["mixing"],
        rollbacks=record["rollbacks"],
        anchored=record["anchored"],
        best_step=record["best_step"],
        best_objective=record["best_objective"],
        starts={name: Start(**start) for name, start in record["starts"].items()},
        sampler_floor=record["sampler_floor"],
    )


def restore_anchor(
    directory: Path, policy: Policy, original: FrozenReference, state: TrainingState
) -> FrozenReference:
    """The reference that the leash was tied to when the checkpoint was written."""
    if not state.anchored:
        return original
    anchor = anchor_at(policy, state.anchored, like=original)
    release(underlying(anchor).model)
    fill(underlying(anchor).model, directory / _ANCHOR)
    return anchor


def restore_next_rollout(checkpoint: Path | None, device: torch.device) -> Rollout | None:
    """The rollout that was written ahead of the next step; None: it is still to be written."""
    if checkpoint is None or not (path := checkpoint / _NEXT).exists():
        return None
    tensors: dict[str, Any] = load_tensors(path, device)
    return Rollout(**tensors)


def whole_state(module: Any, mesh: Mesh) -> dict[str, Tensor]:
    """The parameters of a module, put together from all processes and kept by the first."""
    found: dict[str, Tensor] = {}
    for name, parameter in cast(nn.Module, module).named_parameters():
        full = whole(parameter.detach())
        if mesh.is_first:
            found[name] = full.cpu() if full is not parameter else full
    return found


def fill(module: nn.Module, file: Path) -> None:
    """Parameters from what `whole_state` gave, of which each process reads its slices."""
    wanted = {name: [parameter] for name, parameter in module.named_parameters()}
    read_slices(module, dict.fromkeys(wanted, file), cast("dict[str, list[Tensor]]", wanted))


def _module(value: ValueFunction) -> nn.Module:
    """The critic as a module; both kinds are."""
    return cast(nn.Module, value)


def _require_reference(directory: Path, stored: Mapping[str, Any], now: Identity) -> None:
    if stored["sha256"] != now.sha256:
        raise RunError(
            f"the run in {directory} is tied to another reference: it was {stored['path']} with "
            f"weights {stored['sha256'][:12]}…, got {now.path} with {now.sha256[:12]}…; give back "
            "the model it began with"
        )
