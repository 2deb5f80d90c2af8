"""The algorithms, each with the keys it knows.

`algorithm: grpo` is short for `algorithm: {name: grpo}`, and `algorithm: {epochs: 4}` for
`algorithm: {name: ppo, epochs: 4}`.
"""

from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from kleash.algorithms.distill import DistillGradient
from kleash.config.section import (
    InputKind,
    Section,
    SettingError,
    idle_microbatch_size,
    microbatch_limit,
)
from kleash.kl.placements import Placement
from kleash.models.batching import Limit
from kleash.scoring.divergences import Divergence

WEIGHTED_MIN_EFFECTIVE_SAMPLES = 0.5
"""`min_effective_samples: auto` where the placement has the prefix weights in its loss."""


class ValueConfig(Section):
    """The critic."""

    kind: Literal["trunk_detached", "trunk", "model"] = "trunk_detached"
    """A head on the policy's trunk, without or with gradient into it, or a model of its own."""
    path: Annotated[str | None, InputKind.MODEL] = None
    """Where a model of its own starts: a policy or reward-model directory."""
    lr: PositiveFloat | Literal["auto"] = "auto"
    """Peak learning rate of the critic; auto: `optimizer.lr`."""

    @model_validator(mode="after")
    def _path_belongs(self) -> "ValueConfig":
        if (self.kind == "model") != (self.path is not None):
            raise SettingError(
                "`path` goes with `kind: model`, and with nothing else, got "
                f"kind: {self.kind}, path: {self.path}",
                "kind",
                "path",
            )
        return self


Passes = TypeVar("Passes", bound="PassesConfig")


class PassesConfig(Section):
    """The passes that all algorithms make over a rollout."""

    epochs: PositiveInt = 2
    """Passes over a rollout."""
    minibatches: PositiveInt = 2
    """Optimiser steps in one pass."""
    microbatch_size: PositiveInt = 64
    """Responses in one backward pass; changes memory and speed, not the gradient."""
    microbatch_tokens: PositiveInt | None = None
    """Tokens in one backward pass, prompts and padding among them: responses of similar length,
    as many as fit. In place of `microbatch_size`; none: that decides. Changes memory and speed, not
    the gradient."""
    keep_logits_mib: NonNegativeInt = 512
    """MiB of logits kept from forward to backward; the others are computed a second time. Changes
    memory and speed, not the gradient."""
    min_effective_samples: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = "auto"
    """Least share of a minibatch's tokens that the prefix weights Π π/π_rollout may leave
    effective; below it the policy is too far from the one that sampled, and the rest of the
    updates to this rollout is left out (`policy/updates` counts those made). auto: 0.5 where the
    placement `exact_weighted` has the weights in its loss, otherwise 0, which is no bound."""

    @property
    def microbatch(self) -> Limit:
        """What goes through one backward pass at most: responses, or tokens."""
        return microbatch_limit(self.microbatch_size, self.microbatch_tokens)

    def idle(self) -> dict[str, str]:
        """See `Section.idle`: the one size where the other is given."""
        return idle_microbatch_size(self.microbatch_tokens)

    def with_min_effective_samples(self: Passes, placement: Placement) -> Passes:
        """These settings with the number that `auto` stands for."""
        if self.min_effective_samples != "auto":
            return self
        least = WEIGHTED_MIN_EFFECTIVE_SAMPLES if placement == "exact_weighted" else 0.0
        return self.model_copy(update={"min_effective_samples": least})


class UpdateConfig(PassesConfig):
    """The clipped updates of policy-gradient algorithms."""

    clip_range: PositiveFloat = 0.2
    """ε of the clipped policy loss."""


class PPOConfig(UpdateConfig):
    """Advantages from a critic."""

    name: Literal["ppo"] = "ppo"
    """Which algorithm."""
    value_clip_range: PositiveFloat | None = 0.2
    """ε of the clipped value loss; none: not clipped."""
    value_coef: PositiveFloat = 0.1
    """Weight of the value loss."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token. 1 keeps the return the plain sum of the rewards."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """λ of generalised advantage estimation."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1 over the rollout."""
    value: ValueConfig = ValueConfig()


class GRPOConfig(UpdateConfig):
    """Advantages from the other responses to the same prompt, in units of their spread; so is β."""

    name: Literal["grpo"] = "grpo"
    """Which algorithm."""
    epsilon: PositiveFloat = 1e-4
    """Added to the standard deviation of a group's scores, in units of the score."""


class RLOOConfig(UpdateConfig):
    """Advantages from the other responses to the same prompt, as they are."""

    name: Literal["rloo"] = "rloo"
    """Which algorithm."""


class DistillConfig(PassesConfig):
    """No rewards: the policy, as a student, is drawn towards a teacher at each of its tokens."""

    name: Literal["distill"] = "distill"
    """Which algorithm."""
    divergence: Divergence = "reverse_kl"
    """KL(student‖teacher), KL(teacher‖student), or Jensen–Shannon, exact over the vocabulary."""
    gradient: DistillGradient = "token"
    """`token`: that of each token's divergence with the sampled prefix held fixed, which is what
    on-policy distillation usually means; `sequence`: also what a token does to those that follow,
    by the weights of the placement `exact_weighted`."""

    def with_min_effective_samples(self, placement: Placement) -> "DistillConfig":
        """As for the others; the gradient of sequences has the weights in its loss too."""
        weighted = self.gradient == "sequence"
        return super().with_min_effective_samples("exact_weighted" if weighted else placement)


class TeacherConfig(Section):
    """The model that a student is drawn to, where it is not the reference."""

    path: Annotated[str, InputKind.MODEL]
    """Directory or hub name."""
    revision: str | None = None
    """Branch, tag or commit of a hub name; none: its main branch."""
    adapter: Annotated[str | None, InputKind.MODEL] = None
    """Directory of a LoRA adapter that is merged into the model at `path`; none: the model as it
    is."""


def _with_name(given: object) -> object:
    """The short forms, written out."""
    if isinstance(given, str):
        return {"name": given}
    if isinstance(given, dict):
        return {"name": PPOConfig().name} | cast("dict[str, Any]", given)
    return given


AlgorithmConfig = Annotated[
    Annotated[PPOConfig | GRPOConfig | RLOOConfig | DistillConfig, Field(discriminator="name")],
    BeforeValidator(_with_name),
]
"""One of the four, by its `name`."""
