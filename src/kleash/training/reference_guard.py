"""The references stay what they were: their weights are compared before every step."""

from dataclasses import dataclass, replace

from kleash.config.schema import Config
from kleash.errors import ReferenceChangedError
from kleash.models.policy import Identity
from kleash.models.reference_offload import FrozenReference, anchor_at
from kleash.storage.events import new_event
from kleash.storage.run_directory import RunWriter
from kleash.training.components import Components
from kleash.training.state import (
    TrainingState,
)


@dataclass(frozen=True)
class Seal:
    """Which weights the references have, as a hash and as a sum that is cheap to compare."""

    original: Identity
    original_sum: int
    anchor: Identity
    anchor_sum: int


def seal(components: Components) -> Seal:
    """Take down which weights the references have."""
    original, total = components.original.identity(), components.original.fingerprint()
    if components.reference is components.original:
        return Seal(original, total, original, total)
    return Seal(
        original, total, components.reference.identity(), components.reference.fingerprint()
    )


def require_unchanged(components: Components, sealed: Seal) -> None:
    """Before every step: the references still have the sum of weights they had.

    Raises:
        ReferenceChangedError: one of them has not.
    """
    if components.original.fingerprint() != sealed.original_sum:
        raise reference_changed(components.original, sealed.original)
    if (
        components.reference is not components.original
        and components.reference.fingerprint() != sealed.anchor_sum
    ):
        raise reference_changed(components.reference, sealed.anchor)


def reference_changed(reference: FrozenReference, was: Identity) -> ReferenceChangedError:
    """The error that says which weights a reference had and which it has."""
    return ReferenceChangedError(
        f"the reference changed while training: its weights were {was.sha256[:12]}…, got "
        f"{reference.identity().sha256[:12]}…; find what writes into them (a shared parameter, a "
        "reward function) and resume"
    )


def reanchor_if_due(
    config: Config, components: Components, state: TrainingState, sealed: Seal, run: RunWriter
) -> tuple[Components, TrainingState, Seal]:
    """Tie the leash to the policy as it now is, where the configuration says so."""
    every = config.leash.reanchor_every
    if every is None or state.step % every or state.step == config.steps:
        return components, state, sealed
    components = replace(
        components, reference=anchor_at(components.policy, state.step, like=components.original)
    )
    run.append_event(
        new_event(state.step, "reanchored", f"the leash is tied to the policy of step {state.step}")
    )
    return components, replace(state, anchored=state.step), seal(components)
