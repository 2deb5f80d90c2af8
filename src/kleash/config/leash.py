"""The sections of the leash: its strength, its reference, its bounds and its plan."""

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from kleash.config.policy import Quantization
from kleash.config.section import InputKind, Section, SettingError
from kleash.kl.control.controllers import ScheduledBeta
from kleash.kl.control.groups import OTHERS
from kleash.kl.placements import Placement, check_placement

LEASH_KINDS = ("beta", "target_kl", "target_kl_per_token", "schedule")
"""Ways to give the strength of the leash; a run has one."""


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
    controller: Literal["budget", "ziegler_paper", "ziegler_code"] = "budget"
    """How a β that follows a target moves."""
    initial_beta: PositiveFloat | Literal["auto"] = "auto"
    """Where a β that follows a target starts; auto: at the plan's, or where that cannot say, at
    that of the spread of the scores. `run.json` records it as `start`."""
    horizon: PositiveInt = 10_000
    """Responses over which `controller: ziegler_code` moves β."""
    placement: Placement = "reward_k1"
    """Where the KL is charged, and by which estimator."""
    allow_biased: bool = False
    """Permit a placement whose gradient is known to be wrong."""
    reanchor_every: PositiveInt | None = None
    """Steps after which the leash is tied to the policy as it then is; none: to the reference for
    good. The KL to the original reference stays a series of its own, `objective/kl_original`."""

    def idle(self) -> dict[str, str]:
        """See `Section.idle`: what moves β, where it is fixed."""
        fixed = next((key for key in ("beta", "schedule") if getattr(self, key) is not None), None)
        if fixed is not None:
            why = f"does nothing with a fixed `{fixed}`"
            return dict.fromkeys(("controller", "initial_beta", "horizon"), why)
        if self.controller != "ziegler_code":
            return {"horizon": "is for `controller: ziegler_code` alone"}
        return {}

    @model_validator(mode="after")
    def _fixed_or_moving(self) -> "LeashConfig":
        given = [name for name in LEASH_KINDS if getattr(self, name) is not None]
        if self.groups is not None:
            _check_groups(self.groups, beside=set(given) - {"target_kl"})
        elif len(given) != 1:
            raise SettingError(
                "give exactly one of `beta` (fixed), `target_kl` (adaptive), "
                f"`target_kl_per_token` and `schedule`, got {', '.join(given) or 'none of them'}",
                *given,
            )
        if self.schedule is not None:
            _check_schedule(self.schedule)
        try:
            check_placement(self.placement, allow_biased=self.allow_biased)
        except ValueError as error:
            raise SettingError(f"`leash.placement`: {error}: true", "placement") from None
        if self.placement == "measure" and self.beta != 0:
            raise SettingError(
                "`placement: measure` charges nothing: give `beta: 0` with it", "placement", *given
            )
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
        raise SettingError(
            f"`groups` hold a KL each, and only `target_kl` goes with them, got {sorted(beside)} "
            "too: take one of them",
            "groups",
            *sorted(beside),
        )
    if OTHERS in groups:
        raise SettingError(
            f"a group may not be named `{OTHERS}`, which is what prompts without a target of their "
            "own are called: rename it, or give `target_kl` for them",
            f"groups.{OTHERS}",
        )


def _check_schedule(points: list[tuple[int, float]]) -> None:
    try:
        ScheduledBeta(tuple(points))
    except ValueError as error:
        raise SettingError(str(error), "schedule") from None


