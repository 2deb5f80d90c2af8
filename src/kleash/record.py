"""What a run says about itself before it begins: its objective in one line, and its identity."""

import dataclasses
import platform
from collections.abc import Sequence
from typing import Any

import accelerate
import torch
import transformers

from kleash import __version__
from kleash.assembly import Crew
from kleash.beta.starting import Start
from kleash.config import Config
from kleash.generation import overridden_settings
from kleash.models import Identity


def price(config: Config, beta: float) -> float | None:
    """β in score per nat; None for GRPO, whose β is in spreads of a group per nat."""
    return None if config.algorithm == "grpo" else beta


def objective_line(config: Config, beta: float) -> str:
    """The objective actually optimised, with its numbers."""
    score_text = " + ".join(
        name if reward.weight == 1 else f"{reward.weight:g}·{name}"
        for name, reward in config.reward_models.items()
    )
    if config.score_normalisation != "none":
        score_text = f"({score_text} − mean)/sd"
    if config.algorithm == "grpo":
        score_text = f"({score_text} − group mean)/group sd"
    leash = config.leash
    if leash.placement == "measure" or leash.beta == 0:
        return f"maximise E[{score_text}]; the KL to the reference is measured, not charged"
    if leash.target_kl is not None:
        moves = f"β from {beta:.4g}, moved to hold {leash.target_kl:g} nats per response"
    elif leash.target_kl_per_token is not None:
        moves = f"β from {beta:.4g}, moved to hold {leash.target_kl_per_token:g} nats per token"
    elif leash.schedule is not None:
        moves = f"β from {beta:.4g}, along its schedule"
    else:
        moves = f"β = {beta:.4g} fixed"
    return f"maximise E[{score_text} − β·Σ KL_t]; {moves}; placement {leash.placement}"


def run_meta(
    config: Config,
    crew: Crew,
    reference: Identity,
    argv: Sequence[str],
    *,
    beta: float,
    start: Start | None,
) -> dict[str, Any]:
    """The contents of run.json: who, with what, from which seed."""
    return {
        "argv": list(argv),
        "seed": config.seed,
        "device": str(crew.policy.device),
        "objective": objective_line(config, beta),
        "start": None if start is None else dataclasses.asdict(start),
        "reference": dataclasses.asdict(reference),
        "policy": dataclasses.asdict(crew.policy.identity()),
        # Settings of the model's own generation_config.json that were put aside.
        "sampling_put_aside": overridden_settings(crew.policy),
        "versions": {
            "kleash": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
    }
