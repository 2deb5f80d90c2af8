"""What a run says about itself before it begins: its objective in one line, and its identity."""

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import accelerate
import torch
import transformers

from kleash import __version__
from kleash.config.algorithm import DistillConfig
from kleash.config.leash import LeashConfig
from kleash.config.schema import Config
from kleash.kl.control.groups import OTHERS, States, is_grouped
from kleash.kl.planning.initial_beta import Start
from kleash.models.policy import Identity, Policy
from kleash.rollout.sampling import overridden_settings
from kleash.training.quantization_floor import quantization_meta
from kleash.training.state import TrainingState


def objective_line(config: Config, betas: Mapping[str, float | None], *, step: int = 0) -> str:
    """The objective actually optimised, with its numbers.

    Args:
        config: the run.
        betas: β in force of each group; None where its plan has yet to be made.
        step: the step after which they are in force; 0 before the first.
    """
    first = _beta_words(next(iter(betas.values())), step)
    if isinstance(config.algorithm, DistillConfig):
        return _distillation_line(config.algorithm, config.leash, first)
    score_text = " + ".join(
        name if reward.weight == 1 else f"{reward.weight:g}·{name}"
        for name, reward in config.reward_models.items()
    )
    if config.score_normalisation != "none":
        score_text = f"({score_text} − mean)/sd"
    if config.algorithm.name == "grpo":
        score_text = f"({score_text} − group mean)/group sd"
    leash = config.leash
    if leash.placement == "measure" or leash.beta == 0:
        return f"maximise E[{score_text}]; the KL to the reference is measured, not charged"
    if is_grouped(betas):
        held = ", ".join(
            f"{own.target_kl:g} nats per response of {name} ({_beta_words(betas[name], step)})"
            for name, own in leash.each().items()
        )
        moves = f"β moved in each group to hold {held}"
    elif leash.target_kl is not None:
        moves = f"{first}, moved to hold {leash.target_kl:g} nats per response"
    elif leash.target_kl_per_token is not None:
        moves = f"{first}, moved to hold {leash.target_kl_per_token:g} nats per token"
    elif leash.schedule is not None:
        moves = f"{first}, along its schedule"
    else:
        moves = f"β = {leash.beta:.4g} fixed"
    return f"maximise E[{score_text} − β·Σ KL_t]; {moves}; placement {leash.placement}"


_DIVERGENCES = {
    "reverse_kl": "KL(student‖teacher)",
    "forward_kl": "KL(teacher‖student)",
    "jensen_shannon": "JS(student, teacher)",
}
_PARTS = {
    "token": "token-local: the sampled prefixes are held fixed",
    "sequence": "with what each token does to those that follow",
}


def _distillation_line(algorithm: DistillConfig, leash: LeashConfig, first: str) -> str:
    said = f"minimise E[Σ {_DIVERGENCES[algorithm.divergence]}]; {_PARTS[algorithm.gradient]}"
    if leash.placement == "measure" or leash.beta == 0:
        return said
    held = "" if leash.target_kl is None else f", moved to hold {leash.target_kl:g} nats"
    return f"{said}; + β·Σ KL_t to the reference, {first}{held}, {leash.placement}"


def betas_by_group(states: States) -> dict[str, float | None]:
    """β in force of each group."""
    return {name: state.beta for name, state in states.items()}


def _beta_words(beta: float | None, step: int) -> str:
    if beta is None:
        return "β from its plan, as `kleash plan` says it"
    return f"β {beta:.4g} after step {step}" if step else f"β from {beta:.4g}"


def run_meta(
    config: Config,
    policy: Policy,
    reference: Identity,
    argv: Sequence[str],
    *,
    state: TrainingState,
    undo_in_memory: bool,
) -> dict[str, Any]:
    """The contents of run.json: who, with what, from which seed."""
    return {
        "argv": list(argv),
        "seed": config.seed,
        "device": str(policy.device),
        "objective": objective_line(config, betas_by_group(state.betas)),
        "start": _starts(state.starts),
        "undo": "memory" if undo_in_memory else "checkpoint",
        "reference": dataclasses.asdict(reference),
        "policy": dataclasses.asdict(policy.identity()),
        **quantization_meta(config.policy, config.reference),
        # Settings of the model's own generation_config.json that were put aside.
        "sampling_put_aside": overridden_settings(policy),
        "versions": {
            "kleash": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
    }


def _starts(starts: Mapping[str, Start]) -> dict[str, Any] | None:
    """Where β started, or that of each group by its name; None where it was given."""
    if is_grouped(starts):
        return {name: dataclasses.asdict(start) for name, start in starts.items()} or None
    return dataclasses.asdict(starts[OTHERS])
