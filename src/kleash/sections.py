"""What every section of a configuration is, and the two sections that hold the leash's far end."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator


class Section(BaseModel):
    """Keys with defaults; unknown ones are errors, and nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


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
