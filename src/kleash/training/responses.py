"""Responses as tensors and texts, before and after the reward models have read them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from kleash.models.reward_model import Content
from kleash.types import Rollout


@dataclass(frozen=True, eq=False)
class Responses:
    """What the policy wrote."""

    rollout: Rollout
    prompts: Sequence[Content]
    """Prompt of each response as its author wrote it: what reward models read."""
    texts: list[str]
    """Text of each response."""
    columns: Mapping[str, list[Any]] = field(default_factory=dict[str, list[Any]])
    """The prompts' further columns, and each response's tokens and undropped text."""


@dataclass(frozen=True, eq=False)
class JudgedResponses:
    """Responses with the scores of the reward models."""

    responses: Responses
    raw_scores: Float[Tensor, " batch"]
    """Weighted sum of the reward models, before normalisation."""
    parts: Mapping[str, Float[Tensor, " batch"]]
    """Score of each reward model."""

    @property
    def rollout(self) -> Rollout:
        """The responses as tensors."""
        return self.responses.rollout

    @property
    def prompts(self) -> Sequence[Content]:
        """Prompt of each response."""
        return self.responses.prompts

    @property
    def columns(self) -> Mapping[str, list[Any]]:
        """What reward models may read beside the texts."""
        return self.responses.columns

    @property
    def texts(self) -> list[str]:
        """Text of each response."""
        return self.responses.texts
