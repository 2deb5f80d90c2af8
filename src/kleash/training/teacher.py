"""The teacher of a distillation, where it is another model than the reference, and its settings."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from kleash.algorithms.distill import DistillSettings
from kleash.config.algorithm import DistillConfig, TeacherConfig
from kleash.config.leash import LeashConfig
from kleash.config.rollout import RolloutConfig
from kleash.config.schema import PolicyConfig
from kleash.errors import ModelError
from kleash.models.policy import Policy, Reference, check_compatible, load_reference
from kleash.models.precision import weights_dtype


def load_teacher(
    wanted: TeacherConfig | None, start: PolicyConfig, policy: Policy, device: torch.device
) -> Reference | None:
    """Open the teacher; None where the reference is the teacher, or nothing is distilled.

    Raises:
        ModelError: it cannot be used, or has other tokens than the student.
    """
    if wanted is None:
        return None
    teacher = load_reference(
        wanted.path,
        dtype=weights_dtype(start.precision, frozen=True),
        device=str(device),
        attention=start.attention,
        revision=wanted.revision,
        merge=wanted.adapter,
        sharding=policy.sharding,
    )
    words = check_compatible(policy, teacher).words
    return replace(teacher, words=words, precision=start.precision)


def distill_settings(
    algorithm: DistillConfig, leash: LeashConfig, rollout: RolloutConfig
) -> DistillSettings:
    """The choices of distillation that a configuration makes."""
    return DistillSettings(
        divergence=algorithm.divergence,
        gradient=algorithm.gradient,
        placement=leash.placement,
        allow_biased=leash.allow_biased,
        truncated=rollout.truncated,
    )


def require_same_teacher(began: Mapping[str, Any], teacher: Reference | None, run: str) -> None:
    """A run goes on with the teacher that it began with.

    Args:
        began: what run.json says.
        teacher: as it is now.
        run: the run directory, for the message.

    Raises:
        ModelError: the weights at its path are others.
    """
    if teacher is None:
        return
    recorded, now = began.get("teacher"), teacher.identity()
    then = str(recorded["sha256"]) if isinstance(recorded, dict) else "none"
    if then != now.sha256:
        raise ModelError(
            f"expected the teacher that {run!r} began with ({then[:12]}…), got {now.sha256[:12]}… "
            f"in {now.path!r}: put its weights back, or begin a new run"
        )
