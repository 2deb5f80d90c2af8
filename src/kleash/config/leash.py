"""What every section of a configuration is, and those of the leash, its plan and both its ends."""

from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from kleash.kl.control.controllers import ScheduledBeta
from kleash.kl.control.groups import OTHERS
from kleash.kl.placements import Placement


class Section(BaseModel):
    """Keys with defaults; unknown ones are errors, and nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


WAYS = ("beta", "target_kl", "target_kl_per_token", "schedule")
"""Kinds of leash; a run has one."""
MOVING = {"controller", "initial_beta", "horizon"}
"""What goes with a β that follows a target."""


class LeashConfig(Section):
    """How tight, measured how, charged where."""

    beta: NonNegativeFloat | None = None
    """Fixed β, in score per nat. 0 lets go of the leash and still measures."""
    target_kl: PositiveFloat | None = None
    """KL to hold, in nats per response; β then moves by itself."""
    target_kl_per_token: PositiveFloat | None = None
    """KL to hold, in nats per token: a longer response may then go further."""
    groups: dict[str, PositiveFloat] | None = Field(default=None, min_length=1)
    """KL to hold for the prompts of each `group`, in nats per response, each by a β of its own;
    `target_kl` beside it is for all other prompts."""
    schedule: list[tuple[NonNegativeInt, NonNegativeFloat]] | None = None
    """β along straight lines between points [steps done, β], constant beyond the ends."""
    controller: Literal["budget", "ziegler_paper", "ziegler_code"] | None = None
    """How β moves towards `target_kl`; budget unless said."""
    initial_beta: PositiveFloat | None = None
    """Where a moving β starts; none: at the plan's, or where it cannot say, at that of the
    spread of the scores."""
    horizon: PositiveInt | None = None
    """Responses over which Ziegler's code moves β; 10,000 unless said."""
    placement: Placement = "reward_k1"
    """Where the KL is charged, and by which estimator."""
    allow_biased: bool = False
    """Permit a placement whose gradient is known to be wrong."""
    reanchor_every: PositiveInt | None = None
    """Steps after which the leash is tied to the policy as it then is; none: to the reference for
    good. The KL to the original reference stays a series of its own, `objective/kl_original`."""

    @model_validator(mode="after")
    def _fixed_or_moving(self) -> "LeashConfig":
        given = [name for name in WAYS if getattr(self, name) is not None]
        if self.groups is not None:
            _check_groups(self.groups, beside=set(given) - {"target_kl"})
        elif len(given) != 1:
            raise ValueError(
                "give exactly one of `beta` (fixed), `target_kl` (adaptive), "
                f"`target_kl_per_token` and `schedule`, got {', '.join(given) or 'none of them'}"
            )
        moving = MOVING & self.model_fields_set
        if moving and given and given[0] in ("beta", "schedule"):
            raise ValueError(
                f"{sorted(moving)} do nothing with a fixed `{given[0]}`: leave them out"
            )
        if self.schedule is not None:
            ScheduledBeta(tuple(self.schedule))  # says itself what is wrong with its points
        if self.horizon is not None and self.controller != "ziegler_code":
            raise ValueError("`horizon` is for `controller: ziegler_code` alone")
        if self.placement == "measure" and self.beta != 0:
            raise ValueError("`placement: measure` charges nothing: give `beta: 0` with it")
        return self

    def each(self) -> dict[str, "LeashConfig"]:
        """The leash of every group by its name; without groups, this one for all."""
        if self.groups is None:
            return {OTHERS: self}
        others = {} if self.target_kl is None else {OTHERS: self.target_kl}
        return {
            name: self.model_copy(update={"groups": None, "target_kl": target})
            for name, target in (self.groups | others).items()
        }


def _check_groups(groups: dict[str, float], *, beside: set[str]) -> None:
    if beside:
        raise ValueError(
            f"`groups` hold a KL each, and only `target_kl` goes with them, got {sorted(beside)} "
            "too: take one of them"
        )
    if OTHERS in groups:
        raise ValueError(
            f"a group may not be named `{OTHERS}`, which is what prompts without a target of their "
            "own are called: rename it, or give `target_kl` for them"
        )


class ReferenceConfig(Section):
    """The frozen model the leash is tied to."""

    path: str | None = None
    """Directory or hub name; none: the policy as it is before the first update."""
    revision: str | None = None
    """Branch, tag or commit of a hub name; none: its main branch."""
    adapter: str | None = None
    """Directory of a LoRA adapter that is merged into the model at `path`."""
    kind: Literal["copy", "adapter_off", "cpu_offload", "cached"] | None = None
    """Where it lives: a copy beside the policy; the policy's own weights with the adapter off; a
    copy in main memory, lent to the device; or a copy whose hidden states are kept on the disk.
    None: adapter_off where an adapter is trained and no `path` is given, else copy."""
    cache: str | None = None
    """Directory of `kind: cached`; it belongs to one reference."""
    reference_differs: bool = False
    """Say that the policy does not start at the reference. Otherwise that is an error."""

    @model_validator(mode="after")
    def _parts_agree(self) -> "ReferenceConfig":
        if self.path is None and (self.revision or self.adapter):
            raise ValueError("`revision` and `adapter` go with `path`: without it all is as policy")
        if self.path is not None and self.kind == "adapter_off":
            raise ValueError("`kind: adapter_off` reads the policy's own weights: give no `path`")
        if (self.kind == "cached") != (self.cache is not None):
            raise ValueError("`cache` goes with `kind: cached` and with nothing else")
        return self


class TripwiresConfig(Section):
    """What stops a step: these bounds, and always a number that is not finite or not possible."""

    stop_kl: PositiveFloat | None = None
    """Most exact KL of a rollout to the original reference, in nats per response; none: no
    bound."""
    min_entropy: PositiveFloat | None = None
    """Least entropy of a rollout, in nats per token; none: no bound."""
    then: Literal["stop", "rollback"] = "stop"
    """After a refused step: stop, or return to the last good checkpoint with a higher β."""
    beta_factor: float | None = Field(default=None, gt=1)
    """What β is multiplied by in a rollback; 2 unless said."""
    max_rollbacks: PositiveInt | None = None
    """Rollbacks of one run, 3 unless said; the refusal after the last of them stops it."""
    undo: Literal["memory", "checkpoint"] | None = None
    """How a step that is refused between its updates is undone: by a copy in main memory of what
    learns and of its two moments, or by going back to the last checkpoint, which costs nothing
    until it happens. None: memory where the copy takes at most 512 MiB, else checkpoint. A step of
    a single update needs neither."""

    @model_validator(mode="after")
    def _rollback_alone(self) -> "TripwiresConfig":
        if self.then == "stop" and (self.beta_factor or self.max_rollbacks):
            raise ValueError("`beta_factor` and `max_rollbacks` are for `then: rollback` alone")
        return self


class PlanConfig(Section):
    """Reference responses from which β is planned and scores are first normalised."""

    prompts: int = Field(default=32, ge=2)
    """How many of the training prompts; all, if there are fewer."""
    responses: int = Field(default=32, ge=3)
    """Responses to each: a plan knows nothing beyond the log of this many nats."""