class ReferenceConfig(Section):
    """The frozen model the leash is tied to."""

    path: Annotated[str | None, InputKind.MODEL] = None
    """Directory or hub name; none: the policy as it is before the first update."""
    revision: str | None = None
    """Branch, tag or commit of a hub name; none: its main branch."""
    adapter: Annotated[str | None, InputKind.MODEL] = None
    """Directory of a LoRA adapter that is merged into the model at `path`."""
    kind: Literal["auto", "copy", "adapter_off", "cpu_offload", "cached"] = "auto"
    """Where it lives: a copy beside the policy; the policy's own weights with the adapter off; a
    copy in main memory, moved to the device when it is used; or a copy whose hidden states are
    kept on the disk. auto: adapter_off where an adapter is trained and no `path` is given, else
    copy."""
    quantization: Literal["auto"] | Quantization = "auto"
    """`nf4` keeps its linear layers in 4 bits (needs kleash[qlora]). auto: as `policy.quantization`
    where no `path` is given, else none. What the quantisation of only one of the two costs is
    measured before the first update, in nats; see docs/precision.md."""
    cache: str | None = None
    """Directory of `kind: cached`; it belongs to one reference."""
    reference_differs: bool = False
    """Say that the policy does not start at the reference. Otherwise that is an error."""

    def idle(self) -> dict[str, str]:
        """See `Section.idle`: what goes with a model of its own, or with a cache."""
        idle: dict[str, str] = {}
        if self.path is None:
            why = "goes with `path`, without which the reference is the policy at its start"
            idle |= dict.fromkeys(("revision", "adapter"), why)
        if self.kind != "cached":
            idle["cache"] = "goes with `kind: cached` and with nothing else"
        return idle

    @model_validator(mode="after")
    def _kind_fits(self) -> "ReferenceConfig":
        if self.path is not None and self.kind == "adapter_off":
            raise SettingError(
                "`kind: adapter_off` reads the policy's own weights: give no `path`", "kind", "path"
            )
        if self.kind == "cached" and self.cache is None:
            raise SettingError("`kind: cached` needs `cache`, a directory to keep it in", "kind")
        return self

    @model_validator(mode="after")
    def _quantised_where_it_can_be(self) -> "ReferenceConfig":
        if self.quantization == "nf4" and self.kind == "cpu_offload":
            raise SettingError(
                "`reference.quantization: nf4` is for a copy that stays on the device, which it "
                "makes small: take `kind: copy`, or leave `quantization` out",
                "quantization",
                "kind",
            )
        return self

    def resolved(self, *, adapter: bool, quantization: Quantization) -> "ReferenceConfig":
        """These settings with what `auto` stands for.

        Args:
            adapter: whether the policy trains one.
            quantization: of the policy.
        """
        own = self.path is None
        auto = quantization if own and self.kind != "cpu_offload" else "none"
        wanted = auto if self.quantization == "auto" else self.quantization
        shared = adapter and own and wanted == quantization
        found: dict[str, object] = {"quantization": wanted}
        if self.kind == "auto":
            found["kind"] = "adapter_off" if shared else "copy"
        if own and wanted != quantization:
            # One and the same model, in other numbers.
            found["reference_differs"] = True
        return self.model_copy(update=found)


class TripwiresConfig(Section):
    """What stops a step: these bounds, and always a number that is not finite or not possible."""

    stop_kl: PositiveFloat | None = None
    """Most exact KL of a rollout to the original reference, in nats per response; none: no
    bound."""
    min_entropy: PositiveFloat | None = None
    """Least entropy of a rollout, in nats per token; none: no bound."""
    then: Literal["stop", "rollback"] = "stop"
    """After a refused step: stop, or return to the last good checkpoint with a higher β."""
    beta_factor: float = Field(default=2.0, gt=1)
    """What β is multiplied by in a rollback."""
    max_rollbacks: PositiveInt = 3
    """Rollbacks of one run; the refusal after the last of them stops it."""
    undo: Literal["auto", "memory", "checkpoint"] = "auto"
    """How a step that is refused between its updates is undone: by a copy in main memory of what
    learns and of its two moments, or by going back to the last checkpoint, which costs nothing
    until it happens. auto: memory where the copy takes at most `undo_copy_mib`, else checkpoint. A
    step of a single update needs neither."""
    undo_copy_mib: NonNegativeInt = 512
    """Largest copy that `undo: auto` makes, in MiB; `run.json` records what it chose."""

    def idle(self) -> dict[str, str]:
        """See `Section.idle`: what a rollback needs, where there is none."""
        idle: dict[str, str] = {}
        if self.then == "stop":
            why = "is for `then: rollback` alone"
            idle |= dict.fromkeys(("beta_factor", "max_rollbacks"), why)
        if self.undo != "auto":
            idle["undo_copy_mib"] = "is for `undo: auto` alone"
        return idle


class PlanConfig(Section):
    """Reference responses from which β is planned and scores are first normalised."""

    prompts: int = Field(default=32, ge=2)
    """How many of the training prompts; all, if there are fewer."""
    responses: int = Field(default=32, ge=3)
    """Responses to each: a plan knows nothing beyond the log of this many nats."""
